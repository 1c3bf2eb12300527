import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import imagenet
from experiments import build, cli, paper_rows, train
from qat_jax.training.objective import Classification, Normalisation
from qat_jax.training.optimizer import duration_in_steps, make_optimizer, make_schedule
from qat_jax.training.state import create_state
from qat_jax.training.step import make_train_step

IMAGES = 1_281_167


@pytest.fixture(scope="module")
def published(shared_data):
    path = shared_data.parent / "reference" / "octav_results.json"
    if not path.is_file():
        pytest.skip(f"no published results at {path}")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def paper(published):
    return published["recipes"]


def rates(config):
    """The learning rate in the middle of each epoch."""
    steps_per_epoch = IMAGES // config.batch_size
    total = duration_in_steps(config, "total", steps_per_epoch=steps_per_epoch)
    schedule = make_schedule(
        config.schedule,
        config.optimizer.learning_rate,
        total_steps=total,
        steps_per_epoch=steps_per_epoch,
    )
    epochs = round(total / steps_per_epoch)
    return [float(schedule(int((e + 0.5) * steps_per_epoch))) for e in range(epochs)]


@pytest.mark.parametrize("model", ["resnet18", "resnet50", "resnet101"])
def test_resnets_are_trained_as_the_paper_says(model, paper):
    recipe = paper["resnet_scratch"]
    config = imagenet.get_config(f"model={model},bits=4")
    assert config.batch_size == 8 * 64
    assert config.optimizer.weight_decay == recipe["weight_decay"]
    expected = [recipe["lr"] * 0.1 ** (e // 30) for e in range(recipe["epochs"][model])]
    np.testing.assert_allclose(rates(config), expected, rtol=1e-5)
    long = imagenet.get_config(f"model={model},recipe=long,bits=4")
    assert long.optimizer.learning_rate == pytest.approx(recipe["lr"] * 1e-2)
    assert long.total_epochs == paper["long_retrain"]["epochs"]["resnets"]


@pytest.mark.parametrize("model", ["mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"])
def test_mobilenets_are_trained_as_the_paper_says(model, paper):
    recipe = paper["mobilenet_scratch"]
    config = imagenet.get_config(f"model={model},bits=4")
    assert config.batch_size == 8 * 128
    assert config.optimizer.weight_decay == recipe["weight_decay"][model.split("_")[1]]
    expected = [recipe["lr"] * 0.1 ** (e // 100) for e in range(recipe["epochs"])]
    np.testing.assert_allclose(rates(config), expected, rtol=1e-5)


@pytest.mark.parametrize("model", ["resnet18", "resnet50", "resnet101", "mobilenet_v2"])
def test_short_retraining(model, paper):
    config = imagenet.get_config(f"model={model},recipe=short,bits=4,scaling=static")
    if model in ("resnet50", "resnet101"):
        recipe, rate = (
            paper["short_retrain_resnet50_101"],
            paper["short_retrain_resnet50_101"]["lr"],
        )
        every = 5
    else:
        recipe, every = paper["short_retrain_others"], 10
        rate = recipe["lr"]["resnet18" if model == "resnet18" else "mobilenets"]
    expected = [rate * 0.1 ** (e // every) for e in range(recipe["epochs"])]
    np.testing.assert_allclose(rates(config), expected, rtol=1e-5)
    assert config.quant.static_batches == 5


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("model=resnet20", "model=resnet20: give one of resnet18"),
        ("recipe=medium", "recipe=medium: give scratch, short or long"),
        ("bits=4,scaling=both", "scaling=both: give dynamic, carried, static or learned"),
        ("bit=4", "cannot read 'bit=4'"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arg, message):
    with pytest.raises(ValueError, match=message):
        imagenet.get_config(arg)


FAKE = ["--config.dataset.name=fake", "--config.dataset.size=32", "--config.dataset.resize=32"]


def test_retraining_needs_weights(tmp_path, capsys):
    config = "--config=configs/imagenet.py:model=resnet18,recipe=short,bits=4"
    arguments = ["train", config, f"--workdir={tmp_path / 'x'}", *FAKE]
    assert cli.main(train.run, train.__doc__, arguments) == cli.WRONG_USAGE
    assert "pass --config.model.pretrained=FILE" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_noise_has_as_many_examples_as_are_asked_for():
    config = imagenet.get_config("model=resnet18,bits=4")
    config.dataset.name, config.dataset.fake_examples = "fake", 7
    assert len(build.task(config).test_source()) == 7
    config.dataset.fake_examples = 0
    with pytest.raises(ValueError, match="positive count"):
        build.task(config).test_source()


@pytest.mark.parametrize("model", ["resnet50", "mobilenet_v2", "mobilenet_v3_small"])
def test_a_training_step_fits_together(model):
    """Traced, not run: compiling takes minutes on a CPU."""
    config = imagenet.get_config(f"model={model},bits=4")
    config.model.dtype = "bfloat16"
    objective = Classification(Normalisation(config.dataset.mean, config.dataset.std))
    schedule = make_schedule(config.schedule, 0.1, total_steps=100, steps_per_epoch=10)
    optimizer = make_optimizer(config.optimizer, schedule)
    found, state = create_state_abstractly(config, optimizer)
    step = make_train_step(found["graphdefs"], optimizer, objective=objective, schedule=schedule)
    batch = {
        "image": jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((4,), jnp.int32),
    }
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}


def create_state_abstractly(config, optimizer):
    """The structure of the training state; its arrays are never made."""
    found = {}

    def make():
        found["graphdefs"], state = create_state(build.quantised_model(config), optimizer)
        return state

    return found, jax.eval_shape(make)


def test_every_published_row_has_a_config():
    found = list(paper_rows.rows())
    assert len(found) == 6 + 6 * 7 + 6 * 7 + 6 * 2
    for row in found:
        config = imagenet.get_config(row.argument)
        assert config.total_epochs == paper_rows._EPOCHS[row.recipe][row.model]
        build.clipping(config.quant.clipping)


def test_the_page_of_published_rows_is_the_committed_one():
    page = Path(__file__).parents[2] / "results" / "README.md"
    assert page.read_text() == paper_rows.page() + "\n"


def test_the_published_figures_are_the_papers(published):
    first = published["table1_resnet50_scratch_4bit_top1"]
    found = {row.settings: row.published for row in paper_rows.rows() if row.table == 1}
    assert found.pop("bits=32") == first.pop("fp32")
    assert found.pop("bits=4,clipping=max,gradient=ste") == first.pop("max")
    assert found == {
        f"bits=4,clipping=octav,gradient={name[6:]}": value for name, value in first.items()
    }
    scratch = published["table2_scratch_top1"]
    retrained = published["table3_short_retrain_4bit_top1_and_table4_long"]
    for model in ("resnet18", "resnet50", "resnet101", "mobilenet_v2", "mobilenet_v3_small"):
        rows = [row for row in paper_rows.rows() if row.model == model]
        assert [row.published for row in rows if row.table == 2] == scratch[model]
        assert [row.published for row in rows if row.table in (3, 4)] == retrained[model]
