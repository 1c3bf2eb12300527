"""From a config to a network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from configs.cifar10_resnet20 import get_config as resnet_config
from configs.squad_bert_base import get_config as bert_config
from configs.squad_minilm_ptq import get_config as bert_ptq_config
from experiments import build
from qat_jax.models import CifarResNet, save_weights


def numbers(model):
    """All of a model's arrays by path, those of its random keys too."""
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        x = variable.get_value()
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        found[path] = np.asarray(jax.random.key_data(x) if is_key else x)
    return found


def small_bert(seed, pretrained=None):
    config = bert_config("bits=32")
    config.model.size.update(layers=1, hidden=16, heads=2, intermediate=16, vocabulary=20)
    config.model.pretrained = pretrained
    config.seed = seed
    return build.float_model(config)


def test_what_a_file_has_is_not_drawn(weights, monkeypatch):
    kernels = []

    def recorded(**settings):
        model = CifarResNet(**settings)
        kernels.append(model.conv1.kernel.get_value())
        return model

    monkeypatch.setitem(build._MODELS, "cifar_resnet", recorded)
    config = resnet_config("bits=32")
    config.model.update(depth=8, width=4, in_channels=1, pretrained=str(weights))
    model = build.float_model(config)
    assert [isinstance(kernel, jax.core.Tracer) for kernel in kernels] == [True]
    assert model(jnp.ones((1, 8, 8, 1))).shape == (1, 10)


@pytest.mark.parametrize("part", ["encoder", "whole"])
def test_what_a_file_lacks_is_drawn_from_the_seed(tmp_path, part):
    other, path = small_bert(7), tmp_path / "weights.safetensors"
    save_weights(other.bert if part == "encoder" else other, path)
    drawn, saved = numbers(small_bert(5)), numbers(other)
    found = numbers(small_bert(5, str(path)))
    assert found.keys() == drawn.keys()
    lacking = [p for p in found if {"dropout", "rngs"} & set(p)]
    lacking += [p for p in found if part == "encoder" and p[0] == "answer"]
    assert 0 < len(lacking) < len(found)
    for path, x in found.items():
        expected = drawn[path] if path in lacking else saved[path]
        # Compiled as one, a product may be rounded otherwise.
        np.testing.assert_allclose(x, expected, rtol=1e-6, err_msg=str(path))
        assert x.dtype == expected.dtype


def test_an_undrawn_model_is_one_of_zeros():
    model = build.undrawn(lambda: small_bert(5))
    found = numbers(model)
    assert found.keys() == numbers(small_bert(5)).keys()
    assert all((x == 0).all() for x in found.values())
    model.eval()
    assert model(jnp.ones((1, 4), jnp.int32)).shape == (1, 4, 2)


def test_a_teacher_is_the_float_network_of_its_weights(tmp_path):
    whole, encoder = (tmp_path / f"{part}.safetensors" for part in ("whole", "encoder"))
    other = small_bert(7)
    save_weights(other, whole)
    save_weights(other.bert, encoder)
    config = bert_config("bits=4")
    config.model.size.update(layers=1, hidden=16, heads=2, intermediate=16, vocabulary=20)
    config.model.pretrained = str(encoder)
    assert build.teacher(config) is None

    config.distillation.weight = 0.5
    with pytest.raises(ValueError, match=r"encoder\.safetensors has no head and cannot teach"):
        build.teacher(config)
    config.distillation.teacher = str(whole)
    teacher, expected = build.teacher(config), other
    assert not qj.operand_quantizers(teacher)
    for model in (teacher, expected):
        model.eval()
    tokens = jnp.arange(8).reshape(2, 4)
    np.testing.assert_array_equal(teacher(tokens), expected(tokens))
    assert config.model.pretrained == str(encoder)


def test_overrides_go_before_the_rest():
    config = bert_config("bits=4,gradient=mad")
    config.model.size.update(layers=1, hidden=16, heads=2, intermediate=16, vocabulary=20)
    before = qj.operand_quantizers(build.quantised_model(config))
    config.quant.overrides = (".*/attention=4/4U/-/token", ".*/attention/out=8/8U")
    found = qj.operand_quantizers(build.quantised_model(config))
    assert found.keys() == before.keys()
    for path, operand in found.items():
        expected = before[path].quantizer
        if path.endswith(("/query", "/key", "/attention_weights", "/value")):
            expected = dataclasses.replace(expected, granularity=qj.PerChannel())
        elif "/attention/out/" in path:
            wider = dataclasses.replace(expected.format, bits=8)
            expected = dataclasses.replace(expected, format=wider)
        assert operand.quantizer == expected, path


@pytest.mark.parametrize(
    ("written", "scale", "granularity"),
    [
        ("8", qj.FloatScale(), qj.PerChannel()),
        ("8/-", qj.FloatScale(), qj.PerChannel()),
        ("8/-/6/-", qj.IntScale(6, qj.PerChannel()), qj.PerVector(16)),
    ],
)
@pytest.mark.parametrize("made_by", [build.quantised_model, build.ptq_policy])
def test_embeddings_are_quantised_where_a_config_says_so(written, scale, granularity, made_by):
    config = bert_ptq_config("4/4") if made_by is build.ptq_policy else bert_config("bits=4")
    config.model.size.update(layers=1, hidden=16, heads=2, intermediate=16, vocabulary=20)

    def made():
        found = made_by(config)
        if made_by is build.ptq_policy:
            found = qj.quantize_model(small_bert(0), found)
        return {layer.path: layer for layer in qj.report(found).layers}

    before = made()
    config.quant.embeddings = written
    found = made()
    tables = {path for path in found if path.startswith("bert/embeddings/")}
    assert len(tables) == 3
    for path, layer in found.items():
        if path not in tables:
            assert layer == before[path]
            continue
        assert before[path].weights is None
        assert layer.weights.format == qj.Int(8, narrow=True)
        assert layer.weights.scale == scale
        assert layer.weights.granularity == granularity


@pytest.mark.parametrize(
    ("argument", "changes", "message"),
    [
        ("bits=4", {"overrides": ("layer1",)}, "write PATTERN=NOTATION"),
        ("float", {"overrides": ("layer1/.*=8/8",)}, "of a network that is quantised"),
        (
            "bits=4",
            {"overrides": ("layer1/.*=8/8",), "policy": "- {pattern: .*, notation: 4/4}"},
            "write the rules into the policy",
        ),
        ("bits=4", {"embeddings": "8"}, "cifar_resnet has no embeddings"),
        ("float", {"embeddings": "8"}, "of a network that is quantised"),
    ],
)
def test_overrides_that_nothing_would_read_are_refused(argument, changes, message):
    config = resnet_config(argument)
    config.quant.update(changes)
    with pytest.raises(ValueError, match=message):
        build.quantised_model(config)


@pytest.mark.parametrize(
    ("written", "message"), [("8/8", "tables have no activations"), ("eight", "has 1 parts")]
)
def test_what_is_no_way_to_quantise_embeddings_is_refused(written, message):
    config = bert_config("bits=4")
    config.quant.embeddings = written
    with pytest.raises(ValueError, match=message):
        build.quantised_model(config)
