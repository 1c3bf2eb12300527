"""The part of a training config that says what is learned from another network."""

from typing import Any

from ml_collections.config_dict import placeholder


def distillation_config() -> dict[str, Any]:
    """Knowledge distillation (Hinton et al., arXiv:1503.02531)."""
    return {
        "weight": 0.0,  # the teacher's share of the loss; 0: labels alone, no teacher
        "temperature": 1.0,  # that the logits of both are divided by
        # Float weights of the same network, such as those that a run in float32 leaves; None:
        # model.pretrained's.
        "teacher": placeholder(str),
    }
