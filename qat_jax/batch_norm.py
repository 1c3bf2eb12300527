"""Batch normalisation after training: fold it into the layer before it, or re-estimate it.

Folding is that of Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (CVPR 2018), section 3.2. Re-estimation pools the statistics of
batches as Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3, do.
"""

import functools
import types
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from qat_jax.batches import arrays_apart, refuse_one_array
from qat_jax.nnx import copy_model, normalised_layers, report
from qat_jax.padding import keep_padding


class FoldedBatchNorm(nnx.Module):
    """Takes the place of a batch norm that the layer before it has absorbed: the identity."""

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Give x back; whatever else a batch norm takes has no effect."""
        return x


def fold_batch_norm(model: nnx.Module, *args: Any, **kwargs: Any) -> nnx.Module:
    """Fold batch norms into the layers that feed them, for evaluation and for quantisation.

    Which batch norm follows which layer is seen in the data flow of one abstract forward pass.
    Folded is an ``nnx.BatchNorm`` over the last axis whose input is the output of an ``nnx.Conv``
    or ``nnx.Linear`` that goes nowhere else; every other one stays. So do both where either runs
    more than once, has stacked parameters, or belongs to a subclass, and where the batch norm
    uses the statistics of the batch or changes the dtype.

    Args:
      model: any NNX model in floating point, in either mode; it is left as it is.
      *args: example inputs of the model, arrays or ``jax.ShapeDtypeStruct``; nothing is computed.
      **kwargs: so also by name.

    Returns:
      A copy whose outputs in evaluation mode are the model's but for rounding. Its folded batch
      norms are `FoldedBatchNorm`, so that training it no longer normalises them; its other
      layers share the model's arrays.

    Raises:
      ValueError: if the model is quantised already.

    Example:
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs))
      >>> folded = fold_batch_norm(model, jnp.zeros((1, 4)))
      >>> [type(layer).__name__ for layer in folded.layers]
      ['Linear', 'FoldedBatchNorm']
    """
    for layer in report(model).layers:
        if layer.weights or layer.activations:
            raise ValueError(
                f"{layer.path} is already quantised: fold the batch norms of the model first, "
                "then quantise the result"
            )
    folded = copy_model(model)
    modules = {_name(path): node for path, node in nnx.iter_graph(folded)}
    for source, batch_norm in _pairs(model, args, kwargs):
        _fold(modules[source], modules[batch_norm])
    return folded


def reestimate_batch_norm(model: nnx.Module, batches: Iterable[jax.Array]) -> None:
    """Replace the running statistics of every batch norm, in place, by those of some batches.

    Meant for a quantised model, whose activations no longer have the statistics that training
    left. The model runs as it does in evaluation, except that batch norms normalise with the
    statistics of the batch. The new mean is the mean of the batches' means, the new variance the
    mean of their variances plus the variance of their means: batches, and the calls of a batch
    norm that runs more than once, weigh the same, so make them of equal size.

    Args:
      model: an NNX model, quantised or not, in either mode, which it keeps. A batch norm that
        does not run keeps its statistics.
      batches: inputs of the model, one array each; sizes that differ are compiled separately.

    Raises:
      ValueError: if there is no batch, or one array in the place of batches, or no batch norm in
        the model.

    Example:
      >>> model = nnx.Sequential(nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
      >>> reestimate_batch_norm(model, [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0]])])
      >>> model.layers[0].mean[...], model.layers[0].var[...]
      (Array([4.], dtype=float32), Array([5.], dtype=float32))
    """
    refuse_one_array(batches)
    pooling = copy_model(model)
    pooling.eval()
    pools = dict(_batch_norms(pooling))
    if not pools:
        raise ValueError("the model has no nnx.BatchNorm: re-estimate a model that is not folded")
    for batch_norm in pools.values():
        _mix(batch_norm, _PoolingBatchNorm, momentum=0.0)
        for name in ("mean", "var"):
            variable = getattr(batch_norm, name)
            variable.set_value(jnp.zeros_like(variable.get_value()))
        batch_norm.count = nnx.BatchStat(jnp.zeros_like(batch_norm.mean.get_value()))
    graphdef, statistics, *rest = nnx.split(pooling, nnx.BatchStat, ...)

    @jax.jit
    def pool(statistics: nnx.State, rest: list[nnx.State], batch: jax.Array) -> nnx.State:
        model: Any = nnx.merge(graphdef, statistics, *rest)
        with keep_padding():
            model(batch)
        return nnx.state(model, nnx.BatchStat)

    empty = True
    for batch in batches:
        statistics = pool(statistics, rest, batch)
        empty = False
    if empty:
        raise ValueError("no batches to estimate statistics from: give at least one")
    nnx.update(pooling, statistics)
    for path, batch_norm in _batch_norms(model):
        ran = pools[path].count.get_value() > 0
        for name in ("mean", "var"):
            variable = getattr(batch_norm, name)
            old, new = variable.get_value(), getattr(pools[path], name).get_value()
            variable.set_value(jnp.where(ran, new, old).astype(old.dtype))


class _PoolingBatchNorm(nnx.Module):
    """Mixed into a batch norm of momentum 0: pools the statistics of its calls.

    Chan, Golub and LeVeque's update for groups of equal size, which does not cancel.
    """

    def __call__(self: Any, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        mean, var = self.mean[...], self.var[...]
        kwargs["use_running_average"] = False
        y = super().__call__(x, **kwargs)
        self.count[...] += 1
        from_pooled = self.mean[...] - mean
        new_mean = mean + from_pooled / self.count[...]
        spread = self.var[...] + from_pooled * (self.mean[...] - new_mean)
        self.mean[...] = new_mean
        self.var[...] = var + (spread - var) / self.count[...]
        return y


# Tags of the arrays between layers, as names in the jaxpr.
_OUTPUT = "output of layer: "
_INPUT = "input of batch norm: "


class _TaggedLayer(nnx.Module):
    """Mixed into a layer: tags its output."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> jax.Array:
        return checkpoint_name(super().__call__(*args, **kwargs), self.tag)


class _TaggedBatchNorm(nnx.Module):
    """Mixed into a batch norm: tags its input."""

    def __call__(
        self: Any, x: jax.Array, use_running_average: bool | None = None, **kwargs: Any
    ) -> jax.Array:
        running = self.use_running_average if use_running_average is None else use_running_average
        axis = self.axis[0] if isinstance(self.axis, tuple) else self.axis
        y_dtype = self.dtype or jnp.result_type(x, self.mean[...])
        x = checkpoint_name(x, self.tag)
        if not running or axis % x.ndim != x.ndim - 1 or x.dtype != y_dtype:
            x = checkpoint_name(x, self.tag)  # so that it counts as called twice and stays
        return super().__call__(x, use_running_average, **kwargs)


def _pairs(model: nnx.Module, args: tuple, kwargs: dict[str, Any]) -> list[tuple[str, str]]:
    """Names of the layers and batch norms to fold, found in the jaxpr of the model."""
    tagged = copy_model(model)
    tagged.eval()
    made_anew = normalised_layers(tagged)
    for path, node in nnx.iter_graph(tagged):
        if _is_linear_layer(node) and id(node) not in made_anew:
            _mix(node, _TaggedLayer, tag=_OUTPUT + _name(path))
        elif type(node) is nnx.BatchNorm and node.mean.get_value().ndim == 1:
            _mix(node, _TaggedBatchNorm, tag=_INPUT + _name(path))
    graphdef, state = nnx.split(tagged)
    arrays, rest = arrays_apart((args, kwargs))

    def forward(state: nnx.State, arrays: dict[int, jax.Array]) -> Any:
        model: Any = nnx.merge(graphdef, state)
        args, kwargs = rest.with_arrays(arrays)
        outputs = [y for y in jax.tree.leaves(model(*args, **kwargs)) if isinstance(y, jax.Array)]
        return outputs, nnx.state(model)  # what a layer leaves in a variable is used, too

    found: list[tuple[str, str]] = []
    calls: Counter[str] = Counter()
    for jaxpr in _jaxprs(jax.make_jaxpr(forward)(state, arrays).jaxpr):
        uses = Counter(
            atom
            for atoms in (jaxpr.outvars, *(eqn.invars for eqn in jaxpr.eqns))
            for atom in atoms
            if isinstance(atom, Var)
        )
        sources = {}
        for eqn in jaxpr.eqns:
            tag = str(eqn.params.get("name"))
            if tag.startswith((_OUTPUT, _INPUT)):
                calls[tag] += 1
                sources[eqn.outvars[0]] = tag
                x = eqn.invars[0]
                source = sources.get(x, "") if isinstance(x, Var) and uses[x] == 1 else ""
                if source.startswith(_OUTPUT) and tag.startswith(_INPUT):
                    found.append((source, tag))
    return [
        (source.removeprefix(_OUTPUT), batch_norm.removeprefix(_INPUT))
        for source, batch_norm in found
        if calls[source] == calls[batch_norm] == 1
    ]


def _jaxprs(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    """A jaxpr and those inside its equations, as often as they are called."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        for inner in jax.tree.leaves(eqn.params):
            if isinstance(inner, ClosedJaxpr):
                yield from _jaxprs(inner.jaxpr)
            elif isinstance(inner, Jaxpr):
                yield from _jaxprs(inner)


def _is_linear_layer(node: Any) -> bool:
    """Whether scaling the last axis of the kernel scales the output."""
    if type(node) is nnx.Conv:
        plain, dimensions = lax.conv_general_dilated, len(node.kernel_size) + 2
        return node.conv_general_dilated is plain and node.kernel.get_value().ndim == dimensions
    if type(node) is nnx.Linear:
        return node.dot_general is lax.dot_general and node.kernel.get_value().ndim == 2
    return False


def _fold(layer: Any, batch_norm: Any) -> None:
    """Scale and shift the layer's output by its parameters; the batch norm becomes the identity."""
    kernel = layer.kernel.get_value()
    mean, var = batch_norm.mean.get_value(), batch_norm.var.get_value()
    dtype = jnp.result_type(kernel, mean)
    factor = lax.rsqrt(var.astype(dtype) + batch_norm.epsilon)
    if batch_norm.scale is not None:
        factor = factor * batch_norm.scale.get_value()
    bias = -mean if layer.bias is None else layer.bias.get_value() - mean
    bias = bias * factor
    if batch_norm.bias is not None:
        bias = bias + batch_norm.bias.get_value()
    # New variables: others may share the old ones.
    layer.kernel = layer.kernel.replace((kernel * factor).astype(kernel.dtype))
    bias = bias.astype(kernel.dtype)
    layer.bias = nnx.Param(bias) if layer.bias is None else layer.bias.replace(bias)
    layer.use_bias = True
    # In place: the batch norm may be held by a list, a tuple, or several modules.
    object.__setattr__(batch_norm, "__class__", FoldedBatchNorm)
    vars(batch_norm).clear()
    vars(batch_norm).update(vars(FoldedBatchNorm()))


def _batch_norms(model: nnx.Module) -> Iterator[tuple[tuple, Any]]:
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.BatchNorm):
            yield path, node


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


def _mix(module: nnx.Module, mixin: type[nnx.Module], **attributes: Any) -> None:
    """Put a mixin in front of a module's type, wherever the module is held."""
    object.__setattr__(module, "__class__", _mixed(type(module), mixin))
    for name, value in attributes.items():
        setattr(module, name, value)


@functools.cache
def _mixed(kind: type[nnx.Module], mixin: type[nnx.Module]) -> type[nnx.Module]:
    return types.new_class(kind.__name__, (mixin, kind))
