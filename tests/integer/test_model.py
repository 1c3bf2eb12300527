import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from qat_jax.export import load_packed, save_packed
from qat_jax.integer import Datapath, Packed, integer_model, pack_model
from qat_jax.models import BertForQuestionAnswering, BertSize
from qat_jax.models.mobilenet_v1 import SeparableBlock
from qat_jax.models.resnet_cifar import BasicBlock
from qat_jax.storage import Storage

SMALL_BERT = BertSize(layers=1, hidden=32, heads=2, intermediate=48, vocabulary=20, positions=9)


def separable(rngs):
    return nnx.Sequential(SeparableBlock(8, 20, 1, rngs=rngs), SeparableBlock(20, 12, 2, rngs=rngs))


def residual(rngs):
    return BasicBlock(8, 20, 2, rngs=rngs)


def bert(rngs):
    return BertForQuestionAnswering(SMALL_BERT, rngs=rngs)


def products(rngs):
    return nnx.Sequential(
        nnx.LinearGeneral((3, 8), (4, 6), axis=(1, 2), rngs=rngs),
        nnx.Einsum("bhi,hij->bhj", (4, 6, 5), (4, 5), rngs=rngs),
    )


TOKENS = jnp.array([[1, 5, 3, 7, 2, 0], [4, 4, 9, 0, 0, 0]])
CASES = {
    "separable": (separable, jax.random.normal(jax.random.key(0), (2, 8, 8, 8))),
    "residual": (residual, jax.random.normal(jax.random.key(0), (2, 6, 6, 8))),
    "bert": (bert, TOKENS),
    "products": (products, jax.random.normal(jax.random.key(0), (2, 3, 8))),
}


def quantised(case, policy):
    make, inputs = CASES[case]
    model = make(nnx.Rngs(0))
    for _, variable in nnx.iter_graph(model):
        # Without biases, sums that are 0 in integers and 1e-9 in floats stay so, and OCTAV does not
        # count zeros.
        if isinstance(variable, nnx.Param) and variable.get_value().ndim == 1:
            value = variable.get_value()
            variable.set_value(value + 0.1 * jax.random.normal(jax.random.key(1), value.shape))
    model = qj.quantize_model(model, policy)
    model.eval()
    return model, inputs


@nnx.jit
def run(model, inputs):
    return model(inputs)


@nnx.jit
def padded(model, tokens, mask):
    with qj.ignore_padding(mask):
        return model(tokens, mask=mask)


def stored_bytes(model):
    """Of kernels, packed or not, and all other parameters."""
    state = nnx.state(model, nnx.Any(nnx.Param, Packed))
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("case", "policy"), [*((case, "vsquant-4/4U/4/6") for case in CASES), ("separable", "nvfp4")]
)
def test_a_packed_model_computes_the_same_from_fewer_bytes(case, policy):
    model, inputs = quantised(case, policy)
    packed = pack_model(model, inputs[:1])
    packed.eval()
    np.testing.assert_array_equal(run(packed, inputs), run(model, inputs))
    kernels = len([path for path in qj.operand_quantizers(model) if path.endswith("weights")])
    spare = stored_bytes(packed) - qj.model_storage(model, inputs).bytes
    assert 0 <= spare <= 2 * kernels  # the last bytes of codes and of scales
    assert stored_bytes(model) > 2 * stored_bytes(packed) or case == "bert"


@pytest.mark.parametrize(
    ("case", "policy"),
    [
        ("separable", "octav-w4a4"),
        ("residual", "vsquant-4/4U/4/6"),
        ("bert", "vsquant-4/4U/4/6"),
        ("bert", "vsquant-4/4U/-/token"),
        ("residual", "vsquant-4/4U/4/token"),
        ("products", "octav-w4a4"),
    ],
)
def test_a_model_in_integers_computes_the_same_up_to_rounding(case, policy):
    model, inputs = quantised(case, policy)
    packed = pack_model(model, inputs[:1])
    found, expected = run(integer_model(packed), inputs), run(model, inputs)
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(jnp.abs(expected).max()))


def test_ties_fall_alike_in_float64():
    # Attention that looks at one token gives a code times a scale, which the next quantiser finds
    # exactly between two codes; its 6-bit scales make a vector's difference of a code's.
    with jax.enable_x64(True):
        size = dataclasses.replace(SMALL_BERT, layers=6, vocabulary=400)
        model = BertForQuestionAnswering(size, dtype=jnp.float64, rngs=nnx.Rngs(0))
        parameters = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda x: x.astype(jnp.float64), parameters))
        model = qj.quantize_model(model, "vsquant-4/8/4/6")
        model.eval()
        tokens = jnp.arange(400)[:, None]
        found, expected = (
            run(m, tokens) for m in (integer_model(pack_model(model, tokens)), model)
        )
        np.testing.assert_allclose(found, expected, atol=1e-6)  # the head's outputs are float32


def test_frozen_thresholds_are_used():
    model, inputs = quantised("separable", "octav-w4a4")
    qj.calibrate(model, [3 * inputs])
    dynamic, _ = quantised("separable", "octav-w4a4")
    expected = run(model, inputs)
    assert jnp.abs(expected - run(dynamic, inputs)).max() > 1e-3
    packed = pack_model(model, inputs)
    np.testing.assert_array_equal(run(packed, inputs), expected)
    np.testing.assert_allclose(run(integer_model(packed), inputs), expected, atol=1e-5)


def test_padding_moves_no_threshold():
    model, inputs = quantised("bert", "octav-w4a4")
    integers = integer_model(pack_model(model, inputs))
    mask = inputs > 0
    tokens = jnp.where(mask, inputs, 11)
    found, expected = (padded(m, tokens, mask) for m in (integers, model))
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-5)


def test_rounded_scale_products_change_the_result_and_full_ones_do_not():
    model, inputs = quantised("residual", "vsquant-4/4U/4/6")
    packed = pack_model(model, inputs)
    exact = run(integer_model(packed), inputs)

    def with_bits(bits):
        return run(integer_model(packed, Datapath(scale_product_bits=bits)), inputs)

    np.testing.assert_array_equal(with_bits(10), exact)
    errors = [float(jnp.abs(with_bits(bits) - exact).max()) for bits in (8, 3)]
    assert 0 < errors[0] < errors[1]


def test_an_accumulator_that_is_too_narrow_is_refused():
    model, inputs = quantised("residual", "octav-w4a4")
    integers = integer_model(pack_model(model, inputs), Datapath(accumulator_bits=12))
    with pytest.raises(ValueError, match="accumulator of 12 bits can overflow"):
        run(integers, inputs)


def test_what_cannot_be_packed_or_computed_in_integers_is_said():
    inputs = jnp.ones((1, 4, 4, 3))
    plain = nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="quantise it first"):
        pack_model(plain, inputs)
    transposed = nnx.Sequential(nnx.ConvTranspose(3, 4, (3, 3), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="ConvTranspose layers/0 has no packed form"):
        pack_model(qj.quantize_model(transposed, "octav-w4a4"), inputs)
    with pytest.raises(ValueError, match="pack_model comes first"):
        integer_model(qj.quantize_model(plain, "octav-w4a4"))
    weights_only = qj.Policy([qj.Rule(".*", weights=qj.Quantizer(qj.Int(4)))])
    packed = pack_model(qj.quantize_model(plain, weights_only), inputs)
    with pytest.raises(ValueError, match="the input of layers/0 is a float"):
        integer_model(packed)


class WithAuxiliary(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(8, 6, rngs=rngs)
        self.auxiliary = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.body(x)


class Stack(nnx.Module):
    def __init__(self, rngs):
        make = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=3)(make)(rngs)

    def __call__(self, x):
        apply = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return apply(self.layers, x)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.second = nnx.Linear(8, 8, rngs=rngs)
        self.second.kernel = self.first.kernel

    def __call__(self, x):
        return self.second(self.first(x))


FEATURES = jax.random.normal(jax.random.key(0), (3, 8))


def test_layers_that_cannot_be_packed_are_named():
    unused = qj.quantize_model(WithAuxiliary(nnx.Rngs(0)), "octav-w4a4")
    with pytest.raises(ValueError, match=r"auxiliary does not run .* Rule\('auxiliary'\) in front"):
        pack_model(unused, FEATURES)
    stacked = qj.quantize_model(Stack(nnx.Rngs(0)), "octav-w4a4")
    with pytest.raises(ValueError, match=r"layers is a stack .* Rule\('layers'\) in front"):
        pack_model(stacked, FEATURES)


@pytest.mark.parametrize("alone", ["first", "second", None])
def test_a_kernel_that_a_layer_in_float_shares_stays_there(alone, tmp_path):
    rules = [qj.Rule(".*", qj.Quantizer(qj.Int(4)), qj.Quantizer(qj.Int(8)))]
    if alone:
        rules.insert(0, qj.Rule(alone))
    model = qj.quantize_model(Tied(nnx.Rngs(0)), qj.Policy(rules))
    packed = pack_model(model, FEATURES)
    np.testing.assert_array_equal(run(packed, FEATURES), run(model, FEATURES))
    save_packed(packed, tmp_path / "m")
    loaded = load_packed(Tied(nnx.Rngs(1)), tmp_path / "m")
    np.testing.assert_array_equal(run(loaded, FEATURES), run(model, FEATURES))


def test_a_masked_kernel_is_packed_with_its_mask(tmp_path):
    def masked():
        mask = jnp.tril(jnp.ones((3, 3, 4)))
        return nnx.Sequential(nnx.Conv(3, 4, (3,), mask=mask, rngs=nnx.Rngs(0)))

    inputs = jax.random.normal(jax.random.key(0), (2, 7, 3))
    model = qj.quantize_model(masked(), "octav-w4a4")
    packed = pack_model(model, inputs)
    np.testing.assert_array_equal(run(packed, inputs), run(model, inputs))
    save_packed(packed, tmp_path / "m")
    loaded = load_packed(masked(), tmp_path / "m")
    np.testing.assert_array_equal(run(loaded, inputs), run(model, inputs))


def test_the_result_has_the_dtype_that_the_layer_prefers():
    layer = nnx.Linear(
        8, 4, dtype=jnp.bfloat16, preferred_element_type=jnp.float32, rngs=nnx.Rngs(0)
    )
    model = qj.quantize_model(nnx.Sequential(layer), "octav-w4a4")
    expected = run(model, FEATURES)
    found = run(integer_model(pack_model(model, FEATURES)), FEATURES)
    assert found.dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-2)


def test_packing_changes_nothing_of_the_storage():
    layer = nnx.Sequential(nnx.Linear(8, 6, rngs=nnx.Rngs(0)))
    model = qj.quantize_model(layer, qj.Policy.from_notation("4/4/4/6"))
    packed = pack_model(model, FEATURES)
    expected = qj.model_storage(model, FEATURES)
    assert expected == Storage(48 + 6, 48 * 4 + 6 * 32, 6 * 4, 6 * 32)
    for other in (packed, integer_model(packed)):
        assert qj.model_storage(other, FEATURES) == expected
    assert qj.operand_storage(packed, FEATURES) == qj.operand_storage(model, FEATURES)


def test_a_shared_kernel_is_stored_once_for_each_way_to_quantise_it():
    one, other = (qj.Quantizer(qj.Int(bits)) for bits in (4, 8))
    shared = qj.quantize_model(Tied(nnx.Rngs(0)), qj.Policy([qj.Rule(".*", one)]))
    assert qj.model_storage(shared, FEATURES).code_bits == 64 * 4 + 16 * 32
    two_ways = qj.Policy([qj.Rule("first", one), qj.Rule("second", other)])
    twice = qj.quantize_model(Tied(nnx.Rngs(0)), two_ways)
    assert qj.model_storage(twice, FEATURES).code_bits == 64 * (4 + 8) + 16 * 32
    once_in_float = qj.quantize_model(Tied(nnx.Rngs(0)), qj.Policy([qj.Rule("first", one)]))
    assert qj.model_storage(once_in_float, FEATURES).code_bits == 64 * (4 + 32) + 16 * 32
