import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import qat_jax as qj
from qat_jax.integer import integer_model, pack_model
from qat_jax.models import BertForQuestionAnswering, BertSize
from tests.export.test_packed_file import INPUTS, net, packed_net, run

onnx = pytest.importorskip("onnx", reason="ONNX needs onnx: pip install 'qat_jax[export]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="likewise onnxruntime")

from qat_jax.export.onnx import EXACT_SESSION, save_onnx, to_onnx  # noqa: E402

DQ = "DequantizeLinear"
SMALL_BERT = BertSize(layers=1, hidden=32, heads=2, intermediate=48, vocabulary=20, positions=9)
TOKENS = jnp.array([[1, 5, 3, 7, 2, 0], [4, 4, 9, 0, 0, 0]])


def in_runtime(model, *inputs, **options):
    """Of an ONNX model, exactly."""
    settings = onnxruntime.SessionOptions()
    for name, value in EXACT_SESSION.items():
        settings.add_session_config_entry(name, value)
    for name, value in options.items():
        setattr(settings, name, value)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {n: np.asarray(x) for n, x in zip(names, inputs, strict=True)})[0]


def node_types(model):
    return [node.op_type for node in model.graph.node]


def kernels(model):
    """Constants of more than one axis, by element type."""
    types = {}
    for array in model.graph.initializer:
        if len(array.dims) > 1:
            types.setdefault(onnx.TensorProto.DataType.Name(array.data_type), []).append(array)
    return types


class Function(nnx.Module):
    def __init__(self, function):
        self.function = function

    def __call__(self, *inputs):
        return self.function(*inputs)


def softmax_of_scores(x):
    scores = jnp.einsum("bhwc,bvwc->bwhv", x, x[:, ::-1]) / 3
    return jax.nn.softmax(jnp.where(scores > 0, scores, -1e9), axis=-1)


FUNCTIONS = {
    "arithmetic": lambda x: -x / (2 + jnp.abs(x)) - jnp.sqrt(x * x + 1) + x**3 + jnp.tanh(x),
    "activations": lambda x: jax.nn.gelu(x, approximate=False) + jax.nn.silu(x) + nnx.relu6(4 * x),
    "comparisons": lambda x: jnp.where((x != 0) & ~(x >= 1), jnp.minimum(x, 0.5), jnp.sign(x)),
    "rounding": lambda x: jnp.round(3 * x) + jnp.floor(x) * jnp.ceil(x),
    "not finite": lambda x: jnp.isfinite(jnp.where(x > 1, jnp.inf, jnp.where(x < -1, jnp.nan, x))),
    "reductions": lambda x: x.sum((1, 2)) * x.max() + x.min(-1).mean((1, 2))[:, None],
    "booleans": lambda x: jnp.any(x > 1, axis=(1, 2)) & jnp.all(x > -9, axis=(1, 2)),
    "argmax": lambda x: jnp.argmax(x, axis=2) + jnp.argmin(x, axis=2),
    "gated": lambda x: nnx.glu(x) + jnp.multiply(*jnp.split(nnx.silu(x), 2, -1)),
    "more activations": lambda x: jax.nn.elu(x) + jax.nn.softplus(x) * jnp.exp2(x) - jax.nn.mish(x),
    "rotated halves": lambda x: jnp.stack([-x[..., ::2], x[..., 1::2]], -1).reshape(x.shape),
    "repeated": lambda x: jnp.tile(x, (1, 2, 1, 1)) + jnp.cumsum(jnp.tile(x, (1, 2, 1, 1)), 1),
    "remainders": lambda x: lax.rem(3 * x, jnp.float32(0.7)) + (3 * x) % 0.7,
    "one of two": lambda x: (x > 0) ^ (x < 1),
    "cut": lambda x: jnp.concatenate([x[:, 1:3], x[:, ::-2], x[:, 2:], x[:, 1:6:3]], 1),
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 0), (2, 3), (0, 0)), constant_values=2),
    "one axis": lambda x: x[:, 0] @ jnp.ones((8, 3)) + jnp.arange(3.0),
    "places": lambda x: x[:, jnp.array([3, 0]), jnp.array([1, 5])],
    "max pool": lambda x: nnx.max_pool(x, (3, 2), (2, 1), ((1, 1), (0, 1))),
    "mean pool": lambda x: nnx.avg_pool(x, (3, 2), (2, 1), ((1, 1), (0, 1))),
    "attention": softmax_of_scores,
    "batched product": lambda x: lax.dot_general(x, x, (((3, 2), (3, 2)), ((0,), (0,)))),
    "convolution": lambda x: lax.conv_general_dilated(
        x.transpose(0, 3, 2, 1), jnp.ones((2, 3, 4, 6)) * jnp.arange(6), (1, 2), ((1, 0), (0, 2)),
        rhs_dilation=(2, 1), feature_group_count=2, dimension_numbers=("NCHW", "HWIO", "NHWC"),
    ),
    "layouts": lambda x: nnx.max_pool(x, (2, 2)).sum(3)[..., None] + x[:, :1, :1].max(1)[:, None],
    "spread": lambda x: jnp.broadcast_to(x[:, :1], x.shape).sum((1, 3)) + jnp.zeros(6),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_networks_are_computed_alike(name):
    model = Function(FUNCTIONS[name])
    exported = to_onnx(model, INPUTS)
    for inputs in (INPUTS, jnp.concatenate([INPUTS, -INPUTS, INPUTS + 1])):
        expected = np.asarray(jax.jit(model.function)(inputs))
        found = in_runtime(exported, inputs)
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("policy", [None, "octav-w3a3", "max-w8a8", "vsquant-4/4U/4/6"])
def test_a_network_is_computed_alike(policy):
    model = net() if policy is None else packed_net(policy)
    model.eval()
    exported = to_onnx(model, INPUTS)
    expected = run(model, INPUTS)
    assert jnp.abs(expected).max() > 0.1
    np.testing.assert_allclose(in_runtime(exported, INPUTS), expected, atol=2e-5)
    if policy != "max-w8a8":  # its thresholds are those of the batch
        twice = jnp.concatenate([INPUTS, INPUTS])
        np.testing.assert_allclose(in_runtime(exported, twice)[2:], expected, atol=2e-5)


@pytest.mark.parametrize(
    ("policy", "floats"),
    # A token of two axes, heads and their features, has no operator in ONNX.
    [("vsquant-4/4U/4/6", 0), ("vsquant-4/4U/-/token", 1)],
)
def test_questions_are_answered_alike(policy, floats):
    model = BertForQuestionAnswering(SMALL_BERT, rngs=nnx.Rngs(0))
    inputs = TOKENS, jnp.zeros_like(TOKENS), TOKENS > 0
    quantised = qj.quantize_model(model, policy)
    for each in (model, quantised):
        each.eval()
        exported = to_onnx(each, *inputs)
        expected = nnx.jit(lambda model, *inputs: model(*inputs))(each, *inputs)
        found = in_runtime(exported, *inputs)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    # The inputs of seven layers, and both operands of attention's two products.
    assert node_types(exported).count("QuantizeLinear") == 7 + 4 - floats


def test_kernels_are_stored_in_their_bits_and_vectors_with_two_scales():
    model = nnx.Sequential(nnx.Conv(40, 6, (3, 3), rngs=nnx.Rngs(0)))
    model = qj.quantize_model(model, qj.Policy([qj.Rule.from_notation(".*", "4/4/4/6")]))
    inputs = jax.random.normal(jax.random.key(0), (2, 5, 5, 40))
    exported = to_onnx(model, inputs)
    found = kernels(exported)
    assert [list(array.dims) for array in found["INT4"]] == [[6, 40, 3, 3]]
    assert [list(array.dims) for array in found["UINT4"]] == [[6, 3, 3, 3]]
    by_output = {node.output[0]: node for node in exported.graph.node}
    scales = [by_output.get(node.input[1]) for node in exported.graph.node if node.op_type == DQ]
    assert sum(node is not None and node.op_type == DQ for node in scales) == 1
    np.testing.assert_allclose(in_runtime(exported, inputs), run(model, inputs), atol=2e-5)


def test_frozen_thresholds_are_exported_as_they_are():
    model = qj.quantize_model(net(), "octav-w4a4")
    qj.calibrate(model, [INPUTS])
    thresholds = {
        path: float(operand.threshold.get_value().squeeze())
        for path, operand in qj.operand_quantizers(model).items()
        if path.endswith("activations")
    }
    exported = to_onnx(model, INPUTS)
    constants = {
        array.name: onnx.numpy_helper.to_array(array) for array in exported.graph.initializer
    }
    steps = [
        float(constants[node.input[1]])
        for node in exported.graph.node
        if node.op_type == "QuantizeLinear"
    ]
    assert len(steps) == len(thresholds) == 4
    for threshold, step in zip(thresholds.values(), steps, strict=True):
        codes = threshold / step
        assert min(abs(codes - whole) for whole in (7, 15, 127, 255)) < 1e-3


HALF = {
    "convolution": lambda dtype: nnx.Conv(8, 12, (3, 3), dtype=dtype, rngs=nnx.Rngs(0)),
    "linear": lambda dtype: nnx.Linear(8, 5, dtype=dtype, rngs=nnx.Rngs(0)),
    "to float32": lambda dtype: nnx.Linear(
        8, 5, dtype=dtype, preferred_element_type=jnp.float32, rngs=nnx.Rngs(0)
    ),
}


def in_half_precision(layer, dtype, policy):
    model = nnx.Sequential(HALF[layer](dtype), nnx.relu)
    return model if policy is None else qj.quantize_model(model, policy)


@pytest.mark.parametrize("policy", [None, "max-w8a8", "vsquant-4/4U/4/6"])
@pytest.mark.parametrize("layer", HALF)
def test_float16_is_computed_alike(layer, policy):
    model = in_half_precision(layer, jnp.float16, policy)
    for calibrate in (False, policy is not None):
        if calibrate:
            qj.calibrate(model, [INPUTS])
        expected = run(model, INPUTS)
        found = in_runtime(to_onnx(model, INPUTS), INPUTS)
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, atol=4e-3)


@pytest.mark.parametrize("policy", [None, "max-w8a8", "vsquant-4/4U/4/6"])
def test_bfloat16_is_valid_or_refused(policy, tmp_path):
    exported = to_onnx(in_half_precision("linear", jnp.bfloat16, policy), INPUTS)
    onnx.checker.check_model(exported, full_check=True)
    assert exported.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16
    convolution = in_half_precision("convolution", jnp.bfloat16, policy)
    with pytest.raises(ValueError, match=r"Conv.*bfloat16.*build the model with dtype=jnp.float32"):
        save_onnx(convolution, tmp_path / "m.onnx", INPUTS)
    assert not list(tmp_path.iterdir())


class WithUnusedAttention(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(8, 5, rngs=rngs)
        self.unused = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    def __call__(self, x):
        return self.body(x)


def test_attention_that_never_runs_is_left_out():
    maxima = qj.Quantizer(qj.Int(8), clipping=qj.AbsMax())
    policy = qj.Policy([qj.Rule("body|unused", maxima, maxima)])
    model = qj.quantize_model(WithUnusedAttention(nnx.Rngs(0)), policy)
    found = in_runtime(to_onnx(model, INPUTS), INPUTS)
    np.testing.assert_allclose(found, run(model, INPUTS), atol=2e-5)


def test_a_network_of_zeros_stays_one():
    model = qj.quantize_model(nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0))), "max-w8a8")
    exported = to_onnx(model, jnp.ones((2, 8)))
    np.testing.assert_array_equal(in_runtime(exported, np.zeros((2, 8), np.float32)), 0)


def test_what_has_no_counterpart_is_said(tmp_path):
    layer, inputs = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0))), INPUTS[:, 0, 0]
    dynamic = qj.quantize_model(layer, "octav-w4a4")
    for batch_size in (None, 2):
        with pytest.raises(ValueError, match="freeze them with calibrate"):
            to_onnx(dynamic, inputs, batch_size=batch_size)
    with pytest.raises(ValueError, match="quantise with Int"):
        to_onnx(qj.quantize_model(layer, "nvfp4"), inputs)
    with pytest.raises(ValueError, match="no rule for JAX's cumprod"):
        to_onnx(Function(lambda x: jnp.cumprod(x, axis=1)), INPUTS)
    with pytest.raises(FileNotFoundError, match="make it first"):
        save_onnx(net(), tmp_path / "none" / "m", INPUTS)
    with pytest.raises(ValueError, match="is a folder: give the path of a file"):
        save_onnx(net(), tmp_path, INPUTS)
    assert not list(tmp_path.parent.glob(".*.unfinished"))


def test_a_file_holds_the_same_model(tmp_path):
    model = packed_net("octav-w3a3")
    save_onnx(model, tmp_path / "m.onnx", INPUTS, batch_size=2)
    loaded = onnx.load(tmp_path / "m.onnx")
    assert loaded.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    np.testing.assert_allclose(in_runtime(loaded, INPUTS), run(model, INPUTS), atol=2e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_model_that_counts_its_batch_needs_a_size():
    model = nnx.Sequential(lambda x: x.reshape(len(x), -1), nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    x = jnp.ones((3, 2, 2))
    with pytest.raises(ValueError, match=r"write x\.shape\[0\], or give batch_size"):
        to_onnx(model, x)
    assert to_onnx(model, x, batch_size=3) is not None


def test_the_sign_of_an_activation_is_that_of_all_runs_of_its_layer():
    class Twice(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return self.layer(self.layer(nnx.relu(x)))

    def quantised(signed):
        activations = qj.Quantizer(qj.Int(8, signed=signed), clipping=qj.AbsMax())
        weights = qj.Quantizer(qj.Int(8), qj.PerChannel(), qj.AbsMax())
        return qj.quantize_model(
            Twice(nnx.Rngs(0)), qj.Policy([qj.Rule(".*", weights, activations)])
        )

    x = jax.random.normal(jax.random.key(0), (4, 8))
    found = in_runtime(to_onnx(quantised(None), x), x)
    np.testing.assert_allclose(found, run(quantised(True), x), atol=2e-5)


@pytest.mark.parametrize("policy", ["max-w8a8", "vsquant-4/4U/4/6"])
def test_smoothed_inputs_are_computed_alike(policy):
    model = qj.quantize_model(net(), policy)
    inputs = INPUTS.at[..., 1].multiply(64)
    qj.smooth(model, [inputs])
    model = pack_model(model, inputs)
    model.eval()
    found, expected = in_runtime(to_onnx(model, inputs), inputs), run(model, inputs)
    np.testing.assert_allclose(found, expected, atol=2e-5 * jnp.abs(expected).max())


@pytest.mark.parametrize("policy", ["max-w8a8", "vsquant-4/4/4/6"])
def test_rotated_inputs_are_computed_alike(policy):
    model = nnx.Sequential(
        nnx.Linear(96, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 5, rngs=nnx.Rngs(1))
    )
    x = jax.random.normal(jax.random.key(0), (4, 3, 96)).at[..., 1].multiply(64)
    model = qj.quantize_model(model, policy)
    qj.rotate(model)
    model = pack_model(model, x)
    model.eval()
    found, expected = in_runtime(to_onnx(model, x), x), run(model, x)
    np.testing.assert_allclose(found, expected, atol=2e-5 * jnp.abs(expected).max())


@pytest.mark.parametrize("bits", [4, 8])
def test_kernels_alone_are_multiplied_exactly(bits):
    """ONNX Runtime fuses the kernel of tokens and its scales with the product."""
    x = jax.random.normal(jax.random.key(1), (2, 32, 256)).at[..., 7].mul(30)
    kernels_alone = qj.Rule(".*", qj.Quantizer(qj.Int(bits), qj.PerChannel(), qj.AbsMax()))
    model = nnx.Sequential(nnx.Linear(256, 32, rngs=nnx.Rngs(0)))
    model = qj.quantize_model(model, qj.Policy([kernels_alone]))
    np.testing.assert_allclose(in_runtime(to_onnx(model, x), x), run(model, x), atol=5e-5)


def test_numbers_of_numpys_default_types_are_taken_as_jax_takes_them():
    x = np.random.default_rng(0).normal(size=(2, 8))
    model = qj.quantize_model(nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0))), "max-w8a8")
    found = in_runtime(to_onnx(model, x), x.astype(np.float32))
    np.testing.assert_allclose(found, run(model, x), atol=2e-5)
    tokens = np.arange(6).reshape(2, 3)
    embedding = nnx.Embed(9, 4, rngs=nnx.Rngs(0))
    found = in_runtime(to_onnx(embedding, tokens), tokens.astype(np.int32))
    np.testing.assert_array_equal(found, embedding(tokens))


def test_what_onnx_cannot_say_is_named():
    layer = nnx.Sequential(nnx.Linear(32, 8, rngs=nnx.Rngs(0)))
    x = jnp.ones((2, 32))
    with pytest.raises(ValueError, match=r"layers/0/activations: .* IntScale or FloatScale"):
        to_onnx(qj.quantize_model(layer, "mxint8"), x)
    packed = pack_model(qj.quantize_model(layer, "octav-w4a4"), x)
    with pytest.raises(ValueError, match=r"layers/0 computes in integers.*before integer_model"):
        to_onnx(integer_model(packed), x)


def test_what_needs_the_size_of_the_batch_says_so():
    model = Function(lambda x: x - x.mean(0))
    with pytest.raises(ValueError, match="computes with the size of the batch: give batch_size"):
        to_onnx(model, INPUTS)
    exported = to_onnx(model, INPUTS, batch_size=len(INPUTS))
    np.testing.assert_allclose(in_runtime(exported, INPUTS), model(INPUTS), atol=2e-5)
