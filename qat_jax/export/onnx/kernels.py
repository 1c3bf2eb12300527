"""Kernels in ONNX: codes and scales as they are stored, and the nodes that make numbers of them."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qat_jax.export.onnx.graph import Graph, Tensor
from qat_jax.formats import Format, Int
from qat_jax.granularity import Groups
from qat_jax.quantizer import QTensor


class StoredKernel:
    """A kernel as it is stored, compared by identity.

    Attributes:
      codes: integers, of the kernel's shape.
      scale: compact; integers if there are coarse scales, else float32.
      coarse: compact, or None.
      groups: which codes share a scale.
      bits: of a code.
      dtype: of the kernel.
    """

    def __init__(
        self,
        codes: np.ndarray,
        scale: np.ndarray,
        coarse: np.ndarray | None,
        groups: Groups,
        bits: int,
        dtype: np.dtype,
    ) -> None:
        self.codes, self.scale, self.coarse = codes, scale, coarse
        self.groups, self.bits, self.dtype = groups, bits, dtype

    @classmethod
    def of(cls, q: QTensor, format: Format) -> "StoredKernel":
        """A kernel's codes and scales.

        Raises:
          ValueError: the codes, or the scales of vectors, are floating-point formats.
        """
        if not isinstance(format, Int) or (q.coarse is not None and q.scale.dtype.kind not in "iu"):
            raise ValueError(
                "ONNX has pairs for integer codes under integer or float32 scales: quantise with "
                "Int, and for vectors with IntScale or FloatScale"
            )
        coarse = None if q.coarse is None else np.asarray(q.coarse, np.float32)
        scale = np.asarray(q.scale) if q.coarse is not None else np.asarray(q.scale, np.float32)
        groups = q.groups
        if groups.vector_size and scale.shape[groups.axes[0]] == 1:  # a single vector
            groups = Groups(groups.axes)
        return cls(np.asarray(q.codes), scale, coarse, groups, format.bits, np.dtype(q.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.codes.shape

    def arranged(self, bunches: Sequence[tuple[int, ...]]) -> "StoredKernel | None":
        """The kernel with its axes in another order, those of a bunch made one.

        Args:
          bunches: axes; an empty bunch becomes an axis of length 1.

        Returns:
          It, or None if a bunch mixes axes that share scales with axes that do not.
        """
        cut = self.groups.axes if self.groups.vector_size else ()
        if not all(self._can_merge(tuple(bunch), cut) for bunch in bunches):
            return None
        shared = set(cut or self.groups.axes)
        axes = tuple(number for number, bunch in enumerate(bunches) if shared & set(bunch))
        codes, scale = (_arrange(array, bunches) for array in (self.codes, self.scale))
        coarse = None if self.coarse is None else _arrange(self.coarse, bunches)
        groups = Groups(axes, self.groups.vector_size)
        return StoredKernel(codes, scale, coarse, groups, self.bits, self.dtype)

    def _can_merge(self, bunch: tuple[int, ...], cut: tuple[int, ...]) -> bool:
        if bunch == cut:
            return True
        axes = [axis for axis in bunch if self.shape[axis] > 1]
        if set(axes) & set(cut):
            return len(axes) == len(cut) == 1
        lengths = [self.shape[axis] for axis in axes]
        kept = [
            [array.shape[axis] for axis in axes]
            for array in (self.scale, self.coarse)
            if array is not None
        ]
        return all(sizes in (lengths, [1] * len(axes)) for sizes in kept)

    def dequantized(self, graph: Graph) -> Tensor:
        """The kernel in a graph: its codes, and nodes that make numbers of them."""
        return graph.cast(self._in_float32(graph), self.dtype)

    def _in_float32(self, graph: Graph) -> Tensor:
        codes = self.codes.astype(code_dtype(self.codes.min() < 0, self.bits))
        axes = self.groups.axes
        own = [size == length for size, length in zip(self.scale.shape, self.shape, strict=True)]
        if self.groups.vector_size is None:
            scale = self.scale if self.coarse is None else self.scale * self.coarse
            kept = [axis for axis, size in enumerate(scale.shape) if size > 1]
            if not kept:
                return self._node(graph, codes, scale.reshape(()))
            if len(kept) == 1:
                return self._node(graph, codes, scale.reshape(-1), axis=kept[0])
        elif len(axes) == 1 and all(own[: axes[0]] + own[axes[0] + 1 :]):
            size = self.groups.vector_size
            return self._node(graph, codes, self._scale(graph), axis=axes[0], block_size=size)
        # There is no such pair: the codes as numbers, times a step for each.
        step = self.scale if self.coarse is None else self.scale * self.coarse
        step = np.array(self.groups.expand(jnp.asarray(step), self.shape), np.float32)
        numbers = self._node(graph, codes, np.float32(1))
        return graph.node("Mul", numbers, step, shape=self.shape, dtype=np.float32)

    def _scale(self, graph: Graph) -> Any:
        """The scales of vectors; integers stay such, a node multiplies them with the coarse."""
        if self.coarse is None:
            return self.scale
        kept = [axis for axis, size in enumerate(self.coarse.shape) if size > 1]
        if len(kept) > 1:
            return self.scale * self.coarse
        values = self.scale.astype(code_dtype(False, int(self.scale.max()).bit_length()))
        axis: dict[str, Any] = {"axis": kept[0]} if kept else {}
        coarse = self.coarse.reshape(-1 if kept else ())
        return graph.node("DequantizeLinear", values, coarse, np.zeros(coarse.shape, values.dtype),
                          shape=self.scale.shape, dtype=np.float32, **axis)  # fmt: skip

    def _node(self, graph: Graph, codes: np.ndarray, scale: Any, **options: Any) -> Tensor:
        # Optional, but optimisers go wrong without it; for vectors it would be as large as scales.
        zero = None if "block_size" in options else np.zeros(scale.shape, codes.dtype)
        return graph.node("DequantizeLinear", codes, scale, *([] if zero is None else [zero]),
                          shape=self.shape, dtype=np.float32, **options)  # fmt: skip


def code_dtype(signed: bool, bits: int) -> np.dtype:
    """The narrowest of ONNX's integers, of those that runtimes know, for codes."""
    if bits <= 4:
        return np.dtype(ml_dtypes.int4 if signed else ml_dtypes.uint4)
    return np.dtype(f"{'int' if signed else 'uint'}{8 if bits <= 8 else 16}")


def _arrange(array: np.ndarray, bunches: Sequence[tuple[int, ...]]) -> np.ndarray:
    order = [axis for bunch in bunches for axis in bunch]
    shape = [math.prod(array.shape[axis] for axis in bunch) for bunch in bunches]
    return array.transpose(order).reshape(shape)
