"""Thresholds that sample batches suggest, among a Linen model's variables."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util
from flax.core.scope import union_filters

from qat_jax.batches import compiled, mean_candidates, mean_of_runs
from qat_jax.linen.model import QuantizedModel
from qat_jax.linen.operand import THRESHOLDS, Candidate, frozen_thresholds
from qat_jax.linen.operations import LayerCall, interceptor
from qat_jax.padding import TOKENS
from qat_jax.quantizer import Quantizer


def calibrate(
    model: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    operands: str = ".*",
    pool: bool = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """Variables with thresholds that sample batches suggest, for static scaling.

    As `qat_jax.calibrate` finds them: each quantiser's own clipping rule has a candidate in each
    batch, in a forward pass without quantisation, and the threshold is the mean of the candidates
    (arXiv:2206.06501, section 5). They are a collection of the model's variables, ``"thresholds"``,
    and no parameters; ``apply`` searches for nothing where it finds one. Without the collection
    thresholds are found in every call again.

    Frozen are the thresholds of weights and of activations with one scale a tensor; others stay
    dynamic. Layers inside ``nn.scan`` or ``nn.vmap`` have theirs where the transformation takes the
    collection along, ``variable_axes={"params": 0, "thresholds": 0}``.

    Args:
      model: a Linen model under a policy.
      variables: its variables.
      batches: inputs of the model, one a batch: arrays, or tuples of positional arguments.
      operands: a regular expression; operands whose whole path (``"stem/weights"``) it does not
        match keep the thresholds that they have, or none.
      pool: search once in all batches joined instead, which is exact for every rule, at the price
        of their memory.
      **kwargs: of every call, such as ``train=False``; collections that the model changes in them,
        ``mutable=["cache"]``, stay as they are.

    Returns:
      The variables and the thresholds.

    Raises:
      ValueError: there is no batch, or no operand to freeze, or a batch that is not finite
        somewhere in the model, or a transformation that leaves the collection out.

    Example:
      >>> import jax.numpy as jnp
      >>> from qat_jax.linen import quantize_model
      >>> x = jnp.ones((2, 4))
      >>> model = quantize_model(nn.Dense(8), "max-w4a4", x)
      >>> variables = model.init(jax.random.key(0), x)
      >>> variables = calibrate(model, variables, [x, 3 * x])
      >>> variables["thresholds"]["activations"]
      Array([[2.]], dtype=float32)
    """
    mutable = union_filters(THRESHOLDS, kwargs.pop("mutable", False))
    frozen = frozen_thresholds(variables)
    others = {name: value for name, value in variables.items() if name != THRESHOLDS}

    @compiled
    def observe(others: Mapping[str, Any], *inputs: Any) -> dict[str, jax.Array]:
        with nn.intercept_methods(interceptor(model.placed, _Observed)):
            _, sown = model.module.apply(others, *inputs, mutable=mutable, **kwargs)
        candidates = traverse_util.flatten_dict(sown.get(THRESHOLDS, {}), sep="/")
        chosen = [path for path in candidates if re.fullmatch(operands, path)]
        if not chosen:
            raise ValueError(
                f"no operand to calibrate matches {operands!r}: there are "
                f"{', '.join(candidates) or 'none'}; activations need granularity PerTensor()"
            )
        return {path: mean_of_runs(candidates[path]) for path in chosen}

    found = mean_candidates(lambda *inputs: observe(others, *inputs), batches, pool=pool)
    return others | {THRESHOLDS: traverse_util.unflatten_dict(frozen | found, sep="/")}


class _Observed(LayerCall):
    """A layer that quantises nothing, and of whose operands thresholds are found."""

    def operand(
        self, quantizer: Quantizer, name: str, token_axes: tuple[int, int] | None = TOKENS
    ) -> Candidate:
        return Candidate(self.module, quantizer, name, token_axes)
