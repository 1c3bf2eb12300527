"""Integer operations: the signatures of ``jax.lax`` and a function for each operand.

The functions take the place of the quantisers of `qat_jax.ops` and are told the same axes; they
return an `Operand`. The result is the float that the simulated operation has, up to the rounding
of its last multiplication, unless scale products are rounded.
"""

import itertools
import math
import string
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from qat_jax import ops
from qat_jax.integer.datapath import contract, contract_each
from qat_jax.integer.operand import Operand
from qat_jax.integer.widths import Datapath

OperandFn = Callable[..., Operand]


def dot_general(
    x: jax.Array,
    w: jax.Array,
    /,
    dimension_numbers: lax.DotDimensionNumbers,
    *,
    lhs: OperandFn,
    rhs: OperandFn,
    datapath: Datapath = Datapath(),
) -> jax.Array:
    """``jax.lax.dot_general`` of integers.

    Args:
      x: the left operand, before it is quantised.
      w: the right operand, likewise.
      dimension_numbers: as in ``jax.lax``.
      lhs: makes integers of x.
      rhs: makes integers of w.
      datapath: the widths.

    Returns:
      float32 or, of float64 operands, float64, of the shape of ``jax.lax.dot_general``.

    Raises:
      ValueError: as of `contract`.
    """
    x_operand, w_operand = ops.dot_general_operands(x, w, dimension_numbers, lhs, rhs)
    return _dot_general(x_operand, w_operand, dimension_numbers, datapath)


def einsum(
    subscripts: str,
    x: jax.Array,
    w: jax.Array,
    /,
    *,
    lhs: OperandFn,
    rhs: OperandFn,
    datapath: Datapath = Datapath(),
) -> jax.Array:
    """``jax.numpy.einsum`` of two operands in integers.

    Args:
      subscripts: as in ``jax.numpy``; an axis that is summed up has to be in both operands.
      x: the left operand, before it is quantised.
      w: the right operand, likewise.
      lhs: makes integers of x.
      rhs: makes integers of w.
      datapath: the widths.

    Returns:
      float32 or, of float64 operands, float64, of the shape of ``jax.numpy.einsum``.

    Raises:
      ValueError: as of `contract`; an axis of one operand is summed up by itself.
    """
    x_operand, w_operand = ops.einsum_operands(subscripts, x, w, lhs, rhs)
    left, right, output = _letters(subscripts, x_operand.ndim, w_operand.ndim)
    contracted = [c for c in left if c in right and c not in output]
    shared = [c for c in left if c in right and c in output]
    if lonely := set(left + right) - set(output) - set(contracted):
        raise ValueError(
            f"einsum {subscripts!r} sums up an axis of one operand alone ({', '.join(lonely)}): "
            "sum it up before"
        )
    numbers = (
        ([left.index(c) for c in contracted], [right.index(c) for c in contracted]),
        ([left.index(c) for c in shared], [right.index(c) for c in shared]),
    )
    y = _dot_general(x_operand, w_operand, numbers, datapath)
    made = [*shared, *(c for c in left + right if c not in shared + contracted)]
    return y.transpose([made.index(c) for c in output])


def conv_general_dilated(
    x: jax.Array,
    w: jax.Array,
    /,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    *,
    lhs: OperandFn,
    rhs: OperandFn,
    datapath: Datapath = Datapath(),
) -> jax.Array:
    """``jax.lax.conv_general_dilated`` of integers.

    Args:
      x: the input, before it is quantised.
      w: the kernel, likewise.
      window_strides: as in ``jax.lax``; so are all up to ``feature_group_count``.
      padding: of the input.
      lhs_dilation: of the input.
      rhs_dilation: of the kernel.
      dimension_numbers: which axis is which.
      feature_group_count: groups of input features.
      lhs: makes integers of x.
      rhs: makes integers of w.
      datapath: the widths.

    Returns:
      float32 or, of float64 operands, float64, of the shape of ``jax.lax.conv_general_dilated``.

    Raises:
      ValueError: as of `contract`.
    """
    spec = lax.conv_dimension_numbers(jnp.shape(x), jnp.shape(w), dimension_numbers)
    x_operand, w_operand = ops.convolution_operands(x, w, spec, feature_group_count, lhs, rhs)
    x_batch, x_feature, *x_space = spec.lhs_spec
    w_output, w_input, *w_space = spec.rhs_spec
    unfold = _unfolding(
        [x_operand.shape[axis] for axis in x_space],
        [w_operand.shape[axis] for axis in w_space],
        window_strides,
        padding,
        lhs_dilation or [1] * len(x_space),
        rhs_dilation or [1] * len(x_space),
    )

    def features_last(a: jax.Array) -> jax.Array:
        return a.transpose(x_batch, *x_space, x_feature)

    def outputs_last(a: jax.Array) -> jax.Array:
        return a.transpose(*w_space, w_input, w_output)

    def patches(a: jax.Array) -> jax.Array:  # [groups, N * pixels, window, features of a group]
        a = jnp.stack(unfold(features_last(a)), axis=-2)
        a = a.reshape(-1, a.shape[-2], feature_group_count, a.shape[-1] // feature_group_count)
        return a.transpose(2, 0, 1, 3)

    def kernels(a: jax.Array) -> jax.Array:  # [groups, window, features, outputs of a group]
        a = outputs_last(a)
        inputs, outputs = a.shape[-2:]
        a = a.reshape(-1, inputs, feature_group_count, outputs // feature_group_count)
        return a.transpose(2, 0, 1, 3)

    def shifted(a: jax.Array) -> jax.Array:  # [window, N, pixels…, features, 1]
        return jnp.stack(unfold(features_last(a)))[..., None]

    def taps(a: jax.Array) -> jax.Array:  # [window, 1, 1…, features, outputs of a feature]
        a = outputs_last(a)
        ones = [1] * (1 + len(x_space))
        return a.reshape(math.prod(a.shape[:-2]), *ones, feature_group_count, -1)

    batch, *pixels = jax.eval_shape(unfold, features_last(x_operand.codes))[0].shape[:-1]
    outer = features_last(x_operand.outer) * outputs_last(w_operand.outer)
    if feature_group_count > 1 and w_operand.shape[w_input] == 1:
        x_operand, w_operand = x_operand.rearranged(shifted), w_operand.rearranged(taps)
        made = contract_each(x_operand, w_operand, datapath).to_float(outer.dtype)
    else:
        x_operand, w_operand = x_operand.rearranged(patches), w_operand.rearranged(kernels)
        made = contract(x_operand, w_operand, datapath).to_float(outer.dtype)
        made = made.reshape(feature_group_count, batch, *pixels, -1)
        made = jnp.moveaxis(made, 0, -2)
    made = made.reshape(batch, *pixels, -1) * outer
    out_batch, out_feature, *out_space = spec.out_spec
    return jnp.moveaxis(made, range(made.ndim), (out_batch, *out_space, out_feature))


def _dot_general(
    x: Operand, w: Operand, dimension_numbers: lax.DotDimensionNumbers, datapath: Datapath
) -> jax.Array:
    (x_summed, w_summed), (x_batch, w_batch) = (
        [list(axes) for axes in pair] for pair in dimension_numbers
    )
    x_free = [axis for axis in range(x.ndim) if axis not in x_summed + x_batch]
    w_free = [axis for axis in range(w.ndim) if axis not in w_summed + w_batch]
    batch, rows, columns = (
        [o.shape[axis] for axis in axes] for o, axes in ((x, x_batch), (x, x_free), (w, w_free))
    )
    summed = [x.shape[axis] for axis in x_summed] or [1]
    size = math.prod(summed[:-1]), summed[-1]
    result = contract(
        x.rearranged(
            lambda a: a.transpose(x_batch + x_free + x_summed).reshape(
                math.prod(batch), math.prod(rows), *size
            )
        ),
        w.rearranged(
            lambda a: a.transpose(w_batch + w_summed + w_free).reshape(
                math.prod(batch), *size, math.prod(columns)
            )
        ),
        datapath,
    )
    x_outer = jnp.squeeze(x.outer.transpose(x_batch + x_free + x_summed), _last(x_summed))
    w_outer = jnp.squeeze(w.outer.transpose(w_batch + w_free + w_summed), _last(w_summed))
    x_outer = jnp.expand_dims(x_outer, _last(w_free))
    w_outer = jnp.expand_dims(w_outer, range(len(batch), len(batch) + len(rows)))
    outer = x_outer * w_outer
    return result.to_float(outer.dtype).reshape(*batch, *rows, *columns) * outer


def _last(axes: Sequence[int]) -> tuple[int, ...]:
    """As many axes, from the end."""
    return tuple(range(-len(axes), 0))


def _unfolding(
    space: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    input_dilation: Sequence[int],
    window_dilation: Sequence[int],
) -> Callable[[jax.Array], list[jax.Array]]:
    """Makes [N, pixels of the output…, C], for each place in the window, of the input likewise."""
    dilated = [(n - 1) * d + 1 for n, d in zip(space, input_dilation, strict=True)]
    reach = [(n - 1) * d + 1 for n, d in zip(window, window_dilation, strict=True)]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(dilated, reach, strides, padding)
    edges = [(low, high, d - 1) for (low, high), d in zip(padding, input_dilation, strict=True)]
    padded = [n + low + high for n, (low, high) in zip(dilated, padding, strict=True)]
    spans = [(n - r) // s * s + 1 for n, r, s in zip(padded, reach, strides, strict=True)]

    def unfold(a: jax.Array) -> list[jax.Array]:
        a = lax.pad(a, jnp.zeros((), a.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
        shifted = []
        for offset in itertools.product(*map(range, window)):
            first = [o * d for o, d in zip(offset, window_dilation, strict=True)]
            last = [f + span for f, span in zip(first, spans, strict=True)]
            shifted.append(
                lax.slice(a, (0, *first, 0), (a.shape[0], *last, a.shape[-1]), (1, *strides, 1))
            )
        return shifted

    return unfold


def _letters(subscripts: str, x_ndim: int, w_ndim: int) -> tuple[str, str, str]:
    """The terms of an einsum of two operands, ellipses written out and the output named."""
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    if not arrow:
        once = sorted(c for c in inputs if c.isalpha() and inputs.count(c) == 1)
        output = ("..." if "..." in inputs else "") + "".join(once)
    terms = inputs.split(",")
    hidden = [
        ndim - len(term.replace("...", ""))
        for term, ndim in zip(terms, (x_ndim, w_ndim), strict=True)
    ]
    spare = "".join(c for c in string.ascii_letters if c not in inputs)[: max(hidden)]
    # Ellipses are aligned at their ends.
    x, w = (
        term.replace("...", spare[len(spare) - n :]) for term, n in zip(terms, hidden, strict=True)
    )
    return x, w, output.replace("...", spare)
