"""Weights alone, as configs and mains say it."""

import json

import pytest
from ml_collections import ConfigDict

import qat_jax as qj
from configs._ptq import ptq_config
from configs._quant import quant_config
from configs.cifar10_resnet20_ptq import get_config as ptq
from configs.digits import get_config as digits
from experiments import arguments, build, cli, integers, outliers
from experiments import policy as policy_main
from experiments import ptq as ptq_main
from experiments.records import Run
from tests.experiments import resnet8


def main(module, workdir, weights):
    command = [
        "main",
        "--config=configs/cifar10_resnet20_ptq.py:4/-/4/-",
        f"--workdir={workdir}",
        f"--config.model.pretrained={weights}",
        *resnet8.FLAGS,
    ]
    return cli.main(module.run, module.__doc__, command)


def operands(model):
    return {path.rpartition("/")[2] for path in qj.operand_quantizers(model)}


@pytest.mark.parametrize("arg", ["bits=w4", "notation=4/-", "notation=4/-/4/-"])
def test_training_configs(arg):
    model = build.quantised_model(digits(arg))
    assert operands(model) == {"weights"}
    assert qj.report(model).layers[0].weights.format.bits == 8


def test_bits_of_weights_alone_are_bits_of_weights_and_32():
    quant = quant_config("bits=w4")
    assert (quant.weight_bits, quant.activation_bits) == (4, 32)
    with pytest.raises(ValueError, match="bits=w is not a whole number: give bits=4, bits=w4"):
        quant_config("bits=w")


@pytest.mark.parametrize("notation", ["4/-", "4/-/4/-", "mxfp4-weights"])
def test_ends_of_weights_alone_have_none_either(notation):
    policy = build.ptq_policy(ptq(notation))
    assert [rule.pattern for rule in policy.rules] == ["conv1", "linear", ".*"]
    assert all(rule.activations is None for rule in policy.rules)
    assert policy.rules[0].weights.format.bits == 8
    said = ptq(notation)
    said.quant.edges = "8/8U"
    assert build.ptq_policy(said).rules[0].activations is not None
    # The default follows a notation that a flag gives.
    flagged = ptq("4/4U")
    flagged.quant.notation = notation
    assert build.ptq_policy(flagged) == policy


def test_a_network_is_quantised_after_training(tmp_path, weights):
    assert main(ptq_main, tmp_path / "run", weights) == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert {path.rpartition("/")[2] for path in metrics["effective_bits"]} == {"weights"}
    assert (tmp_path / "run" / "packed.safetensors").is_file()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (integers, "the input of conv1 is a float: integers need quantised activations too"),
        (arguments, "looks at activations, which 4/-/4/- leaves alone: give them bits"),
        (outliers, "looks at activations, which 4/-/4/- leaves alone: give them bits"),
    ],
)
def test_mains_about_activations_refuse_it(tmp_path, weights, capsys, module, message):
    assert main(module, tmp_path / "run", weights) == cli.WRONG_USAGE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_policies_are_printed(capsys):
    assert policy_main.main(["octav-w4"]) == 0
    assert "activations: null" in capsys.readouterr().out


def test_runs_say_what_activations_have(tmp_path):
    config = ConfigDict(ptq_config("4/-/4/-")).to_dict()
    run = Run("run", tmp_path, {"config": config, "metrics": {}})
    assert (run.bits, run.activation_bits) == (4, 32)
