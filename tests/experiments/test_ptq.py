import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from experiments import cli, collect, ptq
from qat_jax.models import CifarResNet, load_weights, save_weights

# Measured with an independent sketch of the same method, batches of 250 images: per cent.
REFERENCE = {
    "max": {8: 91.8, 6: 91.7, 4: 85.9, 3: 46.9},
    "octav": {8: 91.3, 6: 91.2, 4: 90.1, 3: 64.0},
}


@pytest.mark.parametrize("clipping", ["max", "octav"])
def test_accuracy_of_the_quantised_resnet20(cifar10_test, shared_data, clipping):
    images, labels = cifar10_test
    mean, std = jnp.array([0.485, 0.456, 0.406]), jnp.array([0.229, 0.224, 0.225])
    batches = ((images / 255 - mean) / std).reshape(4, 250, 32, 32, 3)
    model = nnx.eval_shape(lambda: CifarResNet(20, rngs=nnx.Rngs(0)))
    load_weights(model, shared_data / "cifar10" / "akamaster_resnet20.safetensors")
    model.eval()
    rule = {"max": qj.AbsMax(), "octav": qj.Octav()}[clipping]
    for bits, expected in REFERENCE[clipping].items():
        policy = qj.uniform_policy(
            bits,
            bits,
            clipping=rule,
            narrow=True,
            first="conv1",
            last="linear",
            edge_clipping=qj.AbsMax(),
        )
        graphdef, state = nnx.split(qj.quantize_model(model, policy))
        forward = jax.jit(lambda state, x, graphdef=graphdef: nnx.merge(graphdef, state)(x))
        predicted = np.concatenate([forward(state, batch).argmax(-1) for batch in batches])
        # In images of a thousand, which are whole numbers: ±0.7 points, at 3 bits ±1.5.
        correct = int(np.sum(predicted == labels))
        assert abs(correct - round(10 * expected)) <= (15 if bits == 3 else 7), (bits, correct)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet8.safetensors"
    save_weights(CifarResNet(8, in_channels=1, width=4, rngs=nnx.Rngs(0)), path)
    return path


def command(workdir, weights, *changes):
    return [
        "ptq",
        "--config=configs/cifar10_resnet20_ptq.py:bits=4",
        f"--workdir={workdir}",
        f"--config.model.pretrained={weights}",
        "--config.dataset.name=digits",
        "--config.dataset.mean=(0.5,)",
        "--config.dataset.std=(0.5,)",
        "--config.model.in_channels=1",
        "--config.model.depth=8",
        "--config.model.width=4",
        *changes,
    ]


def test_the_main_leaves_what_it_promises(tmp_path, weights, capsys):
    workdir = tmp_path / "runs" / "ptq"
    assert cli.main(ptq.run, ptq.__doc__, command(workdir, weights)) == 0
    result = json.loads((workdir / "result.json").read_text())
    metrics = result["metrics"]
    assert metrics["test_count"] == metrics["float_count"] == 360
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines] == ["float", "test"]
    assert lines[1]["correct"] == metrics["test_correct"]
    assert len(metrics["diagnostics"]) == 2 * 8
    assert 5 < metrics["diagnostics"]["layer1/0/conv1/weights"]["sqnr_db"] < 30
    assert cli.main(ptq.run, ptq.__doc__, command(workdir, weights)) == 0
    assert "nothing to do" in capsys.readouterr().err

    gathered = collect.gather(workdir.parent)
    for name in ("test_correct", "float_correct"):
        assert gathered[0]["metrics"][name] == metrics[name]
    assert gathered[0]["metrics"]["accuracy_before"] == metrics["float_accuracy"]
    assert str(tmp_path) not in gathered[0]["command"]
    assert f"{100 * metrics['test_accuracy']:.1f}" in collect.table(gathered)


def test_without_weights_there_is_nothing_to_quantise(tmp_path, weights, capsys):
    arguments = [a for a in command(tmp_path / "x", weights) if "pretrained" not in a]
    assert cli.main(ptq.run, ptq.__doc__, arguments) == cli.WRONG_USAGE
    assert "pass --config.model.pretrained" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_collecting_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run"):
        collect.gather(tmp_path)
