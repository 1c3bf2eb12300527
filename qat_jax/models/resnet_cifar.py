"""Residual networks for small images (CIFAR): 6n+2 layers in three stages of n basic blocks.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2.
Shortcuts are the paper's option A: they have no parameters.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from qat_jax.models.initializers import he_normal

DEPTHS = (8, 20, 32, 44, 56, 110)

# Padding is explicit: "SAME" pads a 3x3 convolution of stride 2 on one side only, whereas the
# published networks, and their pretrained weights, have one pixel on every side.
_conv3x3 = partial(
    nnx.Conv,
    kernel_size=(3, 3),
    padding=((1, 1), (1, 1)),
    use_bias=False,
    kernel_init=he_normal,
)
# Flax's momentum is the share of the old average: 0.9 here is PyTorch's 0.1.
_batch_norm = partial(nnx.BatchNorm, momentum=0.9, epsilon=1e-5)


def shortcut(x: jax.Array, strides: int, channels: int) -> jax.Array:
    """Option A: keep every `strides`-th pixel and pad zero channels, half of them on each side.

    Args:
        x: activations, [N, H, W, C].
        strides: step between the pixels that are kept.
        channels: number of output channels, at least C.

    Returns:
        [N, ceil(H / strides), ceil(W / strides), channels], the dtype of `x`.
    """
    missing = channels - x.shape[-1]
    before = missing // 2
    kept = lax.slice(x, (0,) * x.ndim, x.shape, (1, strides, strides, 1))
    return jnp.pad(kept, ((0, 0), (0, 0), (0, 0), (before, missing - before)))


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions, each followed by batch normalisation, around a shortcut.

    Its input and its output are non-negative: both have passed a ReLU.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        strides: int,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
    ):
        self.channels = channels
        self.strides = strides
        self.conv1 = _conv3x3(in_channels, channels, strides=strides, dtype=dtype, rngs=rngs)
        self.bn1 = _batch_norm(channels, dtype=dtype, rngs=rngs)
        self.conv2 = _conv3x3(channels, channels, dtype=dtype, rngs=rngs)
        self.bn2 = _batch_norm(channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [N, H, W, in_channels] to [N, ceil(H / strides), ceil(W / strides), channels]."""
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + shortcut(x, self.strides, self.channels))


class CifarResNet(nnx.Module):
    """The CIFAR residual network of He et al. (2016), with option-A shortcuts.

    Layer paths are `conv1`, `bn1`, `layer1/0/conv1`, `layer1/0/bn1`, ..., `layer3/n-1/bn2`,
    `linear`. `model.train()` and `model.eval()` choose between batch and running statistics;
    a new model is in training mode.

    Args:
        depth: number of convolutional and linear layers: 8, 20, 32, 44, 56 or 110.
        num_classes: number of logits.
        in_channels: channels of the input images.
        width: channels of the first stage; the second has twice, the third four times as many.
        rngs: source of the `params` key; weights are drawn by He's initialisation.
        dtype: dtype of the computation; parameters and batch statistics stay float32. None
            means the wider of the input's dtype and float32.

    Raises:
        ValueError: `depth` is not one of the above, or a size is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> model = CifarResNet(depth=8, in_channels=1, width=4, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((2, 8, 8, 1))).shape
        (2, 10)
    """

    def __init__(
        self,
        depth: int = 20,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 16,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike | None = None,
    ):
        if depth not in DEPTHS:
            raise ValueError(f"depth is {depth}: choose one of {', '.join(map(str, DEPTHS))}")
        for name, size in [
            ("num_classes", num_classes),
            ("in_channels", in_channels),
            ("width", width),
        ]:
            if size < 1:
                raise ValueError(f"{name} is {size}: choose at least 1")

        def stage(in_channels: int, channels: int, strides: int) -> nnx.List[BasicBlock]:
            first = BasicBlock(in_channels, channels, strides, dtype=dtype, rngs=rngs)
            others = (
                BasicBlock(channels, channels, 1, dtype=dtype, rngs=rngs)
                for _ in range(blocks_per_stage - 1)
            )
            return nnx.List([first, *others])

        blocks_per_stage = (depth - 2) // 6
        self.conv1 = _conv3x3(in_channels, width, dtype=dtype, rngs=rngs)
        self.bn1 = _batch_norm(width, dtype=dtype, rngs=rngs)
        self.layer1 = stage(width, width, strides=1)
        self.layer2 = stage(width, 2 * width, strides=2)
        self.layer3 = stage(2 * width, 4 * width, strides=2)
        self.linear = nnx.Linear(
            4 * width,
            num_classes,
            kernel_init=he_normal,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Classify images.

        Args:
            images: normalised images, [N, H, W, in_channels], floating point.

        Returns:
            Logits, [N, num_classes], float32.
        """
        x = nnx.relu(self.bn1(self.conv1(images)))
        for stage in (self.layer1, self.layer2, self.layer3):
            for block in stage:
                x = block(x)
        x = jnp.mean(x, axis=(1, 2))
        return self.linear(x).astype(jnp.float32)
