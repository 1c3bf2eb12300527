"""MobileNet v3, small and large: inverted residuals that weigh their channels.

Howard et al., "Searching for MobileNetV3" (ICCV 2019, arXiv:1905.02244), tables 1 and 2, as
torchvision publishes them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qat_jax.models.initializers import he_normal_fan_out
from qat_jax.models.mobilenet_v2 import divisible_by_8


class Row(NamedTuple):
    """A line of the paper's tables: one block.

    Attributes:
        kernel: side of the depthwise window.
        inner: channels between the two 1x1 convolutions, at width 1.
        channels: of the output, at width 1.
        weighs_channels: whether there is squeeze-and-excitation.
        hard_swish: whether the activation is hard-swish and not ReLU.
        strides: of the depthwise convolution.
    """

    kernel: int
    inner: int
    channels: int
    weighs_channels: bool
    hard_swish: bool
    strides: int


_BLOCKS = {
    "small": (
        Row(3, 16, 16, True, False, 2),
        Row(3, 72, 24, False, False, 2),
        Row(3, 88, 24, False, False, 1),
        Row(5, 96, 40, True, True, 2),
        Row(5, 240, 40, True, True, 1),
        Row(5, 240, 40, True, True, 1),
        Row(5, 120, 48, True, True, 1),
        Row(5, 144, 48, True, True, 1),
        Row(5, 288, 96, True, True, 2),
        Row(5, 576, 96, True, True, 1),
        Row(5, 576, 96, True, True, 1),
    ),
    "large": (
        Row(3, 16, 16, False, False, 1),
        Row(3, 64, 24, False, False, 2),
        Row(3, 72, 24, False, False, 1),
        Row(5, 72, 40, True, False, 2),
        Row(5, 120, 40, True, False, 1),
        Row(5, 120, 40, True, False, 1),
        Row(3, 240, 80, False, True, 2),
        Row(3, 200, 80, False, True, 1),
        Row(3, 184, 80, False, True, 1),
        Row(3, 184, 80, False, True, 1),
        Row(3, 480, 112, True, True, 1),
        Row(3, 672, 112, True, True, 1),
        Row(5, 672, 160, True, True, 2),
        Row(5, 960, 160, True, True, 1),
        Row(5, 960, 160, True, True, 1),
    ),
}
_STEM = 16
_HIDDEN = {"small": 1024, "large": 1280}  # units of the layer before the classifier, at width 1
_HEAD_EXPANSION = 6
_SQUEEZE = 4

_conv = partial(nnx.Conv, kernel_init=he_normal_fan_out)
# Flax's momentum is the share of the old average: 0.99 here is PyTorch's 0.01.
_batch_norm = partial(nnx.BatchNorm, momentum=0.99, epsilon=1e-3)


class SqueezeExcite(nnx.Module):
    """Weighs each channel by what two 1x1 convolutions make of all channels' averages."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: DTypeLike | None = None):
        squeezed = divisible_by_8(channels // _SQUEEZE)
        self.reduce = _conv(channels, squeezed, (1, 1), dtype=dtype, rngs=rngs)
        self.expand = _conv(squeezed, channels, (1, 1), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [N, H, W, channels] to the same."""
        average = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * nnx.hard_sigmoid(self.expand(nnx.relu(self.reduce(average))))


class InvertedResidual(nnx.Module):
    """Expand, filter each channel, weigh the channels, project without an activation.

    There is no `expand` where nothing is expanded, and no `squeeze_excite` where channels are not
    weighed.
    """

    def __init__(
        self,
        in_channels: int,
        row: Row,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
    ):
        conv = partial(_conv, use_bias=False, dtype=dtype, rngs=rngs)
        batch_norm = partial(_batch_norm, dtype=dtype, rngs=rngs)
        inner = row.inner
        self.activation: Callable[[jax.Array], jax.Array] = (
            nnx.hard_swish if row.hard_swish else nnx.relu
        )
        self.has_shortcut = row.strides == 1 and in_channels == row.channels
        self.expands = inner != in_channels
        if self.expands:
            self.expand = conv(in_channels, inner, (1, 1))
            self.expand_bn = batch_norm(inner)
        self.depthwise = conv(
            inner,
            inner,
            (row.kernel, row.kernel),
            strides=row.strides,
            padding=row.kernel // 2,
            feature_group_count=inner,
        )
        self.depthwise_bn = batch_norm(inner)
        self.weighs_channels = row.weighs_channels
        if self.weighs_channels:
            self.squeeze_excite = SqueezeExcite(inner, dtype=dtype, rngs=rngs)
        self.project = conv(inner, row.channels, (1, 1))
        self.project_bn = batch_norm(row.channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [N, H, W, in_channels] to [N, ceil(H / strides), ceil(W / strides), channels]."""
        y = x
        if self.expands:
            y = self.activation(self.expand_bn(self.expand(y)))
        y = self.activation(self.depthwise_bn(self.depthwise(y)))
        if self.weighs_channels:
            y = self.squeeze_excite(y)
        y = self.project_bn(self.project(y))
        return x + y if self.has_shortcut else y


class MobileNetV3(nnx.Module):
    """The classifier of Howard et al. (2019).

    Layer paths are `conv1`, `bn1`, `blocks/0/depthwise`, `blocks/0/squeeze_excite/reduce`,
    `blocks/0/project`, `blocks/1/expand`, ..., `head`, `head_bn`, `hidden`, `classifier`.
    `model.train()` and `model.eval()` choose between batch and running statistics, and whether
    there is dropout; a new model is in training mode.

    Args:
        size: "small" or "large".
        width: multiplier of the numbers of channels.
        num_classes: number of logits.
        in_channels: channels of the input images.
        dropout: share of the classifier's inputs that training leaves out.
        rngs: source of the `params` key, and of the `dropout` key.
        dtype: dtype of the computation; parameters and batch statistics stay float32. None means
            the wider of the input's dtype and float32.

    Raises:
        ValueError: there is no such size, or a number is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> def classify(images):
        ...     return MobileNetV3("small", num_classes=10, rngs=nnx.Rngs(0))(images)
        >>> nnx.eval_shape(classify, jnp.zeros((1, 64, 64, 3))).shape
        (1, 10)
    """

    def __init__(
        self,
        size: str = "large",
        width: float = 1.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        dropout: float = 0.2,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
    ):
        if size not in _BLOCKS:
            raise ValueError(f"size is {size!r}: choose one of {', '.join(_BLOCKS)}")
        if min(width, num_classes, in_channels) <= 0:
            raise ValueError(
                f"width {width}, num_classes {num_classes}, in_channels {in_channels}: "
                "choose larger ones"
            )
        linear = partial(
            nnx.Linear, kernel_init=nnx.initializers.normal(0.01), dtype=dtype, rngs=rngs
        )
        channels = divisible_by_8(_STEM * width)
        self.conv1 = _conv(
            in_channels,
            channels,
            (3, 3),
            strides=2,
            padding=1,
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.bn1 = _batch_norm(channels, dtype=dtype, rngs=rngs)
        blocks = []
        for row in _BLOCKS[size]:
            row = row._replace(
                inner=divisible_by_8(row.inner * width),
                channels=divisible_by_8(row.channels * width),
            )
            blocks.append(InvertedResidual(channels, row, dtype=dtype, rngs=rngs))
            channels = row.channels
        self.blocks = nnx.List(blocks)
        features = _HEAD_EXPANSION * channels
        self.head = _conv(channels, features, (1, 1), use_bias=False, dtype=dtype, rngs=rngs)
        self.head_bn = _batch_norm(features, dtype=dtype, rngs=rngs)
        hidden = divisible_by_8(_HIDDEN[size] * width)
        self.hidden = linear(features, hidden)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.classifier = linear(hidden, num_classes)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Classify images.

        Args:
            images: normalised images, [N, H, W, in_channels], floating point, 224 by
                224 as published.

        Returns:
            Logits, [N, num_classes], float32.
        """
        x = nnx.hard_swish(self.bn1(self.conv1(images)))
        for block in self.blocks:
            x = block(x)
        x = nnx.hard_swish(self.head_bn(self.head(x)))
        x = nnx.hard_swish(self.hidden(jnp.mean(x, axis=(1, 2))))
        return self.classifier(self.dropout(x)).astype(jnp.float32)
