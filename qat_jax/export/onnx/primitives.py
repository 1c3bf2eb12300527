"""JAX's primitives in ONNX.

`translate` walks through a traced program. What depends on constants alone is computed there and
then; everything else becomes nodes, by the rules of this file, which are those that evaluating
networks needs.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive

from qat_jax.export.onnx import quantizers
from qat_jax.export.onnx.graph import Dimension, Graph, Shape, Tensor
from qat_jax.export.onnx.quantizers import StoredKernel

Rule = Callable[..., Any]
_RULES: dict[str, Rule] = {}
# Of the rules, those that take axes of length 1 for any length, axes in any place, and kernels as
# they are stored. For the others these are brought into the form that the traced program has.
_SPREADING: set[str] = set()
_ORDERING: set[str] = set()
_STORED: set[str] = set()


def translate(graph: Graph, program: ClosedJaxpr, inputs: Sequence[Tensor]) -> list[Any]:
    """Append a traced program to a graph.

    Args:
      graph: it goes here.
      program: what was traced.
      inputs: its arguments.

    Returns:
      What it returns: tensors, or arrays where that is constant.

    Raises:
      ValueError: it holds something that has no rule here.
    """
    return _translate(graph, program.jaxpr, _consts(program), inputs)


def _consts(program: ClosedJaxpr) -> list[Any]:
    """A program's constants; keys of random numbers, which nothing here uses, are no arrays."""
    return [
        x if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)
        for x in program.consts
    ]


def _translate(
    graph: Graph, jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any]
) -> list[Any]:
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= zip(jaxpr.invars, inputs, strict=True)

    def value(atom: Any) -> Any:
        return np.asarray(atom.val) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        found = _equation(graph, equation, [value(atom) for atom in equation.invars])
        values |= zip(equation.outvars, found, strict=True)
    return [value(atom) for atom in jaxpr.outvars]


def _equation(graph: Graph, equation: JaxprEqn, operands: list[Any]) -> list[Any]:
    name = equation.primitive.name
    params = equation.params
    called = _called(equation)
    if called is not None:
        if name == "cond":
            operands = operands[1:]  # which branch
        return _translate(graph, called.jaxpr, _consts(called), operands)
    if name == "dim_as_value":
        raise ValueError(_OF_THE_BATCH)
    if all(isinstance(x, np.ndarray) for x in operands) and _constant(equation):
        return _computed(equation.primitive, operands, params)
    if name not in _RULES:
        raise ValueError(_missing(name))
    if name not in _STORED:
        operands = [x.dequantized(graph) if isinstance(x, StoredKernel) else x for x in operands]
    if name not in _SPREADING:
        operands = [
            x if isinstance(x, StoredKernel) else graph.spread(x, traced.shape)
            for x, traced in zip(operands, _described(equation.invars), strict=True)
        ]
    if name not in _ORDERING:
        operands = [x if isinstance(x, StoredKernel) else graph.ordered(x) for x in operands]
    results = _described(equation.outvars)
    if equation.primitive.multiple_results:
        return _RULES[name](graph, *operands, results=results, **params)
    (result,) = results
    params = {**params, "shape": result.shape, "dtype": np.dtype(result.dtype)}
    return [_RULES[name](graph, *operands, **params)]


_CALLS = (
    *("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"),
    *("checkpoint", "remat", "remat2"),  # by version
)


def _called(equation: JaxprEqn) -> ClosedJaxpr | None:
    """The program that an equation calls."""
    params = equation.params
    if equation.primitive.name in _CALLS:
        (called,) = (params[name] for name in ("jaxpr", "call_jaxpr") if name in params)
        return called if isinstance(called, ClosedJaxpr) else ClosedJaxpr(called, ())
    platforms = params.get("branches_platforms")
    if platforms is not None:  # one branch for each platform: that for all others
        return params["branches"][platforms.index(None)]
    return None


_OF_THE_BATCH = "the model computes with the size of the batch: give batch_size"
_SEARCHES = ("while", "scan", "reduce", "sort")  # what finds thresholds other than maxima


def _missing(name: str) -> str:
    if name in _SEARCHES:
        return (
            f"ONNX export has no {name}. If it is a search for thresholds in each batch, freeze "
            "them with calibrate or use AbsMax; of the model itself, write it without"
        )
    return f"ONNX export has no rule for JAX's {name}: add one to {__name__}"


def _described(atoms: Sequence[Any]) -> list[Any]:
    """Shapes and dtypes in the traced program."""
    return [atom.aval for atom in atoms]


def _constant(equation: JaxprEqn) -> bool:
    """Whether everything about it is known, the batch's size not needed."""
    known = all(
        isinstance(size, int) for array in _described(equation.outvars) for size in array.shape
    )
    return known and equation.primitive is not quantizers.stored_kernel_p


def _computed(primitive: Primitive, operands: list[Any], params: dict[str, Any]) -> list[Any]:
    with jax.ensure_compile_time_eval():
        found = primitive.bind(*operands, **params)
    found = found if primitive.multiple_results else [found]
    return [np.asarray(x) for x in found]


def _rule(
    *names: str, spreads: bool = False, orders: bool = False, stored: bool = False
) -> Callable[[Rule], Rule]:
    """Registers a function of the graph and the operands.

    By keyword it gets the result's shape and dtype and the primitive's own parameters; of a
    primitive of several results a description of each, and it returns as many.
    """

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        for group, wanted in ((_SPREADING, spreads), (_ORDERING, orders), (_STORED, stored)):
            if wanted:
                group.update(names)
        return rule

    return register


# Quantisers


@_rule("quantize_dequantize", orders=True)
def _quantize_dequantize(
    graph: Graph,
    x: Any,
    code_step: Any,
    step: Any,
    *,
    shape: Shape,
    dtype: Any,
    groups: Any,
    format: Any,
) -> Any:
    del shape, dtype
    return quantizers.quantize_dequantize(graph, x, code_step, step, groups=groups, format=format)


@_rule("stored_kernel", stored=True)
def _stored_kernel(graph: Graph, *, shape: Shape, dtype: Any, kernel: Any) -> Any:
    del graph, shape, dtype
    return kernel


# Arithmetic, element by element

_OPERATORS = {
    "add": "Add", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min",
    "pow": "Pow", "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater",
    "ge": "GreaterOrEqual", "and": "And", "or": "Or",
    "neg": "Neg", "abs": "Abs", "sign": "Sign", "exp": "Exp", "log": "Log", "sqrt": "Sqrt",
    "tanh": "Tanh", "logistic": "Sigmoid", "erf": "Erf", "floor": "Floor", "ceil": "Ceil",
    "not": "Not", "sin": "Sin", "cos": "Cos", "xor": "Xor",
}  # fmt: skip
_SAME = ("stop_gradient", "copy", "copy_p", "optimization_barrier", "sharding_constraint")


def _elementwise(graph: Graph, operator: str, *operands: Any, dtype: Any, **attributes: Any) -> Any:
    shape = _broadcast([x.shape for x in operands])
    whole = [x for x in operands if isinstance(x, Tensor) and len(x.shape) == len(shape)]
    order = next((x.order for x in whole if x.order is not None), None)
    if order is not None:
        operands = tuple(_in_order(graph, x, order) for x in operands)
    return graph.node(operator, *operands, shape=shape, dtype=dtype, order=order, **attributes)


def _in_order(graph: Graph, x: Any, order: tuple[int, ...]) -> Any:
    if not x.shape:
        return x
    missing = len(order) - len(x.shape)
    return graph.ordered(graph.reshape(x, (*(1,) * missing, *x.shape)), order)


def _broadcast(shapes: Sequence[Shape]) -> Shape:
    """The shape of arithmetic: of each axis the length that is not 1."""
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(
        next((size for size in sizes if not isinstance(size, int) or size != 1), 1)
        for sizes in zip(*padded, strict=True)
    )


def _same_operator(
    graph: Graph, *operands: Any, shape: Shape, dtype: Any, operator: Any, **params: Any
) -> Any:
    del shape, params
    return _elementwise(graph, operator, *operands, dtype=dtype)


for _name, _operator in _OPERATORS.items():
    _rule(_name, spreads=True, orders=True)(partial(_same_operator, operator=_operator))


@_rule("sub", spreads=True, orders=True)
def _sub(graph: Graph, x: Any, y: Any, *, shape: Shape, dtype: Any) -> Any:
    del shape
    if isinstance(y, np.ndarray) and y.dtype.kind == "f":
        # Runtimes know how to fold an Add into the convolution before it.
        return _elementwise(graph, "Add", x, -y, dtype=dtype)
    return _elementwise(graph, "Sub", x, y, dtype=dtype)


@_rule("ne", spreads=True, orders=True)
def _ne(graph: Graph, x: Any, y: Any, *, shape: Shape, dtype: Any) -> Any:
    del shape
    equal = _elementwise(graph, "Equal", x, y, dtype=dtype)
    return _elementwise(graph, "Not", equal, dtype=dtype)


@_rule(*_SAME, spreads=True, orders=True)
def _same(graph: Graph, x: Any, **params: Any) -> Any:
    del graph, params
    return x


@_rule("rsqrt", spreads=True, orders=True)
def _rsqrt(graph: Graph, x: Any, *, shape: Shape, dtype: Any, **params: Any) -> Any:
    del shape, params
    root = _elementwise(graph, "Sqrt", x, dtype=dtype)
    return _elementwise(graph, "Reciprocal", root, dtype=dtype)


@_rule("square", spreads=True, orders=True)
def _square(graph: Graph, x: Any, *, shape: Shape, dtype: Any) -> Any:
    del shape
    return _elementwise(graph, "Mul", x, x, dtype=dtype)


@_rule("integer_pow", spreads=True, orders=True)
def _integer_pow(graph: Graph, x: Any, *, shape: Shape, dtype: Any, y: Any) -> Any:
    del shape
    return _elementwise(graph, "Pow", x, np.asarray(y, dtype), dtype=dtype)


@_rule("expm1", spreads=True, orders=True)
def _expm1(graph: Graph, x: Any, *, shape: Shape, dtype: Any, **params: Any) -> Any:
    del shape, params
    power = _elementwise(graph, "Exp", x, dtype=dtype)
    return _elementwise(graph, "Add", power, -np.ones((), dtype), dtype=dtype)


@_rule("log1p", spreads=True, orders=True)
def _log1p(graph: Graph, x: Any, *, shape: Shape, dtype: Any, **params: Any) -> Any:
    del shape, params
    more = _elementwise(graph, "Add", x, np.ones((), dtype), dtype=dtype)
    return _elementwise(graph, "Log", more, dtype=dtype)


@_rule("exp2", spreads=True, orders=True)
def _exp2(graph: Graph, x: Any, *, shape: Shape, dtype: Any, **params: Any) -> Any:
    del shape, params
    return _elementwise(graph, "Pow", np.full((), 2, dtype), x, dtype=dtype)


@_rule("rem", spreads=True, orders=True)
def _rem(graph: Graph, x: Any, y: Any, *, shape: Shape, dtype: Any) -> Any:
    del shape
    return _elementwise(graph, "Mod", x, y, dtype=dtype, fmod=1)  # the sign is that of x


@_rule("erfc", spreads=True, orders=True)
def _erfc(graph: Graph, x: Any, *, shape: Shape, dtype: Any, accuracy: Any = None) -> Any:
    del shape, accuracy  # which JAX 0.12 has
    erf = _elementwise(graph, "Erf", x, dtype=dtype)
    return _elementwise(graph, "Sub", np.ones((), dtype), erf, dtype=dtype)


@_rule("round", spreads=True, orders=True)
def _round(graph: Graph, x: Any, *, shape: Shape, dtype: Any, rounding_method: Any) -> Any:
    del shape
    if rounding_method != jax.lax.RoundingMethod.TO_NEAREST_EVEN:
        raise ValueError("ONNX rounds halves to even numbers: so must the network")
    return _elementwise(graph, "Round", x, dtype=dtype)


@_rule("is_finite", spreads=True, orders=True)
def _is_finite(graph: Graph, x: Any, *, shape: Shape, dtype: Any) -> Any:
    del shape
    # Neither infinities nor NaN are 0 when 0 multiplies them.
    zero = _elementwise(graph, "Mul", x, np.zeros((), x.dtype), dtype=x.dtype)
    return _elementwise(graph, "Equal", zero, np.zeros((), x.dtype), dtype=dtype)


@_rule("select_n", spreads=True, orders=True)
def _select_n(graph: Graph, which: Any, *cases: Any, shape: Shape, dtype: Any) -> Any:
    del shape
    if len(cases) != 2 or which.dtype != bool:
        raise ValueError("ONNX chooses between two cases by a boolean")
    return _elementwise(graph, "Where", which, cases[1], cases[0], dtype=dtype)


@_rule("clamp", spreads=True, orders=True)
def _clamp(graph: Graph, low: Any, x: Any, high: Any, *, shape: Shape, dtype: Any) -> Any:
    del shape
    x = _elementwise(graph, "Max", x, low, dtype=dtype)
    return _elementwise(graph, "Min", x, high, dtype=dtype)


@_rule("convert_element_type", spreads=True, orders=True)
def _convert_element_type(graph: Graph, x: Any, *, shape: Shape, dtype: Any, **params: Any) -> Any:
    del shape, params
    return graph.cast(x, dtype)


# Shapes


@_rule("reshape")
def _reshape(
    graph: Graph, x: Any, *, shape: Shape, dtype: Any, dimensions: Any, **params: Any
) -> Any:
    del dtype, params
    if dimensions is not None:
        raise ValueError("ONNX reshapes in the order of the axes: transpose first")
    return graph.reshape(x, shape)


@_rule("squeeze", "expand_dims")
def _squeeze(graph: Graph, x: Any, *, shape: Shape, dtype: Any, **params: Any) -> Any:
    del dtype, params
    return graph.reshape(x, shape)


@_rule("broadcast_in_dim", spreads=True)
def _broadcast_in_dim(
    graph: Graph, x: Any, *, shape: Shape, dtype: Any, broadcast_dimensions: Any, **params: Any
) -> Any:
    del dtype, params
    sizes: list[Dimension] = [1] * len(shape)  # arithmetic spreads what is still to come
    for axis, size in zip(broadcast_dimensions, x.shape, strict=True):
        sizes[axis] = size
    return graph.reshape(x, tuple(sizes))


@_rule("transpose", spreads=True, orders=True, stored=True)
def _transpose(graph: Graph, x: Any, *, shape: Shape, dtype: Any, permutation: Any) -> Any:
    del shape, dtype
    if isinstance(x, StoredKernel):
        arranged = x.arranged([(axis,) for axis in permutation])
        if arranged is not None:
            return arranged
        x = x.dequantized(graph)
    return graph.transpose(x, permutation)


@_rule("concatenate")
def _concatenate(graph: Graph, *parts: Any, shape: Shape, dtype: Any, dimension: Any) -> Any:
    return graph.node("Concat", *parts, shape=shape, dtype=dtype, axis=dimension)


@_rule("stack")
def _stack(graph: Graph, *parts: Any, shape: Shape, dtype: Any, axis: Any) -> Any:
    one = (*shape[:axis], 1, *shape[axis + 1 :])
    parts = tuple(graph.reshape(part, one) for part in parts)
    return graph.node("Concat", *parts, shape=shape, dtype=dtype, axis=axis)


@_rule("tile")
def _tile(graph: Graph, x: Any, *, shape: Shape, dtype: Any, reps: Any) -> Any:
    return graph.node("Tile", x, np.array(reps, np.int64), shape=shape, dtype=dtype)


@_rule("split", orders=True)
def _split(graph: Graph, x: Any, *, results: Sequence[Any], sizes: Any, axis: Any) -> list[Any]:
    if not all(isinstance(size, int | np.integer) for size in sizes):
        raise ValueError(_OF_THE_BATCH)
    limits = np.cumsum(sizes).tolist()
    starts = [0, *limits[:-1]]
    return [
        _cut(graph, x, {axis: (start, limit, 1)}, result.shape)
        for start, limit, result in zip(starts, limits, results, strict=True)
    ]


@_rule("cumsum")
def _cumsum(graph: Graph, x: Any, *, shape: Shape, dtype: Any, axis: Any, reverse: Any) -> Any:
    place = np.array(axis, np.int64)
    return graph.node("CumSum", x, place, shape=shape, dtype=dtype, reverse=int(reverse))


@_rule("slice", orders=True)
def _slice(
    graph: Graph,
    x: Any,
    *,
    shape: Shape,
    dtype: Any,
    start_indices: Any,
    limit_indices: Any,
    strides: Any,
) -> Any:
    del dtype
    strides = (1,) * len(shape) if strides is None else strides
    cut = {
        axis: (start, limit, stride)
        for axis, (start, limit, stride) in enumerate(
            zip(start_indices, limit_indices, strides, strict=True)
        )
        if not (_is(start, 0) and limit == x.shape[axis] and stride == 1)
    }
    return _cut(graph, x, cut, shape)


@_rule("rev", orders=True)
def _rev(graph: Graph, x: Any, *, shape: Shape, dtype: Any, dimensions: Any) -> Any:
    del dtype
    return _cut(graph, x, {axis: (-1, np.iinfo(np.int64).min, -1) for axis in dimensions}, shape)


def _cut(graph: Graph, x: Tensor, cut: dict[int, tuple[Any, Any, int]], shape: Shape) -> Tensor:
    """From start to limit in strides, along some axes."""
    if not cut:
        return x
    if not all(isinstance(number, int) for part in cut.values() for number in part):
        raise ValueError(_OF_THE_BATCH)
    starts, limits, strides = (np.array(row, np.int64) for row in zip(*cut.values(), strict=True))
    axes = np.array([x.places[axis] for axis in cut], np.int64)
    return graph.node("Slice", x, starts, limits, axes, strides,
                      shape=shape, dtype=x.dtype, order=x.order)  # fmt: skip


def _is(size: Dimension, number: int) -> bool:
    return isinstance(size, int) and size == number


@_rule("pad", orders=True)
def _pad(graph: Graph, x: Any, value: Any, *, shape: Shape, dtype: Any, padding_config: Any) -> Any:
    if any(low < 0 or high < 0 or inner for low, high, inner in padding_config):
        raise ValueError("ONNX export pads at the ends only, and cuts nothing off")
    stored = [padding_config[axis] for axis in np.argsort(x.places)]
    ends = [low for low, _, _ in stored] + [high for _, high, _ in stored]
    return graph.node("Pad", x, np.array(ends, np.int64), value, shape=shape, dtype=dtype,
                      order=x.order)  # fmt: skip


@_rule("platform_index")
def _platform_index(graph: Graph, *, shape: Shape, dtype: Any, **params: Any) -> Any:
    del graph, params
    return np.zeros(shape, dtype)  # not looked at


@_rule("gather")
def _gather(
    graph: Graph,
    x: Any,
    indices: Any,
    *,
    shape: Shape,
    dtype: Any,
    dimension_numbers: Any,
    slice_sizes: Any,
    **params: Any,
) -> Any:
    """Of indexed axes one element, of all others everything; out of bounds is not looked at."""
    del params
    numbers = dimension_numbers
    indexed = tuple(numbers.start_index_map)
    if isinstance(indices, np.ndarray) and indices.ndim == 1 and not numbers.collapsed_slice_dims:
        starts = dict(zip(indexed, indices.tolist(), strict=True))  # a single window: a slice
        cut = {axis: (start, start + slice_sizes[axis], 1) for axis, start in starts.items()}
        return _cut(graph, x, cut, shape)
    rest = tuple(axis for axis in range(len(x.shape)) if axis not in indexed)
    if (
        numbers.operand_batching_dims
        or tuple(sorted(indexed)) != tuple(numbers.collapsed_slice_dims)
        or any(slice_sizes[axis] != x.shape[axis] for axis in rest)
    ):
        raise ValueError("ONNX export knows x[indices] of whole axes only")
    leading = tuple(indices.shape[:-1])
    offsets = tuple(numbers.offset_dims)
    places = tuple(axis for axis in range(len(shape)) if axis not in offsets)
    found_shape = (*leading, *(x.shape[axis] for axis in rest))
    x = graph.ordered(graph.transpose(x, (*indexed, *rest)))
    if len(indexed) == 1:
        indices = graph.reshape(indices, leading)
        y = graph.node("Gather", x, indices, shape=found_shape, dtype=dtype, axis=0)
    else:
        indices = graph.cast(indices, np.int64)
        y = graph.node("GatherND", x, indices, shape=found_shape, dtype=dtype)
    order = (*places, *offsets)  # where each axis of y belongs
    return graph.transpose(y, tuple(order.index(axis) for axis in range(len(shape))))


# Sums and their like

_REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin",
               "reduce_prod": "ReduceProd"}  # fmt: skip


def _reduction(
    graph: Graph, x: Any, *, shape: Shape, dtype: Any, axes: Any, operator: Any, **params: Any
) -> Any:
    del params
    left = [place for axis, place in enumerate(x.places) if axis not in axes]
    order = tuple(sorted(left).index(place) for place in left)
    in_order = order == tuple(range(len(order)))
    words = np.array([x.places[axis] for axis in axes], np.int64)
    return graph.node(operator, x, words, shape=shape, dtype=dtype,
                      order=None if in_order else order, keepdims=0)  # fmt: skip


for _name, _operator in _REDUCTIONS.items():
    _rule(_name, orders=True)(partial(_reduction, operator=_operator))


@_rule("reduce", orders=True)
def _maxima(
    graph: Graph, *operands: Any, results: Sequence[Any], jaxpr: Any, dimensions: Any, **params: Any
) -> list[Any]:
    """The maxima of several arrays over the same axes."""
    del params
    count = len(results)
    pairs = zip(jaxpr.invars[:count], jaxpr.invars[count:], strict=True)
    if [(step.primitive.name, *step.invars) for step in jaxpr.eqns] != [("max", *p) for p in pairs]:
        raise ValueError(_missing("reduce"))
    found = []
    for x, least, result in zip(operands[:count], operands[count:], results, strict=True):
        dtype = np.dtype(result.dtype)
        largest = _reduction(graph, x, shape=result.shape, dtype=dtype, axes=dimensions,
                             operator="ReduceMax")  # fmt: skip
        found.append(_elementwise(graph, "Max", largest, least, dtype=dtype))
    return found


def _reduce_bool(
    graph: Graph, x: Any, *, shape: Shape, dtype: Any, axes: Any, operator: Any, **params: Any
) -> Any:
    del params
    numbers = graph.cast(x, np.float32)
    found = _reduction(graph, numbers, shape=shape, dtype=np.float32, axes=axes, operator=operator)
    return graph.cast(found, dtype)


_rule("reduce_and")(partial(_reduce_bool, operator="ReduceMin"))
_rule("reduce_or")(partial(_reduce_bool, operator="ReduceMax"))


def _place(
    graph: Graph, x: Any, *, shape: Shape, dtype: Any, axes: Any, index_dtype: Any, operator: Any
) -> Any:
    del index_dtype
    found = graph.node(operator, x, shape=shape, dtype=np.int64, axis=axes[0], keepdims=0)
    return graph.cast(found, dtype)


_rule("argmax")(partial(_place, operator="ArgMax"))
_rule("argmin")(partial(_place, operator="ArgMin"))


# Products


def _kernel(graph: Graph, w: Any, bunches: Sequence[tuple[int, ...]]) -> Any:
    """The right operand with its axes in another order, those of a bunch made one."""
    if isinstance(w, StoredKernel):
        arranged = w.arranged(bunches)
        if arranged is not None:
            return arranged.dequantized(graph)
        w = w.dequantized(graph)
    merged = tuple(math.prod(w.shape[axis] for axis in bunch) for bunch in bunches)
    w = graph.transpose(w, [axis for bunch in bunches for axis in bunch])
    return graph.ordered(graph.reshape(w, merged))


@_rule("dot_general", orders=True, stored=True)
def _dot_general(
    graph: Graph, x: Any, w: Any, *, shape: Shape, dtype: Any, dimension_numbers: Any, **params: Any
) -> Any:
    del params
    (x_summed, w_summed), (x_batch, w_batch) = dimension_numbers
    x_free, w_free = (
        tuple(axis for axis in range(len(a.shape)) if axis not in (*summed, *batch))
        for a, summed, batch in ((x, x_summed, x_batch), (w, w_summed, w_batch))
    )
    if isinstance(x, StoredKernel):
        x = x.dequantized(graph)
    batch = tuple(x.shape[axis] for axis in x_batch)
    rows, columns = tuple(x.shape[a] for a in x_free), tuple(w.shape[a] for a in w_free)
    terms = math.prod(x.shape[axis] for axis in x_summed)
    # [batch…, rows…, terms] times [batch…, terms, columns]; rows of a batch are one axis.
    x = graph.transpose(x, (*x_batch, *x_free, *x_summed))
    x = graph.ordered(graph.reshape(x, (*batch, *((math.prod(rows),) if x_batch else rows), terms)))
    bunches = [*((axis,) for axis in w_batch), tuple(w_summed), w_free]
    w = _kernel(graph, w, bunches)
    found = (*x.shape[:-1], math.prod(columns))
    x, w = graph.cast(x, dtype), graph.cast(w, dtype)  # which may be wider
    y = graph.node("MatMul", x, w, shape=found, dtype=dtype)
    return graph.reshape(y, shape)


@_rule("conv_general_dilated", orders=True, stored=True)
def _conv_general_dilated(
    graph: Graph,
    x: Any,
    w: Any,
    *,
    shape: Shape,
    dtype: Any,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any,
    rhs_dilation: Any,
    dimension_numbers: Any,
    feature_group_count: Any,
    batch_group_count: Any,
    **params: Any,
) -> Any:
    del params
    if batch_group_count != 1 or any(step != 1 for step in lhs_dilation):
        raise ValueError("ONNX export has no transposed convolutions, nor groups of a batch")
    numbers = dimension_numbers
    x = graph.ordered(graph.transpose(x, numbers.lhs_spec))
    w = _kernel(graph, w, [(axis,) for axis in numbers.rhs_spec])
    x, w = graph.cast(x, dtype), graph.cast(w, dtype)  # which may be wider
    y = graph.node(
        "Conv", x, w,
        shape=tuple(shape[axis] for axis in numbers.out_spec),
        dtype=dtype,
        strides=list(window_strides),
        pads=[low for low, _ in padding] + [high for _, high in padding],
        dilations=list(rhs_dilation),
        group=feature_group_count,
    )  # fmt: skip
    return graph.transpose(y, np.argsort(numbers.out_spec).tolist())


def _pooling(
    graph: Graph,
    x: Any,
    *,
    shape: Shape,
    dtype: Any,
    window_dimensions: Any,
    window_strides: Any,
    padding: Any,
    base_dilation: Any,
    window_dilation: Any,
    operator: Any,
    **params: Any,
) -> Any:
    del params
    # Features last, as everywhere in Flax; ONNX has them second.
    rank = len(shape)
    ends = (0, rank - 1)
    dilated = any(step != 1 for step in (*base_dilation, *window_dilation))
    if dilated or any(window_dimensions[axis] != 1 or padding[axis] != (0, 0) for axis in ends):
        raise ValueError("ONNX export pools over the middle axes, without holes")
    forth = (0, rank - 1, *range(1, rank - 1))
    back = (0, *range(2, rank), 1)
    counted: dict[str, Any] = {"count_include_pad": 1} if operator == "AveragePool" else {}
    y = graph.node(
        operator, graph.ordered(graph.transpose(x, forth)),
        shape=tuple(shape[axis] for axis in forth),
        dtype=dtype,
        kernel_shape=list(window_dimensions[1:-1]),
        strides=list(window_strides[1:-1]),
        pads=[low for low, _ in padding[1:-1]] + [high for _, high in padding[1:-1]],
        **counted,
    )  # fmt: skip
    y = graph.transpose(y, back)
    if operator == "AveragePool":
        size = np.array(math.prod(window_dimensions), dtype)
        y = _elementwise(graph, "Mul", y, size, dtype=dtype)
    return y


_rule("reduce_window_max", orders=True)(partial(_pooling, operator="MaxPool"))
_rule("reduce_window_sum", orders=True)(partial(_pooling, operator="AveragePool"))
