import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from qat_jax.nnx import operand_quantizers


def plain_network(hidden):
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Linear(6, hidden, rngs=rngs),
        nnx.relu,
        nnx.Dropout(0.5, rngs=rngs),
        nnx.Linear(hidden, 3, rngs=rngs),
    )


def network(notation="4/4", hidden=8, **options):
    return qj.quantize_model(plain_network(hidden), qj.Policy.from_notation(notation, **options))


def batches(count=3):
    return [jax.random.normal(jax.random.key(i), (4, 6)) * (i + 1) for i in range(count)]


def test_thresholds_are_the_mean_of_the_candidates():
    model = network()
    frozen = qj.calibrate(model, batches())
    assert len(frozen) == 4
    quantizers = operand_quantizers(model)
    largest = [float(jnp.abs(x).max()) for x in batches()]
    np.testing.assert_allclose(
        quantizers["layers/0/activations"].threshold[...], [[np.mean(largest)]], rtol=1e-6
    )
    kernel = model.layers[0].kernel[...]
    np.testing.assert_allclose(
        quantizers["layers/0/weights"].threshold[...], jnp.abs(kernel).max(0, keepdims=True)
    )
    # The second layer was observed behind the first one in float, without dropout.
    hidden = [nnx.relu(x @ kernel + model.layers[0].bias[...]) for x in batches()]
    np.testing.assert_allclose(
        quantizers["layers/3/activations"].threshold[...],
        [[np.mean([float(h.max()) for h in hidden])]],
        rtol=1e-6,
    )


def test_pooled_thresholds_are_those_of_one_large_batch():
    model, clipping = network(activation_clipping=qj.Octav()), qj.Octav()
    qj.calibrate(model, batches(), pool=True)
    joined = jnp.concatenate(batches())
    np.testing.assert_allclose(
        operand_quantizers(model)["layers/0/activations"].threshold[...],
        clipping.threshold(joined, qj.Int(4, narrow=True), (0, 1)),
    )


def test_frozen_thresholds_are_used_and_dynamic_ones_stay():
    model = network()
    model.eval()
    x = 100 * batches()[0]
    dynamic = model(x)
    qj.calibrate(model, batches(), operands=".*/activations")
    assert operand_quantizers(model)["layers/0/weights"].threshold is None
    assert jnp.abs(model(x)).max() < jnp.abs(dynamic).max() / 5  # clipped far below


def test_vectors_of_activations_stay_dynamic():
    model = network("4/4/4/6", vector_size=4)
    assert qj.calibrate(model, batches()) == ("layers/0/weights", "layers/3/weights")
    assert jnp.isfinite(model(batches()[0])).all()
    with pytest.raises(ValueError, match="granularity PerTensor"):
        qj.calibrate(model, batches(), operands=".*/activations")


def test_saved_and_loaded(tmp_path):
    model, other = network(), network()
    with pytest.raises(ValueError, match="calibrate it first"):
        qj.save_thresholds(model, tmp_path / "t.safetensors")
    qj.calibrate(model, batches())
    qj.save_thresholds(model, tmp_path / "t.safetensors")
    qj.load_thresholds(other, tmp_path / "t.safetensors")
    model.eval()
    other.eval()
    x = batches()[1]
    np.testing.assert_array_equal(model(x), other(x))
    plain = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="the policy that was calibrated"):
        qj.load_thresholds(plain, tmp_path / "t.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        qj.load_thresholds(plain, tmp_path / "no.safetensors")


def test_thresholds_of_another_model_are_refused(tmp_path):
    file = tmp_path / "t.npz"
    model = network(hidden=8)
    qj.calibrate(model, batches())
    qj.save_thresholds(model, file)
    for other in (network(hidden=12), network("4/4/4/6", hidden=12)):
        with pytest.raises(ValueError, match="'layers/0/weights', which does not go with"):
            qj.load_thresholds(other, file)
        assert all(q.threshold is None for q in operand_quantizers(other).values())
    shapes = {1: True, 16: True, 9: False}  # of a 3x3 window nothing is known but its channels
    conv = nnx.Conv(4, 16, (3, 3), rngs=nnx.Rngs(0))
    for channels, fits in shapes.items():
        bare = qj.quantize_model(conv, qj.Policy.from_notation("4/4"))
        np.savez(tmp_path / "c.npz", weights=np.ones((1, 1, 1, channels), np.float32))
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="does not go"):
            qj.load_thresholds(bare, tmp_path / "c.npz")
    per_tensor = qj.Quantizer(qj.Int(4))
    rule = qj.Rule(".*", weights=per_tensor, activations=per_tensor)
    with pytest.raises(ValueError, match="does not go with"):
        qj.load_thresholds(qj.quantize_model(plain_network(8), qj.Policy([rule])), file)
    arrays = dict(np.load(file))
    np.savez(file, **arrays | {"layers/0/weights": -arrays["layers/0/weights"]})
    with pytest.raises(ValueError, match="negative or not finite"):
        qj.load_thresholds(network(), file)


def test_a_batch_that_is_not_finite_freezes_nothing():
    model = network()
    bad = [*batches(1), batches()[1].at[0, 0].set(jnp.nan)]
    with pytest.raises(ValueError, match="layers/0/activations is not finite in batch 2"):
        qj.calibrate(model, bad)
    assert all(q.threshold is None for q in operand_quantizers(model).values())
    with pytest.raises(ValueError, match="give a list of batches"):
        qj.calibrate(model, batches()[0])


def test_frozen_thresholds_serve_examples_alone():
    model = network()
    model.eval()
    qj.calibrate(model, batches())
    x = batches()[0]
    whole = model(x)
    np.testing.assert_array_equal(model(x[0]), whole[0])
    np.testing.assert_allclose(jax.vmap(model)(x), whole, rtol=1e-6)
    quantizer = qj.Quantizer(qj.Int(4), qj.PerVector(2))
    with pytest.raises(ValueError, match="for arrays of 2 dimensions or more, this one has 1"):
        qj.fake_quant(x[0], quantizer, vector_axis=0, threshold=jnp.ones((4, 3)))


def test_a_layer_that_runs_on_two_ranks_is_calibrated():
    class Twice(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(6, 6, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(self.layer(x)[0])

    model = qj.quantize_model(Twice(), "octav-w4a4")
    assert len(qj.carry_thresholds(model, batches()[0])) == 2
    model(batches()[0])
    assert model.layer.dot_general.activations.carried.shape == (1, 1)
    assert len(qj.calibrate(model, batches())) == 2
    assert model(batches()[0]).shape == (6,)


def test_frozen_thresholds_are_state_and_survive_jit_and_training():
    model = network()
    qj.calibrate(model, batches())
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    assert not [p for p in jax.tree.leaves(params) if p.shape == (1, 1)]

    @jax.jit
    def loss(params, rest, x):
        return jnp.sum(nnx.merge(graphdef, params, rest)(x) ** 2)

    grads = jax.grad(loss)(params, rest, batches()[0])
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_a_bare_layer_has_weights_too():
    layer = nnx.Linear(6, 8, use_bias=False, rngs=nnx.Rngs(0))
    model = qj.quantize_model(layer, qj.Policy.from_notation("4/4/4/6"))
    assert qj.calibrate(model, batches()) == ("weights",)
    storage = qj.model_storage(model, batches()[0])
    assert (storage.elements, storage.code_bits, storage.scale_bits) == (48, 48 * 4, 8 * 4)


def test_nothing_to_calibrate_with_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        qj.calibrate(network(), [])
    with pytest.raises(ValueError, match="at least one"):
        qj.calibrate(network(), [], pool=True)
    with pytest.raises(ValueError, match="quantise the model first"):
        qj.calibrate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), batches())


def test_the_storage_of_a_model():
    model = network("4/4/4/6", vector_size=4)
    storage = qj.operand_storage(model, batches()[0])
    # 6 inputs are two vectors, the last one shorter; 8 outputs have a coarse scale each.
    assert storage["layers/0/weights"] == qj.Storage(48, 48 * 4, 2 * 8 * 4, 8 * 32)
    assert storage["layers/0/activations"] == qj.Storage(24, 24 * 4, 4 * 2 * 6, 32)
    whole = qj.model_storage(model, batches()[0])
    assert whole.elements == 48 + 8 + 24 + 3
    assert whole.code_bits == (48 + 24) * 4 + 11 * 32
    assert whole.bytes == -(-(whole.code_bits + whole.scale_bits + whole.coarse_bits) // 8)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.layer = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.layer(self.attention(x))


class Stack(nnx.Module):
    """Blocks that `nnx.vmap` makes and `nnx.scan` runs, the layers on some axis of the kernels."""

    def __init__(self, depth, axis=0):
        self.axes = nnx.StateAxes({nnx.Param: axis, ...: 0})
        make = nnx.vmap(Block, in_axes=0, out_axes=self.axes)
        self.blocks = nnx.split_rngs(splits=depth)(make)(nnx.Rngs(0))

    def __call__(self, x):
        @nnx.scan(in_axes=(self.axes, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return block(x)

        return run(self.blocks, x)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("policy", ["octav-w4a4", "vsquant-4/4U/4/-"])
def test_thresholds_of_stacked_layers_go_through_a_file(tmp_path, policy, axis):
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    policy = qj.preset(policy, last="blocks/layer")
    model = qj.quantize_model(Stack(3, axis), policy)
    frozen = qj.calibrate(model, [x])
    assert {"blocks/layer/weights", "blocks/attention/query"} <= set(frozen)
    assert model.blocks.layer.dot_general.weights.threshold.shape[0] == 3
    qj.save_thresholds(model, tmp_path / "t.safetensors")
    loaded = qj.quantize_model(Stack(3, axis), policy)
    qj.load_thresholds(loaded, tmp_path / "t.safetensors")
    np.testing.assert_array_equal(loaded(x), model(x))

    deeper = qj.quantize_model(Stack(4, axis), policy)
    with pytest.raises(ValueError, match=r"thresholds of shape .* they are of another model"):
        qj.load_thresholds(deeper, tmp_path / "t.safetensors")
