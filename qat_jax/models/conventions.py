"""What other libraries call the variables of these models, and how they lay them out."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from qat_jax.models.bert import Bert, BertForQuestionAnswering
from qat_jax.models.mobilenet_v1 import MobileNetV1
from qat_jax.models.mobilenet_v2 import MobileNetV2
from qat_jax.models.mobilenet_v3 import MobileNetV3
from qat_jax.models.resnet import ResNet
from qat_jax.models.resnet_cifar import CifarResNet


def _to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """HWIO to OIHW, [in, out] to [out, in]; vectors as they are."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _from_torch(name: str, array: np.ndarray) -> np.ndarray:
    """OIHW to HWIO, [out, in] to [in, out]; vectors as they are."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


_TORCH_VARIABLES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "embedding": "weight",
}


@dataclasses.dataclass(frozen=True)
class Convention:
    """A library's names and layouts of one family of models.

    Attributes:
        library: its name.
        layer: from a model and the path of one of its layers, `layer1/0/conv1`, to the library's
            name of it.
        variable: from the library's name of a layer and ours of its variable to that of both.
        to_file: from a name and an array of ours to the array in a file.
        from_file: back, but for the shape: axes that the file has as one may still be one.
        ignored: pattern of names in files that the model has no use for.
        renamed: from a name that older files have to today's.
    """

    library: str
    layer: Callable[[Any, str], str]
    variable: Callable[[str, str], str] = lambda layer, leaf: f"{layer}.{_TORCH_VARIABLES[leaf]}"
    to_file: Callable[[str, np.ndarray], np.ndarray] = _to_torch
    from_file: Callable[[str, np.ndarray], np.ndarray] = _from_torch
    # PyTorch's batch norms count their batches; with a fixed momentum nothing reads the count.
    ignored: str = r".*\.num_batches_tracked"
    renamed: Callable[[str], str] = lambda name: name

    def name(self, model: nnx.Module, path: tuple[Any, ...]) -> str:
        """The library's name of the variable at a path of the model.

        Raises:
            ValueError: it has none.
        """
        *layer, leaf = path
        if leaf not in _TORCH_VARIABLES:
            raise ValueError(
                f"variable {'/'.join(map(str, path))} has no PyTorch name: "
                "load and save models of this library's kinds, or of Conv, Linear and BatchNorm"
            )
        return self.variable(self.layer(model, "/".join(map(str, layer))), leaf)


def of_model(model: nnx.Module) -> tuple[Convention, ...]:
    """The conventions in which there are weights of such a model; the first is its own."""
    families = (_CONVENTIONS[kind] for kind in type(model).__mro__ if kind in _CONVENTIONS)
    return next(families, (_TORCH,))


def _huggingface_unit(layer: str) -> tuple[str, str]:
    """A layer's convolution, by name, and which half of the unit around it the layer is."""
    convolution = layer.removesuffix("_bn").replace("bn", "conv")
    return convolution, "convolution" if convolution == layer else "normalization"


def _huggingface_resnet(model: ResNet, layer: str) -> str:
    if layer == "fc":
        return "classifier.1"
    if match := re.fullmatch(r"layer(\d)/(\d+)/downsample/([01])", layer):
        stage, block, half = match.groups()
        unit, half = f"{block}.shortcut", ("convolution", "normalization")[int(half)]
    elif match := re.fullmatch(r"layer(\d)/(\d+)/(?:conv|bn)(\d)", layer):
        stage, block, number = match.groups()
        unit, half = f"{block}.layer.{int(number) - 1}", _huggingface_unit(layer)[1]
    else:
        return f"resnet.embedder.embedder.{_huggingface_unit(layer)[1]}"
    return f"resnet.encoder.stages.{int(stage) - 1}.layers.{unit}.{half}"


def _huggingface_mobilenet_v1(model: MobileNetV1, layer: str) -> str:
    convolution, half = _huggingface_unit(layer)
    if convolution == "classifier":
        return convolution
    if convolution == "conv1":
        return f"mobilenet_v1.conv_stem.{half}"
    _, block, kind = convolution.split("/")
    return f"mobilenet_v1.layer.{2 * int(block) + (kind == 'pointwise')}.{half}"


def _huggingface_mobilenet_v2(model: MobileNetV2, layer: str) -> str:
    convolution, half = _huggingface_unit(layer)
    if convolution == "classifier":
        return convolution
    kinds = {"expand": "expand_1x1", "depthwise": "conv_3x3", "project": "reduce_1x1"}
    if convolution in ("conv1", "head"):
        unit = {"conv1": "conv_stem.first_conv", "head": "conv_1x1"}[convolution]
    else:
        _, block, kind = convolution.split("/")
        unit = f"{'conv_stem' if block == '0' else f'layer.{int(block) - 1}'}.{kinds[kind]}"
    return f"mobilenet_v2.{unit}.{half}"


def _torchvision_mobilenet_v2(model: MobileNetV2, layer: str) -> str:
    convolution = layer.removesuffix("_bn").replace("bn", "conv")
    half = int(convolution != layer)
    if convolution == "classifier":
        return "classifier.1"
    if convolution in ("conv1", "head"):
        return f"features.{0 if convolution == 'conv1' else len(model.blocks) + 1}.{half}"
    _, block, kind = convolution.split("/")
    kinds = ["depthwise", "project"] if block == "0" else ["expand", "depthwise", "project"]
    position = kinds.index(kind)
    # The projection has no activation, and so is no unit of its own.
    place = f"{position + half}" if kind == "project" else f"{position}.{half}"
    return f"features.{int(block) + 1}.conv.{place}"


def _torchvision_mobilenet_v3(model: MobileNetV3, layer: str) -> str:
    convolution = layer.removesuffix("_bn").replace("bn", "conv")
    half = int(convolution != layer)
    if convolution in ("hidden", "classifier"):
        return f"classifier.{0 if convolution == 'hidden' else 3}"
    if convolution in ("conv1", "head"):
        return f"features.{0 if convolution == 'conv1' else len(model.blocks) + 1}.{half}"
    _, block, kind, *rest = convolution.split("/")
    kinds = ["expand", "depthwise", "squeeze_excite", "project"]
    present = [k for k in kinds if hasattr(model.blocks[int(block)], k)]
    place = {"reduce": "fc1", "expand": "fc2"}[rest[0]] if rest else half
    return f"features.{int(block) + 1}.block.{present.index(kind)}.{place}"


def _keras_mobilenet_v1(model: MobileNetV1, layer: str) -> str:
    """`blocks/0/depthwise_bn` is `conv_dw_1_bn`."""
    ends = {"conv1": "conv1", "bn1": "conv1_bn", "classifier": "conv_preds"}
    if layer in ends:
        return ends[layer]
    _, block, kind = layer.split("/")
    kind, is_batch_norm, _ = kind.partition("_bn")
    kind = {"depthwise": "conv_dw", "pointwise": "conv_pw"}[kind]
    return f"{kind}_{int(block) + 1}{is_batch_norm}"


def _keras_variable(layer: str, leaf: str) -> str:
    if layer.endswith("_bn"):
        names = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
        return f"{layer}/{names[leaf]}"
    return f"{layer}/{'depthwise_kernel' if 'conv_dw' in layer else leaf}"


def _to_keras(name: str, array: np.ndarray) -> np.ndarray:
    """HW1C to HWC1 for depthwise kernels, IO to 11IO for the classifier's: only 1s move."""
    if name.endswith("depthwise_kernel"):
        return array.transpose(0, 1, 3, 2)
    return array[None, None] if name == "conv_preds/kernel" else array


def _from_keras(name: str, array: np.ndarray) -> np.ndarray:
    if name.endswith("depthwise_kernel"):
        return array.transpose(0, 1, 3, 2)
    return array[0, 0] if name == "conv_preds/kernel" else array


def _huggingface_bert(model: Bert, layer: str) -> str:
    """`layers/0/attention/query` is `encoder.layer.0.attention.self.query`."""
    names = {
        "embeddings/word": "embeddings.word_embeddings",
        "embeddings/position": "embeddings.position_embeddings",
        "embeddings/token_type": "embeddings.token_type_embeddings",
        "embeddings/norm": "embeddings.LayerNorm",
        "pooler": "pooler.dense",
        "attention/query": "attention.self.query",
        "attention/key": "attention.self.key",
        "attention/value": "attention.self.value",
        "attention/out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "intermediate": "intermediate.dense",
        "output": "output.dense",
        "output_norm": "output.LayerNorm",
    }
    if match := re.fullmatch(r"layers/(\d+)/(.*)", layer):
        return f"encoder.layer.{match[1]}.{names[match[2]]}"
    return names[layer]


def _huggingface_question_answering(model: BertForQuestionAnswering, layer: str) -> str:
    if layer == "answer":
        return "qa_outputs"
    return f"bert.{_huggingface_bert(model.bert, layer.removeprefix('bert/'))}"


def _to_bert(name: str, array: np.ndarray) -> np.ndarray:
    """[in…, out…] to [out, in], heads and their features as one axis; embeddings as they are."""
    if name.endswith("bias") or "LayerNorm" in name:
        return array.reshape(-1)
    if "embeddings" in name:
        return array
    if "attention.output" in name:  # [heads, depth, out]
        return array.reshape(-1, array.shape[-1]).T
    return array.reshape(array.shape[0], -1).T


def _from_bert(name: str, array: np.ndarray) -> np.ndarray:
    return array if array.ndim == 1 or "embeddings" in name else array.T


_TORCH = Convention("torchvision", lambda model, layer: layer.replace("/", "."))
_AKAMASTER = Convention(
    "pytorch_resnet_cifar10", lambda model, layer: "module." + layer.replace("/", ".")
)
_KERAS_MOBILENET_V1 = Convention(
    "keras", _keras_mobilenet_v1, _keras_variable, _to_keras, _from_keras
)
_BERT: dict[str, Any] = {
    "to_file": _to_bert,
    "from_file": _from_bert,
    # The head of pretraining, and what a model without pooling has no layer for.
    "ignored": r"(bert\.)?(pooler|embeddings\.position_ids|cls).*",
    "renamed": lambda name: name.replace("Norm.gamma", "Norm.weight").replace(
        "Norm.beta", "Norm.bias"
    ),
}
_CONVENTIONS: dict[type[nnx.Module], tuple[Convention, ...]] = {
    CifarResNet: (_AKAMASTER,),
    ResNet: (_TORCH, Convention("huggingface", _huggingface_resnet)),
    MobileNetV1: (_KERAS_MOBILENET_V1, Convention("huggingface", _huggingface_mobilenet_v1)),
    MobileNetV2: (
        Convention("torchvision", _torchvision_mobilenet_v2),
        Convention("huggingface", _huggingface_mobilenet_v2),
    ),
    Bert: (
        Convention("huggingface", _huggingface_bert, **_BERT),
        Convention(
            "huggingface, under bert",
            lambda model, layer: f"bert.{_huggingface_bert(model, layer)}",
            **_BERT,
        ),
    ),
    BertForQuestionAnswering: (
        Convention("huggingface", _huggingface_question_answering, **_BERT),
    ),
    MobileNetV3: (Convention("torchvision", _torchvision_mobilenet_v3),),
}
