"""Policies as text."""

import dataclasses
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import qat_jax as qj
from experiments import cli, policy
from qat_jax.models import CifarResNet
from tests import my_rules

PRESETS = (
    "octav-w4a4", "max-w2a3-ste", "vsquant-4/4U/4/6", "vsquant-3/8/fp16/-", "nvfp4", "mxfp6-e3m2",
)  # fmt: skip


def quantisers():
    formats = st.one_of(
        st.builds(
            qj.Int, st.integers(2, 16), signed=st.sampled_from([None, True]), narrow=st.booleans()
        ),
        st.sampled_from([qj.Float(2, 1), qj.Float(4, 3)]),
    )
    granularities = st.one_of(
        st.sampled_from([qj.PerTensor(), qj.PerChannel(), qj.PerShard(8)]),
        st.builds(qj.PerVector, st.integers(2, 64)),
    )
    clippings = st.one_of(
        st.builds(qj.Octav, iterations=st.integers(0, 30)),
        st.builds(qj.Percentile, st.floats(1, 100)),
        st.builds(qj.Fixed, st.floats(1e-6, 1e6)),
        st.sampled_from([qj.AbsMax(), qj.Exact(), qj.MseSweep(), qj.Entropy()]),
    )
    scales = st.one_of(
        st.sampled_from([qj.FloatScale(), qj.FloatScale("float16"), qj.E4M3(), qj.E8M0()]),
        st.builds(
            qj.IntScale,
            st.integers(2, 16),
            granularities,
            clippings,
            codes=st.sampled_from(["float", "stored"]),
            zero=st.sampled_from(["zero", "one"]),
        ),
    )
    gradients = st.sampled_from(["ste", "pwl", "mad"])
    return st.builds(qj.Quantizer, formats, granularities, clippings, gradients, scales)


@given(st.lists(st.tuples(st.none() | quantisers(), st.none() | quantisers()), min_size=1))
def test_every_policy_comes_back(sides):
    rules = [qj.Rule(f"layer{i}/.*[0-9]: #{i}", *both) for i, both in enumerate(sides)]
    written = qj.Policy(rules)
    text = qj.policy_to_yaml(written)
    assert qj.policy_from_yaml(text) == written
    assert qj.policy_to_yaml(qj.policy_from_yaml(text)) == text


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_in_a_file_quantises_alike(tmp_path, name):
    policies = qj.preset(name), None
    qj.save_policy(policies[0], tmp_path / "policy.yaml")
    loaded = qj.load_policy(tmp_path / "policy.yaml")
    assert loaded == policies[0]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 64)), jnp.float32)
    ys = []
    for each in (policies[0], loaded):
        model = nnx.Sequential(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
        ys.append(qj.quantize_model(model, each)(x))
    np.testing.assert_array_equal(*ys)


def test_a_person_writes_notations_and_parts():
    read = qj.policy_from_yaml(
        """
        - {pattern: stem, notation: 8/8U}
        - pattern: .*/depthwise
          notation: 4/8U/4/6
          vector_size: 9
          weight_clipping: Exact
          gradient: mph
        - {pattern: mine, notation: 4/8U, gradient: tests.my_rules.faint}
        - pattern: head
        - pattern: .*
          weights: {format: "Int(4, narrow=True)", granularity: PerChannel(), gradient: ste}
        """
    )
    stem, depthwise, mine, head, rest = read.rules
    assert stem == qj.Rule.from_notation("stem", "8/8U")
    assert depthwise == qj.Rule.from_notation(
        ".*/depthwise", "4/8U/4/6", vector_size=9, weight_clipping=qj.Exact(), gradient="mph"
    )
    assert mine.weights.gradient is mine.activations.gradient is my_rules.faint
    assert head == qj.Rule("head")
    int4 = qj.Int(4, narrow=True)
    assert rest == qj.Rule(".*", qj.Quantizer(int4, qj.PerChannel(), gradient="ste"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "p.yaml is not YAML"),
        ("a: 1", "p.yaml is no policy: write a list of rules"),
        ("[]", "p.yaml is no policy"),
        ("- {weights: null}", "rule 1 of p.yaml: .* has no pattern"),
        ("- {pattern: '('}", "rule 1 of p.yaml: '\\(' is not a regular expression"),
        ("- {pattern: a}\n- {pattern: b, wieghts: 1}", "rule 2 of p.yaml: no 'wieghts' here"),
        ("- {pattern: a, notation: 4/4U, vecor_size: 3}", "no 'vecor_size' here: there are"),
        ("- {pattern: a, notation: 4}", "rule 1 of p.yaml: .*W/A"),
        ("- {pattern: a, notation: 4/4/4/6, vector_size: 16.0}", "rule 1 of p.yaml: .* 16.0: give"),
        ("- {pattern: a, notation: 4/4/4/6, vector_size: '16'}", "vector_size is '16': give"),
        ("- {pattern: a, notation: 4/4U, gradient: [mad]}", "gradient is .*: give one, such as"),
        ("- {pattern: a, weights: {format: Int(4), gradient: [mad]}}", "gradient is .*: give one"),
        ("- {pattern: a, weights: 4}", "4 is no quantiser: give at least its format"),
        ("- {pattern: a, weights: {format: Int(4), clip: 1}}", "no 'clip' here: there are format"),
        ("- {pattern: a, weights: {format: Int(40)}}", "rule 1 of p.yaml: .*40"),
        ("- {pattern: a, weights: {format: Itn(4)}}", "no 'Itn': there are Quantizer, Int"),
        ("- {pattern: a, weights: {format: 'Int(4'}}", "cannot read 'Int\\(4'"),
        ("- {pattern: a, weights: {format: 'Int(4, wide=1)'}}", "not a Int: "),
        ("- {pattern: a, weights: {format: Int}}", "not a Int: "),
        ("- {pattern: a, weights: {format: Int(4), gradient: mat}}", "there are ste, pwl, mad"),
        ("- {pattern: a, weights: {format: \"__import__('os').system('x')\"}}", "no .__import__"),
    ],
)
def test_what_is_no_policy_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        qj.policy_from_yaml(text, "p.yaml")


def test_a_rule_of_ones_own_has_no_name_in_a_file(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Mine:
        def threshold(self, x, format, axes):
            return x

    mine = qj.Policy([qj.Rule(".*", qj.Quantizer(qj.Int(4), clipping=Mine()))])
    with pytest.raises(ValueError, match="not of this library"):
        qj.save_policy(mine, tmp_path / "p.yaml")
    assert not (tmp_path / "p.yaml").exists()
    with pytest.raises(FileNotFoundError, match=r"p\.yaml does not exist"):
        qj.load_policy(tmp_path / "p.yaml")


def test_policies_are_printed_and_compared(tmp_path, capsys):
    assert policy.main(["vsquant-4/4U/4/6"]) == 0
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    assert policy.main(["vsquant-4/4U/4/6", str(path)]) == 0
    assert capsys.readouterr().out == ""
    path.write_text(path.read_text().replace("Int(4, ", "Int(3, ", 1))
    assert policy.main(["vsquant-4/4U/4/6", str(path)]) == 1
    found = capsys.readouterr().out.splitlines()
    assert "-    format: Int(4, narrow=True)" in found
    assert "+    format: Int(3, narrow=True)" in found
    assert policy.main(["octav-a4"]) == cli.WRONG_USAGE
    assert "no preset 'octav-a4'" in capsys.readouterr().err
    assert policy.main(["none.yaml"]) == cli.WRONG_USAGE
    assert "none.yaml does not exist" in capsys.readouterr().err


def test_the_readme_shows_a_policy(pytestconfig, tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(
        "import dataclasses\n\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Cubic:\n"
        "    scale: float\n\n"
        "    def threshold(self, x, format, axes): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "my_rules", None)
    monkeypatch.delitem(sys.modules, "my_rules")  # and again at the end, when it is imported
    blocks = re.findall(
        "```yaml\n(.*?)```", (pytestconfig.rootpath / "README.md").read_text(), re.S
    )
    assert [qj.policy_from_yaml(block).rules[0].pattern for block in blocks] == ["conv1"]


def test_the_command_line_teaches():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.policy", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "vsquant-4/4U/4/6 > mine.yaml" in done.stdout


def test_a_preset_in_a_file_is_that_of_its_name(tmp_path, capsys):
    model = CifarResNet(8, in_channels=1, width=4, rngs=nnx.Rngs(0))
    ends = ["--first=conv1", "--last=linear"]
    assert policy.main(["octav-w4a4", *ends]) == 0
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out)
    named = qj.report(qj.quantize_model(model, "octav-w4a4"))
    from_file = qj.report(qj.quantize_model(model, qj.load_policy(path)))
    assert from_file == named
    assert policy.main(["octav-w4a4", str(path), *ends]) == 0
    assert policy.main(["octav-w4a4", str(path)]) == 1


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_bytes(b"\xff\xe9")
    with pytest.raises(ValueError, match=r"p\.yaml is no text in UTF-8 .*: save it as one"):
        qj.load_policy(path)
