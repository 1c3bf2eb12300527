"""Depthwise convolutions, also where the compiler is slow at them.

XLA's CPU compiler takes some ten times as long over one as over the same sum of shifted images.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Convolution = Callable[[jax.Array, jax.Array], jax.Array]

_FEATURES_LAST = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def conv_general_dilated(
    x: jax.Array,
    w: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """``jax.lax.conv_general_dilated``; on a CPU `shift_and_add` where that does the same.

    Args:
      x: the input.
      w: the kernel.
      window_strides: as in ``jax.lax``; so are the others.
      padding: of the input.
      options: the rest, by name, ``dimension_numbers`` as ``ConvDimensionNumbers``.

    Returns:
      The convolution.
    """
    general: Convolution = partial(
        lax.conv_general_dilated, window_strides=window_strides, padding=padding, **options
    )
    plain = options | {"precision": None, "feature_group_count": None, "dimension_numbers": None}
    if not (
        options["dimension_numbers"] == _FEATURES_LAST
        and x.shape[3] == w.shape[3] == options["feature_group_count"] > 1
        and x.dtype == w.dtype == jnp.float32
        and all(value in (None, 1, (1, 1)) for value in plain.values())
    ):
        return general(x, w)
    shifted: Convolution = partial(shift_and_add, window_strides=window_strides, padding=padding)
    return lax.platform_dependent(x, w, cpu=shifted, default=general)


def shift_and_add(
    x: jax.Array,
    w: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
) -> jax.Array:
    """A depthwise convolution as the sum over the window of the shifted input times one weight.

    Args:
      x: the input, [N, H, W, C].
      w: the kernel, [height, width, 1, C].
      window_strides: along H and W.
      padding: "SAME", "VALID", or (before, after) for H and W.

    Returns:
      The convolution, [N, H', W', C].

    Example:
      >>> x, w = jnp.ones((1, 4, 4, 8)), jnp.ones((3, 3, 1, 8))
      >>> shift_and_add(x, w, (2, 2), "SAME")[0, :, :, 0]
      Array([[9., 6.],
             [6., 4.]], dtype=float32)
    """
    window = w.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], window, window_strides, padding)
    edges = [(low, high, 0) for low, high in ((0, 0), *padding, (0, 0))]
    x = lax.pad(x, jnp.zeros((), x.dtype), edges)  # unlike jnp.pad it can take away, too
    strides = (1, *window_strides, 1)
    last = [  # where the last window starts
        (extent - width) // stride * stride
        for extent, width, stride in zip(x.shape[1:3], window, window_strides, strict=True)
    ]
    batch, _, _, features = x.shape
    terms = (
        lax.slice(x, (0, i, j, 0), (batch, i + last[0] + 1, j + last[1] + 1, features), strides)
        * w[i, j, 0]
        for i, j in product(*map(range, window))
    )
    return reduce(jnp.add, terms)
