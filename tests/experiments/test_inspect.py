"""A look into a quantised network."""

import csv
import json

import pytest
from flax import nnx

import qat_jax as qj
from configs.cifar10_resnet20_ptq import get_config
from experiments import cli, inspect, ptq
from qat_jax.models import BertForQuestionAnswering, BertSize
from qat_jax.nnx import is_weight
from qat_jax.sensitivity import with_switches
from tests.experiments import resnet8


def command(workdir, weights, *changes, notation="4/4U"):
    return [
        "inspect",
        f"--config=configs/cifar10_resnet20_ptq.py:{notation}",
        f"--workdir={workdir}",
        f"--config.model.pretrained={weights}",
        "--config.inspect.examples=64",
        *resnet8.FLAGS,
        *changes,
    ]


def rows(path):
    return list(csv.DictReader(path.open(encoding="utf-8")))


def test_operands_layers_and_a_policy(tmp_path, weights, capsys):
    workdir = tmp_path / "run"
    changes = ["--config.inspect.sensitivity", "--config.inspect.suggest_bits=4.5"]
    changes += ["--config.inspect.candidates=(2, 5, 8)", "--config.clipping.weights=octav"]
    assert cli.main(inspect.run, inspect.__doc__, command(workdir, weights, *changes)) == 0
    said = capsys.readouterr().out
    operands = rows(workdir / inspect.OPERANDS)
    assert len(operands) == 2 * 8
    first, kernel = operands[0], operands[3]
    assert (first["operand"], first["shape"]) == ("conv1/activations", "250×8×8×1")
    assert (first["codes"], first["scales"]) == ("int8", "tensor")
    assert (kernel["codes"], kernel["scales"]) == ("int4", "channel")
    # By the maximum nothing is clipped; OCTAV clips, near the optimum; that has the most decibels.
    assert float(first["threshold / max"]) == 1
    assert float(first["clipped, %"]) == 0
    assert float(kernel["clipped, %"]) > 0
    assert 0.7 < float(kernel["threshold / optimum"]) < 1.3
    for row in operands:
        assert float(row["SQNR at optimum, dB"]) > float(row["SQNR, dB"]) - 0.05
        assert len(row["magnitudes"]) == 12
    assert "layer1/0/conv1/weights" in said

    layers = rows(workdir / inspect.LAYERS)
    assert [row["layer"] for row in layers][:2] == ["conv1", "layer1/0/conv1"]
    assert len({row["loss alone quantised"] for row in layers}) == 8

    metrics = json.loads((workdir / "result.json").read_text())["metrics"]
    assert metrics["suggested_bits"] <= 4.5
    assert set(metrics["bits"].values()) <= {2, 5, 8}
    assert len(set(metrics["bits"].values())) > 1
    policy = qj.load_policy(workdir / inspect.POLICY)
    bits = {rule.pattern: rule.weights.format.bits for rule in policy.rules}
    assert list(bits.values()) == list(metrics["bits"].values())
    # The other mains take the policy and find the same.
    own = [a for a in command(tmp_path / "ptq", weights) if "inspect." not in a]
    own += [f"--config.quant.policy={workdir / inspect.POLICY}"]
    assert cli.main(ptq.run, ptq.__doc__, own) == 0
    again = json.loads((tmp_path / "ptq" / "result.json").read_text())["metrics"]
    assert again["test_accuracy"] == metrics["suggested_accuracy"]


def test_kernels_have_candidates_and_attention_which_has_no_kernel_none():
    size = BertSize(layers=1, hidden=16, heads=2, intermediate=16, vocabulary=20, positions=9)
    bert = BertForQuestionAnswering(size, rngs=nnx.Rngs(0))
    model = qj.quantize_model(bert, qj.preset("vsquant-4/8/6/10"))
    found = inspect.candidates(model, (3, 8))
    assert set(found) == {path for path in qj.operand_quantizers(model) if is_weight(path)}
    assert "bert/layers/0/attention/query/weights" in found
    with_switches(model, {kernel: list(by_bits.values()) for kernel, by_bits in found.items()})


@pytest.mark.parametrize(("batches", "same"), [(1, True), (0, False)])
def test_batch_norms_suit_each_choice_where_they_are_reestimated(weights, batches, same):
    config = get_config("4/4U")
    config.dataset.update(name="digits", mean=(0.5,), std=(0.5,))
    config.model.update(in_channels=1, depth=8, width=4, pretrained=str(weights))
    config.inspect.examples = 32
    config.calibration.batch_norm_batches = batches
    bench = ptq.Bench.from_config(config)
    model = bench.quantised(config)

    def losses():
        return list(inspect.measured(bench, config, with_switches(model), [{}]))

    before = losses()
    model.bn1.var.set_value(100 * model.bn1.var.get_value())  # as low bits may change it
    assert (losses() == before) == same


@pytest.mark.parametrize(
    ("notation", "change", "message"),
    [
        ("float", "--config.seed=0", "give a notation, such as 4/4U"),
        ("nvfp4", "--config.inspect.suggest_bits=4", "of which there are no other bits"),
        ("4/4U", "--config.inspect.suggest_bits=1.5", "1.5 bits on average cannot be had"),
        ("4/4U", "--config.inspect.candidates=(1,)", "bits"),
        ("4/4U", "--config.inspect.examples=0", "inspect.examples is 0: give at least 1"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, weights, capsys, notation, change, message):
    arguments = command(tmp_path / "x", weights, change, notation=notation)
    if "candidates" in change:
        arguments.append("--config.inspect.suggest_bits=4")
    assert cli.main(inspect.run, inspect.__doc__, arguments) == cli.WRONG_USAGE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
