import optax
import pytest
from flax import nnx

from qat_jax.training.objective import Classification, Normalisation
from qat_jax.training.sharding import Placement
from qat_jax.training.state import create_state
from qat_jax.training.step import make_eval_step, make_train_step
from tests.training.tiny_training import Lab, TinyNet


@pytest.fixture(scope="session")
def lab() -> Lab:
    schedule = optax.linear_schedule(0.5, 0.0, 20)
    optimizer = optax.sgd(schedule, momentum=0.9)
    objective = Classification(Normalisation(mean=(0.5,), std=(0.25,)))
    graphdefs, _ = create_state(TinyNet(4, nnx.Rngs(0)), optimizer)
    return Lab(
        optimizer=optimizer,
        schedule=schedule,
        objective=objective,
        graphdefs=graphdefs,
        devices=Placement.over_all_devices(),
        train_step=make_train_step(graphdefs, optimizer, objective=objective, schedule=schedule),
        eval_step=make_eval_step(graphdefs, objective=objective),
    )
