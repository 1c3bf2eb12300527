"""The config that quantises the network of the quickstart after training."""

import json

import pytest
from flax import nnx

from configs import digits_ptq, quickstart
from experiments import cli, ptq
from experiments.quickstart import run_name
from experiments.train import WEIGHTS
from qat_jax.models import CifarResNet, save_weights


def main(workdir, *changes):
    arguments = ["ptq", "--config=configs/digits_ptq.py", f"--workdir={workdir}", *changes]
    return cli.main(ptq.run, ptq.__doc__, arguments)


@pytest.mark.parametrize(
    ("notation", "change", "message"),
    [
        ("nvfp4", "clipping.weights=mse", "clipping.weights changes nothing beside quant.notation"),
        ("nvfp4", "scale.codes=stored", "scale.codes changes nothing beside quant.notation nvfp4"),
        ("mxfp4", "quant.vector_size=8", "quant.vector_size changes nothing beside"),
        ("4/4U", "calibration.pool", "calibration.pool joins batches, of which there are none"),
    ],
)
def test_what_would_change_nothing_is_refused(tmp_path, capsys, notation, change, message):
    workdir = tmp_path / "run"
    flags = f"--config=configs/digits_ptq.py:{notation}", f"--workdir={workdir}"
    assert cli.main(ptq.run, ptq.__doc__, ["ptq", *flags, f"--config.{change}"]) == cli.WRONG_USAGE
    assert message in capsys.readouterr().err
    assert not workdir.exists()


def test_its_weights_are_those_that_the_quickstart_leaves():
    config, first = digits_ptq.get_config(), quickstart.get_config()
    assert "float32" in first.cells
    run = run_name("float32", first.seed)
    assert config.model.pretrained == f"runs/quickstart/{run}/{WEIGHTS}"
    trained, own = first.recipe.model.to_dict(), config.model.to_dict()
    assert {**trained, "pretrained": None} == {**own, "pretrained": None}


def test_it_runs_from_a_file_of_weights(tmp_path):
    weights = tmp_path / "resnet8.safetensors"
    save_weights(CifarResNet(8, in_channels=1, width=8, rngs=nnx.Rngs(0)), weights)
    assert main(tmp_path / "run", f"--config.model.pretrained={weights}") == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics["test_count"] == metrics["float_count"] == 360
    assert (tmp_path / "run" / "packed.safetensors").is_file()


@pytest.mark.parametrize("key", ["batches", "gptq_batches", "batch_norm_batches"])
def test_a_negative_number_of_batches_is_refused(tmp_path, capsys, key):
    weights = tmp_path / "resnet8.safetensors"
    save_weights(CifarResNet(8, in_channels=1, width=8, rngs=nnx.Rngs(0)), weights)
    changes = f"--config.model.pretrained={weights}", f"--config.calibration.{key}=-1"
    assert main(tmp_path / "run", *changes) == cli.WRONG_USAGE
    assert "no -1 batches to calibrate on: give 0 or more" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_weights_it_says_so(tmp_path, capsys):
    absent = tmp_path / "absent.safetensors"
    assert main(tmp_path / "run", f"--config.model.pretrained={absent}") == cli.WRONG_USAGE
    assert f"no pretrained weights at {absent}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
