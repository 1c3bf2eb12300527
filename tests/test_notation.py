import pytest

import qat_jax as qj


@pytest.mark.parametrize(
    "text", ["4/4U/4/6", "8/8/-/-", "4/8/6/10", "3/3U/fp32/fp16", "6/3/-/bf16", "4/4U/-/token"]
)
def test_it_prints_as_it_is_written(text):
    assert str(qj.Notation.parse(text)) == text


def test_two_parts_have_no_vectors():
    assert str(qj.Notation.parse("8/8U")) == "8/8U/-/-"


@pytest.mark.parametrize(
    "text", ["", "4", "4/4/4", "4u/4/-/-", "1/4", "4/17", "4/4/x/4", "4/4/1/4", "4/4/token/-"]
)
def test_what_cannot_be_read_is_taught(text):
    with pytest.raises(ValueError, match="4/4U/4/6, 4/8/6/10, 8/8U/-/-"):
        qj.Notation.parse(text)


def test_the_policy_of_a_notation():
    policy = qj.Policy.from_notation("4/8U/4/-", first="stem", last="head", vector_size=32)
    assert [rule.pattern for rule in policy.rules] == ["stem", "head", ".*"]
    assert policy.rules[0].weights == qj.Quantizer(
        qj.Int(8, narrow=True), qj.PerChannel(), qj.AbsMax(), "ste"
    )
    between = policy.rules[2]
    assert between.weights.granularity == qj.PerVector(32)
    assert between.weights.scale == qj.IntScale(4, qj.PerChannel())
    assert between.activations == qj.Quantizer(
        qj.Int(8, signed=None, narrow=True), qj.PerTensor(), qj.AbsMax(), "ste"
    )


def test_tokens_have_scales_of_their_own():
    parsed = qj.Notation.parse("4/8U/4/token")
    assert parsed.per_token
    assert parsed.vector_scales == (4, None)
    (rule,) = qj.Policy.from_notation("4/8U/4/token").rules
    assert rule.weights.granularity == qj.PerVector(16)
    assert rule.activations == qj.Quantizer(
        qj.Int(8, signed=None, narrow=True), qj.PerChannel(), qj.AbsMax(), "ste"
    )
    with pytest.raises(ValueError, match="write 4/-/4/-"):
        qj.Notation.parse("4/-/4/token")


def test_options_reach_the_quantisers():
    policy = qj.Policy.from_notation(
        "4/4/4/6",
        weight_clipping=qj.Exact(),
        scale=qj.IntScale(2, codes="stored", zero="one"),
        gradient="mph",
    )
    weights, activations = policy.rules[0].weights, policy.rules[0].activations
    assert weights.clipping == qj.Exact()
    assert activations.clipping == qj.AbsMax()
    assert (weights.gradient, activations.gradient) == ("mad", "pwl")
    assert activations.scale == qj.IntScale(6, qj.PerTensor(), codes="stored", zero="one")
    assert activations.format.signed is True


def test_presets_by_notation():
    assert qj.preset("vsquant-4/4U/4/6") == qj.Policy.from_notation("4/4U/4/6")
    with pytest.raises(ValueError, match="vsquant-4/4U/4/6; or nvfp4"):
        qj.preset("nvfp5")
