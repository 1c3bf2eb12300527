import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from qat_jax.training.sharding import Placement

# Quantised, since a per-tensor threshold of a split activation is where devices could disagree.
FIRST_LOSSES = """
import json, sys, jax, optax
from flax import nnx
import qat_jax as qj
from qat_jax.training.distillation import taught
from qat_jax.training.sharding import Placement
from qat_jax.training.state import create_state
from qat_jax.training.objective import Classification, Normalisation
from qat_jax.training.step import make_eval_step, make_train_step
from tests.training.tiny_training import TinyNet, eval_data, train_data

bits, fsdp, distils = map(int, sys.argv[1:])
devices = Placement.over_all_devices(fsdp)
schedule = optax.constant_schedule(0.1)
optimizer = optax.sgd(schedule, momentum=0.9)
model = TinyNet(4, nnx.Rngs(0))
if bits < 32:
    model = qj.quantize_model(model, qj.uniform_policy(bits, bits))
graphdefs, state = create_state(model, optimizer)
distillation = None
if distils:
    distillation, state = taught(state, TinyNet(4, nnx.Rngs(1)), weight=0.5)
state = devices.shard_state(state)
settings = dict(objective=Classification(Normalisation((0.5,), (0.25,))), placement=devices)
step = make_train_step(
    graphdefs, optimizer, schedule=schedule, distillation=distillation, **settings
)
evaluate = make_eval_step(graphdefs, **settings)
data, losses = train_data(0), []
for _ in range(20):
    batch = devices.shard_batch(next(data))
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
counts = [int(evaluate(state, devices.shard_batch(batch))["count"]) for batch in eval_data()]
shape = lambda array: array.addressable_shards[0].data.shape
momentum = next(leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 4)
print(json.dumps({"losses": losses, "counts": counts, "compilations": step._cache_size(),
                  "batch": shape(batch["image"]), "kernel": shape(state.params["conv"]["kernel"]),
                  "statistics": shape(state.model_state["norm"]["mean"]),
                  "momentum": shape(momentum)}))
"""


def first_losses(devices: int, bits: int = 32, fsdp: int = 1, distils: bool = False) -> dict:
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", FIRST_LOSSES, str(bits), str(fsdp), str(int(distils))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("bits", "distils"), [(32, False), (4, False), (4, True)])
def test_eight_devices_train_like_one(bits, distils):
    one = first_losses(1, bits, distils=distils)
    split = first_losses(8, bits, fsdp=4, distils=distils)
    np.testing.assert_allclose(split["losses"], one["losses"], rtol=1e-4)
    assert split["counts"] == one["counts"] == [8, 3]
    assert split["compilations"] == one["compilations"] == 1
    assert (one["batch"], split["batch"]) == ([8, 4, 4, 1], [1, 4, 4, 1])
    assert (one["kernel"], split["kernel"]) == ([3, 3, 1, 4], [3, 3, 1, 1])
    assert split["momentum"] == split["kernel"]
    assert split["statistics"] == one["statistics"] == [4]


def test_whole_copies_on_eight_devices():
    one, copies = first_losses(1), first_losses(8)
    np.testing.assert_allclose(copies["losses"], one["losses"], rtol=1e-4)
    assert copies["batch"] == [1, 4, 4, 1]
    assert copies["kernel"] == one["kernel"]


def test_an_indivisible_batch_is_refused():
    devices = Placement.over_all_devices()
    devices.check_batch_size(jax.device_count())

    class FourDevices:
        size = 4

    with pytest.raises(ValueError, match=r"batch_size 10 .* 4 devices: choose .* such as 8"):
        Placement(FourDevices()).check_batch_size(10)
    with pytest.raises(
        ValueError, match=r"multiple of 16 \(devices times accumulate 4\), such as 32"
    ):
        Placement(FourDevices()).check_batch_size(44, 4)
    Placement(FourDevices()).check_batch_size(48, 4)


@pytest.mark.parametrize("fsdp", [0, 7])
def test_groups_that_do_not_fill_the_devices_are_refused(fsdp):
    with pytest.raises(ValueError, match=f"fsdp {fsdp} does not divide the 1 devices"):
        Placement.over_all_devices(fsdp)
