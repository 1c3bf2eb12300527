"""MobileNet v2: inverted residuals with linear bottlenecks.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (CVPR 2018,
arXiv:1801.04381), table 2.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qat_jax.models.initializers import he_normal_fan_out

# Expansion, output channels at width 1, number of blocks, stride of the first of them.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM = 32
_HEAD = 1280

_conv = partial(nnx.Conv, use_bias=False, kernel_init=he_normal_fan_out)


def divisible_by_8(channels: float) -> int:
    """The multiple of 8 nearest to a number of channels, but not below nine tenths of it."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest if nearest >= 0.9 * channels else nearest + 8


class InvertedResidual(nnx.Module):
    """Expand by a 1x1 convolution, filter each channel, project without an activation.

    A shortcut joins input and output where they have the same shape. There is no `expand` where
    the expansion is 1.
    """

    def __init__(
        self,
        in_channels: int,
        expansion: int,
        channels: int,
        strides: int,
        *,
        padding: str | int,
        epsilon: float,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
    ):
        conv = partial(_conv, dtype=dtype, rngs=rngs)
        batch_norm = partial(nnx.BatchNorm, momentum=0.9, epsilon=epsilon, dtype=dtype, rngs=rngs)
        inner = in_channels * expansion
        self.has_shortcut = strides == 1 and in_channels == channels
        self.expands = expansion > 1
        if self.expands:
            self.expand = conv(in_channels, inner, (1, 1))
            self.expand_bn = batch_norm(inner)
        self.depthwise = conv(
            inner, inner, (3, 3), strides=strides, padding=padding, feature_group_count=inner
        )
        self.depthwise_bn = batch_norm(inner)
        self.project = conv(inner, channels, (1, 1))
        self.project_bn = batch_norm(channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [N, H, W, in_channels] to [N, ceil(H / strides), ceil(W / strides), channels]."""
        y = x
        if self.expands:
            y = nnx.relu6(self.expand_bn(self.expand(y)))
        y = nnx.relu6(self.depthwise_bn(self.depthwise(y)))
        y = self.project_bn(self.project(y))
        return x + y if self.has_shortcut else y


class MobileNetV2(nnx.Module):
    """The classifier of Sandler et al. (2018).

    Layer paths are `conv1`, `bn1`, `blocks/0/depthwise`, `blocks/0/project`, `blocks/1/expand`,
    ..., `head`, `head_bn`, `classifier`, and `blocks/1/expand_bn` and so on. `model.train()` and
    `model.eval()` choose between batch and running statistics, and whether there is dropout; a new
    model is in training mode.

    Args:
        width: multiplier of the numbers of channels.
        num_classes: number of logits.
        in_channels: channels of the input images.
        dropout: share of the classifier's inputs that training leaves out.
        tensorflow: whether padding and the epsilon of batch norms are those of the weights that
            TensorFlow published, instead of torchvision's.
        rngs: source of the `params` key, and of the `dropout` key.
        dtype: dtype of the computation; parameters and batch statistics stay float32. None means
            the wider of the input's dtype and float32.

    Raises:
        ValueError: a size is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> def classify(images):
        ...     return MobileNetV2(width=0.25, num_classes=10, rngs=nnx.Rngs(0))(images)
        >>> nnx.eval_shape(classify, jnp.zeros((1, 64, 64, 3))).shape
        (1, 10)
    """

    def __init__(
        self,
        width: float = 1.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        dropout: float = 0.2,
        tensorflow: bool = False,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
    ):
        if min(width, num_classes, in_channels) <= 0:
            raise ValueError(
                f"width {width}, num_classes {num_classes}, in_channels {in_channels}: "
                "choose larger ones"
            )
        padding: str | int = "SAME" if tensorflow else 1
        epsilon = 1e-3 if tensorflow else 1e-5
        batch_norm = partial(nnx.BatchNorm, momentum=0.9, epsilon=epsilon, dtype=dtype, rngs=rngs)
        channels = divisible_by_8(_STEM * width)
        self.conv1 = _conv(
            in_channels, channels, (3, 3), strides=2, padding=padding, dtype=dtype, rngs=rngs
        )
        self.bn1 = batch_norm(channels)
        blocks = []
        for expansion, full_channels, count, stride in _STAGES:
            for index in range(count):
                following = divisible_by_8(full_channels * width)
                block = InvertedResidual(
                    channels,
                    expansion,
                    following,
                    stride if index == 0 else 1,
                    padding=padding,
                    epsilon=epsilon,
                    rngs=rngs,
                    dtype=dtype,
                )
                blocks.append(block)
                channels = following
        self.blocks = nnx.List(blocks)
        features = divisible_by_8(_HEAD * max(1.0, width))
        self.head = _conv(channels, features, (1, 1), dtype=dtype, rngs=rngs)
        self.head_bn = batch_norm(features)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.classifier = nnx.Linear(
            features,
            num_classes,
            kernel_init=nnx.initializers.normal(0.01),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Classify images.

        Args:
            images: normalised images, [N, H, W, in_channels], floating point, 224 by
                224 as published.

        Returns:
            Logits, [N, num_classes], float32.
        """
        x = nnx.relu6(self.bn1(self.conv1(images)))
        for block in self.blocks:
            x = block(x)
        x = nnx.relu6(self.head_bn(self.head(x)))
        x = self.dropout(jnp.mean(x, axis=(1, 2)))
        return self.classifier(x).astype(jnp.float32)
