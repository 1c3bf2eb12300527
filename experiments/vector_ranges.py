"""How much smaller the range of a vector is than that of its channel, and what that is worth."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qat_jax as qj
from experiments.ptq import sown
from qat_jax.granularity import ChannelAxis, Granularity, VectorAxis
from qat_jax.nnx import OperandQuantizer, captured_by_operand, is_weight
from qat_jax.sensitivity import with_replaced_quantizers


@dataclasses.dataclass(frozen=True)
class RangesRow:
    """One operand, scaled by maxima. Errors are mean squared errors over the mean square.

    Attributes:
        operand: its path.
        bits: of its codes.
        vectors: how many there are in it.
        mean_range: the largest magnitude of a vector over that of its coarse group, on average:
            by so much is its step smaller. The coarse group of weights is the output channel, that
            of activations the layer.
        predicted_error: the error of vectors over that of coarse groups if errors go with the
            square of the step: the mean square of these ranges over the non-zero elements.
        tensor_error: with one scale for all of it.
        coarse_error: with one scale for each coarse group.
        vector_error: with one floating-point scale for each vector.
        stored_error: with integer scales of vectors, as the notation has them; that of
            floating-point ones where it has none.
    """

    operand: str
    bits: int
    vectors: int
    mean_range: float
    predicted_error: float
    tensor_error: float
    coarse_error: float
    vector_error: float
    stored_error: float


class Ranges(NamedTuple):
    """What is seen of one operand.

    Attributes:
        x: its elements.
        vector: the largest magnitude of each vector, compact (see `qat_jax.granularity.Groups`).
        coarse: that of each coarse group, of a shape that broadcasts to ``vector``'s.
        predicted_error: see `RangesRow`; so the next four.
        tensor_error: with one scale.
        coarse_error: with one scale a coarse group.
        vector_error: with one scale a vector.
        stored_error: with these scales as integers.
    """

    x: jax.Array
    vector: jax.Array
    coarse: jax.Array
    predicted_error: jax.Array
    tensor_error: jax.Array
    coarse_error: jax.Array
    vector_error: jax.Array
    stored_error: jax.Array

    @property
    def per_group(self) -> float:
        """Vectors that share a coarse group."""
        return self.vector.size / self.coarse.size

    @property
    def shares(self) -> np.ndarray:
        """Each vector's range over its coarse group's, without the vectors of zeros alone."""
        vector, coarse = np.asarray(self.vector), np.asarray(self.coarse)
        return (vector / np.where(coarse > 0, coarse, 1))[vector > 0]

    def row(self, operand: str, bits: int) -> RangesRow:
        """The row of an operand with codes of so many bits."""
        errors = {name: float(getattr(self, name)) for name in self._fields if "error" in name}
        return RangesRow(operand, bits, self.vector.size, float(self.shares.mean()), **errors)


class Seen(nnx.Variable):
    """The type under which `Ranges` are sown."""


class RangeProbe(nnx.Module):
    """Takes the place of a quantiser, quantises nothing and looks at the ranges.

    Attributes:
        quantizer: the one whose place it takes (static).
        coarse: which elements share a coarse group (static).
        vector_size: of vectors (static).
    """

    def __init__(self, own: OperandQuantizer, coarse: Granularity, vector_size: int) -> None:
        self.quantizer = own.quantizer
        self.coarse = coarse
        self.vector_size = vector_size

    def __call__(
        self, x: jax.Array, channel_axis: ChannelAxis = None, vector_axis: VectorAxis = None
    ) -> jax.Array:
        """Returns x."""
        axes: dict[str, Any] = {"channel_axis": channel_axis, "vector_axis": vector_axis}
        square = jnp.mean(jnp.square(x))

        def scaled(granularity: Granularity) -> qj.Quantizer:
            return qj.Quantizer(self.quantizer.format, granularity, qj.AbsMax())

        def error(quantizer: qj.Quantizer) -> jax.Array:
            return jnp.mean(jnp.square(qj.fake_quant(x, quantizer, **axes) - x)) / square

        vectors = scaled(qj.PerVector(self.vector_size))
        stored = dataclasses.replace(vectors, scale=self.quantizer.scale)
        vector = vectors.threshold(x, **axes)
        coarse = scaled(self.coarse).threshold(x, **axes)
        groups = vectors.granularity.groups(x.ndim, channel_axis, vector_axis)
        nonzero = x != 0
        of_element = jnp.where(nonzero, groups.expand(vector, x.shape), 0)
        whole = jnp.where(nonzero, coarse, 0)
        self.sow(
            Seen,
            "ranges",
            Ranges(
                x=x,
                vector=vector,
                coarse=coarse,
                predicted_error=jnp.sum(jnp.square(of_element)) / jnp.sum(jnp.square(whole)),
                tensor_error=error(scaled(qj.PerTensor())),
                coarse_error=error(scaled(self.coarse)),
                vector_error=error(vectors),
                stored_error=error(stored),
            ),
        )
        return x


def ranges(model: nnx.Module, vector_size: int, *inputs: jax.Array) -> dict[str, Ranges]:
    """The ranges of all operands in a forward pass that quantises nothing.

    Args:
        model: a network with quantisers that say the formats of operands and, if they have
            vectors, how the scales of these are stored.
        vector_size: of vectors.
        *inputs: a batch for it.

    Returns:
        By the operand's path, in the order of the network.
    """

    def probe(path: str, own: OperandQuantizer) -> RangeProbe:
        return RangeProbe(own, qj.PerChannel() if is_weight(path) else qj.PerTensor(), vector_size)

    probed = with_replaced_quantizers(model, probe)
    found = captured_by_operand(sown(probed, Seen, *inputs), Ranges)
    return {path: found[path] for path in qj.operand_quantizers(model)}
