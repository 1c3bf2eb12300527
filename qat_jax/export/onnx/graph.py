"""A graph under construction: what a value of the traced program is in ONNX, and its nodes."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

OPSET = 21  # the first with 4-bit integers and scales of blocks
IR_VERSION = 10

Dimension = Any  # an int, or a symbolic dimension of jax.export
Shape = tuple[Dimension, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """The output of a node, or an input of the graph.

    Transposing it adds no node: it only says where the axes are. JAX's networks have their
    features last and ONNX's second, and so what a convolution leaves stays as it is for the next.

    Attributes:
      name: in the graph.
      shape: in the traced program. Axes that it spread may still have length 1: ONNX's arithmetic
        spreads them anyway (see `Graph.spread`).
      dtype: of its elements.
      order: where in the graph each of these axes is; None: in the same place.
    """

    name: str
    shape: Shape
    dtype: np.dtype
    order: tuple[int, ...] | None = None

    @property
    def places(self) -> tuple[int, ...]:
        """The order, in any case."""
        return tuple(range(len(self.shape))) if self.order is None else self.order


class Graph:
    """Nodes in order, and the constants that they use.

    A value is a `Tensor`, or a NumPy array, which becomes a constant once a node uses it.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self._numbers = itertools.count()

    def input(self, name: str, shape: Shape, dtype: Any) -> Tensor:
        """An input; a symbolic dimension gets its own name."""
        self.inputs.append(_described(name, shape, dtype))
        return Tensor(name, shape, np.dtype(dtype))

    def node(
        self,
        operator: str,
        *operands: Any,
        shape: Shape,
        dtype: Any,
        order: tuple[int, ...] | None = None,
        **attributes: Any,
    ) -> Tensor:
        """Append a node of one output.

        Args:
          operator: ONNX's name.
          *operands: values, whose orders are the caller's business; None for an optional one.
          shape: of the output.
          dtype: of the output.
          order: of the output.
          **attributes: the node's.
        """
        name = f"{operator.lower()}_{next(self._numbers)}"
        names = ["" if x is None else self.name(x) for x in operands]
        self.nodes.append(helper.make_node(operator, names, [name], **attributes))
        return Tensor(name, shape, np.dtype(dtype), order)

    def name(self, value: Any) -> str:
        """The name of a value; an array becomes a constant."""
        if isinstance(value, Tensor):
            return value.name
        # One for each use: optimisers of graphs that rewrite constants trip over shared ones.
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def reshape(self, x: Any, shape: Shape) -> Any:
        """A value in another shape, of as many elements.

        Raises:
          ValueError: more than one dimension of the new shape depends on the batch.
        """
        if isinstance(x, np.ndarray):
            return x.reshape(shape)
        if x.shape == tuple(shape):
            return x
        x = self.ordered(x)
        same = len(x.shape), len(shape)
        sizes = []
        for axis, size in enumerate(shape):
            kept = axis < min(same) and x.shape[: axis + 1] == tuple(shape[: axis + 1])
            # 0 copies the size of the input, -1 is whatever is left over.
            sizes.append(size if isinstance(size, int) else 0 if kept else -1)
        if sizes.count(-1) > 1:
            raise ValueError(
                f"no ONNX reshape to {tuple(map(str, shape))}: give batch_size, so that its sizes "
                "are numbers"
            )
        if 0 in [size for size in shape if isinstance(size, int)]:
            raise ValueError(f"an array of shape {shape} is empty: ONNX has no place for it")
        return self.node("Reshape", x, np.array(sizes, np.int64), shape=tuple(shape), dtype=x.dtype)

    def transpose(self, x: Any, permutation: Sequence[int]) -> Any:
        """A value with its axes in another order."""
        if isinstance(x, np.ndarray):
            return x.transpose(permutation)
        shape = tuple(x.shape[axis] for axis in permutation)
        order = tuple(x.places[axis] for axis in permutation)
        in_order = order == tuple(range(len(order)))
        return dataclasses.replace(x, shape=shape, order=None if in_order else order)

    def ordered(self, x: Any, order: tuple[int, ...] | None = None) -> Any:
        """A value whose axes are where they are wanted.

        Args:
          x: of as many axes, if there is an order.
          order: see `Tensor`.
        """
        if isinstance(x, np.ndarray):
            return x if order is None else x.transpose(np.argsort(order))
        if x.order == order:
            return x
        wanted = tuple(range(len(x.shape))) if order is None else order
        moved = [x.places[axis] for axis in np.argsort(wanted)]
        return self.node("Transpose", x, shape=x.shape, dtype=x.dtype, order=order, perm=moved)

    def cast(self, x: Any, dtype: Any) -> Any:
        """A value of another element type."""
        if x.dtype == np.dtype(dtype):
            return x
        if isinstance(x, np.ndarray):
            return x.astype(dtype)
        return self.node("Cast", x, shape=x.shape, dtype=dtype, order=x.order,
                         to=element_type(dtype))  # fmt: skip

    def spread(self, x: Any, shape: Shape) -> Any:
        """A value whose axes have all the length that the traced program gives them.

        Raises:
          ValueError: that length depends on the batch in a way that ONNX cannot say.
        """
        shape = tuple(shape)
        if tuple(x.shape) == shape:
            return x
        known = all(isinstance(size, int) for size in shape)
        if known and isinstance(x, np.ndarray):
            return np.broadcast_to(x, shape)
        sizes = np.array(shape, np.int64) if known else self._run_time_sizes(shape)
        return self.node("Expand", self.ordered(x), sizes, shape=shape, dtype=x.dtype)

    def _run_time_sizes(self, shape: Shape) -> Tensor:
        """A shape of which parts are known when the graph runs."""
        known = {
            str(dimension.dim_param): (value.name, axis)
            for value in self.inputs
            for axis, dimension in enumerate(value.type.tensor_type.shape.dim)
            if dimension.dim_param
        }
        parts: list[Any] = []
        for size in shape:
            if isinstance(size, int):
                parts.append(np.array([size], np.int64))
            elif str(size) in known:
                name, axis = known[str(size)]
                source = Tensor(name, (), np.dtype(np.float32))  # only its name counts
                parts.append(
                    self.node("Shape", source, shape=(1,), dtype=np.int64, start=axis, end=axis + 1)
                )
            else:
                raise ValueError(f"the size {size} has no name in ONNX: give batch_size")
        return self.node("Concat", *parts, shape=(len(shape),), dtype=np.int64, axis=0)

    def finish(self, outputs: Sequence[Any], shapes: Sequence[Shape], name: str) -> onnx.ModelProto:
        """The graph as a model.

        Args:
          outputs: values.
          shapes: theirs in the traced program.
          name: of the graph.
        """
        described = []
        for number, (value, shape) in enumerate(zip(outputs, shapes, strict=True)):
            output = "output" if len(outputs) == 1 else f"output_{number}"
            value = self.ordered(self.spread(value, shape))
            self.nodes.append(helper.make_node("Identity", [self.name(value)], [output]))
            described.append(_described(output, shape, value.dtype))
        graph = helper.make_graph(self.nodes, name, self.inputs, described, self.initializers)
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="qat_jax",
        )


def element_type(dtype: Any) -> int:
    """ONNX's number of an element type."""
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _described(name: str, shape: Shape, dtype: Any) -> onnx.ValueInfoProto:
    sizes = [size if isinstance(size, int) else str(size) for size in shape]
    return helper.make_tensor_value_info(name, element_type(dtype), sizes)
