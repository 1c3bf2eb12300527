"""A quantiser: the independent choices as one value, and the functions that apply it."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qat_jax.clipping import Clipping, Octav, Refining, accumulation_dtype
from qat_jax.formats import Format, Int, has_negative
from qat_jax.gradients import GradientRule, gradient_rule, with_gradient
from qat_jax.granularity import (
    ChannelAxis,
    Granularity,
    Groups,
    PerChannel,
    PerShard,
    PerTensor,
    VectorAxis,
)
from qat_jax.scales import FloatScale, Scale, StoredScale, reciprocal

# By what a choice is known, and an example of one.
_ASKED = {
    "format": ("grid", "Int(4)"),
    "granularity": ("groups", "PerTensor()"),
    "clipping": ("threshold", "Octav()"),
    "scale": ("store", "FloatScale()"),
}


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How to quantise an array: a hashable value, safe as a static argument of ``jax.jit``.

    Calling it is `fake_quant`, so that it can stand wherever an operation of ``ops`` takes a
    function of (x, channel_axis, vector_axis).

    Attributes:
      format: which numbers exist.
      granularity: which elements share a scale.
      clipping: how the threshold is found.
      gradient: what the backward pass believes: "ste", "pwl", "mad" or a rule of ``gradients``.
      scale: how the scales are stored.

    Raises:
      ValueError: something is no choice of its kind, or cannot be hashed.

    Example:
      >>> w4 = Quantizer(Int(4), granularity=PerTensor(), clipping=Octav(), gradient="mad")
      >>> w4(jnp.array([0.0, 0.11, -0.52, 1.0])).shape
      (4,)
    """

    format: Format
    granularity: Granularity = PerTensor()
    clipping: Clipping = Octav()
    gradient: str | GradientRule = "mad"
    scale: Scale = FloatScale()

    def __post_init__(self) -> None:
        for name, (method, example) in _ASKED.items():
            choice = getattr(self, name)
            if isinstance(choice, type) or not hasattr(choice, method):
                raise ValueError(f"{name} is {choice!r}: give one, such as {example}")
        gradient_rule(self.gradient)
        try:
            hash(self)
        except TypeError as error:
            raise ValueError(
                f"{error}: put your class under @dataclasses.dataclass(frozen=True)"
            ) from error

    def __call__(
        self, x: jax.Array, channel_axis: ChannelAxis = None, vector_axis: VectorAxis = None
    ) -> jax.Array:
        """Fake quantisation of x: see `fake_quant`."""
        return fake_quant(x, self, channel_axis=channel_axis, vector_axis=vector_axis)

    def threshold(
        self, x: jax.Array, channel_axis: ChannelAxis = None, vector_axis: VectorAxis = None
    ) -> jax.Array:
        """The clipping threshold of each group of x, compact (see `Groups.reduce`)."""
        return _threshold(jnp.asarray(x), self, _hashable(channel_axis), _hashable(vector_axis))

    @property
    def refines(self) -> bool:
        """Whether thresholds can be found from earlier ones: see `refined_threshold`."""
        whole_axes = isinstance(self.granularity, PerTensor | PerChannel)
        return whole_axes and isinstance(self.clipping, Refining)

    def refined_threshold(
        self, x: jax.Array, start: jax.Array, channel_axis: ChannelAxis = None
    ) -> jax.Array:
        """`threshold`, from what it was a little before, for quantisers that `refines` is true of.

        Args:
          x: floating-point array.
          start: earlier thresholds, as `threshold` returns them.
          channel_axis: the axis or axes with a scale each, for `PerChannel`.

        Raises:
          ValueError: the quantiser does not refine.
        """
        if not (self.refines and isinstance(self.clipping, Refining)):
            raise ValueError(f"{self} finds every threshold from nothing: use `threshold`")
        groups = self.granularity.groups(x.ndim, channel_axis, None)
        return self.clipping.refined(jax.lax.stop_gradient(x), self.format, groups.axes, start)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantised array: codes and their scales. A pytree.

    Attributes:
      codes: numbers of the format, of the original shape.
      scale: the steps between codes as they are stored: one for each group, with as many
        dimensions as ``codes`` (see `Groups.reduce`). NaN for a group that held NaN or infinity.
      coarse: what the scales are multiples of, or None; NaN instead of integer scales.
      format: the format of the codes (static).
      groups: which codes share a scale (static).
      dtype: of the original array (static).
    """

    codes: jax.Array
    scale: jax.Array
    coarse: jax.Array | None
    format: Format = dataclasses.field(metadata={"static": True})
    groups: Groups = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the original array."""
        return self.codes.shape

    @property
    def step(self) -> jax.Array:
        """What each code is a multiple of, in float32 or more; broadcasts to the codes."""
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        step = StoredScale(self.scale, self.coarse).step(dtype)
        return self.groups.expand(step, self.shape)


def fake_quant(
    x: jax.Array,
    quantizer: Quantizer,
    *,
    channel_axis: ChannelAxis = None,
    vector_axis: VectorAxis = None,
    threshold: jax.Array | None = None,
    learned: bool = False,
) -> jax.Array:
    """Quantise and dequantise in one step, with the quantiser's gradient.

    Args:
      x: floating-point array of any shape; half precision is quantised in float32.
      quantizer: the description.
      channel_axis: the axis or axes with a scale each, for granularities that have them.
      vector_axis: the axis along which vectors lie, or several adjacent ones, for `PerVector`.
      threshold: use these thresholds instead of searching for them: one for each group, as
        `Quantizer.threshold` returns them, or one for all along some axes; or, with as many
        dimensions as x, whatever broadcasts to x. Where no axis is named, their shape says it.
      learned: whether given thresholds get a gradient, that of LSQ (Esser et al.,
        arXiv:1902.08153, equation 3): rounding is passed straight through, so that for x̂ the
        quantised x it is the sum of g·x̂/s over what saturates and of g·(x̂ - x)/s over the rest.
        Otherwise they are constants.

    Returns:
      An array of x's shape and dtype. A group whose threshold is 0 becomes 0; NaN and infinity
      become NaN, and so does, with a threshold found from the data, all of their group, and all
      of their coarse group where scales are quantised.

    Raises:
      ValueError: thresholds are given that go neither with the groups nor with x, or are to be
        learned and not given.

    Example:
      >>> x = jnp.array([-1.0, 0.1, 0.3, 0.9])
      >>> fake_quant(x, Quantizer(Int(3, narrow=True)), threshold=0.75)
      Array([-0.75,  0.  ,  0.25,  0.75], dtype=float32)
    """
    if learned and threshold is None:
        raise ValueError("a threshold that is searched for has no gradient: give one to be learned")
    axes = _hashable(channel_axis), _hashable(vector_axis)
    return _fake_quant(jnp.asarray(x), threshold, quantizer, *axes, learned)


def quantize(
    x: jax.Array,
    quantizer: Quantizer,
    *,
    channel_axis: ChannelAxis = None,
    vector_axis: VectorAxis = None,
    threshold: jax.Array | None = None,
) -> QTensor:
    """Quantise to codes and scales. Not differentiable: see `fake_quant`.

    ``dequantize(quantize(x, …))`` equals ``fake_quant(x, …)`` bit for bit for finite x. Integers
    cannot hold a NaN, so a group with a non-finite element gets a NaN scale.

    Args:
      x: as for `fake_quant`.
      quantizer: as for `fake_quant`.
      channel_axis: as for `fake_quant`.
      vector_axis: as for `fake_quant`.
      threshold: as for `fake_quant`, but of groups: codes have no scale for each element.

    Returns:
      Codes of x's shape with their scales.

    Raises:
      ValueError: thresholds are given that do not go with the groups.

    Example:
      >>> q = quantize(jnp.array([-1.0, 0.1, 0.3, 0.9]), Quantizer(Int(3)), threshold=1.0)
      >>> q.codes, q.scale
      (Array([-4,  0,  1,  3], dtype=int8), Array([0.25], dtype=float32))
    """
    axes = _hashable(channel_axis), _hashable(vector_axis)
    x, threshold = jax.lax.stop_gradient((jnp.asarray(x), threshold))
    return _quantize(x, threshold, quantizer, *axes)


def dequantize(q: QTensor) -> jax.Array:
    """The real numbers that a quantised array stands for, in its original dtype.

    Args:
      q: codes and scales.

    Returns:
      Floating-point array of q's shape and dtype.

    Raises:
      ValueError: the scales are not those of the codes, as in a stack of quantised arrays.
    """
    compact = q.groups.compact_shape(q.shape)
    if q.scale.shape != compact:
        raise ValueError(
            f"codes of shape {q.shape} have scales of shape {q.scale.shape}, not {compact}: of "
            "arrays that jax.vmap or jax.lax.scan stacked, use jax.vmap(dequantize)"
        )
    step = q.step
    return (q.codes.astype(step.dtype) * step).astype(q.dtype)


# What follows is compiled as one where nothing else is being compiled, and once for a shape; inside
# a transformation it leaves no trace.
_STATIC = ("quantizer", "channel_axis", "vector_axis")
_compiled = functools.partial(jax.jit, static_argnames=_STATIC, inline=True)


@_compiled
def _threshold(
    x: jax.Array, quantizer: Quantizer, channel_axis: ChannelAxis, vector_axis: VectorAxis
) -> jax.Array:
    groups = quantizer.granularity.groups(x.ndim, channel_axis, vector_axis)
    x = jax.lax.stop_gradient(x)  # a rule of one's own may hold loops that have no derivative

    def search(format: Format) -> jax.Array:
        return groups.reduce(x, lambda x, axes: quantizer.clipping.threshold(x, format, axes))

    format = quantizer.format
    if groups.has_rest(x.shape) and isinstance(format, Int) and format.signed is None:
        # Whole and shorter vectors are searched apart; the sign is that of all of x.
        signed, unsigned = (
            search(dataclasses.replace(format, signed=signed)) for signed in (True, False)
        )
        return jnp.where(has_negative(x), signed, unsigned)
    return search(format)


@functools.partial(_compiled, static_argnames=(*_STATIC, "learned"))
def _fake_quant(
    x: jax.Array,
    threshold: jax.Array | None,
    quantizer: Quantizer,
    channel_axis: ChannelAxis,
    vector_axis: VectorAxis,
    learned: bool,
) -> jax.Array:
    threshold, groups = _grouped(x, quantizer, channel_axis, vector_axis, threshold)
    if not learned:
        threshold = jax.lax.stop_gradient(threshold)
    return _fake_quant_at(quantizer, groups, channel_axis, learned)(x, threshold)


@_compiled
def _quantize(
    x: jax.Array,
    threshold: jax.Array | None,
    quantizer: Quantizer,
    channel_axis: ChannelAxis,
    vector_axis: VectorAxis,
) -> QTensor:
    threshold, groups = _grouped(x, quantizer, channel_axis, vector_axis, threshold)
    compact = groups.compact_shape(x.shape)
    if not _broadcasts(threshold.shape, compact):
        raise _misfit(threshold.shape, compact)
    threshold = jnp.broadcast_to(threshold, compact)
    # Codes cannot say that an element was not finite: its scale has to.
    finite = groups.reduce(
        jnp.isfinite(x), lambda finite, axes: jnp.all(finite, axis=axes, keepdims=True)
    )
    threshold = jnp.where(finite, threshold, jnp.nan)
    codes, scale = _codes(x, threshold, quantizer, groups, channel_axis)
    codes = jnp.where(jnp.isnan(codes), 0, codes)
    return QTensor(
        codes=codes.astype(quantizer.format.code_dtype),
        scale=scale.values,
        coarse=scale.coarse,
        format=quantizer.format,
        groups=groups,
        dtype=x.dtype,
    )


def _grouped(
    x: jax.Array,
    quantizer: Quantizer,
    channel_axis: ChannelAxis,
    vector_axis: VectorAxis,
    threshold: jax.Array | None,
) -> tuple[jax.Array, Groups]:
    """Thresholds of x's rank, found or given, and the groups that they belong to."""
    if threshold is None:
        groups = quantizer.granularity.groups(x.ndim, channel_axis, vector_axis)
        return quantizer.threshold(x, channel_axis, vector_axis), groups
    threshold = jnp.asarray(threshold, accumulation_dtype(x))
    given = threshold.shape
    threshold = _of_rank(threshold, x.ndim)
    by_axes = not isinstance(quantizer.granularity, PerShard)  # a shard is no index of an axis
    if by_axes and channel_axis is None and vector_axis is None:
        # The thresholds' own shape says it.
        groups = Groups(tuple(a for a in range(x.ndim) if threshold.shape[a] == 1))
    else:
        groups = quantizer.granularity.groups(x.ndim, channel_axis, vector_axis)
    compact = groups.compact_shape(x.shape)
    # With fewer dimensions they would go to the last axes, whichever have the scales.
    elementwise = len(given) >= x.ndim and _broadcasts(threshold.shape, x.shape)
    if not (elementwise or _broadcasts(threshold.shape, compact)):
        raise _misfit(given, compact)
    return threshold, groups


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether an array of a shape broadcasts to another one of the same rank."""
    return all(size in (1, of) for size, of in zip(shape, to, strict=True))


def _misfit(shape: tuple[int, ...], compact: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"thresholds of shape {shape} do not go with codes that share "
        f"scales of shape {compact}: give one threshold for each of those"
    )


def _of_rank(threshold: jax.Array, ndim: int) -> jax.Array:
    """Thresholds with leading axes of length 1 added, or taken away: an example alone has none."""
    more = threshold.ndim - ndim
    if more > 0 and all(size == 1 for size in threshold.shape[:more]):
        return jnp.squeeze(threshold, range(more))
    if more > 0:
        raise ValueError(
            f"thresholds of shape {threshold.shape} are for arrays of {threshold.ndim} dimensions "
            f"or more, this one has {ndim}"
        )
    return jnp.expand_dims(threshold, range(-more))


def code_step(
    x: jax.Array,
    quantizer: Quantizer,
    *,
    channel_axis: ChannelAxis = None,
    vector_axis: VectorAxis = None,
    threshold: jax.Array,
) -> jax.Array:
    """What each element is divided by to get its code.

    It is `QTensor.step`, but where codes come from a scale before that is stored (see `IntScale`).

    Args:
      x: see `quantize`; so the others.
      quantizer: see there.
      channel_axis: see there.
      vector_axis: see there.
      threshold: see there.

    Returns:
      An array that broadcasts to x; 0 where there is no step.
    """
    threshold, groups = _grouped(x, quantizer, channel_axis, vector_axis, threshold)
    return _code_step(x, threshold, quantizer, groups, channel_axis)


def _code_step(
    x: jax.Array,
    threshold: jax.Array,
    quantizer: Quantizer,
    groups: Groups,
    channel_axis: ChannelAxis,
) -> jax.Array:
    _, step = quantizer.scale.store(threshold, quantizer.format.grid(x).steps, channel_axis)
    return groups.expand(step, x.shape)


def _codes(
    x: jax.Array,
    threshold: jax.Array,
    quantizer: Quantizer,
    groups: Groups,
    channel_axis: ChannelAxis,
) -> tuple[jax.Array, StoredScale]:
    """Codes of x, still in the dtype of the computation, and the stored scales."""
    grid = quantizer.format.grid(x)
    scale, step = quantizer.scale.store(threshold, grid.steps, channel_axis)
    per_step = groups.expand(reciprocal(step), x.shape)
    codes = grid.round(x.astype(step.dtype) * per_step)
    return jnp.where(codes == 0, 0, codes), scale  # integers have no -0


@functools.cache
def _fake_quant_at(
    quantizer: Quantizer, groups: Groups, channel_axis: ChannelAxis, learned: bool
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def forward(x: jax.Array, threshold: jax.Array) -> jax.Array:
        codes, scale = _codes(x, threshold, quantizer, groups, channel_axis)
        step = groups.expand(scale.step(threshold.dtype), x.shape)
        # Saturation would make a number of an infinity.
        return jnp.where(jnp.isfinite(x), codes * step, jnp.nan).astype(x.dtype)

    def bounds(x: jax.Array, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
        upper = groups.expand(threshold, x.shape)
        return quantizer.format.lower(upper), upper

    def of_threshold(x: jax.Array, y: jax.Array, threshold: jax.Array, g: jax.Array) -> jax.Array:
        grid = quantizer.format.grid(x)
        step = _code_step(x, threshold, quantizer, groups, channel_axis)
        x, y, g = (array.astype(threshold.dtype) for array in (x, y, g))
        saturates = (x < grid.low * step) | (x > grid.high * step)
        change = jnp.where(saturates, y, y - x) * groups.expand(reciprocal(threshold), x.shape)

        def for_each(threshold: jax.Array) -> jax.Array:
            # A product, not a broadcast: it is shared among devices as x is.
            return groups.expand(threshold, x.shape) * jnp.ones_like(x)

        (gradient,) = jax.linear_transpose(for_each, threshold)(g * change)  # sums over groups
        return gradient

    return with_gradient(forward, bounds, quantizer.gradient, of_threshold if learned else None)


def _hashable(axis: ChannelAxis | VectorAxis) -> int | tuple[int, ...] | None:
    if axis is None:
        return None
    return int(axis) if isinstance(axis, int | np.integer) else tuple(axis)
