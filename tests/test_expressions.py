"""Choices as text: this library's, and a user's own by the name of their module."""

import dataclasses
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from configs import digits
from experiments import build
from qat_jax.description import describe, restore
from qat_jax.expressions import from_text, to_text
from tests import my_rules

OWN = "tests.my_rules"
POLICY = f"""
- pattern: head
  weights:
    format: Int(3, narrow=True)
    clipping: "{OWN}.Deviations(2.0, of=('a',))"
    gradient: {OWN}.faint
    scale: IntScale(4, clipping={OWN}.Deviations)
"""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("tests.my_rules.Deviations()", my_rules.Deviations()),
        ("tests.my_rules.Deviations(count=2.0)", my_rules.Deviations(2.0)),
        ("tests.my_rules.Deviations(of=('a', 'b'))", my_rules.Deviations(of=("a", "b"))),
        ("tests.my_rules.faint", my_rules.faint),
        ("Percentile(99.0)", qj.Percentile(99.0)),
        ("IntScale(4, clipping=tests.my_rules.Deviations(count=1.0))",
         qj.IntScale(4, clipping=my_rules.Deviations(1.0))),
    ],
)  # fmt: skip
def test_text_and_choice(text, value):
    assert to_text(value) == text
    assert from_text(text) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (qj.Fixed(np.float64(0.5)), "Fixed(0.5)"),
        (qj.Fixed(np.float32(0.1)), "Fixed(0.10000000149011612)"),
        (qj.Int(np.int64(4), narrow=np.bool_(True)), "Int(4, narrow=True)"),
        (qj.IntScale(4, clipping=qj.Percentile(np.float64(99))),
         "IntScale(4, clipping=Percentile(99.0))"),
    ],
)  # fmt: skip
def test_numbers_of_numpy_are_written_as_those_of_python(value, text):
    assert to_text(value) == text
    assert from_text(text) == value


def test_a_policy_of_ones_own_choices_quantises_as_they_say(tmp_path):
    policy = qj.policy_from_yaml(POLICY)
    quantizer = policy.rules[0].weights
    assert quantizer.clipping == my_rules.Deviations(2.0, of=("a",))
    assert quantizer.gradient is my_rules.faint
    assert quantizer.scale.clipping == my_rules.Deviations()
    assert qj.policy_from_yaml(qj.policy_to_yaml(policy)) == policy
    assert restore(json.loads(json.dumps(describe(quantizer)))) == quantizer

    x = jnp.array([-1.0, 0.25, 0.5, 4.0])
    spread = jnp.sqrt(jnp.mean((x - x.mean()) ** 2))
    np.testing.assert_allclose(quantizer.threshold(x), [2 * spread], rtol=1e-6)
    plain = dataclasses.replace(quantizer, scale=qj.FloatScale(), clipping=qj.Fixed(1.0))
    gradient = jax.grad(lambda x: plain(x).sum())(x)
    np.testing.assert_allclose(gradient, [1, 1, 1, 0.1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_such_rules.Mine()", "cannot import 'no_such_rules', .* add its folder to PYTHONPATH"),
        ("tests.my_rules.Mine()", "module 'tests.my_rules' has no 'Mine'"),
        ("tests.my_rules.Thawed()", r"put @dataclasses.dataclass\(frozen=True\) in front"),
        ("tests.my_rules.jnp", "neither a frozen dataclass nor a function"),
        ("tests.my_rules.faint(1)", "a function, which no file calls: write tests.my_rules.faint"),
        ("shutil.rmtree('x')", "a function, which no file calls"),
        ("os.system('x')", "neither a frozen dataclass nor a function"),
        ("tests.my_rules.Deviations(width=1)", "not a tests.my_rules.Deviations: "),
        ("Deviations()", r"your own have their module, as in my_rules.Deviations"),
        ("(lambda: 1)()", "no "),
        ("tests..my_rules.Deviations()", "cannot read"),
    ],
)
def test_what_is_no_choice_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        from_text(text)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"format": qj.Octav()}, r"format is Octav\(.*: give one, such as Int\(4\)"),
        ({"clipping": "octva"}, r"clipping is 'octva': give one, such as Octav\(\)"),
        ({"clipping": qj.Octav}, "clipping is <class"),
        ({"granularity": 16}, r"granularity is 16: give one, such as PerTensor\(\)"),
        ({"scale": qj.Int(4)}, "scale is Int"),
        ({"clipping": my_rules.Thawed()}, r"put your class under @dataclasses.dataclass\(frozen"),
    ],
)
def test_a_choice_of_another_kind_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        qj.Quantizer(**({"format": qj.Int(4)} | choices))


def test_what_no_module_has_is_not_described():
    @dataclasses.dataclass(frozen=True)
    class Local:
        def threshold(self, x, format, axes):
            return x

    for unknown in (Local(), lambda x, lower, upper, g: g, jnp.ones(3)):
        with pytest.raises(ValueError, match="cannot be described in a file"):
            to_text(unknown)


def test_a_file_of_numbers_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "unheard_of_rules.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="import unheard_of_rules first"):
        restore({"type": "unheard_of_rules.Mine"})
    assert "unheard_of_rules" not in sys.modules


def test_configs_name_them(tmp_path):
    assert build.clipping("tests.my_rules.Deviations(2.0)") == my_rules.Deviations(2.0)
    assert build.clipping("Percentile(99.5)") == build.clipping("p99.5")
    with pytest.raises(ValueError, match="or your own with its module"):
        build.clipping("mine")
    config = digits.get_config("bits=4,clipping=tests.my_rules.Deviations")
    config.quant.gradient = f"{OWN}.faint"
    model = build.quantised_model(config)
    quantizers = [operand.quantizer for operand in qj.operand_quantizers(model).values()]
    assert {q.clipping for q in quantizers} == {my_rules.Deviations()}
    assert {q.gradient for q in quantizers} == {my_rules.faint}
    config.quant.policy = POLICY.replace("head", ".*")
    by_file = build.quantised_model(config)
    assert qj.operand_quantizers(by_file)["linear/weights"].quantizer.gradient is my_rules.faint
    assert isinstance(by_file, nnx.Module)


@dataclasses.dataclass(frozen=True)
class Best:
    """A rule of clipping among several."""

    rules: tuple = ()
    cap: float = 1.0


@pytest.mark.parametrize(
    "value",
    [
        Best((qj.Octav(), qj.AbsMax())),
        Best((qj.Percentile(99.0),)),
        Best(cap=math.inf),
        Best(((1, "a"), (None, -math.inf))),
    ],
)
def test_arguments_of_every_kind_are_read_back(value):
    assert from_text(to_text(value)) == value


@pytest.mark.parametrize("value", [Best(cap=math.nan), Best((object(),))])
def test_what_cannot_be_read_back_is_not_written(value):
    with pytest.raises(ValueError, match="cannot be described in a file"):
        to_text(value)
