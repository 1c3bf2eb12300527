"""What stands at padding moves no threshold."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from qat_jax import linen

LENGTHS = (3, 6, 1)
MASK = jnp.arange(6) < jnp.array(LENGTHS)[:, None]


class Encoder(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.linear = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x, mask):
        return self.linear(nnx.gelu(self.attention(x, mask=mask[:, None, None, :])))


def policy(clipping):
    activations = qj.Quantizer(qj.Int(4, signed=None), qj.PerTensor(), clipping)
    return qj.Policy([qj.Rule(".*", activations=activations)])


def padded(value):
    x = np.random.default_rng(0).normal(size=(3, 6, 8)).astype(np.float32)
    return jnp.where(MASK[..., None], x, value)


@pytest.mark.parametrize("clipping", [qj.AbsMax(), qj.Octav(), qj.MseSweep(), qj.Exact()])
def test_the_rest_of_the_batch_is_as_if_there_were_no_padding(clipping):
    """Values, thresholds and all, whatever is at padding."""
    model = qj.quantize_model(Encoder(nnx.Rngs(0)), policy(clipping))
    model.eval()

    @nnx.jit
    def run(model, x):
        with qj.ignore_padding(MASK):
            return nnx.capture(model, qj.Diagnostic)(x, MASK)

    @nnx.jit
    def plain(model, x):
        return model(x, MASK)[MASK]

    (few, few_diagnostics), (many, many_diagnostics) = (
        run(model, padded(value)) for value in (0.5, 50.0)
    )
    np.testing.assert_array_equal(few[MASK], many[MASK])
    jax.tree.map(np.testing.assert_array_equal, few_diagnostics, many_diagnostics)
    assert not np.array_equal(*(plain(model, padded(value)) for value in (0.5, 50.0)))


def test_a_sequence_alone_has_the_thresholds_that_it_has_with_padding():
    # The maximum would not see the attention of padded queries, which is even.
    model = qj.quantize_model(Encoder(nnx.Rngs(0)), policy(qj.Octav()))
    model.eval()
    x = padded(50.0)[:1]

    @nnx.jit
    def run(model, x):
        with qj.ignore_padding(MASK[:1]):
            whole = model(x, MASK[:1])[:, :3]
        return whole, model(x[:, :3], MASK[:1, :3])

    np.testing.assert_allclose(*run(model, x), rtol=1e-5, atol=1e-6)


def test_static_thresholds_do_not_see_padding():
    def thresholds(value):
        model = qj.quantize_model(Encoder(nnx.Rngs(0)), policy(qj.AbsMax()))
        with qj.ignore_padding(MASK):
            qj.calibrate(model, [(padded(value), MASK)])
        quantizers = qj.operand_quantizers(model)
        return {path: float(q.threshold[...].item()) for path, q in quantizers.items()}

    assert thresholds(0.5) == thresholds(50.0)


def test_a_compiled_function_keeps_no_mask_from_outside():
    model = qj.quantize_model(nnx.Sequential(nnx.Linear(1, 1, rngs=nnx.Rngs(0))), "max-w4a4")
    x = jnp.array([[[1.0], [2.0], [99.0]]])
    masks = jnp.array([[[True, True, False]], [[True, True, True]]])

    @nnx.jit
    def outside(model, x):
        return model(x)

    @nnx.jit
    def inside(model, x, mask):
        with qj.ignore_padding(mask):
            return outside(model, x)  # compiled before, without a mask

    plain = outside(model, x)
    with qj.ignore_padding(masks[0]), pytest.raises(ValueError, match="enter ignore_padding in"):
        outside(model, x)
    np.testing.assert_array_equal(outside(model, x), plain)
    for mask in masks:
        with qj.ignore_padding(mask):
            expected = model(x)  # not compiled, it may be outside
            gradient = jax.grad(lambda x: model(x).sum())(x)
        np.testing.assert_allclose(inside(model, x, mask), expected, rtol=1e-6)
        assert np.isfinite(gradient).all()


def test_linen_models_too():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            x = nn.MultiHeadDotProductAttention(2)(x, x, mask=mask[:, None, None, :])
            return nn.Dense(4)(nn.gelu(x))

    model = linen.quantize_model(Network(), policy(qj.AbsMax()), padded(0.5), MASK)
    variables = model.init(jax.random.key(0), padded(0.5), MASK)
    with qj.ignore_padding(MASK):
        few, many = (model.apply(variables, padded(value), MASK) for value in (0.5, 50.0))
    np.testing.assert_array_equal(few[MASK], many[MASK])


def test_operands_without_padding_are_left_alone():
    mask = jnp.array([[True, False]])
    with qj.ignore_padding(mask):
        linear = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        x = jnp.array([[1.0, 2.0]])  # an example of two features, not of two tokens
        model = qj.quantize_model(nnx.Sequential(linear), "max-w8a8")
        inside = model(x)
    np.testing.assert_array_equal(inside, model(x))
    with qj.ignore_padding(None):
        np.testing.assert_array_equal(model(x), inside)


@pytest.mark.parametrize(
    "mask", [jnp.ones(6, bool), jnp.ones((2, 1, 1, 6), bool), jnp.ones((2, 6))]
)
def test_other_masks_are_refused(mask):
    with (
        pytest.raises(ValueError, match=r"give bool \[batch, length\], False for padding"),
        qj.ignore_padding(mask),
    ):
        pass
