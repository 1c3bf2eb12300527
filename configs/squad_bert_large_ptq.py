"""BERT-large on SQuAD 1.1, quantised after fine-tuning: VS-Quant's tables (arXiv:2102.04503).

    python -m experiments.ptq --config=configs/squad_bert_large_ptq.py:4/8/6/10 --workdir=runs/ptq \
        --config.model.pretrained=DIR --config.dataset.name=squad_json \
        --config.dataset.data_dir=DIR --config.dataset.test_split=dev-v1.1.json

`model.pretrained` is a folder with model.safetensors, head included, and vocab.txt.

Published F1 (float 90.93) by the bits of the scales of vectors of 16:

    W/A    4/8    4/10   6/8    6/10   fp16   fp32   best per channel
    3/6    83.17  86.24  84.30  86.92  87.03  87.13  6.88
    3/8    86.82  88.86  87.65  89.50  89.63  89.63  8.71
    4/6    87.08  88.08  87.66  88.52  88.84  88.84  10.06
    4/8    89.54  90.31  89.76  90.54  90.78  90.78  83.18
    6/6    87.34  88.39  87.76  89.01  89.15  89.20  32.29
    6/8    89.65  90.47  89.82  90.63  90.82  90.81  88.90
    8/6    87.40  88.68  87.72  89.02  89.15  89.13  40.50
    8/8    89.84  90.47  90.12  90.66  90.78  90.78  89.41

ARG: bits as W/A/ws/as, such as 4/8/6/10; "float".
"""

from ml_collections import ConfigDict

from configs import squad_bert_large
from configs._squad import squad_ptq_config


def get_config(arg: str = "4/8/6/10") -> ConfigDict:
    return squad_ptq_config("squad_bert_large_ptq", squad_bert_large.get_config(), arg)
