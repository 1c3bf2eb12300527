"""A small ResNet-8 on scikit-learn's handwritten digits (8x8 pixels, 10 classes).

    python -m experiments.train --config=configs/digits.py --workdir=runs/digits-float
    python -m experiments.train --config=configs/digits.py:bits=4 --workdir=runs/digits-octav-4
    python -m experiments.train --config=configs/digits.py:bits=2,clipping=max,gradient=ste \
        --workdir=runs/digits-max-2

Expected test accuracy (360 images, seed 0; an image is 0.28 points, and seeds differ by about a
point): float 97.8 %; 4 bits, OCTAV 98.3 %, maximum 97.8 %; 2 bits, OCTAV with MPH gradients 97.2 %,
maximum 95.0 % (results/quickstart.json). Each takes about half a minute on two CPU cores, most of
it compilation.

ARG: bits (2 to 8; w2 to w8 of weights alone; 32 or "float" is no quantisation) or notation (of
vectors, as in 4/4U/4/6; 4/-/4/- of weights alone), clipping (octav, max, exact, mse, p99.9),
gradient (mph, mad, pwl, ste), scaling (dynamic, carried, static, learned).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs._distillation import distillation_config
from configs._machine import machine_config
from configs._quant import quant_config


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(
        {
            "experiment": "digits",
            "task": "image_classification",
            "seed": 0,
            "dataset": {
                "name": "digits",
                "data_dir": placeholder(str),  # None: the data room's default folder
                "train_split": "train",
                # Held out of the training images, to choose by; the test images are then looked at
                # once, at the end.
                "validation_split": placeholder(str),
                "test_split": "test",
                "augment": "none",
                "mean": (0.5,),
                "std": (0.5,),
                "in_memory": True,  # keep what has been read
                "num_threads": 1,
                "num_workers": 0,
            },
            "model": {
                "name": "cifar_resnet",
                "depth": 8,
                "width": 8,
                "num_classes": 10,
                "in_channels": 1,
                "pretrained": placeholder(str),  # path of a safetensors or npz file
            },
            "quant": quant_config(arg),
            "optimizer": {
                "name": "sgd",
                "learning_rate": 0.1,
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": 1e-4,
            },
            "schedule": {"name": "cosine", "warmup_percent": 5.0},
            "label_smoothing": 0.0,
            "distillation": distillation_config(),
            "average_decay": 0.0,  # of the parameters that are evaluated; 0: those of the last step
            **machine_config(),
            "batch_size": 64,
            "total_epochs": 15.0,
            "eval_every_epochs": 3.0,
            "checkpoint_every_epochs": 3.0,
            "log_every_steps": 10,
        }
    )
