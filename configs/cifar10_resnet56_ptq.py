"""A pretrained ResNet-56 on CIFAR-10, quantised after training.

    python -m experiments.ptq --config=configs/cifar10_resnet56_ptq.py:4/4U/4/6 --workdir=runs/ptq \
        --config.dataset.name=cifar10_local --config.dataset.data_dir=DIR \
        --config.model.pretrained=PATH/akamaster_resnet56.safetensors

As `configs/cifar10_resnet20_ptq.py`, for the deeper network: float 92.6 on the first 1,000 test
images, 92.2 at 4/4U/4/6 and 90.9 at 3/3U/4/6 (results/ptq_resnet56_order.csv).

ARG: bits as W/A/ws/as; "float".
"""

from ml_collections import ConfigDict

from configs import cifar10_resnet20_ptq


def get_config(arg: str = "4/4U/4/6") -> ConfigDict:
    config = cifar10_resnet20_ptq.get_config(arg)
    config.experiment = "cifar10_resnet56_ptq"
    config.model.depth = 56
    return config
