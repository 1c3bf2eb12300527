"""BERT-base on SQuAD 1.1: OCTAV's table 5 (arXiv:2206.06501).

    python -m experiments.train --config=configs/squad_bert_base.py:bits=4 --workdir=runs/squad-4 \
        --config.model.pretrained=DIR --config.dataset.name=squad_json \
        --config.dataset.data_dir=DIR --config.dataset.train_split=train-v1.1.json \
        --config.dataset.test_split=dev-v1.1.json

`model.pretrained` is a folder with model.safetensors and vocab.txt. Weights have a threshold for
each output feature, activations one for each tensor, at the input of every linear layer and of both
products of attention; the head has 8 bits (quant.edge_bits); embeddings, norms and the softmax stay
in float.

Published F1 (float 88.24):

    bits            4      5      6      7      8
    dynamic octav   84.51  86.30  87.43  88.28  88.34
    dynamic max     11.51  78.97  85.17  87.46  88.01
    static octav    83.60  85.82  87.14  87.67  88.02
    static mse      81.82  84.16  87.14  87.68  87.97
    static p99.9    81.06  85.78  86.73  86.84  87.34
    static p99.99   67.90  83.20  86.78  87.60  87.94

Cost, by arithmetic and not by measurement: 88,000 windows of 384 tokens and 86 million weights,
twice, with three products each way: 3.5e16 floating-point operations.

ARG: as of cifar10_resnet20.py; static thresholds of BERT-base come from 10 batches in the paper
(--config.quant.static_batches=10).
"""

from ml_collections import ConfigDict

from configs._squad import squad_config
from qat_jax.models import BERT_BASE


def get_config(arg: str = "") -> ConfigDict:
    return squad_config("squad_bert_base", BERT_BASE, arg)
