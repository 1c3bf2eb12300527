"""Weights quantised, activations in floating point: names, and all that consumes a policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qat_jax as qj
from qat_jax.export import load_packed, save_packed, to_stablehlo
from qat_jax.hardware import Design, scale_pairs
from qat_jax.integer import integer_model, pack_model
from qat_jax.linen import quantize_model as quantize_linen
from qat_jax.policy import BLOCK_FORMATS

NAMES = ["octav-w4", "max-w4", "octav-w4-ste", "vsquant-4/-", "vsquant-4/-/4/-", "mxfp4-weights"]
X = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(3, 32, (3, 3), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 32, decode=False, rngs=rngs)
        self.head = nnx.Linear(32, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x)).reshape(len(x), -1, 32)
        return self.head(self.attention(x).mean(1))


class Sequence(nnx.Module):
    """What every export takes."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(3, 32, (3, 3), rngs=rngs)
        self.body = nnx.Conv(32, 32, (3, 3), rngs=rngs)
        self.head = nnx.Linear(32, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.body(nnx.relu(self.stem(x)))).mean((1, 2)))


def test_notations_of_weights_alone():
    assert qj.Notation.parse("4/-/4/-") == qj.Notation(4, None, weight_scale=4)
    for text in ("4/-/4/-", "4/-/-/-", "6/-/fp16/-"):
        assert str(qj.Notation.parse(text)) == text
    assert str(qj.Notation.parse("4/-")) == "4/-/-/-"


@pytest.mark.parametrize("scale", ["6", "fp16"])
def test_a_scale_of_activations_that_are_left_alone_is_an_error(scale):
    with pytest.raises(ValueError, match=f"have no scales, {scale}: write 4/-/4/-$"):
        qj.Notation.parse(f"4/-/4/{scale}")


@pytest.mark.parametrize("name", NAMES)
def test_no_rule_quantises_an_activation(name):
    policy = qj.preset(name, first="stem", last="head")
    assert len(policy.rules) == (1 if "mx" in name else 3)
    assert all(rule.weights is not None and rule.activations is None for rule in policy.rules)


def test_the_names_say_the_weights_of_their_counterparts():
    for alone, both in [
        ("octav-w4", "octav-w4a4"),
        ("max-w4", "max-w4a8"),
        ("octav-w4-ste", "octav-w4a4-ste"),
        ("vsquant-4/-/4/-", "vsquant-4/4U/4/6"),
        ("mxfp4-weights", "mxfp4"),
    ]:
        ends = {"first": "stem", "last": "head"}
        weights = [rule.weights for rule in qj.preset(alone, **ends).rules]
        assert weights == [rule.weights for rule in qj.preset(both, **ends).rules]
    assert {f"{name}-weights" for name in BLOCK_FORMATS if "weights" not in name} < set(
        BLOCK_FORMATS
    )
    assert qj.uniform_policy(4, None, first="a") == qj.preset("octav-w4", first="a")


def test_ends_can_be_said():
    policy = qj.Policy.from_notation("4/-", first="stem", edges="8/8U")
    assert policy.rules[0].activations is not None


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_fake_quantised_and_learn(name):
    model = qj.quantize_model(Net(), name)
    layers = qj.report(model).layers
    assert all(layer.activations is None for layer in layers)
    assert [layer.path for layer in layers if layer.weights is None] == ["attention"]
    assert all(path.endswith("weights") for path in qj.operand_quantizers(model))

    # The same numbers as of a float model with kernels that were quantised before.
    by_hand = Net()
    for path, quantizer in qj.operand_quantizers(model).items():
        layer = by_hand
        for part in path.split("/")[:-1]:
            layer = getattr(layer, part)
        *_, features, out = range(layer.kernel.ndim)
        if layer.kernel.ndim == 3 and not path.startswith("attention/out"):
            axes = (1, 2), 0
        elif layer.kernel.ndim == 3:
            axes = 2, (0, 1)
        else:
            axes = out, features
        if "mx" in name and path.startswith("attention/out"):
            axes = 2, 1
        layer.kernel[...] = quantizer.quantizer(layer.kernel[...], *axes)
    np.testing.assert_allclose(model(X), by_hand(X), atol=2e-6)

    grads = nnx.grad(lambda m: jnp.sum(m(X) ** 2))(model)
    assert all(jnp.isfinite(g).all() and g.any() for g in jax.tree.leaves(grads.stem))


def test_attention_of_its_own_stays_where_its_products_do():
    def own(query, key, value, **_):
        return query + key + value

    model = Net()
    model.attention.attention_fn = own
    assert qj.quantize_model(model, "octav-w4").attention.attention_fn is own
    with pytest.raises(ValueError, match="attention already has a attention_fn of its own"):
        qj.quantize_model(model, "octav-w4a4")


@pytest.mark.parametrize("name", NAMES)
def test_linen_likewise(name):
    x = jnp.ones((2, 64))
    net = nn.Sequential([nn.Dense(64), nn.relu, nn.Dense(5)])
    model = quantize_linen(net, name, x)
    assert all(layer.weights and not layer.activations for layer in model.report.layers)
    variables = model.init(jax.random.key(0), x)
    _, captured = model.apply(variables, x, mutable=["diagnostics"])
    assert all(set(found) == {"weights"} for found in captured["diagnostics"].values())
    grads = jax.grad(lambda v: jnp.sum(model.apply(v, x) ** 2))(variables)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert not jnp.array_equal(model.apply(variables, x), net.apply(variables, x))


def test_thresholds_of_weights_are_frozen_and_carried(tmp_path):
    model = qj.quantize_model(Sequence(), "octav-w4")
    assert qj.carry_thresholds(model, X) == ("stem/weights", "body/weights", "head/weights")
    model = qj.quantize_model(Sequence(), "octav-w4")
    expected = model(X)
    assert qj.calibrate(model, [X]) == ("stem/weights", "body/weights", "head/weights")
    qj.save_thresholds(model, tmp_path / "t.safetensors")
    again = qj.quantize_model(Sequence(), "octav-w4")
    qj.load_thresholds(again, tmp_path / "t.safetensors")
    np.testing.assert_array_equal(again(X), expected)


@pytest.mark.parametrize("name", NAMES)
def test_packed_kernels_meet_floats(tmp_path, name):
    model = qj.quantize_model(Sequence(), name)
    model.eval()
    expected = nnx.jit(lambda m: m(X))(model)
    packed = pack_model(model, X)
    np.testing.assert_array_equal(nnx.jit(lambda m: m(X))(packed), expected)
    assert qj.model_storage(packed, X).bits_per_element < 10
    with pytest.raises(ValueError, match="the input of stem is a float"):
        integer_model(packed)

    save_packed(packed, tmp_path / "m.safetensors")
    loaded = load_packed(Sequence(), tmp_path / "m.safetensors")
    np.testing.assert_array_equal(nnx.jit(lambda m: m(X))(loaded), expected)

    program = to_stablehlo(packed, X)  # nothing depends on the size of the batch
    np.testing.assert_allclose(program.call(X[:1]), expected[:1], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if "mx" not in name])
def test_onnx_has_dequantised_kernels_and_no_pairs(name):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from qat_jax.export.onnx import to_onnx

    model = qj.quantize_model(Sequence(), name)
    graph = to_onnx(model, X)
    types = [node.op_type for node in graph.graph.node]
    assert types.count("QuantizeLinear") == 0
    assert types.count("DequantizeLinear") >= 3
    session = runtime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"input": np.asarray(X)})
    np.testing.assert_allclose(found, model(X), atol=1e-4)


def test_the_hardware_has_no_floats():
    for design in (lambda: Design.from_notation("4/-/4/-"), lambda: Design.of(qj.Rule(".*"))):
        with pytest.raises(ValueError, match="must quantise weights and activations: the datapath"):
            design()
    with pytest.raises(ValueError, match="no layer has integer scales and quantised activations"):
        scale_pairs(qj.quantize_model(Sequence(), "vsquant-4/-/4/-"), X)


def test_files_say_it_too():
    policy = qj.preset("vsquant-4/-/4/-", first="stem")
    assert qj.policy_from_yaml(qj.policy_to_yaml(policy)) == policy
    written = "- {pattern: stem, notation: 8/-}\n- {pattern: .*, notation: 4/-/4/-}"
    assert qj.policy_from_yaml(written) == policy
