"""What each quantiser costs, by one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import optimize

import qat_jax as qj
from qat_jax.bit_allocation import allocate_bits, average_bits
from qat_jax.models import BertForQuestionAnswering, BertSize, CifarResNet
from qat_jax.sensitivity import FLOAT, OWN, losses_of, with_switches

RESNET = CifarResNet(8, in_channels=1, width=4, rngs=nnx.Rngs(0))
IMAGES = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
SMALL_BERT = BertSize(layers=1, hidden=32, heads=2, intermediate=48, vocabulary=20, positions=9)
BERT = BertForQuestionAnswering(SMALL_BERT, rngs=nnx.Rngs(0))
TOKENS = jnp.array([[1, 5, 3, 7, 2, 0], [4, 4, 9, 0, 0, 0]])


def loss(model, inputs):
    return jnp.mean(jnp.square(model(inputs)))


def plainly(model, rules, inputs):
    """Quantised by rules of its layers, the ordinary way."""
    if rules:
        model = qj.quantize_model(model, qj.Policy(rules))
    model.eval()
    return float(jax.jit(loss)(model, inputs))


@pytest.mark.parametrize(("model", "inputs"), [(RESNET, IMAGES), (BERT, TOKENS)])
def test_choices_are_policies(model, inputs):
    policy = qj.preset("octav-w3a3")  # of all layers, the ends too
    quantised = qj.quantize_model(model, policy)
    quantised.eval()
    operands = list(qj.operand_quantizers(quantised))
    layers = dict.fromkeys(path.rpartition("/")[0] for path in operands)
    choices = [{}, dict.fromkeys(operands, OWN)]
    choices += [{p: OWN for p in operands if p.rpartition("/")[0] == layer} for layer in layers]
    in_float, everything, *alone = losses_of(with_switches(quantised), loss, choices, inputs)
    assert in_float == pytest.approx(plainly(model, [], inputs), rel=1e-5)
    assert everything == pytest.approx(float(jax.jit(loss)(quantised, inputs)), rel=1e-5)
    (rule,) = policy.rules
    for layer, found in zip(layers, alone, strict=True):
        one = qj.Rule(layer, rule.weights, rule.activations)
        assert found == pytest.approx(plainly(model, [one], inputs), rel=1e-5), layer
    assert len(set(alone)) == len(layers)


def test_alternatives_are_quantisers_of_their_own():
    quantised = qj.quantize_model(RESNET, "octav-w8a8")
    quantised.eval()
    other = qj.Quantizer(qj.Int(2, narrow=True), qj.PerChannel())
    switched = with_switches(quantised, {"layer1/0/conv1/weights": [other]})
    own, two = losses_of(
        switched,
        loss,
        [{"layer1/0/conv1/weights": OWN}, {"layer1/0/conv1/weights": OWN + 1}],
        IMAGES,
    )
    rule = qj.Rule("layer1/0/conv1", other)
    assert two == pytest.approx(plainly(RESNET, [rule], IMAGES), rel=1e-5)
    assert abs(two - own) > 1e-3 * own
    with pytest.raises(ValueError, match="the model quantises no nothing/weights"):
        with_switches(quantised, {"nothing/weights": [other]})


def test_a_choice_for_no_operand_is_refused():
    switched = with_switches(qj.quantize_model(RESNET, "octav-w8a8"))
    with pytest.raises(ValueError, match=r"no operand 'conv1': there are .*conv1/weights"):
        list(losses_of(switched, loss, [{}, {"conv1": OWN}], IMAGES))


def test_alternatives_do_not_see_padding():
    quantised = qj.quantize_model(BERT, qj.preset("max-w8a4"))
    quantised.eval()
    operands = qj.operand_quantizers(quantised)
    own = {path: OWN for path in operands if path.endswith(("activations", "query", "key"))}
    switched = with_switches(quantised, {path: [operands[path].quantizer] for path in own})
    mask = jnp.arange(TOKENS.shape[1]) + 0 * TOKENS < 1  # most is padding, the maxima too

    def padded(model, tokens):
        with qj.ignore_padding(mask):
            return jnp.mean(jnp.square(model(tokens, mask=mask)[mask]))

    first, second = losses_of(switched, padded, [own, dict.fromkeys(own, OWN + 1)], TOKENS)
    assert first == second
    (seen,) = losses_of(switched, loss, [own], TOKENS)
    assert seen != first


def test_frozen_thresholds_stay_and_the_model_itself_too():
    quantised = qj.quantize_model(RESNET, "octav-w3a3")
    qj.calibrate(quantised, [3 * IMAGES])
    quantised.eval()
    before = jax.tree.map(np.asarray, nnx.state(quantised))
    switched = with_switches(quantised)
    everything = dict.fromkeys(qj.operand_quantizers(quantised), OWN)
    found, again, other = losses_of(
        switched, loss, [everything, everything, {**everything, "linear/weights": FLOAT}], IMAGES
    )
    assert found == again == pytest.approx(float(jax.jit(loss)(quantised, IMAGES)), rel=1e-5)
    assert other != found
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(quantised))


def test_one_program_measures_everything():
    quantised = qj.quantize_model(RESNET, "octav-w3a3")
    quantised.eval()
    traced = []

    def counting(model, inputs):
        traced.append(1)
        return loss(model, inputs)

    choices = [{}] + [{path: OWN} for path in qj.operand_quantizers(quantised)]
    assert len(set(losses_of(with_switches(quantised), counting, choices, IMAGES))) > 5
    assert len(traced) == 1


def brute_force(losses, sizes, average):
    import itertools

    kernels = list(losses)
    budget = average * sum(sizes.values())
    found = [
        (sum(losses[k][b] for k, b in zip(kernels, bits, strict=True)), bits)
        for bits in itertools.product(*(losses[k] for k in kernels))
        if sum(sizes[k] * b for k, b in zip(kernels, bits, strict=True)) <= budget + 1e-9
    ]
    return min(found)[0]


@pytest.mark.parametrize("seed", range(20))
def test_bits_are_those_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    losses = {f"k{i}": {b: float(rng.exponential(1 / b)) for b in (2, 3, 4, 8)} for i in range(5)}
    sizes = {name: int(rng.integers(1, 1000)) for name in losses}
    average = float(rng.uniform(2, 8))
    bits = allocate_bits(losses, sizes, average)
    assert average_bits(bits, sizes) <= average + 1e-6
    total = sum(losses[name][b] for name, b in bits.items())
    assert total == pytest.approx(brute_force(losses, sizes, average))


def least_added(losses, budget):
    """Of kernels of equal sizes, by dynamic programming: the least sum over each one's least."""
    spent = {0: 0.0}
    for by_bits in losses.values():
        least, before, spent = min(by_bits.values()), spent, {}
        for used, total in before.items():
            for bits, loss in by_bits.items():
                if used + bits <= budget:
                    added = total + loss - least
                    spent[used + bits] = min(added, spent.get(used + bits, np.inf))
    return min(spent.values())


@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (2.0, 1e-2), (0, 1e-6), (0, 1e-12), (0, 0)])
@pytest.mark.parametrize("seed", range(4))
def test_bits_are_the_best_however_small_the_losses_or_large_what_they_share(seed, offset, scale):
    rng, candidates = np.random.default_rng(seed), (2, 3, 4, 6, 8)
    losses = {
        f"k{i}": {b: offset + scale * rng.lognormal(0, 1.5) * 4.0 ** (2 - b) for b in candidates}
        for i in range(22)
    }
    bits = allocate_bits(losses, dict.fromkeys(losses, 1000), 3.5)
    assert sum(bits.values()) <= 22 * 3.5
    added = sum(losses[k][b] - min(losses[k].values()) for k, b in bits.items())
    assert added == pytest.approx(least_added(losses, 22 * 3.5), rel=1e-6)


def test_bits_that_the_solver_does_not_find_are_told(monkeypatch):
    gave_up = optimize.OptimizeResult(success=False, message="time limit", x=None)
    monkeypatch.setattr(optimize, "milp", lambda *arguments, **settings: gave_up)
    with pytest.raises(RuntimeError, match="no bits were found: time limit"):
        allocate_bits({"a": {3: 1.0}}, {"a": 7}, 4)


def test_a_budget_that_is_met_exactly_is_met():
    losses = {"a": {3: 1.0, 4: 0.5}, "b": {3: 1.0, 4: 0.0}}
    assert allocate_bits(losses, {"a": 7, "b": 7}, 3.5) == {"a": 3, "b": 4}
    assert allocate_bits(losses, {"a": 7, "b": 7}, 3) == {"a": 3, "b": 3}
    with pytest.raises(ValueError, match=r"2\.9 bits .* the fewest of each kernel make 3\.00"):
        allocate_bits(losses, {"a": 7, "b": 7}, 2.9)
    with pytest.raises(ValueError, match="not finite"):
        allocate_bits({"a": {3: float("nan")}}, {"a": 7}, 4)


def test_a_choice_that_is_not_there_is_refused():
    switched = with_switches(qj.quantize_model(RESNET, "octav-w8a8"))
    for number in (-1, OWN + 1):
        with pytest.raises(
            ValueError, match=f"linear/weights has no choice {number}: .* 1 the last"
        ):
            list(losses_of(switched, loss, [{"linear/weights": number}], IMAGES))


def test_carried_thresholds_are_left_behind():
    model = qj.quantize_model(RESNET, "octav-w4a4")
    qj.carry_thresholds(model, IMAGES)
    model.train()
    switched = with_switches(model)
    (found,) = losses_of(switched, loss, [dict.fromkeys(qj.operand_quantizers(model), OWN)], IMAGES)
    assert np.isfinite(found)


def test_smoothed_layers_stay_so_whatever_quantises_them():
    model = qj.quantize_model(RESNET, "octav-w3a3")
    inputs = IMAGES.at[:, :2].multiply(50)
    qj.smooth(model, [inputs])
    model.eval()
    other = qj.Quantizer(qj.Int(3, narrow=True), qj.PerTensor(), qj.AbsMax())
    switched = with_switches(model, {"layer1/0/conv1/activations": [other]})
    operands = dict.fromkeys(qj.operand_quantizers(model), OWN)
    in_float, own = losses_of(switched, loss, [{}, operands], inputs)
    assert in_float == pytest.approx(plainly(RESNET, [], inputs), rel=1e-5)
    assert own == pytest.approx(float(jax.jit(loss)(model, inputs)), rel=1e-5)
