"""Residual networks for ImageNet: 18 to 152 layers, version 1.5.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (CVPR 2016), table 1. In
version 1.5 a bottleneck block strides in its 3x3 convolution instead of the 1x1 before it: the
networks that are commonly published, and quantised, as "ResNet-50".
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from qat_jax.models.initializers import he_normal_fan_out

_conv = partial(nnx.Conv, use_bias=False, kernel_init=he_normal_fan_out)
# Flax's momentum is the share of the old average: 0.9 here is PyTorch's 0.1.
_batch_norm = partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5)


def _projection(
    in_channels: int, channels: int, strides: int, dtype: DTypeLike | None, rngs: nnx.Rngs
) -> nnx.List | None:
    """Convolution and batch norm of a shortcut that changes the shape; None where it does not."""
    if strides == 1 and in_channels == channels:
        return None
    conv = _conv(in_channels, channels, (1, 1), strides=strides, dtype=dtype, rngs=rngs)
    return nnx.List([conv, _batch_norm(channels, dtype=dtype, rngs=rngs)])


def _shortcut(x: jax.Array, projection: nnx.List | None) -> jax.Array:
    for layer in projection or ():
        x = layer(x)
    return x


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions around a shortcut. Input and output are non-negative."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        strides: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
    ):
        conv = partial(_conv, kernel_size=(3, 3), padding=1, dtype=dtype, rngs=rngs)
        batch_norm = partial(_batch_norm, dtype=dtype, rngs=rngs)
        self.conv1 = conv(in_channels, channels, strides=strides)
        self.bn1 = batch_norm(channels)
        self.conv2 = conv(channels, channels)
        self.bn2 = batch_norm(channels)
        self.downsample = nnx.data(_projection(in_channels, channels, strides, dtype, rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [N, H, W, in_channels] to [N, ceil(H / strides), ceil(W / strides), channels]."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + _shortcut(x, self.downsample))


class BottleneckBlock(nnx.Module):
    """A 3x3 convolution between two 1x1 ones, around a shortcut. Input and output are non-negative.

    The output has four times `channels`.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        strides: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
    ):
        conv = partial(_conv, dtype=dtype, rngs=rngs)
        batch_norm = partial(_batch_norm, dtype=dtype, rngs=rngs)
        out_channels = self.expansion * channels
        self.conv1 = conv(in_channels, channels, (1, 1))
        self.bn1 = batch_norm(channels)
        self.conv2 = conv(channels, channels, (3, 3), strides=strides, padding=1)
        self.bn2 = batch_norm(channels)
        self.conv3 = conv(channels, out_channels, (1, 1))
        self.bn3 = batch_norm(out_channels)
        self.downsample = nnx.data(_projection(in_channels, out_channels, strides, dtype, rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [N, H, W, in_channels] to [N, ceil(H / strides), ceil(W / strides), 4 channels]."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return nnx.relu(y + _shortcut(x, self.downsample))


_LAYOUTS: dict[int, tuple[type[BasicBlock] | type[BottleneckBlock], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (BottleneckBlock, (3, 4, 6, 3)),
    101: (BottleneckBlock, (3, 4, 23, 3)),
    152: (BottleneckBlock, (3, 8, 36, 3)),
}


class ResNet(nnx.Module):
    """The ImageNet residual network of He et al. (2016), version 1.5.

    Layer paths are torchvision's: `conv1`, `bn1`, `layer1/0/conv1`, ..., `layer2/0/downsample/0`
    (the projection, and its batch norm `/1`), ..., `fc`. `model.train()` and `model.eval()` choose
    between batch and running statistics; a new model is in training mode.

    Args:
        depth: number of convolutional and linear layers: 18, 34, 50, 101 or 152.
        num_classes: number of logits.
        in_channels: channels of the input images.
        width: channels of the first stage before expansion; doubled from stage to stage.
        rngs: source of the `params` key.
        dtype: dtype of the computation; parameters and batch statistics stay float32. None means
            the wider of the input's dtype and float32.

    Raises:
        ValueError: `depth` is not one of the above, or a size is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> def classify(images):
        ...     return ResNet(50, rngs=nnx.Rngs(0))(images)
        >>> nnx.eval_shape(classify, jnp.zeros((2, 224, 224, 3))).shape
        (2, 1000)
    """

    def __init__(
        self,
        depth: int = 50,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: int = 64,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
    ):
        if depth not in _LAYOUTS:
            raise ValueError(f"depth is {depth}: choose one of {', '.join(map(str, _LAYOUTS))}")
        sizes = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}: choose at least 1")
        block, counts = _LAYOUTS[depth]
        self.conv1 = _conv(in_channels, width, (7, 7), strides=2, padding=3, dtype=dtype, rngs=rngs)
        self.bn1 = _batch_norm(width, dtype=dtype, rngs=rngs)
        before = width

        def stage(number: int) -> nnx.List:
            nonlocal before
            channels = width * 2**number
            blocks = []
            for index in range(counts[number]):
                strides = 2 if number and index == 0 else 1
                blocks.append(block(before, channels, strides, dtype=dtype, rngs=rngs))
                before = channels * block.expansion
            return nnx.List(blocks)

        self.layer1 = stage(0)
        self.layer2 = stage(1)
        self.layer3 = stage(2)
        self.layer4 = stage(3)
        self.fc = nnx.Linear(
            before,
            num_classes,
            kernel_init=nnx.initializers.normal(0.01),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Classify images.

        Args:
            images: normalised images, [N, H, W, in_channels], floating point; 224 by 224 as
                published.

        Returns:
            Logits, [N, num_classes], float32.
        """
        x = nnx.relu(self.bn1(self.conv1(images)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x)
        return self.fc(jnp.mean(x, axis=(1, 2))).astype(jnp.float32)
