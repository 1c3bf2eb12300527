"""MobileNet v1: depthwise separable convolutions for 224x224 images.

Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications"
(arXiv:1704.04861), table 1, with TensorFlow's padding and clipped ReLU, as published weights need.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qat_jax.models.initializers import lecun_normal

# Output channels at width 1 and stride of the thirteen separable blocks.
_BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (512, 1),
    (1024, 2),
    (1024, 1),
)

_conv = partial(nnx.Conv, use_bias=False, kernel_init=lecun_normal)


def _batch_norm(channels: int, dtype: DTypeLike | None, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(channels, momentum=0.99, epsilon=1e-3, dtype=dtype, rngs=rngs)


class SeparableBlock(nnx.Module):
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution across channels."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        strides: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
    ):
        self.depthwise = _conv(
            in_channels,
            in_channels,
            (3, 3),
            strides=strides,
            feature_group_count=in_channels,
            dtype=dtype,
            rngs=rngs,
        )
        self.depthwise_bn = _batch_norm(in_channels, dtype, rngs)
        self.pointwise = _conv(in_channels, channels, (1, 1), dtype=dtype, rngs=rngs)
        self.pointwise_bn = _batch_norm(channels, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [N, H, W, in_channels] to [N, ceil(H / strides), ceil(W / strides), channels]."""
        x = nnx.relu6(self.depthwise_bn(self.depthwise(x)))
        return nnx.relu6(self.pointwise_bn(self.pointwise(x)))


class MobileNetV1(nnx.Module):
    """The classifier of Howard et al. (2017).

    Layer paths are `conv1`, `bn1`, `blocks/0/depthwise`, `blocks/0/depthwise_bn`,
    `blocks/0/pointwise`, `blocks/0/pointwise_bn`, ..., `classifier`. `model.train()` and
    `model.eval()` choose between batch and running statistics; a new model is in training mode.

    Args:
        width: multiplier of every number of channels (published: 0.25, 0.5, 0.75, 1).
        num_classes: number of logits.
        in_channels: channels of the input images.
        rngs: source of the `params` key.
        dtype: dtype of the computation; parameters and batch statistics stay float32. None means
            the wider of the input's dtype and float32.

    Raises:
        ValueError: a size is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> def classify(images):
        ...     model = MobileNetV1(width=0.25, num_classes=10, rngs=nnx.Rngs(0))
        ...     return model(images)
        >>> nnx.eval_shape(classify, jnp.zeros((1, 64, 64, 3))).shape
        (1, 10)
    """

    def __init__(
        self,
        width: float = 1.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
    ):
        if min(int(32 * width), num_classes, in_channels) < 1:
            raise ValueError(
                f"width {width}, num_classes {num_classes}, in_channels {in_channels}: "
                "choose larger ones"
            )
        channels = int(32 * width)
        self.conv1 = _conv(in_channels, channels, (3, 3), strides=2, dtype=dtype, rngs=rngs)
        self.bn1 = _batch_norm(channels, dtype, rngs)
        blocks = []
        for full_channels, strides in _BLOCKS:
            following = int(full_channels * width)
            blocks.append(SeparableBlock(channels, following, strides, dtype=dtype, rngs=rngs))
            channels = following
        self.blocks = nnx.List(blocks)
        self.classifier = nnx.Linear(channels, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Classify images.

        Args:
            images: scaled to [-1, 1], [N, H, W, in_channels], floating point, 224 by
                224 as published.

        Returns:
            Logits, [N, num_classes], float32.
        """
        x = nnx.relu6(self.bn1(self.conv1(images)))
        for block in self.blocks:
            x = block(x)
        return self.classifier(jnp.mean(x, axis=(1, 2))).astype(jnp.float32)
