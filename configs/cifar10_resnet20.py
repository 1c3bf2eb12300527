"""Quantisation-aware training of a pretrained ResNet-20 on CIFAR-10, one epoch.

Start from a pretrained float network (`model.pretrained`, a safetensors file with the names of
akamaster/pytorch_resnet_cifar10) and fine-tune it with its quantisers in place:

    python -m experiments.train --config=configs/cifar10_resnet20.py:bits=4 --workdir=runs/r20-4 \
        --config.model.pretrained=PATH/akamaster_resnet20.safetensors

`dataset.name` is TFDS's `cifar10`, or `cifar10_local` for a set built from local files.

The float network scores 91.5 % on the first 1,000 test images (standard error about 0.9). Quantised
with OCTAV it goes from 89.5 to 90.7 % with 4 bits and from 64.3 to 90.0 % with 3; with max scaling
3 bits end at 85.2 % (results/qat_cifar10_resnet20.md). An epoch of 45,000 images takes four to
seven minutes on two CPU cores.

ARG: bits (2 to 8; 32 or "float" is no quantisation) or notation (of vectors, as in 3/3U/4/6, which
goes from 82.6 to 91.1 % in 200 steps: results/qat_cifar10_resnet20_vectors.md), clipping (octav,
max, exact, mse, p99.9), gradient (mph, mad, pwl, ste), scaling (dynamic, carried, static,
learned).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs._distillation import distillation_config
from configs._machine import machine_config
from configs._quant import quant_config


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(
        {
            "experiment": "cifar10_resnet20",
            "task": "image_classification",
            "seed": 0,
            "dataset": {
                "name": "cifar10",
                "data_dir": placeholder(str),  # None: the data room's default folder
                "train_split": "train",
                # Held out of the training images, to choose by; the test images are then looked at
                # once, at the end.
                "validation_split": placeholder(str),
                "test_split": "test",
                "augment": "crop_flip",
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
                "in_memory": True,  # keep what has been read
                "num_threads": 1,
                "num_workers": 0,
            },
            "model": {
                "name": "cifar_resnet",
                "depth": 20,
                "width": 16,
                "num_classes": 10,
                "in_channels": 3,
                "pretrained": placeholder(str),  # path of a safetensors or npz file
            },
            "quant": quant_config(arg),
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.02,
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": 1e-4,
            },
            "schedule": {"name": "cosine"},
            "label_smoothing": 0.0,
            "distillation": distillation_config(),
            "average_decay": 0.0,  # of the parameters that are evaluated; 0: those of the last step
            **machine_config(),
            "batch_size": 128,
            "total_epochs": 1.0,
            "eval_every_epochs": 1.0,
            "checkpoint_every_percent": 25.0,
            "log_every_steps": 20,
        }
    )
