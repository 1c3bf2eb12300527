import csv
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

import qat_jax as qj
from experiments import cli, collect, export, ptq, ptq_figures, ptq_tables
from experiments.published import PUBLISHED
from qat_jax.models import CifarResNet, load_weights
from tests.experiments import resnet8

# Measured with an independent sketch of the same method, ten iterations of OCTAV on all elements,
# batches of 250 images: per cent.
# More bits, where nothing is lost: `results/ptq_resnet20_per_channel.md`.
REFERENCE = {
    "max": {4: 85.9, 3: 46.9},
    "octav": {4: 90.1, 3: 64.0},
}

# A thousand images repay some of LLVM's optimisations, which conftest.py switches off.
OPTIMISED = {"xla_backend_optimization_level": 1}


@pytest.mark.parametrize("clipping", ["max", "octav"])
def test_accuracy_of_the_quantised_resnet20(cifar10_test, shared_data, clipping):
    images, labels = cifar10_test
    mean, std = jnp.array([0.485, 0.456, 0.406]), jnp.array([0.229, 0.224, 0.225])
    batches = ((images / 255 - mean) / std).reshape(4, 250, 32, 32, 3)
    model = nnx.eval_shape(lambda: CifarResNet(20, rngs=nnx.Rngs(0)))
    load_weights(model, shared_data / "cifar10" / "akamaster_resnet20.safetensors")
    model.eval()
    rule = {"max": qj.AbsMax(), "octav": qj.Octav(10)}[clipping]
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
        forward = jax.jit(
            lambda state, x, graphdef=graphdef: nnx.merge(graphdef, state)(x),
            compiler_options=OPTIMISED,
        )
        predicted = np.concatenate([forward(state, batch).argmax(-1) for batch in batches])
        # In images of a thousand, which are whole numbers: ±0.7 points, at 3 bits ±1.5.
        correct = int(np.sum(predicted == labels))
        assert abs(correct - round(10 * expected)) <= (15 if bits == 3 else 7), (bits, correct)


def command(workdir, weights, *changes):
    return [
        "ptq",
        "--config=configs/cifar10_resnet20_ptq.py:4/4U/4/6",
        f"--workdir={workdir}",
        f"--config.model.pretrained={weights}",
        *resnet8.FLAGS,
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
    # 4 inputs are a vector; each has a 4-bit scale, each of 4 outputs a coarse one of 32 bits.
    assert metrics["effective_bits"]["layer1/0/conv1/weights"] == round(4 + 4 / 4 + 32 / 36, 4)
    assert cli.main(ptq.run, ptq.__doc__, command(workdir, weights)) == 0
    assert "nothing to do" in capsys.readouterr().err

    gathered = collect.gather(workdir.parent)
    for name in ("test_correct", "float_correct"):
        assert gathered[0]["metrics"][name] == metrics[name]
    assert gathered[0]["metrics"]["accuracy_before"] == metrics["float_accuracy"]
    assert str(tmp_path) not in gathered[0]["command"]
    assert f"{100 * metrics['test_accuracy']:.1f}" in collect.table(gathered, collect.ACCURACY)


def test_without_weights_there_is_nothing_to_quantise(tmp_path, weights, capsys):
    arguments = [a for a in command(tmp_path / "x", weights) if "pretrained" not in a]
    assert cli.main(ptq.run, ptq.__doc__, arguments) == cli.WRONG_USAGE
    assert "pass --config.model.pretrained" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_model_that_does_not_exist_is_told(tmp_path, weights, capsys):
    arguments = command(tmp_path / "x", weights, "--config.model.name=foo")
    assert cli.main(ptq.run, ptq.__doc__, arguments) == cli.WRONG_USAGE
    assert "model.name is 'foo': give one of cifar_resnet, " in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_static_thresholds_are_left_beside_the_result(tmp_path, weights):
    changes = ["--config.calibration.batches=2", "--config.clipping.activations=octav"]
    arguments = command(tmp_path / "x", weights, *changes)
    arguments[1] = "--config=configs/cifar10_resnet20_ptq.py:4/4U"
    assert cli.main(ptq.run, ptq.__doc__, arguments) == 0
    thresholds = load_file(tmp_path / "x" / ptq.THRESHOLDS)
    assert len(thresholds) == 2 * 8
    assert thresholds["layer1/0/conv1/activations"].shape == (1, 1, 1, 1)


def test_batch_norms_are_folded_and_layers_overridden(tmp_path, weights):
    changes = ["--config.fold_batch_norm=True", "--config.quant.overrides=('layer1/.*=8/8U',)"]
    assert cli.main(ptq.run, ptq.__doc__, command(tmp_path / "x", weights, *changes)) == 0
    metrics = json.loads((tmp_path / "x" / "result.json").read_text())["metrics"]
    diagnostics = metrics["diagnostics"]
    eight, four = (diagnostics[f"layer{i}/0/conv2/weights"]["sqnr_db"] for i in (1, 2))
    assert eight > four + 15


def test_a_policy_in_a_file_takes_the_place_of_the_notation(tmp_path, weights, capsys):
    path = tmp_path / "policy.yaml"
    path.write_text(
        "- {pattern: 'layer1/.*', notation: 8/8}\n- {pattern: .*, notation: 3/3U/4/6}\n"
    )
    arguments = command(tmp_path / "x", weights, f"--config.quant.policy={path}")
    assert cli.main(ptq.run, ptq.__doc__, arguments) == 0
    result = json.loads((tmp_path / "x" / "result.json").read_text())
    bits = result["metrics"]["effective_bits"]
    assert bits["layer1/0/conv1/weights"] == round(8 + 32 / 36, 4)
    assert bits["layer2/0/conv1/weights"] == round(3 + 4 / 4 + 32 / 36, 4)
    # The run keeps what the file said, not where it was.
    assert qj.policy_from_yaml(result["config"]["quant"]["policy"]) == qj.load_policy(path)
    path.write_text("- {pattern: .*, notation: 8/8}\n")
    assert cli.main(ptq.run, ptq.__doc__, arguments) == cli.WRONG_USAGE
    assert "holds a run of other settings (quant.policy" in capsys.readouterr().err

    path.write_text("- {pattern: lyaer1, notation: 8/8}\n")
    arguments[2] = f"--workdir={tmp_path / 'y'}"
    assert cli.main(ptq.run, ptq.__doc__, arguments) == cli.WRONG_USAGE
    assert "rule 'lyaer1' matches no layer" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.quant.policy=no.yaml", "policy file no.yaml does not exist"),
        ("--config.clipping.weights=best", "give one of max, octav"),
        ("--config.quant.notation=4x4", "write W/A/ws/as"),
        ("--config.scale.codes=some", "IntScale.codes is one of"),
        ("--config.quant.overrides=('conv1',)", "write PATTERN=NOTATION"),
        ("--config.quant.notation=float --config.quant.overrides=('conv1=8/8',)", "is quantised"),
    ],
)
def test_wrong_settings_end_before_anything_is_written(tmp_path, weights, capsys, change, message):
    arguments = command(tmp_path / "x", weights, *change.split())
    assert cli.main(ptq.run, ptq.__doc__, arguments) == cli.WRONG_USAGE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_network_whose_activations_have_shards_is_packed(tmp_path, weights):
    """From as many examples as its shards can be cut of."""
    path = tmp_path / "policy.yaml"
    path.write_text(
        "- pattern: .*\n"
        "  weights: {format: Int(4), clipping: AbsMax()}\n"
        "  activations: {format: Int(4), clipping: AbsMax(), granularity: PerShard(2)}\n"
    )
    arguments = command(tmp_path / "x", weights, f"--config.quant.policy={path}")
    assert cli.main(ptq.run, ptq.__doc__, arguments) == 0
    model, example = export.packed_model(tmp_path / "x")
    assert len(example[0]) == 2
    assert np.isfinite(jax.jit(model)(*example)).all()


def test_tables_go_on_where_they_were_stopped(tmp_path, weights, monkeypatch):
    sizes = ptq_tables.TABLES["sizes"]
    monkeypatch.setitem(ptq_tables.TABLES, "sizes", lambda: itertools.islice(sizes(), 3))
    arguments = command(tmp_path / "x", weights, "--config.tables=('sizes',)")
    measure, measured = ptq_tables.measure, []

    def stopped(bench, config):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(config.quant.vector_size)
        return measure(bench, config)

    monkeypatch.setattr(ptq_tables, "measure", stopped)
    assert cli.main(ptq_tables.run, ptq_tables.__doc__, arguments) == 130
    monkeypatch.setattr(ptq_tables, "measure", measure)
    with (tmp_path / "x" / "cells.jsonl").open("a") as log:
        log.write('{"table": "si')  # as a machine that goes down leaves it
    assert cli.main(ptq_tables.run, ptq_tables.__doc__, arguments) == 0
    metrics = json.loads((tmp_path / "x" / "result.json").read_text())["metrics"]
    assert [cell["column"] for cell in metrics["cells"]] == ["1", "2", "4"]
    assert measured == [1, 2]

    ptq_figures.write(tmp_path, tmp_path / "net")
    rows = list(csv.DictReader((tmp_path / "net_sizes.csv").open()))
    assert [row["column"] for row in rows] == ["1", "2", "4"]
    assert (tmp_path / "net_sizes.png").stat().st_size > 5000


def test_published_figures_are_the_papers(shared_data):
    path = shared_data.parent / "reference" / "vsquant_results.json"
    if not path.is_file():
        pytest.skip(f"no published figures at {path}")
    paper = json.loads(path.read_text())

    def rows(table, count):
        published = PUBLISHED[table].values
        return {row: list(values.values())[:count] for row, values in published.items()}

    calibrators = paper["table2_per_channel_static"]
    assert rows("calibrators", 7) == calibrators["resnet50"]
    assert rows("bert_calibrators", 7) == calibrators["bert_base"]
    assert list(PUBLISHED["calibrators"].values["3/3U"]) == calibrators["columns"]
    vectors = paper["table3_fp_per_vector_vs_best_per_channel"]
    assert rows("vectors", 2) == vectors["resnet50"]
    assert rows("bert_vectors", 2) == vectors["bert_base"]
    assert rows("sizes", 7) == {"6/6U": list(paper["table4_resnet50_6bit_vector_size"].values())}
    resnet = paper["table5_resnet50_two_level"]
    assert rows("scales", 7) == {row: resnet[row][:7] for row in ("4/3U", "4/4U", "4/8U", "6/6U")}
    two_level = paper["table6_7_bert_two_level"]["bert_base"]
    assert rows("bert_scales", 6) == {row: values[:6] for row, values in two_level.items()}
    for table, network in [("scales", "resnet50"), ("bert_scales", "bert_base")]:
        assert PUBLISHED[table].in_float == paper["baselines_fp32"].get(
            network, paper["baselines_fp32"].get("resnet50_v1.5")
        )


def test_an_unknown_table_is_refused(tmp_path, weights, capsys):
    arguments = command(tmp_path / "x", weights, "--config.tables=('sizez',)")
    assert cli.main(ptq_tables.run, ptq_tables.__doc__, arguments) == cli.WRONG_USAGE
    assert "give some of calibrators" in capsys.readouterr().err


def test_kernels_are_rounded_by_training_examples(tmp_path, weights):
    changes = ["--config.calibration.gptq_batches=2", "--config.quant.notation=3/8U"]
    assert cli.main(ptq.run, ptq.__doc__, command(tmp_path / "x", weights, *changes)) == 0
    metrics = json.loads((tmp_path / "x" / "result.json").read_text())["metrics"]
    # The kernel has only numbers of its grid by then, so that quantising it again costs nothing.
    assert float(metrics["diagnostics"]["layer1/0/conv1/weights"]["sqnr_db"]) > 90


def test_outliers_move_into_kernels_before_thresholds_are_frozen(tmp_path, weights):
    changes = ["--config.calibration.smoothing_batches=1", "--config.calibration.batches=1"]
    changes += ["--config.calibration.rotate"]
    assert cli.main(ptq.run, ptq.__doc__, command(tmp_path / "x", weights, *changes)) == 0
    packed = load_file(tmp_path / "x" / "packed.safetensors")
    factors = np.concatenate([x for name, x in packed.items() if name.endswith(".factors")])
    assert (factors != 1).any()
    assert (np.log2(factors) % 1 == 0).all()
    assert "conv1/activations.threshold" in packed
    with safe_open(tmp_path / "x" / "packed.safetensors", "np") as file:
        kernels = json.loads(file.metadata()["qat_jax"])["kernels"]
    assert kernels["linear/weights"]["rotation"] == 16
    assert kernels["conv1/weights"]["rotation"] is None


def test_every_table_has_a_figure():
    assert ptq_figures.TITLES.keys() == ptq_tables.TABLES.keys()
