import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qat_jax as qj
from qat_jax import Int, PerChannel, PerTensor, PerVector, Quantizer, fake_quant
from qat_jax.export import load_packed, save_packed
from qat_jax.integer import pack_model
from qat_jax.nnx import Learned

FORMATS = [
    Int(2, narrow=True),
    Int(3),
    Int(4, narrow=True),
    Int(4, signed=False),
    Int(8, signed=False, narrow=True),
]


def lsq(x, step, low, high):
    """The paper's pseudo-code, differentiated by JAX."""
    scaled = jnp.clip(x / step, low, high)
    rounded = scaled + jax.lax.stop_gradient(jnp.round(scaled) - scaled)
    return rounded * step


def numbers(shape, seed=0, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def threshold_gradient(x, s, g, quantizer, **axes):
    _, pullback = jax.vjp(
        lambda s: fake_quant(x, quantizer, threshold=s, learned=True, **axes), jnp.asarray(s)
    )
    return pullback(g)[0]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("gradient", ["ste", "pwl", "mad"])
def test_the_gradient_is_that_of_lsq(format, gradient):
    with jax.enable_x64(True):
        x, g = numbers((7, 11)), numbers((7, 11), 1)
        s = jnp.full((1, 1), 0.8)
        grid = format.grid(x)
        step = 0.8 / grid.steps
        _, pullback = jax.vjp(lambda step: lsq(x, step, grid.low, grid.high), jnp.asarray(step))
        expected = pullback(g)[0] / grid.steps
        found = threshold_gradient(x, s, g, Quantizer(format, gradient=gradient))
        np.testing.assert_allclose(found, np.full((1, 1), expected), rtol=1e-9)


@pytest.mark.parametrize(
    ("granularity", "axes", "compact", "group"),
    [
        (PerChannel(), {"channel_axis": 1}, (1, 10), (6, 1)),
        (PerVector(4), {"vector_axis": 1}, (6, 3), (1, 4)),
        (PerVector(4), {"vector_axis": 0}, (2, 10), (4, 1)),
    ],
)
def test_each_group_has_its_own(granularity, axes, compact, group):
    """Against one group at a time, the last vectors being short."""
    with jax.enable_x64(True):
        x, g = numbers((6, 10)), numbers((6, 10), 1)
        s = 0.3 + numbers(compact, 2) ** 2
        quantizer = Quantizer(Int(3, narrow=True), granularity)
        found = threshold_gradient(x, s, g, quantizer, **axes)
        assert found.shape == compact
        rows, columns = group
        for i, j in np.ndindex(compact):
            part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            one = threshold_gradient(x[part], s[i, j], g[part], Quantizer(Int(3, narrow=True)))
            np.testing.assert_allclose(found[i, j], one, rtol=1e-9)


def test_the_operand_has_the_gradient_it_had():
    x, s = numbers((5, 9), dtype=jnp.float32), jnp.array([[0.5]])
    for gradient in ("ste", "pwl", "mad"):
        quantizer = Quantizer(Int(4), gradient=gradient)
        constant, learned = (
            jax.vjp(
                lambda x, quantizer=quantizer, learned=learned: fake_quant(
                    x, quantizer, threshold=s, learned=learned
                ),
                x,
            )
            for learned in (False, True)
        )
        np.testing.assert_array_equal(constant[0], learned[0])
        np.testing.assert_array_equal(constant[1](x)[0], learned[1](x)[0])


def test_thresholds_are_constants_unless_they_are_to_be_learned():
    x = numbers((8,), dtype=jnp.float32)
    constant = jax.grad(lambda s: fake_quant(x, Quantizer(Int(4)), threshold=s).sum())
    assert constant(0.5) == 0
    for quantise in (fake_quant, qj.fake_quant_with_diagnostics):
        with pytest.raises(ValueError, match="give one to be learned"):
            quantise(x, Quantizer(Int(4)), learned=True)


def test_codes_and_scales_have_no_gradient():
    def decoded(x, s):
        return qj.dequantize(qj.quantize(x, Quantizer(Int(4)), threshold=s)) @ jnp.arange(8.0)

    of_x, of_threshold = jax.grad(decoded, (0, 1))(numbers((8,), dtype=jnp.float32), 0.5)
    assert of_threshold == 0
    np.testing.assert_array_equal(of_x, 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_half_precision_and_groups_of_zeros(dtype):
    x = numbers((3, 8), dtype=jnp.float32).at[1].set(0).astype(dtype)
    s = jnp.array([[0.7], [0.0], [0.0]])
    found = threshold_gradient(
        x, s, jnp.ones_like(x), Quantizer(Int(4), PerChannel()), channel_axis=0
    )
    assert found.dtype == jnp.float32
    assert np.isfinite(found).all()
    assert found[0, 0] != 0
    np.testing.assert_array_equal(found[1:], 0)  # nothing is known about what has no step


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, 6, rngs=rngs, decode=False)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x)).reshape(x.shape[0], -1, 6)
        return self.head(self.attention(x).mean(1))


def images(seed=1):
    return jax.random.normal(jax.random.key(seed), (2, 4, 4, 3))


def flat(state):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(nnx.to_pure_dict(state))])


def gradient_with_diagnostics(model):
    def loss(model):
        return jnp.square(nnx.capture(model, qj.Diagnostic)(images())[0]).mean()

    return flat(nnx.grad(loss)(model))


def learning(policy="octav-w4a4", operands=".*"):
    model = qj.quantize_model(Net(nnx.Rngs(0)), policy)
    qj.calibrate(model, [images()])
    return model, qj.learn_thresholds(model, operands=operands)


def test_every_frozen_threshold_becomes_a_parameter():
    model = qj.quantize_model(Net(nnx.Rngs(0)), "octav-w4a4")
    frozen = qj.calibrate(model, [images()])
    before = model(images())
    learned = qj.learn_thresholds(model)
    assert set(learned) == set(frozen)
    np.testing.assert_array_equal(model(images()), before)
    parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
    names = {"/".join(map(str, path)) for path, _ in parameters}
    assert sum(name.endswith("threshold") for name in names) == len(learned)
    assert "learned" in repr(model.head.dot_general.weights)
    assert qj.learn_thresholds(model) == learned  # again: as it was
    qj.calibrate(model, [images()])
    assert not any(isinstance(x, Learned) for _, x in nnx.iter_graph(model))


def test_what_cannot_be_learned_is_said():
    model = qj.quantize_model(Net(nnx.Rngs(0)), "octav-w4a4")
    with pytest.raises(ValueError, match="none, freeze some with calibrate first"):
        qj.learn_thresholds(model)
    qj.calibrate(model, [images()])
    with pytest.raises(ValueError, match=r"'nothing': there are .*head/weights"):
        qj.learn_thresholds(model, operands="nothing")
    assert qj.learn_thresholds(model, operands=".*weights") == tuple(
        path for path in qj.operand_quantizers(model) if path.endswith("weights")
    )


def test_a_step_of_descent_moves_steps_as_lsq_does():
    """On a linear layer, with LSQ's own parameter, the step, and its own scale of the gradient."""
    layer = nnx.Linear(6, 5, use_bias=False, rngs=nnx.Rngs(0))
    quantizer = Quantizer(Int(4, narrow=True), PerTensor(), gradient="pwl")
    weights = dataclasses.replace(quantizer, granularity=PerChannel())
    model = qj.quantize_model(
        nnx.Sequential(layer), qj.Policy([qj.Rule(".*", weights=weights, activations=quantizer)])
    )
    x = numbers((8, 6), dtype=jnp.float32)
    target = numbers((8, 5), 1, jnp.float32)
    qj.calibrate(model, [x])
    qj.learn_thresholds(model)
    operation = model.layers[0].dot_general
    before = {
        name: getattr(operation, name).threshold.get_value() / 7
        for name in ("activations", "weights")
    }

    def loss(model):
        return jnp.square(model(x) - target).mean()

    optimizer = nnx.Optimizer(model, optax.sgd(0.01), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(loss)(model))

    def paper(steps):
        kernel = lsq(layer.kernel[...], steps["weights"], -7, 7)
        return jnp.square(lsq(x, steps["activations"], -7, 7) @ kernel - target).mean()

    gradient = jax.grad(paper)(before)
    scale = {"activations": 1 / np.sqrt(6 * 7), "weights": 1 / np.sqrt(6 * 7)}
    for name, step in before.items():
        expected = step - 0.01 * scale[name] * gradient[name]
        found = getattr(operation, name).threshold.get_value() / 7
        assert (found != step).all()
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_one_below_zero_counts_by_its_magnitude(tmp_path):
    model, learned = learning()
    before = model(images())
    operands = qj.operand_quantizers(model)
    for path in learned:
        operands[path].threshold.set_value(-operands[path].threshold.get_value())
    np.testing.assert_array_equal(model(images()), before)
    qj.save_thresholds(model, tmp_path / "thresholds.safetensors")
    other = qj.quantize_model(Net(nnx.Rngs(0)), "octav-w4a4")
    qj.load_thresholds(other, tmp_path / "thresholds.safetensors")
    np.testing.assert_array_equal(other(images()), before)

    def loss(model):
        return jnp.square(model(images())).mean()

    gradient = nnx.grad(loss)(model)
    for path in learned:
        operands[path].threshold.set_value(-operands[path].threshold.get_value())
    opposite = nnx.grad(loss)(model)
    np.testing.assert_array_equal(gradient_with_diagnostics(model), flat(opposite))
    weights, activations = (
        [getattr(g.head.dot_general, name).threshold.get_value() for g in (gradient, opposite)]
        for name in ("weights", "activations")
    )
    for one, other in (weights, activations):
        assert np.abs(one).max() > 0
        np.testing.assert_array_equal(one, -other)


@pytest.mark.parametrize("policy", ["octav-w4a4", "vsquant-4/8/4/6"])
def test_files_and_counts_take_them_as_frozen(policy, tmp_path):
    model = qj.quantize_model(Net(nnx.Rngs(0)), policy)
    model.eval()
    qj.calibrate(model, [images()])
    frozen = {
        "answer": model(images()),
        "storage": qj.model_storage(model, images()),
        "rest": str(qj.report(model).rest),
    }
    qj.learn_thresholds(model)
    assert qj.model_storage(model, images()) == frozen["storage"]
    assert str(qj.report(model).rest) == frozen["rest"]
    packed = pack_model(model, images())
    np.testing.assert_array_equal(packed(images()), frozen["answer"])
    save_packed(packed, tmp_path / "packed.safetensors")
    read = load_packed(Net(nnx.Rngs(1)), tmp_path / "packed.safetensors")
    read.eval()
    np.testing.assert_array_equal(read(images()), frozen["answer"])


def test_they_learn_under_scan_remat_and_vmap():
    class Deep(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def layers(rngs):
                return nnx.Linear(4, 4, rngs=rngs)

            self.layers = layers(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            @nnx.remat
            def forward(x, layer):
                return nnx.relu(layer(x))

            return forward(x, self.layers)

    model = qj.quantize_model(Deep(nnx.Rngs(0)), qj.uniform_policy(4, 4))
    x = numbers((8, 4), dtype=jnp.float32)
    qj.calibrate(model, [x])
    assert qj.learn_thresholds(model) == ("layers/activations", "layers/weights")
    gradient = nnx.grad(lambda model: jnp.square(model(x)).mean())(model)
    of_weights = gradient.layers.dot_general.weights.threshold.get_value()
    of_activations = gradient.layers.dot_general.activations.threshold.get_value()
    assert of_weights.shape == (3, 1, 4)
    assert of_activations.shape == (3, 1, 1)
    assert all(np.abs(g).max() > 0 for g in (*of_weights, *of_activations))

    each = jax.vmap(
        jax.grad(lambda s, x: fake_quant(x, Quantizer(Int(3)), threshold=s, learned=True).sum())
    )(jnp.array([0.4, 0.9]), x[:2])
    for found, s, row in zip(each, (0.4, 0.9), x[:2], strict=True):
        alone = threshold_gradient(row, s, jnp.ones(4), Quantizer(Int(3)))
        np.testing.assert_allclose(found, alone, rtol=1e-6)
