"""BERT-base on SQuAD 1.1, quantised after fine-tuning: VS-Quant's tables (arXiv:2102.04503).

    python -m experiments.ptq --config=configs/squad_bert_base_ptq.py:4/8/6/10 --workdir=runs/ptq \
        --config.model.pretrained=DIR --config.dataset.name=squad_json \
        --config.dataset.data_dir=DIR --config.dataset.test_split=dev-v1.1.json

`model.pretrained` is a folder with model.safetensors, head included, and vocab.txt.

Published F1 (float 86.88) by the bits of the scales of vectors of 16:

    W/A    4/8    4/10   6/8    6/10   fp16   fp32   best per channel
    3/8    76.28  81.84  78.44  82.81  82.90  82.93  11.03
    4/8    82.87  85.91  83.39  86.35  86.34  86.33  73.61
    6/8    83.47  86.16  83.63  86.54  86.57  86.61  80.18
    8/8    83.53  86.33  83.75  86.59  86.74  86.74  81.25

ARG: bits as W/A/ws/as, such as 4/8/6/10; "float".
"""

from ml_collections import ConfigDict

from configs import squad_bert_base
from configs._squad import squad_ptq_config


def get_config(arg: str = "4/8/6/10") -> ConfigDict:
    return squad_ptq_config("squad_bert_base_ptq", squad_bert_base.get_config(), arg)
