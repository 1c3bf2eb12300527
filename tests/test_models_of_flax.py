"""What Flax's models may do besides: flags, views, masks, control flow, parametrised kernels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from qat_jax import linen as qlinen
from qat_jax.integer import integer_model, pack_model

X = jax.random.normal(jax.random.key(0), (4, 16))


class WithFlag(nnx.Module):
    """Its forward pass asks what is no array."""

    def __init__(self):
        self.hidden = nnx.Linear(16, 16, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(16, 4, rngs=nnx.Rngs(1))

    def __call__(self, x, train=True):
        x = self.hidden(x)
        return self.head(nnx.relu(x) if train else jnp.tanh(x))


class LinenWithFlag(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(16, name="hidden")(x)
        return nn.Dense(4, name="head")(nn.relu(x) if train else jnp.tanh(x))


def test_batches_may_have_flags():
    found = {}
    for train in (True, False):
        model = qj.quantize_model(WithFlag(), "max-w8a8")
        assert qj.smooth(model, [(X, train)]) == ("hidden/activations", "head/activations")
        model = qj.quantize_model(WithFlag(), "octav-w8a8")
        qj.carry_thresholds(model, X, train)
        qj.gptq(model, [(X[:2], train), (X[2:], train)])
        assert len(qj.calibrate(model, [(X, train)])) == 4
        found[train] = qj.operand_quantizers(model)["head/activations"].kept
        assert len(qj.calibrate(model, [(X, train), (X, train)], pool=True)) == 4
        assert qj.model_storage(model, X, train) == qj.model_storage(
            pack_model(model, X, train), X, train
        )
    assert found[True] > 1.05 * found[False]  # the tangent is below 1, the ReLU is not


def test_batches_may_have_flags_in_linen():
    module, found = LinenWithFlag(), {}
    model = qlinen.quantize_model(module, "max-w8a8", X, False)
    variables = module.init(jax.random.key(0), X)
    for train in (True, False):
        calibrated = qlinen.calibrate(model, variables, [(X, train)])
        found[train] = calibrated["thresholds"]["head"]["activations"]
    assert found[True] > 1.05 * found[False]


def test_a_view_for_evaluation_leaves_what_training_carries():
    layers = nnx.Linear(16, 16, rngs=nnx.Rngs(0)), nnx.Dropout(0.1, rngs=nnx.Rngs(1))
    model = qj.quantize_model(nnx.Sequential(*layers), "octav-w2a2")
    qj.carry_thresholds(model, X)
    evaluated = nnx.view(model, deterministic=True)
    quantizers = qj.operand_quantizers(evaluated)
    assert all(quantizer.deterministic for quantizer in quantizers.values())
    before = quantizers["layers/0/activations"].carried.get_value()
    evaluated(5 * X)
    np.testing.assert_array_equal(quantizers["layers/0/activations"].carried.get_value(), before)
    assert not any(q.deterministic for q in qj.operand_quantizers(model).values())


@pytest.mark.parametrize("in_integers", [False, True])
def test_causal_attention_beside_a_mask_of_padding(in_integers):
    attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 8, 16))
    mask = (jnp.arange(8) < jnp.array([[8], [5]]))[:, None, None]
    fine = qj.Quantizer(qj.Int(8), qj.PerChannel(), qj.AbsMax())
    model = qj.quantize_model(attention, qj.Policy([qj.Rule(".*", fine, fine)]))
    if in_integers:
        model = integer_model(pack_model(model, x))
    found = model(x, mask=mask, is_causal=True)
    expected = attention(x, mask=mask & jnp.tril(jnp.ones((8, 8), bool)))
    np.testing.assert_allclose(found, expected, atol=0.05 * float(jnp.abs(expected).max()))
    assert jnp.abs(attention(x, mask=mask) - expected).max() > 0.2 * jnp.abs(expected).max()


class Branches(nnx.Module):
    def __init__(self):
        self.a, self.b = (nnx.Linear(16, 16, rngs=nnx.Rngs(seed)) for seed in range(2))

    def __call__(self, x):
        return nnx.cond(x.sum() > 0, lambda m, x: m.a(x), lambda m, x: m.b(x), self, x)


def test_layers_in_branches_run_and_say_why_they_cannot_be_observed():
    model = qj.quantize_model(Branches(), "octav-w8a8")
    np.testing.assert_allclose(model(X), Branches()(X), atol=0.1)
    for observe in (
        lambda: qj.calibrate(model, [X]),
        lambda: qj.smooth(model, [X]),
        lambda: pack_model(model, X),
    ):
        with pytest.raises(ValueError, match=r"inside nnx\.cond, .*leave these layers in float"):
            observe()


class Stack(nnx.Module):
    """What is sown inside is dropped: nothing says along which axis it would lie."""

    def __init__(self):
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(16, 16, rngs=rngs)

        self.layers = make(nnx.Rngs(0).split(3))

    def __call__(self, x):
        axes = nnx.StateAxes({nnx.Param: 0, ...: None})

        @nnx.scan(in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return layer(x)

        return run(self.layers, x)


def test_what_a_scan_drops_is_told():
    model = qj.quantize_model(Stack(), "max-w4a8")
    with pytest.raises(ValueError, match=r"drop what is sown there.*give \.\.\. the axis 0"):
        qj.calibrate(model, [X])
    with pytest.raises(ValueError, match="drops what is sown there"):
        pack_model(model, X)


def test_batch_norms_behind_a_normalised_kernel_stay():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.WeightNorm(nnx.Linear(16, 8, rngs=rngs), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
    )
    model.layers[1].var.set_value(jnp.linspace(0.1, 4, 8))
    model.eval()
    np.testing.assert_allclose(qj.fold_batch_norm(model, X)(X), model(X), rtol=1e-5, atol=1e-6)


def test_folding_keeps_what_a_bias_is_marked_with():
    rngs = nnx.Rngs(0)
    linear = nnx.Linear(16, 8, bias_metadata={"tag": "shift"}, rngs=rngs)
    model = nnx.Sequential(linear, nnx.BatchNorm(8, rngs=rngs))
    folded = qj.fold_batch_norm(model, X)
    assert folded.layers[0].bias.get_metadata() == linear.bias.get_metadata()


class LinenNormalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="head")(nn.WeightNorm(nn.Dense(8, name="first"))(x))


def test_parameters_with_strokes_in_their_names_stay_in_linen():
    module = LinenNormalised()
    model = qlinen.quantize_model(module, "max-w4a8", X)
    variables = module.init(jax.random.key(0), X)
    rounded = qlinen.gptq(model, variables, [X], operands="head/weights")
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert jax.tree.map(jnp.shape, rounded["params"]) == shapes
    assert np.isfinite(model.apply(rounded, X)).all()


def test_diagnostics_that_a_loop_hands_on_do_not_pile_up():
    module = LinenWithFlag()
    model = qlinen.quantize_model(module, "max-w4a8", X)
    variables = module.init(jax.random.key(0), X)
    for _ in range(3):
        _, changed = model.apply(variables, X, mutable=nn.DenyList("params"))
        variables = {**variables, **changed}
    assert len(variables["diagnostics"]["head"]["weights"]) == 1


class LinenCached(nn.Module):
    @nn.compact
    def __call__(self, x):
        seen = self.variable("cache", "seen", lambda: jnp.zeros((), jnp.int32))
        seen.value += 1
        return nn.Dense(4, name="head")(x)


def test_models_with_caches_are_calibrated_in_linen():
    module = LinenCached()
    model = qlinen.quantize_model(module, "max-w4a8", X)
    variables = module.init(jax.random.key(0), X)
    for mutable in (["cache"], "cache"):
        found = qlinen.calibrate(model, variables, [X, X], mutable=mutable)
        assert found["cache"]["seen"] == variables["cache"]["seen"]
        assert found["thresholds"]["head"].keys() == {"weights", "activations"}
