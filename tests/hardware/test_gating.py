import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from qat_jax.hardware import ScalePairs, pareto_front, scale_pairs
from qat_jax.integer import pack_model


def rounds_to_zero(product, bits, kept):
    """Half up, as a datapath does it."""
    dropped = bits - kept
    return product == 0 if dropped == 0 else (product + (1 << (dropped - 1))) >> dropped == 0


@pytest.mark.parametrize("kept", range(1, 7))
def test_every_product_of_small_scales(kept):
    counts = np.arange(64.0).reshape(8, 8)
    zero = sum(
        counts[w, a]
        for w, a in itertools.product(range(8), repeat=2)
        if rounds_to_zero(w * a, 6, kept)
    )
    assert ScalePairs(counts, 6).zero_share(kept) == zero / counts.sum()


def test_more_bits_than_there_are_is_refused():
    with pytest.raises(ValueError, match="rounds to 1 to 6, not 7"):
        ScalePairs(np.ones((8, 8)), 6).zero_share(7)


@pytest.mark.parametrize("notation", ["4/4/3/4", "4/4/3/-", "4/4/-/4"])
def test_a_linear_layer_pair_by_pair(notation):
    layer = nnx.Linear(40, 5, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (6, 40)) ** 3
    parsed = qj.Notation.parse(notation)
    rule = qj.Rule.from_notation(".*", notation)
    model = qj.quantize_model(layer, qj.Policy([rule]))
    pairs = scale_pairs(model, x)

    w = qj.quantize(layer.kernel[...], rule.weights, channel_axis=1, vector_axis=0).scale
    a = qj.quantize(x, rule.activations, channel_axis=0, vector_axis=1).scale
    w = w if parsed.weight_scale else jnp.ones((3, 5), int)
    a = a if parsed.activation_scale else jnp.ones((6, 3), int)
    products = np.einsum("vo,nv->vno", np.asarray(w, int), np.asarray(a, int))
    for kept in range(1, pairs.bits + 1):
        expected = np.mean([rounds_to_zero(p, pairs.bits, kept) for p in products.ravel().tolist()])
        assert pairs.zero_share(kept) == pytest.approx(expected)


def test_strided_convolutions_count_by_their_products():
    class Two(nnx.Module):
        def __init__(self):
            self.one = nnx.Conv(16, 16, (3, 3), strides=2, rngs=nnx.Rngs(0))
            self.other = nnx.Conv(16, 32, (1, 1), rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.other(self.one(x))

    model = qj.quantize_model(Two(), qj.Policy.from_notation("4/4/4/4"))
    counts = scale_pairs(model, jnp.ones((2, 8, 8, 16))).counts
    # 16 positions of 9 weights and 16 outputs; 16 positions of one weight and 32 outputs.
    assert counts.sum() == pytest.approx(2 * 16 * (9 * 16 * 16 + 16 * 32))


def test_layers_without_integer_scales_or_with_different_ones_are_refused():
    layers = nnx.Sequential(*(nnx.Linear(16, 16, rngs=nnx.Rngs(0)) for _ in range(2)))
    with pytest.raises(ValueError, match="no layer has integer scales"):
        scale_pairs(qj.quantize_model(layers, qj.Policy.from_notation("4/4")), jnp.ones((2, 16)))
    rules = [qj.Rule.from_notation(".*0", "4/4/4/4"), qj.Rule.from_notation(".*", "4/4/4/6")]
    with pytest.raises(ValueError, match="different bits"):
        scale_pairs(qj.quantize_model(layers, qj.Policy(rules)), jnp.ones((2, 16)))


def test_a_pareto_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    costs, values = rng.integers(0, 12, (2, 60)).tolist()
    front = pareto_front(costs, values)
    kept = {(costs[i], values[i]) for i in front}
    points = set(zip(costs, values, strict=True))
    assert len(kept) == len(front)
    assert kept == {
        (c, v)
        for c, v in points
        if not any(oc <= c and ov >= v and (oc, ov) != (c, v) for oc, ov in points)
    }


def test_every_run_of_a_layer_counts():
    class Twice(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(16, 16, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(self.layer(x))

    model = qj.quantize_model(Twice(), qj.Policy.from_notation("4/4/4/4"))
    assert scale_pairs(model, jnp.ones((4, 16))).counts.sum() == pytest.approx(2 * 4 * 16 * 16)


def test_what_cannot_be_paired_is_named():
    layer = nnx.Sequential(nnx.Linear(16, 16, rngs=nnx.Rngs(0)))
    x = jnp.ones((4, 16))
    packed = pack_model(qj.quantize_model(layer, qj.Policy.from_notation("4/4/4/4")), x)
    with pytest.raises(ValueError, match="give the model from before pack_model"):
        scale_pairs(packed, x)
    small, large = (qj.Rule.from_notation(".*", "4/4/4/4", vector_size=n) for n in (8, 16))
    mixed = qj.Policy([qj.Rule(".*", small.weights, large.activations)])
    with pytest.raises(ValueError, match=r"vectors of \[8, 16\] elements cannot be paired"):
        scale_pairs(qj.quantize_model(layer, mixed), x)
