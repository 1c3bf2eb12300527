"""A pretrained ResNet-20 on CIFAR-10, quantised after training.

    python -m experiments.ptq --config=configs/cifar10_resnet20_ptq.py:4/4U/4/6 --workdir=runs/ptq \
        --config.dataset.name=cifar10_local --config.dataset.data_dir=DIR \
        --config.model.pretrained=PATH/akamaster_resnet20.safetensors

First convolution and classifier at 8 bits, clipped at the maximum. Expected accuracy on the first
1,000 test images (standard error about 0.9; float 91.5), dynamic thresholds, batches of 250, one
or two minutes a run on two CPU cores, most of them compilation:

    notation   weights and activations clipped at the maximum   by OCTAV
    8/8U       91.5                                             91.6
    4/4U       85.7                                             89.1
    4/4U/4/6   90.6
    3/3U/4/6   85.3

(results/ptq_resnet20_per_channel.md, results/ptq_resnet20_scales.csv.) Without vectors the
composition of the batches alone moves these by some tenths of a point.

ARG: bits as W/A/ws/as, such as 4/4U/4/6: weights, activations (U: unsigned where they can be), the
vector scales of each ("-": one floating-point scale a channel or layer); "float".
"""

from ml_collections import ConfigDict

from configs import cifar10_resnet20
from configs._ptq import ptq_config


def get_config(arg: str = "4/4U/4/6") -> ConfigDict:
    training = cifar10_resnet20.get_config()
    return ConfigDict(
        {
            "experiment": "cifar10_resnet20_ptq",
            "task": "image_classification",
            "seed": 0,
            "dataset": training.dataset,
            "model": training.model,
            "batch_size": 250,
            **ptq_config(arg),
        }
    )
