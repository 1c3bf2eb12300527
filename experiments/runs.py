"""The networks of finished runs."""

from pathlib import Path

import jax
from flax import nnx
from ml_collections import ConfigDict

from experiments import build
from qat_jax.training.checkpoint import Checkpoints
from qat_jax.training.distillation import taught
from qat_jax.training.optimizer import make_optimizer
from qat_jax.training.state import create_state, restore_model
from qat_jax.training.workdir import Workdir

_OF_A_NETWORK = ("task", "dataset", "model", "quant")  # of a config
PACKED = "packed.safetensors"  # what a run of `experiments.ptq` leaves of its network


def finished_config(folder: Path) -> ConfigDict:
    """The config of a finished run.

    Raises:
        WorkdirError: the folder holds no run.
        ValueError: the run is not finished, or of a main that leaves no network.
    """
    run = Workdir(folder)
    config = ConfigDict(run.settings())
    if missing := [section for section in _OF_A_NETWORK if section not in config]:
        raise ValueError(
            f"{folder} is no run of experiments.train or experiments.ptq, its config has no "
            f"{missing[0]}: name one"
        )
    if not run.result_path.exists():
        raise ValueError(f"{folder} is not finished: repeat the command that trains it")
    return config


def trained_model(config: ConfigDict, folder: Path, *example: jax.Array) -> nnx.Module:
    """The model of a finished run of `experiments.train`, in evaluation mode.

    Args:
        config: the run's.
        folder: the run's.
        *example: what the model is called with, of any size; needed where thresholds are static or
            carried.

    Raises:
        ValueError: the folder has no checkpoint.
    """
    untrained = config.copy_and_resolve_references()
    untrained.model.pretrained = None  # the file may be gone, and its weights are not these
    model = build.undrawn(lambda: build.quantised_model(untrained))
    # Places for the factors and thresholds that the checkpoint has.
    build.prepare_quantisers(model, config.quant, lambda count: [example])
    optimizer = make_optimizer(config.optimizer, lambda step: 0.0)  # for its state's shape alone
    averages = config.get("average_decay", 0.0) > 0
    graphdefs, state = create_state(model, optimizer, averages=averages)
    if build.distils(config):  # places for the teacher's arrays, too
        teacher = build.undrawn(lambda: build.float_model(untrained))
        _, state = taught(state, teacher, weight=config.distillation.weight)
    with Checkpoints(Workdir(folder).checkpoints_path) as checkpoints:
        restored = checkpoints.restore(state)
    if restored is None:
        raise ValueError(f"{folder} has no checkpoint: name the folder of a finished training run")
    return restore_model(graphdefs, restored[0])
