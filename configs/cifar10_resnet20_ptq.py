"""A pretrained ResNet-20 on CIFAR-10, quantised after training with dynamic thresholds.

    python -m experiments.ptq --config=configs/cifar10_resnet20_ptq.py:bits=4 --workdir=runs/ptq-4 \
        --config.dataset.name=cifar10_local \
        --config.model.pretrained=PATH/akamaster_resnet20.safetensors

Narrow grids; first convolution and classifier at 8 bits with max scaling; between them weights
per output channel and activations per tensor, whose thresholds come from each batch of 250.

Expected accuracy on the first 1,000 test images (standard error about 0.9; float 91.5), about
20 seconds a run on two CPU cores:

    bits  max   octav
    8     91.5  91.9
    6     92.1  91.9
    4     85.7  89.4
    3     47.8  64.4

The composition of the batches alone moves these by some tenths of a point.

ARG: bits (2 to 8; 32 or "float" is no quantisation), clipping (octav, max).
"""

from ml_collections import ConfigDict

from configs import cifar10_resnet20


def get_config(arg: str = "bits=8") -> ConfigDict:
    training = cifar10_resnet20.get_config(arg)
    config = ConfigDict(
        {
            "experiment": "cifar10_resnet20_ptq",
            "seed": 0,
            "dataset": training.dataset,
            "model": training.model,
            "quant": training.quant,
            "batch_size": 250,
        }
    )
    config.quant.edge_clipping = "max"
    return config
