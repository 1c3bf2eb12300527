"""Retraining of a pretrained MobileNet v1 0.75 with its quantisers, on what images there are.

    python -m experiments.train --workdir=runs/m \
        --config=configs/imagenet_mobilenet_v1.py:bits=4,scaling=dynamic \
        --config.quant.activation_bits=8 --config.dataset.data_dir=DIR \
        --config.dataset.train_split=train.zip --config.dataset.test_split=val.zip \
        --config.model.pretrained=PATH/mobilenet_v1_0.75_224.safetensors

The weight decay is that of OCTAV's short retraining of MobileNets (arXiv:2206.06501), and so is the
rate for each image of a batch; theirs sees ImageNet thirty times, this is for a thousand images.
The paper did not train this network.

ARG: as of cifar10_resnet20.py.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import imagenet, imagenet_mobilenet_v1_ptq

BATCH_SIZE = 50


def get_config(arg: str = "") -> ConfigDict:
    config = imagenet.get_config(f"model=mobilenet_v2,recipe=short,{arg}".rstrip(","))
    ptq = imagenet_mobilenet_v1_ptq.get_config()
    config.experiment = "imagenet_mobilenet_v1"
    config.dataset = ptq.dataset
    with config.unlocked():
        config.dataset.augment = "resized_crop_flip"
        config.dataset.validation_split = placeholder(str)
        config.dataset.num_threads, config.dataset.num_workers = 2, 0
        config.model = ptq.model
        config.model.dtype = "float32"
    config.schedule.decay_every_epochs = 3.0
    config.optimizer.learning_rate *= BATCH_SIZE / config.batch_size
    config.batch_size = BATCH_SIZE
    config.total_epochs = 5.0
    config.log_every_steps = 5
    return config
