"""Tables of embeddings: quantised by rules that say so, and by no other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import qat_jax as qj
from qat_jax import linen as qlinen
from qat_jax.export import load_packed, save_packed
from qat_jax.integer import integer_model, pack_model

VOCABULARY, FEATURES = 11, 32
E4 = qj.Quantizer(qj.Int(4, narrow=True), qj.PerChannel(), qj.AbsMax(), "ste")
VECTORS = qj.Quantizer(
    qj.Int(4, narrow=True), qj.PerVector(16), qj.AbsMax(), scale=qj.IntScale(6, qj.PerChannel())
)
W8 = qj.Quantizer(qj.Int(8), qj.PerChannel(), qj.AbsMax())
A8 = qj.Quantizer(qj.Int(8, signed=None), qj.PerTensor(), qj.AbsMax(), "pwl")
TOKENS = jnp.array([[1, 5, 3, 1], [10, 0, 2, 2]])


class LanguageModel(nnx.Module):
    """A table that is looked up first and attended to last, as tied language models have it."""

    def __init__(self, rngs):
        self.tokens = nnx.Embed(VOCABULARY, FEATURES, rngs=rngs)
        self.hidden = nnx.Linear(FEATURES, FEATURES, rngs=rngs)

    def __call__(self, tokens):
        return self.tokens.attend(nnx.relu(self.hidden(self.tokens(tokens))))


class LinenLanguageModel(nn.Module):
    def setup(self):
        self.tokens = nn.Embed(VOCABULARY, FEATURES)
        self.hidden = nn.Dense(FEATURES)

    def __call__(self, tokens):
        return self.tokens.attend(nn.relu(self.hidden(self.tokens(tokens))))


def language_model():
    return LanguageModel(nnx.Rngs(0))


def quantised(embeddings=E4, weights=W8, activations=A8):
    rules = [qj.Rule(".*", weights, activations), qj.Rule("tokens", embeddings=embeddings)]
    return qj.quantize_model(language_model(), qj.Policy(rules))


def of_rows(table, quantizer):
    return qj.fake_quant(table, quantizer, channel_axis=0, vector_axis=-1)


@pytest.mark.parametrize("quantizer", [E4, VECTORS], ids=["rows", "vectors"])
def test_both_uses_of_a_table_see_its_rows_quantised(quantizer):
    model = quantised(quantizer)
    table = of_rows(model.tokens.embedding.get_value(), quantizer)
    np.testing.assert_array_equal(model.tokens(TOKENS), table[TOKENS])
    query = jax.random.normal(jax.random.key(0), (2, FEATURES))
    np.testing.assert_allclose(model.tokens.attend(query), query @ table.T, rtol=1e-5, atol=1e-6)
    assert len(np.unique(np.asarray(table[3] / jnp.abs(table[3]).max()).round(5))) <= 15 * 2


def test_rows_have_scales_of_their_own():
    model = quantised()
    scaled = model.tokens.embedding.get_value().at[4].mul(1e4)
    before = model.tokens(TOKENS)
    model.tokens.embedding.set_value(scaled)
    np.testing.assert_array_equal(model.tokens(TOKENS), before)  # row 4 is not among them


def test_gradients_reach_the_rows_that_were_looked_up():
    model = quantised()
    gradient = nnx.grad(lambda model: (3 * model.tokens(TOKENS)).sum())(model)
    found = gradient.tokens.embedding.get_value()
    expected = np.zeros((VOCABULARY, FEATURES))
    np.add.at(expected, np.asarray(TOKENS).ravel(), 3)
    np.testing.assert_array_equal(found, expected)


def test_rules_of_kernels_leave_tables_alone():
    model = qj.quantize_model(language_model(), qj.Policy([qj.Rule(".*", W8, A8)]))
    assert [(layer.path, layer.weights) for layer in qj.report(model).layers] == [
        ("tokens", None),
        ("hidden", W8),
    ]
    np.testing.assert_array_equal(model.tokens(TOKENS), language_model().tokens(TOKENS))


def test_the_first_rule_with_a_quantiser_of_embeddings_decides():
    rules = [
        qj.Rule(".*", W8, A8),
        qj.Rule("tok.*", embeddings=E4),
        qj.Rule(".*", embeddings=VECTORS),
    ]
    with pytest.raises(ValueError, match="matches only layers that earlier rules decide"):
        qj.quantize_model(language_model(), qj.Policy([*rules, qj.Rule("hidden", W8)]))
    report = qj.report(qj.quantize_model(language_model(), qj.Policy(rules)))
    tokens, hidden = report.layers
    assert (tokens.weights, tokens.activations, hidden.weights) == (E4, None, W8)
    assert report.rest.parameters == FEATURES  # the bias


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (qj.Rule("tokens", weights=W8), r"matches only embeddings, .*give embeddings=…"),
        (qj.Rule("table", embeddings=E4), r"matches no layer.*there are: hidden, tokens"),
    ],
)
def test_rules_that_decide_nothing_are_refused(rule, message):
    for quantise in (
        lambda policy: qj.quantize_model(language_model(), policy),
        lambda policy: qlinen.quantize_model(LinenLanguageModel(), policy, TOKENS),
    ):
        with pytest.raises(ValueError, match=message):
            quantise(qj.Policy([rule]))


def test_something_else_is_no_quantiser_of_embeddings():
    with pytest.raises(TypeError, match="embeddings is 8: give a Quantizer"):
        qj.Rule(".*", embeddings=8)


def test_policies_with_embeddings_are_files():
    policy = qj.Policy([qj.Rule(".*", W8, A8), qj.Rule("tokens", embeddings=VECTORS)])
    text = qj.policy_to_yaml(policy)
    assert text.count("embeddings") == 1
    assert qj.policy_from_yaml(text) == policy


def test_thresholds_of_tables_are_frozen_saved_and_loaded(tmp_path):
    octav = qj.Quantizer(qj.Int(4, narrow=True), qj.PerChannel(), qj.Octav())
    model = quantised(octav)
    qj.calibrate(model, [TOKENS])
    threshold = qj.operand_quantizers(model)["tokens/weights"].threshold.get_value()
    expected = qj.octav(model.tokens.embedding.get_value(), qj.Int(4, narrow=True), axis=1)
    np.testing.assert_allclose(threshold, expected, rtol=1e-6)
    qj.save_thresholds(model, tmp_path / "t.safetensors")
    other = quantised(octav)
    qj.load_thresholds(other, tmp_path / "t.safetensors")
    np.testing.assert_array_equal(other(TOKENS), model(TOKENS))
    qj.learn_thresholds(model, operands="tokens/weights")
    gradient = nnx.grad(
        lambda model: (model(TOKENS) ** 2).sum(), argnums=nnx.DiffState(0, nnx.Param)
    )
    learned = gradient(model).tokens.promote_dtype.weights.threshold.get_value()
    assert learned.shape == (VOCABULARY, 1)
    assert (learned != 0).any()


def test_diagnostics_name_the_table():
    _, captured = nnx.capture(quantised(), qj.Diagnostic)(TOKENS)
    found = qj.diagnostics_by_layer(captured)
    twice = {"tokens/weights", "tokens/weights/1"}  # looked up, then attended to
    assert twice | {"hidden/weights", "hidden/activations"} == set(found)
    assert 15 < found["tokens/weights"].sqnr_db < 30


@pytest.mark.parametrize("quantizer", [E4, VECTORS], ids=["rows", "vectors"])
def test_packed_tables_are_the_same_and_small(quantizer, tmp_path):
    model = quantised(quantizer)
    model.eval()
    packed = pack_model(model, TOKENS)
    np.testing.assert_array_equal(packed(TOKENS), model(TOKENS))
    assert packed.tokens.embedding.get_value().size == 0
    scales = (32 if quantizer is E4 else 2 * 6 + 32) * VOCABULARY
    bits = 4 * VOCABULARY * FEATURES + scales + 8 * FEATURES**2 + 32 * FEATURES + 32 * FEATURES
    assert qj.model_storage(model, TOKENS).bytes == qj.model_storage(packed, TOKENS).bytes
    assert qj.model_storage(packed, TOKENS).bytes == -(-bits // 8)
    save_packed(packed, tmp_path / "net.safetensors")
    loaded = load_packed(language_model(), tmp_path / "net.safetensors")
    loaded.eval()
    np.testing.assert_array_equal(loaded(TOKENS), model(TOKENS))
    stored = load_file(tmp_path / "net.safetensors").values()
    assert bits <= 8 * sum(array.nbytes for array in stored) < bits + 8 * len(stored)


def test_a_network_in_integers_looks_its_table_up():
    model = quantised()
    model.eval()
    qj.calibrate(model, [TOKENS])
    packed = pack_model(model, TOKENS)
    np.testing.assert_allclose(integer_model(packed)(TOKENS), packed(TOKENS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantizer", [E4, VECTORS], ids=["rows", "vectors"])
def test_tables_go_to_onnx_as_codes(quantizer):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime: pip install 'qat_jax[export]'")
    from qat_jax.export.onnx import to_onnx
    from tests.export.test_onnx import in_runtime, kernels

    model = quantised(quantizer)
    model.eval()
    qj.calibrate(model, [TOKENS])
    exported = to_onnx(model, TOKENS)
    found = in_runtime(exported, TOKENS.astype(np.int32))
    np.testing.assert_allclose(found, model(TOKENS), rtol=1e-4, atol=1e-5)
    assert "INT4" in kernels(exported)


def test_gptq_smoothing_and_rotation_pass_tables_by():
    model = quantised()
    before = model.tokens.embedding.get_value()
    qj.smooth(model, [TOKENS])
    qj.rotate(model)
    assert qj.gptq(model, [TOKENS]) == ("hidden/weights",)
    np.testing.assert_array_equal(model.tokens.embedding.get_value(), before)


def test_linen_is_like_nnx():
    policy = qj.Policy([qj.Rule(".*", W8, A8), qj.Rule("tokens", embeddings=VECTORS)])
    model = qlinen.quantize_model(LinenLanguageModel(), policy, TOKENS)
    twin = quantised(VECTORS)
    hidden = twin.hidden
    variables = {
        "params": {
            "tokens": {"embedding": twin.tokens.embedding.get_value()},
            "hidden": {"kernel": hidden.kernel.get_value(), "bias": hidden.bias.get_value()},
        }
    }
    np.testing.assert_allclose(model.apply(variables, TOKENS), twin(TOKENS), rtol=1e-6)
    in_float = LinenLanguageModel().apply(variables, TOKENS)
    assert not np.allclose(in_float, twin(TOKENS), rtol=1e-3)
    assert {layer.path: layer.weights for layer in model.report.layers} == {
        "tokens": VECTORS,
        "hidden": W8,
    }
    assert model.report.rest == qj.report(twin).rest

    frozen = qlinen.calibrate(model, variables, [TOKENS])
    qj.calibrate(twin, [TOKENS])
    np.testing.assert_allclose(
        frozen["thresholds"]["tokens"]["weights"],
        qj.operand_quantizers(twin)["tokens/weights"].threshold.get_value(),
    )
    np.testing.assert_allclose(model.apply(frozen, TOKENS), twin(TOKENS), rtol=1e-6)


def test_a_table_that_is_only_attended_to_is_found_in_linen():
    class Head(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Embed(VOCABULARY, FEATURES, name="head").attend(x)

    x = jnp.ones((2, FEATURES))
    model = qlinen.quantize_model(Head(), qj.Policy([qj.Rule("head", embeddings=E4)]), x)
    variables = model.init(jax.random.key(0), x)
    table = of_rows(variables["params"]["head"]["embedding"], E4)
    np.testing.assert_allclose(model.apply(variables, x), x @ table.T, rtol=1e-5, atol=1e-6)


def test_half_precision_tables_stay_so():
    embed = nnx.Embed(
        VOCABULARY, FEATURES, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    model = qj.quantize_model(embed, qj.Policy([qj.Rule(".*", embeddings=E4)]))
    assert model(TOKENS).dtype == jnp.bfloat16
    np.testing.assert_array_equal(model(TOKENS), of_rows(embed.embedding.get_value(), E4)[TOKENS])


def test_a_promotion_of_ones_own_is_not_replaced():
    embed = nnx.Embed(3, 4, promote_dtype=lambda arrays, **_: arrays, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="has a promote_dtype of its own"):
        qj.quantize_model(embed, qj.Policy([qj.Rule(".*", embeddings=E4)]))
