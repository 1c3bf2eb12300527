"""Float models in Flax NNX, one file a family, with pretrained weights in and out.

A model is made of plain Flax layers and knows nothing of quantisation: policies are put into it
from outside.
"""

from qat_jax.models.keras_weights import load_keras_mobilenet_v1
from qat_jax.models.mobilenet_v1 import MobileNetV1
from qat_jax.models.resnet_cifar import CifarResNet
from qat_jax.models.weights import load_weights, save_weights

__all__ = [
    "CifarResNet",
    "MobileNetV1",
    "load_keras_mobilenet_v1",
    "load_weights",
    "save_weights",
]
