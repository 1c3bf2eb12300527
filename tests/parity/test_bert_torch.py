"""BERT against Hugging Face's, randomly initialised: outputs equal, masks and segments included."""

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qat_jax.models import Bert, BertForQuestionAnswering, BertSize, load_weights, save_weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZE = BertSize(layers=3, hidden=48, heads=4, intermediate=96, vocabulary=99, positions=40)


def theirs(kind):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=SIZE.vocabulary,
        hidden_size=SIZE.hidden,
        num_hidden_layers=SIZE.layers,
        num_attention_heads=SIZE.heads,
        intermediate_size=SIZE.intermediate,
        max_position_embeddings=SIZE.positions,
        initializer_range=0.2,
    )
    return kind(config).eval()


def inputs():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, SIZE.vocabulary, (3, 17))
    mask = np.arange(17) < np.array([[17], [9], [1]])
    return tokens, rng.integers(0, 2, (3, 17)), mask


def run(model):
    tokens, types, mask = map(torch.from_numpy, inputs())
    with torch.no_grad():
        return model(input_ids=tokens, token_type_ids=types, attention_mask=mask.long())


def test_the_encoder_and_its_pooling(tmp_path):
    reference = theirs(transformers.BertModel)
    path = tmp_path / "model.safetensors"
    reference.save_pretrained(tmp_path)
    model = Bert(SIZE, pooling=True, rngs=nnx.Rngs(1))
    load_weights(model, path)
    model.eval()
    expected, encoded = run(reference), model(*inputs())
    mask = inputs()[2]
    hidden = expected.last_hidden_state.numpy()
    np.testing.assert_allclose(encoded[mask], hidden[mask], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        model.pool(encoded), expected.pooler_output.numpy(), rtol=1e-4, atol=1e-4
    )
    save_weights(model, tmp_path / "back.safetensors")
    original, back = load_file(path), load_file(tmp_path / "back.safetensors")
    assert original.keys() == back.keys()
    for name, array in original.items():
        np.testing.assert_array_equal(back[name], array)


def test_the_head_for_questions(tmp_path):
    reference = theirs(transformers.BertForQuestionAnswering)
    reference.save_pretrained(tmp_path)
    model = BertForQuestionAnswering(SIZE, rngs=nnx.Rngs(1))
    load_weights(model, tmp_path / "model.safetensors")
    model.eval()
    expected, logits = run(reference), model(*inputs())
    mask = inputs()[2]
    for index, name in enumerate(("start_logits", "end_logits")):
        np.testing.assert_allclose(
            logits[..., index][mask], expected[name].numpy()[mask], rtol=1e-4, atol=1e-4
        )
