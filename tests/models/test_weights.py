import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import qat_jax as qj
from qat_jax.integer import pack_model
from qat_jax.models import CifarResNet, load_weights, save_weights


def model_of(seed: int, **options) -> CifarResNet:
    """A small model whose every variable, batch statistics included, is random."""
    model = nnx.eval_shape(lambda: CifarResNet(8, rngs=nnx.Rngs(0), **{"width": 4} | options))
    rng = np.random.default_rng(seed)
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    nnx.update(model, jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape), x.dtype), state))
    return model


def values_of(model: nnx.Module) -> nnx.State:
    return jax.tree.map(np.array, nnx.state(model, (nnx.Param, nnx.BatchStat)))


def assert_equal_values(one: nnx.State, other: nnx.State) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture
def saved(tmp_path):
    """A model, the file it was saved to, and the arrays in the file."""
    path = tmp_path / "model.safetensors"
    model = model_of(0)
    save_weights(model, path)
    return model, path, load_file(path)


def test_round_trip_is_exact(saved):
    model, path, _ = saved
    other = model_of(1)
    assert load_weights(other, path) is None
    assert_equal_values(values_of(other), values_of(model))


def test_round_trip_through_npz_is_exact(saved):
    model, path, arrays = saved
    save_weights(model, path.with_suffix(".npz"))
    with np.load(path.with_suffix(".npz")) as file:
        assert set(file.files) == arrays.keys()
    other = model_of(1)
    load_weights(other, path.with_suffix(".npz"))
    assert_equal_values(values_of(other), values_of(model))


def test_file_has_the_names_and_layouts_of_pytorch(saved):
    model, _, arrays = saved
    assert len(arrays) == 7 + 4 * 7 + 2
    block, linear = model.layer2[0], model.linear
    for name, expected in {
        "module.conv1.weight": model.conv1.kernel[...].transpose(3, 2, 0, 1),
        "module.layer2.0.conv1.weight": block.conv1.kernel[...].transpose(3, 2, 0, 1),
        "module.layer2.0.bn1.weight": block.bn1.scale[...],
        "module.layer2.0.bn1.bias": block.bn1.bias[...],
        "module.layer2.0.bn2.running_mean": block.bn2.mean[...],
        "module.layer2.0.bn2.running_var": block.bn2.var[...],
        "module.linear.weight": linear.kernel[...].T,
        "module.linear.bias": linear.bias[...],
    }.items():
        np.testing.assert_array_equal(arrays[name], expected, err_msg=name)


def test_pretrained_file_is_written_as_it_was_read(shared_data, tmp_path):
    source = shared_data / "cifar10" / "akamaster_resnet20.safetensors"
    model = nnx.eval_shape(lambda: CifarResNet(20, rngs=nnx.Rngs(0)))
    load_weights(model, source)
    save_weights(model, tmp_path / "again.safetensors")
    original, again = load_file(source), load_file(tmp_path / "again.safetensors")
    assert original.keys() == again.keys()
    for name, array in original.items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)


def test_values_take_the_dtype_of_the_model_and_batch_counts_are_ignored(saved):
    model, path, arrays = saved
    counts = {"module.bn1.num_batches_tracked": np.array(7)}
    save_file({name: array.astype(np.float16) for name, array in arrays.items()} | counts, path)
    other = model_of(1)
    load_weights(other, path)
    rounded = jax.tree.map(lambda x: x.astype(np.float16), values_of(model))
    assert_equal_values(values_of(other), rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(values_of(other))} == {np.dtype(np.float32)}


def renamed(arrays):
    return {name.removeprefix("module."): array for name, array in arrays.items()}


def without_bias(arrays):
    return {name: array for name, array in arrays.items() if name != "module.linear.bias"}


def with_projection(arrays):
    return arrays | {"module.layer2.0.shortcut.0.weight": np.zeros((8, 4, 1, 1), np.float32)}


def more_classes(arrays):
    return arrays | {"module.linear.bias": np.zeros(11, np.float32)}


def of_integers(arrays):
    return {name: array.astype(np.int32) for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            renamed,
            r"missing names: 37 .* and unexpected names: 37 \(such as bn1.bias\).*save_weights",
        ),
        (without_bias, r"missing names: 1 \(such as module.linear.bias\)"),
        (with_projection, r"unexpected names: 1 \(such as module.layer2.0.shortcut.0.weight\)"),
        (more_classes, r"module.linear.bias .* shape \(11,\).* needs \(10,\): build the model"),
        (of_integers, r"is int32: convert"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_and_the_model_is_left_as_it_was(saved, spoil, message):
    model, path, arrays = saved
    save_file(spoil(arrays), path)
    before = values_of(model)
    with pytest.raises(ValueError, match=message) as error:
        load_weights(model, path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert_equal_values(values_of(model), before)


def test_another_depth_is_named(saved):
    _, path, _ = saved
    deeper = nnx.eval_shape(lambda: CifarResNet(20, width=4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"holds 8 .* layers, the model 20: build the model with"):
        load_weights(deeper, path)


def test_another_width_is_named(saved):
    _, path, _ = saved
    with pytest.raises(ValueError, match=r"build the model with the file's width"):
        load_weights(model_of(0, width=2), path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.safetensors does not exist: give"):
        load_weights(model_of(0), tmp_path / "none.safetensors")


def test_a_file_of_another_format_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"PK\x03\x04 not safetensors at all")
    with pytest.raises(ValueError, match=r"weights.pth is not a readable safetensors file"):
        load_weights(model_of(0), path)


def test_saving_into_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder .*none does not exist: make it"):
        save_weights(model_of(0), tmp_path / "none" / "model.safetensors")


def test_a_layer_without_a_pytorch_name_is_refused(tmp_path):
    model = nnx.LoRA(3, 2, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="variable lora_a has no PyTorch name"):
        save_weights(model, tmp_path / "model.safetensors")


def mlp(seed):
    rngs = nnx.Rngs(seed)
    return nnx.Sequential(nnx.Linear(16, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 8, rngs=rngs))


@pytest.mark.parametrize("change", ["rotated", "smoothed", "both"])
def test_what_changes_kernels_is_not_written(change, tmp_path):
    """The file is the float network's, whatever basis its layers quantise in."""
    x = jax.random.normal(jax.random.key(0), (4, 16)) * jnp.arange(1, 17)
    model = qj.quantize_model(mlp(0), "max-w8a8")
    if change != "rotated":
        qj.smooth(model, [x])
    if change != "smoothed":
        qj.rotate(model)
    save_weights(model, tmp_path / "w.safetensors")
    other = mlp(1)
    load_weights(other, tmp_path / "w.safetensors")
    np.testing.assert_allclose(other(x), mlp(0)(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"smoothed or rotated.*load weights into the float model"):
        load_weights(model, tmp_path / "w.safetensors")


def test_packed_models_have_a_file_of_their_own(tmp_path):
    model = pack_model(qj.quantize_model(mlp(0), "max-w8a8"), jnp.ones((1, 16)))
    with pytest.raises(ValueError, match="save_packed writes such a model"):
        save_weights(model, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())
