"""BERT-large on SQuAD 1.1: OCTAV's table 5 (arXiv:2206.06501).

Command, quantised places and ARG as of squad_bert_base.py. Published F1 (float 91.0):

    bits            4      5      6      7      8
    dynamic octav   87.09  89.77  90.51  90.81  90.78
    dynamic max      6.92  80.06  87.71  90.04  90.48
    static octav    87.08  89.54  90.60  90.79  90.61
    static mse      85.54  89.77  90.39  90.80  90.55
    static p99.9    86.98  89.79  89.99  90.07  90.11
    static p99.99    6.90  87.63  90.38  90.79  90.33

Less memory: --config.model.remat computes the inside of each layer twice, --config.accumulate=4
takes the batch in four parts, --config.model.dtype=bfloat16 halves what is kept.
"""

from ml_collections import ConfigDict

from configs._squad import squad_config
from qat_jax.models import BERT_LARGE


def get_config(arg: str = "") -> ConfigDict:
    return squad_config("squad_bert_large", BERT_LARGE, arg)
