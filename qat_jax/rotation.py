"""Features of activations mixed so that none is an outlier: rotations by Hadamard matrices.

Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (arXiv:2404.00456); here at
the input of each layer by itself, so that nothing is asked of the layers before it.
"""

from flax import nnx

from qat_jax import hadamard
from qat_jax.features import LayerInput, layer_inputs, matching, refuse_thresholds

_SHORTEST = 8  # a block that is worth it
_LONGEST = 128  # beyond it the transform costs more than the smaller layers themselves


def rotate(model: nnx.Module, *, operands: str = ".*", block: int | None = None) -> tuple[str, ...]:
    """Turn features of layers' inputs, and the kernels that they meet, in place.

    Features lie in blocks of a power of two. Of each block a layer's operation takes the
    Walsh-Hadamard transform (`hadamard.rotated`) before it quantises its input, and the kernel is
    stored transformed: without quantisers the layer computes what it did, up to rounding. A large
    feature becomes a little of all the others of its block, and one threshold serves them better;
    what is not negative, as after a ReLU, gets a sign, however, which costs one bit. No batches are
    needed. Comes before thresholds are frozen or carried and before `gptq`, and after `smooth`.

    Rotated are dense layers and convolutions whose input and kernel are both quantised and whose
    features a power of two of 8 or more divides; those that share a kernel, stacks of layers
    (``nnx.scan``) and depthwise convolutions are left.

    Args:
      model: a quantised NNX model, in either mode.
      operands: a regular expression; inputs whose whole path (``"layer1/0/conv1/activations"``) it
        does not match are left.
      block: the length of the blocks, a power of two that divides the features; None: the longest
        there is, up to 128.

    Returns:
      The paths of the inputs that are rotated.

    Raises:
      ValueError: there is no such input, one has been rotated already or has thresholds that are
        frozen or carried, or ``block`` is no such length. The model is then unchanged.

    Example:
      >>> from qat_jax import quantize_model
      >>> model = nnx.Sequential(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
      >>> model = quantize_model(model, "octav-w4a4")
      >>> rotate(model)
      ('layers/0/activations',)
    """
    if block is not None and (block < _SHORTEST or block & (block - 1)):
        raise ValueError(f"block is a power of two from {_SHORTEST} on, unlike {block!r}")
    inputs = {path: found for path, found in layer_inputs(model).items() if _longest(found)}
    chosen = matching(inputs, operands, to="rotate")
    for path, found in chosen.items():
        if found.op.rotation is not None:
            raise ValueError(f"{path} is rotated already: leave it out with operands=…")
        if block is not None and _longest(found) % block:
            raise ValueError(
                f"{path} has blocks of at most {_longest(found)} features: give a block of that "
                "or less, or leave it out with operands=…"
            )
        refuse_thresholds(path, found, to="rotate")
    for found in chosen.values():
        length = block or min(_longest(found), _LONGEST)
        found.kernel.set_value(hadamard.rotated(found.kernel.get_value(), found.axis, length))
        found.op.rotation = length
    return tuple(chosen)


def _longest(found: LayerInput) -> int:
    """The longest block of an input; 0 if none is worth it."""
    if found.is_depthwise:
        return 0
    length = hadamard.longest_block(found.kernel.get_value().shape[found.axis])
    return length if length >= _SHORTEST else 0
