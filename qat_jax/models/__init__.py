"""Float models in Flax NNX, one file a family, with pretrained weights in and out.

A model is made of plain Flax layers and knows nothing of quantisation: policies are put into it
from outside.
"""

from qat_jax.models.bert import (
    BERT_BASE,
    BERT_LARGE,
    MINILM,
    Bert,
    BertForQuestionAnswering,
    BertSize,
)
from qat_jax.models.mobilenet_v1 import MobileNetV1
from qat_jax.models.mobilenet_v2 import MobileNetV2
from qat_jax.models.mobilenet_v3 import MobileNetV3
from qat_jax.models.pretrained import Pretrained, find_pretrained
from qat_jax.models.resnet import ResNet
from qat_jax.models.resnet_cifar import CifarResNet
from qat_jax.models.weights import load_weights, save_weights

__all__ = [
    "BERT_BASE",
    "BERT_LARGE",
    "MINILM",
    "Bert",
    "BertForQuestionAnswering",
    "BertSize",
    "CifarResNet",
    "MobileNetV1",
    "MobileNetV2",
    "MobileNetV3",
    "Pretrained",
    "ResNet",
    "find_pretrained",
    "load_weights",
    "save_weights",
]
