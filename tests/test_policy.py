import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import qat_jax as qj
from qat_jax import AbsMax, Int, Octav, PerChannel, PerTensor, Policy, Quantizer, Rule
from qat_jax.linen import quantize_model as quantize_linen
from qat_jax.policy import preset, uniform_policy

PATHS = ["stem", "blocks/0/conv", "blocks/1/conv", "head"]
W8, W4 = Quantizer(Int(8)), Quantizer(Int(4))
LAYER = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
ROW = jnp.ones((1, 4))


def test_the_first_match_decides_and_patterns_match_whole_paths():
    policy = Policy([Rule("stem", W8), Rule("blocks/.*", W4, W8)])
    placed = policy.place(PATHS)
    assert placed["stem"].weights == W8
    assert placed["blocks/1/conv"].activations == W8
    assert "head" not in placed


def test_a_rule_that_matches_nothing_is_an_error_that_lists_the_paths():
    with pytest.raises(ValueError, match=r"'conv' matches no layer.*stem, blocks/0/conv"):
        Policy([Rule("conv", W8), Rule(".*", W4)]).place(PATHS)
    with pytest.raises(ValueError, match="there are: none"):
        Policy([Rule("a", W8)]).place([])


def test_a_rule_behind_a_more_general_one_is_an_error():
    with pytest.raises(ValueError, match="'stem' matches only layers that earlier rules decide"):
        Policy([Rule(".*", W4), Rule("stem", W8)]).place(PATHS)
    assert Policy([Rule("stem", W8), Rule(".*", W4)]).place(["stem"]) == {"stem": Rule("stem", W8)}


def test_a_broken_pattern_is_an_error():
    with pytest.raises(ValueError, match="'layer\\(' is not a regular expression"):
        Rule("layer(")


def test_the_recipe_of_the_paper():
    policy = preset("octav-w4a3", first="stem", last="head")
    placed = policy.place(PATHS)
    w8, a8 = Int(8, narrow=True), Int(8, signed=None, narrow=True)
    assert placed["stem"].weights == Quantizer(w8, PerChannel(), Octav(), "mad")
    assert placed["head"].weights == Quantizer(w8, PerTensor(), Octav(), "mad")
    assert placed["head"].activations == Quantizer(a8, PerTensor(), Octav(), "pwl")
    w4, a3 = Int(4, narrow=True), Int(3, signed=None, narrow=True)
    assert placed["blocks/0/conv"].weights == Quantizer(w4, PerChannel(), Octav(), "mad")
    assert placed["blocks/0/conv"].activations == Quantizer(a3, PerTensor(), Octav(), "pwl")


def test_choices_of_the_uniform_policy():
    policy = uniform_policy(2, 2, clipping=AbsMax(), gradient="ste", narrow=False, last="head")
    assert len(policy.rules) == 2
    assert policy.rules[-1].weights == Quantizer(Int(2), PerChannel(), AbsMax(), "ste")
    mixed = uniform_policy(2, 2, edge_clipping=AbsMax(), edge_bits=6, first="stem")
    assert mixed.rules[0].weights == Quantizer(Int(6, narrow=True), PerChannel(), AbsMax(), "mad")
    assert preset("max-w8a8-pwl").rules[0].weights == Quantizer(
        Int(8, narrow=True), PerChannel(), AbsMax(), "pwl"
    )


@pytest.mark.parametrize("name", ["octav", "octav-a4", "sweep-w4a4", "octav-w4a4-mpg"])
def test_unknown_presets_teach_the_grammar(name):
    with pytest.raises(ValueError, match="write octav-w4a4 or max-w4a4"):
        preset(name)
    with pytest.raises(ValueError, match="Int has 2 to 16 bits"):
        preset("octav-w1a4")


@pytest.mark.parametrize(
    ("make", "mend"),
    [
        (lambda: qj.Rule(".*", weights=qj.Int(4)), "weights is Int.* give a Quantizer"),
        (lambda: qj.Rule(".*", activations="max-w4a4"), "activations is .* give a Quantizer"),
        (lambda: qj.Rule(qj.Quantizer(qj.Int(4))), "pattern is .* give a regular expression"),
        (lambda: qj.Policy("octav-w4a4"), r"write preset\('octav-w4a4'\)"),
        (lambda: qj.Policy(qj.Rule(".*")), r"\[rule\] for one"),
        (lambda: qj.Policy([qj.Quantizer(qj.Int(4))]), "is no rule: give rules"),
        (lambda: qj.quantize_model(LAYER, [qj.Rule(".*")]), "policy is .* give a Policy"),
        (lambda: quantize_linen(nn.Dense(3), [qj.Rule(".*")], ROW), "policy is .* give a Policy"),
        (lambda: qj.quantize_model(nn.Dense(3), "max-w4a4"), r"use qat_jax\.linen\.quantize_model"),
        (lambda: quantize_linen(LAYER, "max-w4a4", ROW), r"use qat_jax\.quantize_model"),
        (lambda: qj.einsum("ab,bc->ac", ROW, jnp.ones((4, 2)), lhs="max-w4a4"), "give a Quantizer"),
    ],
)
def test_the_wrong_kind_of_thing_names_the_right_one(make, mend):
    with pytest.raises(TypeError, match=mend) as error:
        make()
    assert "\n" not in str(error.value)


def test_einsum_layers_without_contraction_have_no_vectors():
    policy = qj.Policy(
        [qj.Rule(".*", activations=qj.Quantizer(qj.Int(4), qj.PerVector(16), qj.AbsMax()))]
    )
    layer = nn.Einsum((3, 4), "bi,jo->bijo", use_bias=False)
    model = quantize_linen(layer, policy, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="PerVector needs vector_axis"):
        model.apply({"params": {"kernel": jnp.ones((3, 4))}}, jnp.ones((2, 3)))
