import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from qat_jax.training.sharding import DataParallel

FIRST_LOSSES = """
import json, jax, optax
from flax import nnx
from qat_jax.training.sharding import DataParallel
from qat_jax.training.state import create_state
from qat_jax.training.step import Normalisation, make_eval_step, make_train_step
from tests.training.tiny_training import TinyNet, eval_data, train_data

devices = DataParallel.over_all_devices()
schedule = optax.constant_schedule(0.5)
optimizer = optax.sgd(schedule, momentum=0.9)
graphdefs, state = create_state(TinyNet(4, nnx.Rngs(0)), optimizer)
state = devices.replicate(state)
normalise = Normalisation((0.5,), (0.25,))
settings = dict(normalise=normalise, replicated=devices.replicated)
step = make_train_step(graphdefs, optimizer, schedule=schedule, **settings)
evaluate = make_eval_step(graphdefs, **settings)
data, losses = train_data(0), []
for _ in range(4):
    batch = devices.shard_batch(next(data))
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
counts = [int(evaluate(state, devices.shard_batch(batch))["count"]) for batch in eval_data()]
shards = [batch["image"].addressable_shards[0].data.shape[0], len(state.step.addressable_shards)]
print(json.dumps({"losses": losses, "counts": counts, "shards": shards,
                  "compilations": step._cache_size()}))
"""


def first_losses(devices: int) -> dict:
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", FIRST_LOSSES],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_eight_devices_train_like_one():
    one, eight = first_losses(1), first_losses(8)
    assert one["shards"] == [8, 1]
    assert eight["shards"] == [1, 8]
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=1e-4)
    assert eight["counts"] == one["counts"] == [8, 3]
    assert eight["compilations"] == 1


def test_an_indivisible_batch_is_refused():
    devices = DataParallel.over_all_devices()
    devices.check_batch_size(jax.device_count())

    class FourDevices:
        size = 4

    with pytest.raises(ValueError, match=r"batch_size 10 .* 4 devices: choose .* such as 8"):
        DataParallel(FourDevices()).check_batch_size(10)
