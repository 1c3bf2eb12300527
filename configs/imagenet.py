"""OCTAV's ImageNet experiments (arXiv:2206.06501, tables 1 to 4): one recipe, any bits.

    python -m experiments.train --config=configs/imagenet.py:model=resnet50,recipe=scratch,bits=4 \
        --workdir=runs/r50-scratch-4 --config.dataset.data_dir=DIR

ARG, separated by commas:

    model     resnet18, resnet34, resnet50, resnet101, resnet152, mobilenet_v2, mobilenet_v3_small,
              mobilenet_v3_large
    recipe    scratch, short (retraining) or long; the last two need --config.model.pretrained=FILE,
              safetensors with torchvision's or Hugging Face's names
    bits      of weights and activations; 32 is float. First convolution and classifier have 8
    clipping  octav, octav10 (all iterations on all elements), max, mse, exact, p99.9 …
    gradient  mph (MAD for weights, PWL for activations), mad, pwl, ste
    scaling   dynamic: thresholds are found in every step; carried: from those of the step before;
              static: once, on five batches; learned: those are trained, by LSQ's gradient

The recipes are the paper's: they do not change with the bits. Its grids are two's complement; ours
are narrow unless `--config.quant.narrow=False` says otherwise (docs/decisions.md). Images come from
TFDS (`imagenet2012`, prepared), from folders of classes (`--config.dataset.name=image_folder
--config.dataset.train_split=train --config.dataset.test_split=val`), or are noise
(`--config.dataset.name=fake`, to see whether a machine carries a recipe;
`--config.dataset.fake_examples=16 --config.batch_size=16 --config.total_epochs=1` is one step).

What the paper published, top-1 in per cent; none of it has been run here, for want of ImageNet:

    table 1, resnet50, scratch, 4 bits: float 76.07; max 72.67; OCTAV with ste 67.75, pwl 74.31,
    mad 74.81, mph 75.15

    table 2, scratch     float   octav 4   max 4   octav 6   max 6   octav 8   max 8
    resnet50             76.07     75.15   72.67     76.07   76.01     76.24   76.12
    resnet18             70.12     69.17   65.65     69.78   69.52     70.07   70.19
    resnet101            77.28     76.48   72.53     77.30   77.04     77.31   77.15
    mobilenet_v2         71.71     70.88   69.17     71.64   71.79     71.71   71.77
    mobilenet_v3_small   65.99     54.68    0.39     65.02   60.17     65.98   65.14
    mobilenet_v3_large   72.97     65.86    1.25     72.12   69.38     72.89   72.78

    tables 3 and 4, 4 bits   short, dynamic        short, static             long, octav
                             octav     max    octav     mse   p99.9     dynamic  static
    resnet50                 75.38   71.44    75.84   75.85   75.66       76.21   76.46
    resnet18                 69.16   65.53    69.18   69.28   69.04       69.90   70.13
    resnet101                76.10   70.88    76.96   77.01   76.79       76.84   77.48
    mobilenet_v2             69.32   66.94     0.66    0.93    1.72       71.23    1.21
    mobilenet_v3_small       53.52    0.10     0.43    0.58    0.65       58.93    0.80
    mobilenet_v3_large       64.97   39.46     0.39    0.30    0.34       69.21    0.60

Cost, by arithmetic and not by measurement: a step needs about three times the forward pass's 1.8
(resnet18), 4.1 (resnet50), 7.8 (resnet101), 0.3 (mobilenet_v2), 0.06 and 0.2 (mobilenet_v3) billion
multiplications an image, and an epoch has 1,281,167 images: 150 epochs of resnet50 are 4.7e18
floating-point operations.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs._distillation import distillation_config
from configs._machine import machine_config
from configs._quant import quant_config

MODELS: dict[str, dict[str, Any]] = {
    **{f"resnet{depth}": {"name": "resnet", "depth": depth} for depth in (18, 34, 50, 101, 152)},
    "mobilenet_v2": {"name": "mobilenet_v2", "width": 1.0, "dropout": 0.2, "tensorflow": False},
    **{
        f"mobilenet_v3_{size}": {"name": "mobilenet_v3", "size": size, "width": 1.0, "dropout": 0.2}
        for size in ("small", "large")
    },
}
# Learning rate, batch size, epochs between decays by ten, epochs, of training from scratch.
_RESNET = (0.1, 512, 30, 150)
_MOBILENET = (0.2, 1024, 100, 300)
_SCRATCH = {name: _RESNET if "resnet" in name else _MOBILENET for name in MODELS}
_SCRATCH["resnet101"] = _SCRATCH["resnet152"] = (0.1, 512, 30, 80)
# Learning rate, epochs between decays by ten, epochs, of the short retraining.
_SHORT = {name: (1e-4, 5, 15) if "resnet" in name else (1e-2, 10, 30) for name in MODELS}
_SHORT["resnet18"] = _SHORT["resnet34"] = (1e-4, 10, 30)
_LONG_EPOCHS = {name: 150 if "resnet" in name else 300 for name in MODELS}
_WEIGHT_DECAY = {name: 1e-4 if "resnet" in name else 1e-5 for name in MODELS} | {
    "mobilenet_v2": 4e-5
}


def get_config(arg: str = "") -> ConfigDict:
    parts = arg.split(",")
    ours = dict(part.split("=", 1) for part in parts if part.startswith(("model=", "recipe=")))
    theirs = ",".join(part for part in parts if not part.startswith(("model=", "recipe=")))
    model, recipe = ours.get("model", "resnet50"), ours.get("recipe", "scratch")
    if model not in MODELS:
        raise ValueError(f"model={model}: give one of {', '.join(MODELS)}")
    learning_rate, batch_size, decay_every, epochs = _SCRATCH[model]
    match recipe:
        case "scratch":
            pass
        case "short":
            learning_rate, decay_every, epochs = _SHORT[model]
        case "long":
            learning_rate, epochs = learning_rate * 1e-2, _LONG_EPOCHS[model]
        case _:
            raise ValueError(f"recipe={recipe}: give scratch, short or long")
    return ConfigDict(
        {
            "experiment": f"imagenet_{model}_{recipe}",
            "task": "image_classification",
            "seed": 0,
            "dataset": {
                "name": "imagenet2012",
                "fake_examples": 1024,  # of noise, where the name is "fake"
                "data_dir": placeholder(str),  # None: the data room's default folder
                "train_split": "train",
                # Held out of the training images, to choose by; the test images are then looked at
                # once, at the end.
                "validation_split": placeholder(str),
                "test_split": "validation",
                "augment": "resized_crop_flip",
                "size": 224,
                "resize": 256,  # the shorter side of a test image, before its centre crop
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
                "num_threads": 16,
                "num_workers": 0,
            },
            "model": {
                **MODELS[model],
                "num_classes": 1000,
                "in_channels": 3,
                "dtype": "float32",  # of the computation; bfloat16 keeps parameters in float32
                "pretrained": placeholder(str),  # path of a safetensors or npz file
            },
            "retrains": recipe != "scratch",
            "quant": quant_config(theirs),
            "optimizer": {
                "name": "sgd",
                "learning_rate": learning_rate,
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": _WEIGHT_DECAY[model],
            },
            "schedule": {
                "name": "step",
                "decay_factor": 0.1,
                "decay_every_epochs": float(decay_every),
            },
            "label_smoothing": 0.0,
            "distillation": distillation_config(),
            "average_decay": 0.0,  # of the parameters that are evaluated; 0: those of the last step
            **machine_config(),
            "batch_size": batch_size,
            "total_epochs": float(epochs),
            "eval_every_epochs": 1.0,
            "checkpoint_every_epochs": 1.0,
            "log_every_steps": 100,
        }
    )
