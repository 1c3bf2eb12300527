import json
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import qat_jax as qj
from configs import quickstart as config_file
from experiments import build, cli, figures, quickstart, runs

TWO_CELLS = ("float32", "octav-w2a2")


def tiny_config(**changes):
    config = config_file.get_config()
    for cell in set(config.cells) - set(TWO_CELLS):
        del config.cells[cell]
    config.num_seeds = 1
    config.recipe.total_epochs = 1.0
    config.recipe.model.width = 4
    config.update(changes)
    return config


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "quickstart"
    before = jax.config.jax_compilation_cache_dir
    quickstart.run(tiny_config(), workdir)
    assert jax.config.jax_compilation_cache_dir == before
    return workdir


def test_the_result_is_what_the_runs_measured(finished):
    result = json.loads((finished / "result.json").read_text())
    assert result["experiment"] == "quickstart"
    assert result["config"] == json.loads((finished / "config.json").read_text())
    cells = result["metrics"]["cells"]
    assert tuple(cells) == TWO_CELLS
    for name, cell in cells.items():
        assert cell["runs"] == [f"{name}-seed0"]
        run = json.loads((finished / cell["runs"][0] / "result.json").read_text())
        assert cell["accuracies"] == [run["metrics"]["test_accuracy"]]
        assert cell["mean"] == run["metrics"]["test_accuracy"] > 0.2
        assert cell["test_count"] == run["metrics"]["test_count"] == 360
        assert cell["wall_seconds"] == [run["wall_seconds"]]
        assert run["config"]["quant"] == result["config"]["cells"][name]


def test_the_figure_is_an_image_of_readable_size(finished):
    with Image.open(finished / "quickstart.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.width >= 1200
        assert image.height >= 500
        # Both colours of the bars are there: it is not an empty page.
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {(0x7F, 0x7F, 0x7F), (0x00, 0x72, 0xB2)} <= colours


def test_the_figure_shows_the_trained_float_model(finished):
    config = tiny_config()
    recipe = quickstart.run_config(config, "float32", 0)
    folder = finished / "float32-seed0"
    seen = quickstart.layer_input(recipe, folder, config)
    assert seen.shape == (360, 4, 4, 8)
    untrained = build.float_model(recipe)
    trained = runs.trained_model(recipe, folder)
    assert not np.array_equal(trained.conv1.kernel[...], untrained.conv1.kernel[...])


def test_a_finished_folder_prints_the_table_again_and_stays_as_it_is(finished, capsys):
    before = contents(finished)
    quickstart.run(tiny_config(), finished)
    assert contents(finished) == before
    printed = capsys.readouterr().out
    result = json.loads((finished / "result.json").read_text())
    for cell in result["metrics"]["cells"].values():
        assert f"{100 * cell['mean']:.1f}" in printed
    assert "OCTAV + MPH, 2 bits" in printed
    assert "360 images, seeds: 1" in printed
    assert max(map(len, printed.splitlines())) <= 90


def test_an_interrupted_comparison_goes_on(finished, tmp_path, monkeypatch):
    calls = []
    finished_runs = {
        run: json.loads((finished / run / "result.json").read_text())
        for run in ("float32-seed0", "octav-w2a2-seed0")
    }

    def train(config, workdir):
        calls.append(workdir.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return finished_runs[workdir.name]

    workdir = tmp_path / "run"
    monkeypatch.setattr(quickstart.train, "run", train)
    with pytest.raises(KeyboardInterrupt):
        quickstart.run(tiny_config(), workdir)
    assert not (workdir / "result.json").exists()
    (workdir / "float32-seed0").symlink_to(finished / "float32-seed0")
    quickstart.run(tiny_config(), workdir)
    assert calls == ["float32-seed0", "octav-w2a2-seed0"] * 2
    assert (workdir / "result.json").exists()


def test_cells_differ_in_how_they_quantise_and_in_nothing_else():
    config = config_file.get_config()
    for seed in range(config.num_seeds):
        recipes = [quickstart.run_config(config, cell, seed).to_dict() for cell in config.cells]
        weights = []
        for cell in config.cells:
            settings = quickstart.run_config(config, cell, seed)
            model = build.quantised_model(settings)
            weights.append(jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
        for own in recipes:
            assert own.pop("quant") is not None
            own.pop("experiment")
        assert all(own == recipes[0] for own in recipes)
        assert recipes[0]["seed"] == seed
        for own in weights:
            assert all(np.array_equal(a, b) for a, b in zip(own, weights[0], strict=True))


def test_the_curves_are_of_the_formats_that_were_trained():
    config = config_file.get_config()
    assert quickstart.formats(config) == [
        qj.Int(4, signed=None, narrow=True),
        qj.Int(2, signed=None, narrow=True),
    ]
    config.cells["octav-w2a2"].narrow = False
    assert qj.Int(2, signed=None) in quickstart.formats(config)


def test_the_published_cells_are_trained_in_the_order_of_the_table():
    assert list(
        cli.parse(["q", "--workdir=x"], default_config=quickstart.DEFAULT_CONFIG).config.cells
    ) == [
        "float32",
        "max-w4a4",
        "octav-w4a4",
        "max-w2a2",
        "octav-w2a2-ste",
        "octav-w2a2",
    ]


def test_mean_and_spread_are_over_the_seeds(tmp_path, monkeypatch):
    accuracies = {0: 0.5, 1: 0.75, 2: 0.9}

    def train(config, workdir):
        metrics = {"test_accuracy": accuracies[config.seed], "test_count": 8}
        return {"metrics": metrics, "wall_seconds": 1.0}

    monkeypatch.setattr(quickstart.train, "run", train)
    cells = quickstart.train_cells(tiny_config(num_seeds=3), tmp_path)
    assert cells["float32"]["seeds"] == [0, 1, 2]
    assert cells["float32"]["accuracies"] == [0.5, 0.75, 0.9]
    assert cells["float32"]["mean"] == pytest.approx(2.15 / 3)
    assert cells["float32"]["std"] == pytest.approx(statistics.stdev([0.5, 0.75, 0.9]))


def test_the_error_curve_is_the_true_error():
    x = jnp.abs(jax.random.normal(jax.random.key(0), (4000,)))
    curve = figures.error_curve(x, qj.Int(4, signed=None))
    exact = np.asarray(x, np.float64)
    step = curve.thresholds[137] / 16
    rounded = np.clip(np.round(exact / step), 0, 15) * step
    expected = np.mean((rounded - exact) ** 2) / np.mean(exact**2)
    assert curve.errors[137] == pytest.approx(expected, rel=1e-3)
    assert curve.maximum == float(x.max())
    assert curve.iterates[0] == pytest.approx(float(x.mean()), rel=1e-5)
    assert curve.iterates[-1] == pytest.approx(float(qj.octav(x, qj.Int(4, signed=False))[0]))
    # OCTAV's model of the error lets numbers grow to s, the grid ends one step before it.
    assert curve.iterate_errors[-1] < 1.1 * curve.errors.min() < curve.maximum_error
    assert json.loads(json.dumps(curve.summary()))["octav"]["iterates"] == curve.iterates.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.num_seeds=0", "num_seeds is 0"),
        ("--config.figure_layer=layer9/0/conv1", "no layer 'layer9/0/conv1'"),
        ("--config.figure_layer=linear", "is not a convolution"),
        ("--config.recipe.optimizer.name=adam", "choose sgd or adamw"),
        ("--config.recipe.model.depth=9", "depth is 9"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_stays(tmp_path, capsys, change, message):
    workdir = tmp_path / "run"
    arguments = ["quickstart", f"--workdir={workdir}", change]
    status = cli.main(
        quickstart.run, quickstart.__doc__, arguments, default_config=quickstart.DEFAULT_CONFIG
    )
    assert status == cli.WRONG_USAGE
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not workdir.exists()
