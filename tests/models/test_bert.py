"""BERT: sizes, padding, memory, names, and quantisation from outside."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx.nn.attention import dot_product_attention_weights
from safetensors.numpy import load_file, save_file

import qat_jax as qj
from qat_jax.models import (
    BERT_BASE,
    BERT_LARGE,
    MINILM,
    Bert,
    BertForQuestionAnswering,
    BertSize,
    load_weights,
    save_weights,
)
from qat_jax.training.state import split_model

SMALL = BertSize(layers=2, hidden=8, heads=2, intermediate=16, vocabulary=20, positions=9)
TOKENS = jnp.array([[1, 5, 3, 7, 2, 0], [4, 4, 9, 0, 0, 0]])
MASK = TOKENS > 0


def parameters(make):
    model = nnx.eval_shape(make)
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(
    ("size", "published"), [(BERT_BASE, 109_482_240), (BERT_LARGE, 335_141_888)]
)
def test_parameter_counts_are_the_published_ones(size, published):
    assert parameters(lambda: Bert(size, pooling=True, rngs=nnx.Rngs(0))) == published


def test_a_head_has_a_logit_for_start_and_end():
    assert parameters(lambda: BertForQuestionAnswering(MINILM, rngs=nnx.Rngs(0))) == (
        parameters(lambda: Bert(MINILM, rngs=nnx.Rngs(0))) + 384 * 2 + 2
    )
    model = BertForQuestionAnswering(SMALL, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    model.eval()
    logits = jax.eval_shape(lambda: model(TOKENS, mask=MASK))
    assert (logits.shape, logits.dtype) == ((2, 6, 2), jnp.float32)
    assert model.answer.kernel.dtype == jnp.float32


def test_padding_changes_nothing_that_is_not_padding():
    model = Bert(SMALL, rngs=nnx.Rngs(0))
    model.eval()

    @nnx.jit
    def encode(model, tokens, mask=None):
        return model(tokens, mask=mask)

    whole = encode(model, TOKENS, MASK)
    alone = encode(model, TOKENS[1:, :3])[0]
    np.testing.assert_allclose(whole[1, :3], alone, rtol=1e-4, atol=1e-6)
    other = encode(model, jnp.where(MASK, TOKENS, 11), MASK)
    np.testing.assert_allclose(whole[MASK], other[MASK], rtol=1e-4, atol=1e-6)


def test_dropout_is_of_training_alone():
    model = Bert(SMALL, rngs=nnx.Rngs(0))
    model.train()
    assert not np.allclose(model(TOKENS), model(TOKENS))
    model.eval()
    np.testing.assert_array_equal(model(TOKENS), model(TOKENS))


@pytest.mark.parametrize("broadcast", [False, True])
def test_each_sequence_and_head_loses_other_attention_weights(broadcast):
    size = dataclasses.replace(SMALL, layers=1)
    model = Bert(size, dropout=0.5, broadcast_dropout=broadcast, rngs=nnx.Rngs(0))
    model.train()
    dropped = []

    def attend(query, key, value, *, module, **options):
        weights = dot_product_attention_weights(query, key, **options)
        dropped.append(np.asarray(weights == 0))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value)

    model.layers[0].attention.attention_fn = attend
    model(TOKENS)
    (masks,) = dropped
    assert 0.3 < masks.mean() < 0.7
    masks = masks.reshape(-1, *masks.shape[2:])
    assert len(np.unique(masks, axis=0)) == (1 if broadcast else len(masks))


def test_remat_changes_only_the_memory():
    size = dataclasses.replace(SMALL, layers=1)
    weights = jnp.sin(jnp.arange(2 * 6 * 8.0)).reshape(2, 6, 8)

    def gradient(remat):
        model = Bert(size, dropout=0.5, remat=remat, rngs=nnx.Rngs(0))
        model = qj.quantize_model(model, qj.uniform_policy(8, 8, gradient="ste"))
        graphdefs, params, rest = split_model(model)

        def loss(params):
            encoded = nnx.merge(graphdefs.train, params, rest)(TOKENS, mask=MASK)
            return jnp.sum(encoded * weights)

        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        gradient(True),
        gradient(False),
    )


def test_heads_share_the_features_equally():
    with pytest.raises(ValueError, match="hidden 10 is no multiple of heads 3"):
        BertSize(layers=1, hidden=10, heads=3, intermediate=4)


@pytest.mark.parametrize("library", [None, "huggingface, under bert"])
def test_weights_come_back_under_hugging_faces_names(tmp_path, library):
    first, second = (Bert(SMALL, pooling=True, rngs=nnx.Rngs(seed)) for seed in (1, 2))
    save_weights(first, tmp_path / "bert.safetensors", library)
    load_weights(second, tmp_path / "bert.safetensors")
    first.eval(), second.eval()
    np.testing.assert_array_equal(first.pool(first(TOKENS)), second.pool(second(TOKENS)))
    names = load_file(tmp_path / "bert.safetensors")
    prefix = "bert." if library else ""
    assert names[f"{prefix}encoder.layer.1.attention.output.dense.weight"].shape == (8, 8)
    assert names[f"{prefix}encoder.layer.0.intermediate.dense.weight"].shape == (16, 8)


def test_what_a_model_has_no_use_for_is_left_in_the_file(tmp_path):
    path = tmp_path / "bert.safetensors"
    save_weights(Bert(SMALL, pooling=True, rngs=nnx.Rngs(1)), path)
    save_file(load_file(path) | {"embeddings.position_ids": np.arange(9)[None]}, path)
    load_weights(BertForQuestionAnswering(SMALL, rngs=nnx.Rngs(0)).bert, path)
    save_file(load_file(path) | {"encoder.layer.2.output.dense.bias": np.zeros(8)}, path)
    with pytest.raises(ValueError, match="unexpected names: 1"):
        load_weights(Bert(SMALL, rngs=nnx.Rngs(0)), path)


def test_every_linear_layer_and_both_products_of_attention_are_quantised():
    model = BertForQuestionAnswering(SMALL, rngs=nnx.Rngs(0))
    model = qj.quantize_model(model, qj.uniform_policy(4, 4, last="answer"))
    model.eval()
    found = list(qj.operand_quantizers(model))
    layer = "bert/layers/1"
    for operand in ("query", "key", "attention_weights", "value"):
        assert f"{layer}/attention/{operand}" in found
    for name in ("attention/query", "attention/out", "intermediate", "output"):
        assert {f"{layer}/{name}/weights", f"{layer}/{name}/activations"} <= set(found)
    assert "answer/weights" in found
    assert jnp.isfinite(model(TOKENS, mask=MASK)).all()
