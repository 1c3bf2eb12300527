import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import qat_jax as qj
from qat_jax.description import describe, restore
from qat_jax.export import load_packed, save_packed
from qat_jax.integer import pack_model, unpack
from qat_jax.models.mobilenet_v1 import SeparableBlock
from qat_jax.nnx import layer_sites

READER = Path(__file__).parents[2] / "docs" / "read_packed.py"
POLICIES = ["vsquant-4/4U/4/6", "octav-w3a3", "nvfp4"]
INPUTS = jax.random.normal(jax.random.key(0), (2, 6, 6, 8))


def net():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        SeparableBlock(8, 20, 1, rngs=rngs),
        nnx.Conv(20, 12, (3, 3), feature_group_count=2, rngs=rngs),
        nnx.Dropout(0.5, rngs=rngs),
        nnx.Linear(12, 5, rngs=rngs),
    )


def packed_net(policy):
    model = qj.quantize_model(net(), policy)
    if policy == "octav-w3a3":
        qj.calibrate(model, [INPUTS])
    model = pack_model(model, INPUTS)
    model.eval()
    return model


def reader():
    spec = importlib.util.spec_from_file_location("read_packed", READER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@nnx.jit
def run(model, inputs):
    return model(inputs)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_file_brings_the_model_back_bit_for_bit(tmp_path, policy):
    model = packed_net(policy)
    save_packed(model, tmp_path / "m.safetensors")
    loaded = load_packed(net(), tmp_path / "m.safetensors")
    loaded.eval()
    np.testing.assert_array_equal(run(loaded, INPUTS), run(model, INPUTS))
    assert str(qj.report(loaded)) == str(qj.report(model))
    assert not list(tmp_path.glob(".*"))

    save_packed(loaded, tmp_path / "again.safetensors")
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("m", "again"))
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


@pytest.mark.parametrize("policy", POLICIES)
def test_numpy_alone_reads_the_same_numbers(tmp_path, policy):
    model = packed_net(policy)
    save_packed(model, tmp_path / "m.safetensors")
    found = reader().read(tmp_path / "m.safetensors")
    sites = layer_sites(model)
    assert len(sites) == 4
    for site in sites:
        kernel = qj.dequantize(unpack(site.installed.weights.packed))
        np.testing.assert_array_equal(found[f"{site.path}/kernel"], kernel)
    np.testing.assert_array_equal(found["layers/3/bias"], model.layers[3].bias[...])


def test_thresholds_that_training_carries_are_no_part_of_a_file(tmp_path):
    path = tmp_path / "m.safetensors"
    trained = qj.quantize_model(net(), "octav-w3a3")
    qj.carry_thresholds(trained, INPUTS)
    model = pack_model(trained, INPUTS)
    model.eval()
    save_packed(model, path)
    assert not [name for name in load_file(path) if "carried" in name]

    def write_as_before(arrays):
        arrays["layers/3/dot_general/activations/carried"] = np.ones((1, 1), np.float32)

    for change in (None, write_as_before):
        rewritten(path, change)
        loaded = load_packed(net(), path)
        loaded.eval()
        np.testing.assert_array_equal(run(loaded, INPUTS), run(model, INPUTS))


def test_an_abstract_model_is_enough(tmp_path):
    def small():
        return nnx.Sequential(nnx.Linear(8, 5, rngs=nnx.Rngs(0)))

    model = pack_model(qj.quantize_model(small(), "octav-w3a3"), INPUTS)
    save_packed(model, tmp_path / "m.safetensors")
    loaded = load_packed(nnx.eval_shape(small), tmp_path / "m.safetensors")
    np.testing.assert_array_equal(loaded(INPUTS), model(INPUTS))


def test_a_process_without_jax_reads_a_file(tmp_path):
    save_packed(packed_net("octav-w3a3"), tmp_path / "m.safetensors")
    without_jax = "import sys; sys.modules['jax'] = None; import runpy; sys.argv = sys.argv[1:]; "
    run_it = "runpy.run_path(sys.argv[0], run_name='__main__')"
    printed = subprocess.run(
        [sys.executable, "-c", without_jax + run_it, READER, tmp_path / "m.safetensors"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "layers/1/kernel" in printed
    assert "(3, 3, 10, 12)" in printed


def test_another_process_computes_the_same(tmp_path):
    model = packed_net("vsquant-4/4U/4/6")
    save_packed(model, tmp_path / "m.safetensors")
    np.save(tmp_path / "expected.npy", run(model, INPUTS))
    code = """
import sys, numpy as np
from flax import nnx
from qat_jax.export import load_packed
from tests.export.test_packed_file import INPUTS, net, run
model = load_packed(net(), sys.argv[1])
model.eval()
assert (np.asarray(run(model, INPUTS)) == np.load(sys.argv[2])).all()
"""
    files = [tmp_path / "m.safetensors", tmp_path / "expected.npy"]
    subprocess.run([sys.executable, "-c", code, *files], check=True, cwd=READER.parents[1])


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    model = packed_net("octav-w3a3")
    save_packed(model, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_packed(net(), path)
    save_file({"a": np.ones(3)}, path)
    with pytest.raises(ValueError, match="write one with save_packed"):
        load_packed(net(), path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_packed(net(), tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="make it first"):
        save_packed(model, tmp_path / "none" / "m.safetensors")
    with pytest.raises(ValueError, match="is a folder: give the path of a file"):
        save_packed(model, tmp_path)
    assert not list(tmp_path.parent.glob(".*.unfinished"))
    with pytest.raises(ValueError, match="pack_model comes first"):
        save_packed(net(), path)


def test_kernels_cut_into_shards_have_no_place_in_a_file(tmp_path):
    policy = qj.Policy([qj.Rule(".*", qj.Quantizer(qj.Int(4), granularity=qj.PerShard(4)))])
    layer = nnx.Sequential(nnx.Linear(8, 5, rngs=nnx.Rngs(0)))
    model = pack_model(qj.quantize_model(layer, policy), INPUTS)
    with pytest.raises(ValueError, match=r"layers/0/weights .* PerTensor or PerChannel"):
        save_packed(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def rewritten(path, change_arrays=None, change_content=None):
    arrays = load_file(path)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    content = json.loads(json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["qat_jax"])
    if change_arrays:
        change_arrays(arrays)
    if change_content:
        change_content(content)
    save_file(arrays, path, metadata={"qat_jax": json.dumps(content)})


def test_a_file_of_another_model_or_a_later_layout_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    model = packed_net("octav-w3a3")
    wider = nnx.Sequential(*net().layers[:-1], nnx.Linear(12, 6, rngs=nnx.Rngs(0)))
    longer = nnx.Sequential(*net().layers, nnx.LayerNorm(5, rngs=nnx.Rngs(0)))
    save_packed(model, path)
    with pytest.raises(ValueError, match=r"of another model: layers/3/weights has shape \(12, 5\)"):
        load_packed(wider, path)
    with pytest.raises(ValueError, match="only one of the two has 'layers/4/bias'"):
        load_packed(longer, path)
    rewritten(path, change_arrays=lambda arrays: arrays.pop("layers/3/weights.scale"))
    with pytest.raises(ValueError, match=r"codes or scales of layers/3/weights are missing"):
        load_packed(net(), path)
    save_packed(model, path)
    rewritten(path, change_content=lambda content: content.update(version=2))
    with pytest.raises(ValueError, match="this qat_jax knows 1"):
        load_packed(net(), path)


def test_every_quantiser_of_the_library_can_be_described():
    quantizers = [
        quantizer
        for name in [*POLICIES, "mxfp4", "mxint8", "max-w8a8", "vsquant-4/8U/fp16/-"]
        for rule in qj.preset(name).rules
        for quantizer in (rule.weights, rule.activations)
    ]
    quantizers += [
        qj.Quantizer(qj.Int(4), clipping=clipping)
        for clipping in (qj.Exact(), qj.MseSweep(), qj.Entropy(), qj.Percentile(99.9))
    ]
    for quantizer in quantizers:
        described = json.loads(json.dumps(describe(quantizer)))
        assert restore(described) == quantizer


def test_a_quantiser_of_ones_own_cannot_be_described():
    def rule(x, lower, upper, g):
        return g

    with pytest.raises(ValueError, match="cannot be described in a file"):
        describe(qj.Quantizer(qj.Int(4), gradient=rule))
    with pytest.raises(ValueError, match="no 'Int5'"):
        restore({"type": "Int5"})
    with pytest.raises(ValueError, match="not a Int"):
        restore({"type": "Int", "width": 4})


def test_arrays_of_numpy_in_any_order_of_memory(tmp_path):
    def plain():
        return nnx.Sequential(
            nnx.Linear(8, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 4, rngs=nnx.Rngs(1))
        )

    x = jax.random.normal(jax.random.key(0), (3, 8))
    model = plain()
    transposed = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32).T
    model.layers[0].kernel = nnx.Param(transposed)
    policy = qj.Policy([qj.Rule("layers/0"), qj.Rule.from_notation(".*", "4/4/4/6")])
    packed = pack_model(qj.quantize_model(model, policy), x)
    save_packed(packed, tmp_path / "m.safetensors")
    loaded = load_packed(plain(), tmp_path / "m.safetensors")
    np.testing.assert_array_equal(run(loaded, x), run(packed, x))
    with pytest.raises(ValueError, match="npz has no place for metadata"):
        save_packed(packed, tmp_path / "m.npz")


def test_the_reader_knows_bfloat16_and_every_name(tmp_path):
    class Net(nnx.Module):
        def __init__(self):
            half = {"param_dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
            self.attention_weights = nnx.Linear(8, 4, **half)

        def __call__(self, x):
            return self.attention_weights(x)

    x = jnp.ones((2, 8), jnp.bfloat16)
    weights = qj.Quantizer(qj.Int(4), qj.PerVector(4), qj.AbsMax(), scale=qj.FloatScale("bfloat16"))
    model = qj.quantize_model(Net(), qj.Policy([qj.Rule(".*", weights)]))
    model.attention_weights.bias[...] = jnp.arange(4, dtype=jnp.bfloat16) / 7
    save_packed(pack_model(model, x), tmp_path / "m.safetensors")
    found = reader().read(tmp_path / "m.safetensors")
    assert set(found) == {"attention_weights/kernel", "attention_weights/bias"}
    expected = jax.tree.map(np.float32, model.attention_weights.bias[...])
    np.testing.assert_array_equal(found["attention_weights/bias"], expected)


def layers(dtype, param_dtype=jnp.float32, **options):
    options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": nnx.Rngs(0)} | options
    model = nnx.Sequential(nnx.Linear(8, 8, **options), nnx.relu, nnx.Linear(8, 4, **options))
    model.eval()
    return model


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, None])
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_file_is_for_models_that_compute_in_its_dtype(tmp_path, dtype, use_bias):
    made_with, other = jnp.float32, jnp.bfloat16
    if dtype == jnp.bfloat16:
        made_with, other = other, made_with
    x = jax.random.normal(jax.random.key(0), (2, 8)).astype(made_with)
    model = qj.quantize_model(layers(dtype, made_with, use_bias=use_bias), "octav-w4a4")
    model = pack_model(model, x)
    save_packed(model, path := tmp_path / "m.safetensors")
    expected = run(model, x)
    # The dtype of parameters is that of the file.
    for param_dtype in (made_with, other):
        found = run(load_packed(layers(dtype, param_dtype, use_bias=use_bias), path), x)
        assert found.dtype == expected.dtype == made_with
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(
        ValueError,
        match=rf"layers/0 computes in {np.dtype(made_with)}, here it does in {np.dtype(other)}: "
        rf"make the model with dtype=jnp\.{np.dtype(made_with)}",
    ):
        load_packed(layers(other), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"change_arrays": lambda a: a.pop("layers/1/weights.coarse")},
            "coarse scales of .* missing",
        ),
        (
            {
                "change_arrays": lambda a: a.update(
                    {"layers/1/weights.codes": np.zeros(3, np.uint8)}
                )
            },
            r"codes of layers/1/weights have shape \(3,\), not .* damaged",
        ),
        (
            {
                "change_arrays": lambda a: a.update(
                    {"layers/1/weights.scale": np.zeros(1, np.uint8)}
                )
            },
            r"scales of layers/1/weights have shape .* damaged",
        ),
        (
            {"change_content": lambda c: c.pop("version")},
            r"m\.safetensors is damaged: its metadata",
        ),
        ({"change_content": lambda c: c.update(kernels=[1])}, "is damaged: its metadata"),
        (
            {"change_content": lambda c: c["kernels"]["layers/1/weights"].pop("axes")},
            "metadata lacks a part",
        ),
    ],
)
def test_files_with_parts_missing_are_refused(change, message, tmp_path):
    path = tmp_path / "m.safetensors"
    save_packed(packed_net("vsquant-4/4U/4/6"), path)
    rewritten(path, **change)
    with pytest.raises(ValueError, match=message):
        load_packed(net(), path)
