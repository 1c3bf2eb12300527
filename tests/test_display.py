"""What a quantised model looks like at a prompt and in a notebook."""

import flax.linen as nn
import jax.numpy as jnp
import pytest
import treescope
from flax import nnx

import qat_jax as qj
from qat_jax import integer
from qat_jax import linen as qlinen

W4 = qj.Quantizer(qj.Int(4, narrow=True), qj.PerChannel(), qj.Octav(), "mad")
A8 = qj.Quantizer(qj.Int(8, signed=None), qj.PerTensor(), qj.AbsMax(), "ste")
IN_WORDS = "int4 narrow PerChannel Octav mad", "auto8 PerTensor AbsMax ste"


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.up = nnx.ConvTranspose(4, 4, (2, 2), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = self.up(self.stem(x))
        return self.head(self.attention(x.mean(1)))


@pytest.fixture(scope="module")
def model():
    policy = qj.Policy([qj.Rule("stem", weights=W4), qj.Rule(".*", weights=W4, activations=A8)])
    return qj.quantize_model(Net(nnx.Rngs(0)), policy)


def test_a_quantised_layer_shows_its_quantisers_in_words(model):
    assert repr(model.stem.conv_general_dilated) == (
        "QuantizedOp(\n"
        "  activations=float,\n"
        "  weights=OperandQuantizer(int4 narrow PerChannel Octav mad)\n"
        ")"
    )
    shown = repr(model)
    assert str(model) == shown  # no terminal, no colours
    for operation in ("QuantizedOp", "QuantizedPromotion", "QuantizedAttention"):
        assert operation in shown
    assert shown.count(IN_WORDS[0]) == 7  # stem, up, head and the four of attention
    assert "Quantizer(format=" not in shown
    assert "token_axes" not in shown
    assert "value=Array(shape=(3, 3, 1, 4)" in shown  # the rest is Flax's own


def test_treescope_shows_the_same(model):
    shown = treescope.render_to_text(model)
    assert "OperandQuantizer(int4 narrow PerChannel Octav mad)" in shown
    assert "Quantizer(format=" not in shown
    assert "token_axes" not in shown


def test_frozen_thresholds_are_said():
    model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    model = qj.quantize_model(model, qj.Policy([qj.Rule(".*", W4, A8)]))
    assert "frozen" not in repr(model)
    qj.calibrate(model, [jnp.ones((2, 4))], operands=".*weights")
    assert "weights=OperandQuantizer(int4 narrow PerChannel Octav mad frozen)" in repr(model)
    assert "activations=OperandQuantizer(auto8 PerTensor AbsMax ste)" in repr(model)
    packed = integer.pack_model(model, jnp.ones((2, 4)))
    assert "weights=PackedKernel(int4 narrow PerChannel Octav mad)" in repr(packed)
    integers = repr(integer.integer_model(packed))
    assert "IntegerOp(" in integers
    assert "weights=PackedKernel(int4 narrow PerChannel Octav mad)" in integers


def test_a_report_is_a_table_everywhere(model):
    report = qj.report(model)
    assert repr(report) == str(report)
    assert repr(report).splitlines()[1].split("  ")[0] == "stem"
    page = report._repr_html_()
    assert page.count("<tr>") == 1 + len(report.layers)
    faint = '<td style="text-align:left;opacity:.55">float</td>'
    assert page.count(faint) == 2  # the stem's input, and attention, which has no kernel
    assert f'<td style="text-align:left">{IN_WORDS[0]}</td>' in page
    assert "color" not in page  # those of the notebook, light or dark


def test_what_a_name_holds_is_escaped():
    class Layer(nnx.Module):
        def __init__(self):
            setattr(self, "<b>", nnx.Linear(2, 2, rngs=nnx.Rngs(0)))

    page = qj.report(Layer())._repr_html_()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page


def test_a_linen_model_shows_its_table():
    class LinenNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(x)

    model = qlinen.quantize_model(LinenNet(), qj.Policy([qj.Rule(".*", W4)]), jnp.ones((2, 4)))
    assert repr(model) == f"QuantizedModel of LinenNet\n{model.report}"
    assert model._repr_html_() == f"QuantizedModel of LinenNet{model.report._repr_html_()}"
    assert ">float</td>" in model._repr_html_()


class WithRest(nnx.Module):
    """640 parameters in two kernels; 104 besides, 64 of these in half precision."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(8, 8, param_dtype=jnp.bfloat16, rngs=rngs)
        self.shift = nnx.Param(jnp.zeros(8))
        self.body = nnx.Linear(8, 64, use_bias=False, rngs=rngs)
        self.same = nnx.Linear(8, 64, use_bias=False, rngs=rngs)
        self.same.kernel = self.body.kernel
        self.head = nnx.Linear(64, 2, rngs=rngs)
        self.scale = nnx.LayerNorm(30, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.head(self.body(self.embed(x) + self.shift) + self.same(self.embed(x)))


def test_a_report_counts_what_nothing_quantises():
    tokens = jnp.ones((2, 3), jnp.int32)
    policy = qj.Policy([qj.Rule("head", W4), qj.Rule(".*", W4)])
    model = qj.quantize_model(WithRest(), policy)
    expected = (
        "beside these kernels: 104 of 744 parameters (14 %), 288 bytes, which stay as they are"
    )
    for each in (WithRest(), model, nnx.eval_shape(WithRest)):
        report = qj.report(each)
        assert str(report).splitlines()[-1] == expected
        assert expected in report._repr_html_()
    # Packed, each layer has the shared kernel for itself.
    packed = qj.report(integer.pack_model(model, tokens)).rest
    assert (packed.parameters, packed.bytes, packed.of) == (104, 288, 744 + 512)


def test_a_linen_report_counts_it_too():
    class LinenNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Embed(8, 8, param_dtype=jnp.bfloat16)(x)
            return nn.Dense(3, name="head")(x + self.param("shift", nn.initializers.zeros, (8,)))

    x = jnp.ones((2, 3), jnp.int32)
    report = qlinen.quantize_model(LinenNet(), qj.Policy([qj.Rule(".*", W4)]), x).report
    assert str(report).endswith(
        "beside these kernels: 75 of 99 parameters (75.8 %), 172 bytes, which stay as they are"
    )
    bare = qlinen.quantize_model(nn.Dense(3), qj.Policy([qj.Rule(".*", W4)]), jnp.ones((2, 4)))
    assert (bare.report.rest.parameters, bare.report.rest.of) == (3, 15)
