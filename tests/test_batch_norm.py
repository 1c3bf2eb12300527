import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from qat_jax.batch_norm import FoldedBatchNorm, fold_batch_norm, reestimate_batch_norm
from qat_jax.data.cifar10_local import read_examples
from qat_jax.models import CifarResNet, load_weights

KEY = jax.random.key(0)


def normal(*shape, dtype=None):
    return jax.random.normal(KEY, shape, dtype)


def conv(*args, **kwargs):
    return nnx.Conv(*args, **kwargs, rngs=nnx.Rngs(1))


def linear(*args, **kwargs):
    return nnx.Linear(*args, **kwargs, rngs=nnx.Rngs(1))


def batch_norm(channels, **kwargs):
    """A batch norm with statistics, scale and bias of its own."""
    layer = nnx.BatchNorm(channels, **kwargs, rngs=nnx.Rngs(0))
    for i, name in enumerate(("mean", "var", "scale", "bias")):
        variable = getattr(layer, name)
        if variable is not None:
            value = jax.random.uniform(jax.random.key(i), (channels,), minval=0.3, maxval=2)
            variable.set_value(value.astype(variable.get_value().dtype))
    return layer


class Net(nnx.Module):
    """Layers and a function that says how they are connected."""

    def __init__(self, forward, **layers):
        self.forward = forward
        for name, layer in layers.items():
            setattr(self, name, nnx.data(layer))

    def __call__(self, x, **kwargs):
        return self.forward(self, x, **kwargs)


@jax.jit
def forward(model, x):
    return model(x)


def count(model, kind):
    return sum(isinstance(node, kind) for _, node in nnx.iter_graph(model))


def assert_folded(model, x, folded, kept=0, rtol=1e-5):
    """Folds as many as said, computes the same, and leaves the original alone."""
    before = jax.tree.map(jnp.copy, nnx.state(model))
    result = fold_batch_norm(model, x)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    model.eval(), result.eval()
    y, want = forward(result, x), forward(model, x)
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(y, want, rtol=rtol, atol=rtol * scale)
    assert y.dtype == want.dtype
    assert count(result, FoldedBatchNorm) == folded
    assert count(result, nnx.BatchNorm) == kept
    assert count(model, nnx.BatchNorm) == folded + kept
    return result


IMAGE = (2, 6, 6, 4)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda **k: linear(4, 8, **k), (3, 4)),
        (lambda **k: conv(4, 8, (3, 3), strides=2, **k), IMAGE),
        (lambda **k: conv(4, 8, 3, **k), (2, 7, 4)),
        (lambda **k: conv(4, 8, (3, 3), feature_group_count=2, **k), IMAGE),
        (lambda **k: conv(4, 8, (3, 3), feature_group_count=4, **k), IMAGE),
    ],
)
def test_layers(make, shape, use_bias):
    layer = make(use_bias=use_bias)
    if use_bias:
        layer.bias.set_value(normal(8))
    assert_folded(nnx.Sequential(layer, batch_norm(8), nnx.relu), normal(*shape), 1)


@pytest.mark.parametrize(
    "options",
    [{"use_scale": False}, {"use_bias": False}, {"axis": (-1,)}, {"axis": 1}, {"epsilon": 0.5}],
)
def test_options_of_the_batch_norm(options):
    assert_folded(nnx.Sequential(linear(4, 8), batch_norm(8, **options)), normal(3, 4), 1)


def test_double_precision():
    with jax.enable_x64(True):
        f64 = dict(param_dtype=jnp.float64)
        depthwise = conv(4, 4, (3, 3), feature_group_count=4, use_bias=False, **f64)
        model = nnx.Sequential(
            depthwise, batch_norm(4, **f64), nnx.relu, conv(4, 8, (1, 1), **f64), batch_norm(8)
        )
        folded = assert_folded(model, normal(*IMAGE, dtype=jnp.float64), 2, rtol=1e-13)
        assert folded.layers[0].bias.get_value().dtype == jnp.float64


def test_half_precision_and_a_change_of_dtype():
    half = dict(dtype=jnp.bfloat16)
    x = normal(3, 4)
    assert_folded(nnx.Sequential(linear(4, 8, **half), batch_norm(8, **half)), x, 1, rtol=2e-2)
    assert_folded(nnx.Sequential(linear(4, 8, **half), batch_norm(8)), x, 0, 1)


def shared_layer(net, x):
    return net.bn(net.layer(net.layer(x)))


def shared_batch_norm(net, x):
    return net.bn(net.layer(net.bn(x)))


def branch(net, x):
    y = net.layer(x)
    return net.bn(y) + nnx.relu(y)


def output_too(net, x):
    y = net.layer(x)
    return net.bn(y) + 0 * y.sum()


def something_between(net, x):
    return net.bn(nnx.relu(net.layer(x)))


def batch_statistics(net, x):
    return net.bn(net.layer(x), use_running_average=False)


def kept_in_a_variable(net, x):
    net.seen[...] = net.layer(x)
    return net.bn(net.seen[...])


def two_inner_calls(net, x):
    inner = nnx.jit(lambda net, x: net.bn(net.layer(x)))
    return inner(net, inner(net, x))


def one_in_a_jit(net, x):
    return net.bn(nnx.jit(lambda layer, x: layer(x))(net.layer, x))


@pytest.mark.parametrize(
    "connect",
    [
        shared_layer,
        shared_batch_norm,
        branch,
        output_too,
        something_between,
        kept_in_a_variable,
        two_inner_calls,
        one_in_a_jit,
    ],
)
def test_what_stays(connect):
    x = normal(3, 8)
    seen = nnx.BatchStat(jnp.zeros((3, 8)))
    model = Net(connect, layer=linear(8, 8), bn=batch_norm(8), seen=seen)
    kept = fold_batch_norm(model, x)
    assert count(kept, nnx.BatchNorm) == 1
    assert not count(kept, FoldedBatchNorm)
    model.eval(), kept.eval()
    np.testing.assert_array_equal(kept(x), model(x))


def test_batch_norms_that_cannot_be_folded():
    x = normal(8, 8)
    model = Net(batch_statistics, layer=linear(8, 8), bn=batch_norm(8))
    assert_folded(model, x, 0, 1)
    assert_folded(nnx.Sequential(linear(8, 8), batch_norm(8, axis=0)), x, 0, 1)

    class Standardised(nnx.Linear):
        def __call__(self, x):
            return super().__call__(x) / jnp.std(self.kernel[...])

    model = nnx.Sequential(Standardised(8, 8, rngs=nnx.Rngs(0)), batch_norm(8))
    assert_folded(model, x, 0, 1)
    squared = linear(8, 8, dot_general=lambda x, k, *a, **kw: x @ (k * k))
    assert_folded(nnx.Sequential(squared, batch_norm(8)), x, 0, 1)


@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat])
def test_inside_a_transformation(transform):
    def connect(net, x):
        return transform(lambda net, x: nnx.relu(net.bn(net.layer(x))))(net, x)

    assert_folded(Net(connect, layer=linear(8, 8), bn=batch_norm(8)), normal(3, 8), 1)


def test_stacked_layers_stay():
    @nnx.vmap(in_axes=0)
    def block(keys):
        rngs = nnx.Rngs(keys)
        return nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(block, x):
        return block(x)

    model = Net(lambda net, x: run(net.blocks, x), blocks=block(jax.random.split(KEY, 3)))
    assert_folded(model, normal(3, 8), 0, 1)


def test_pairs_come_from_the_data_flow_wherever_layers_are_held():
    def connect(net, x, double):
        x = net.a(net.pair[1](x))
        x = net.twice[0](net.pair[0]["z"](x))
        return 2 * x if double else x

    bn = batch_norm(8)
    pair = ({"z": linear(8, 8)}, linear(8, 8))
    model = Net(connect, z=bn, a=batch_norm(8), pair=pair, twice=(bn,))
    x = normal(3, 8)
    folded = fold_batch_norm(model, jax.ShapeDtypeStruct(x.shape, x.dtype), double=True)
    assert count(folded, FoldedBatchNorm) == 2
    model.eval(), folded.eval()
    np.testing.assert_allclose(folded(x, double=True), model(x, double=True), rtol=1e-5, atol=1e-5)
    paths = [[layer.path for layer in qj.report(m).layers] for m in (folded, model)]
    assert paths[0] == paths[1] == ["pair/0/z", "pair/1"]


def test_a_kernel_that_others_share_is_left_to_them():
    first, second = linear(8, 8), linear(8, 8)
    second.kernel = first.kernel
    assert_folded(nnx.Sequential(first, batch_norm(8), second), normal(3, 8), 1)


def test_a_quantised_model_is_refused():
    model = nnx.Sequential(conv(4, 8, (3, 3)), batch_norm(8), linear(8, 2))
    with pytest.raises(ValueError, match=r"layers/0 is already quantised: fold .* first"):
        fold_batch_norm(qj.quantize_model(model, "octav-w4a4"), normal(*IMAGE))


def pretrained(shared_data):
    model = nnx.eval_shape(lambda: CifarResNet(20, rngs=nnx.Rngs(0)))
    load_weights(model, shared_data / "cifar10" / "akamaster_resnet20.safetensors")
    return model


def normalised(images):
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    return (np.float32(images) / 255 - mean) / std


def test_the_pretrained_resnet20_folded_and_quantised(cifar10_test, shared_data):
    model = pretrained(shared_data)
    x = normalised(cifar10_test[0][:16])
    folded = assert_folded(model, x, 19)
    quantized = qj.quantize_model(folded, "octav-w4a4")
    assert sum(layer.weights is not None for layer in qj.report(quantized).layers) == 20
    agree = forward(quantized, x).argmax(-1) == forward(folded, x).argmax(-1)
    assert agree.mean() > 0.7


def test_statistics_are_those_of_the_pooled_batches():
    model = Net(
        lambda net, x: net.second(net.layer(net.drop(net.first(x)))),
        first=batch_norm(4, momentum=0.7, use_fast_variance=False),
        layer=linear(4, 4),
        drop=nnx.Dropout(0.5, rngs=nnx.Rngs(0)),
        second=batch_norm(4, momentum=0.8),
        unused=batch_norm(4),
    )
    model.second.eval()
    old = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    unused = model.unused.mean.get_value()
    batches = np.random.default_rng(0).normal(3, 2, (5, 64, 4)).astype(np.float32)
    batches += 10 * np.arange(5, dtype=np.float32)[:, None, None]
    reestimate_batch_norm(model, iter(batches))

    def check(layer, x):
        np.testing.assert_allclose(layer.mean.get_value(), x.mean((0, 1)), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(layer.var.get_value(), x.var((0, 1)), rtol=1e-4)

    wide = batches.astype(np.float64)
    check(model.first, wide)
    first = model.first
    y = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
    y = y * first.scale.get_value() + first.bias.get_value()
    check(model.second, y @ np.asarray(model.layer.kernel.get_value(), np.float64))
    assert (first.momentum, model.second.momentum) == (0.7, 0.8)
    assert (first.use_running_average, model.second.use_running_average) == (False, True)
    assert not model.drop.deterministic
    assert type(first) is nnx.BatchNorm
    np.testing.assert_array_equal(model.unused.mean.get_value(), unused)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.Param), old)


def test_a_shared_batch_norm_pools_its_calls():
    model = Net(lambda net, x: net.bn(x) + net.bn(3 * x + 1), bn=batch_norm(4))
    model.bn.mean.set_value(jnp.full(4, jnp.nan))  # the old statistics do not matter
    batches = np.random.default_rng(0).normal(1, 2, (3, 64, 4))
    reestimate_batch_norm(model, list(batches.astype(np.float32)))
    pooled = np.stack([batches, 3 * batches + 1])
    np.testing.assert_allclose(model.bn.mean.get_value(), pooled.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(model.bn.var.get_value(), pooled.var((0, 1, 2)), rtol=1e-4)


def test_nothing_to_estimate():
    with pytest.raises(ValueError, match="no batches"):
        reestimate_batch_norm(nnx.Sequential(batch_norm(4)), [])
    with pytest.raises(ValueError, match=r"no nnx\.BatchNorm"):
        reestimate_batch_norm(nnx.Sequential(linear(4, 4)), [normal(3, 4)])


def test_reestimation_helps_the_quantised_resnet20(cifar10_test, shared_data):
    """Measured, of 1,000 images: 469 right before, 717 after."""
    images, labels = cifar10_test
    train = shared_data / "cifar10" / "cifar10_train_00.npz"
    if not train.is_file():
        pytest.skip(f"no CIFAR-10 training images at {train}")
    examples = [image for image, _ in zip(read_examples(train), range(1000), strict=False)]
    batches = normalised(np.stack([image for image, _ in examples])).reshape(4, 250, 32, 32, 3)
    edges = dict(first="conv1", last="linear", edge_clipping=qj.AbsMax())
    policy = qj.uniform_policy(3, 3, clipping=qj.AbsMax(), narrow=True, **edges)
    model = qj.quantize_model(pretrained(shared_data), policy)
    model.eval()

    # A thousand images repay some of LLVM's optimisations, which conftest.py switches off.
    optimised = {"xla_backend_optimization_level": 1}
    classify = jax.jit(lambda model, x: model(x).argmax(-1), compiler_options=optimised)

    def correct():
        tests = normalised(images).reshape(4, 250, 32, 32, 3)
        predicted = np.concatenate([classify(model, x) for x in tests])
        return int(np.sum(predicted == labels))

    before = correct()
    reestimate_batch_norm(model, list(batches))
    after = correct()
    assert after > before + 150, (before, after)


@pytest.mark.parametrize("batches", [normal(6, 4), np.ones((6, 4), np.float32)])
def test_one_array_is_no_list_of_batches(batches):
    """Its rows would be taken for batches, and the model would be lost."""
    model = nnx.Sequential(batch_norm(4))
    before = jax.tree.map(jnp.copy, nnx.state(model))
    with pytest.raises(ValueError, match=r"give a list of batches, \[x\] for one"):
        reestimate_batch_norm(model, batches)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
