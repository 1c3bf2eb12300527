"""What quantisers sowed during a forward pass, by layer and operand."""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from qat_jax.diagnostics import Diagnostics
from qat_jax.nnx.operand import Codes
from qat_jax.nnx.sites import operand_path
from qat_jax.padding import keep_padding
from qat_jax.quantizer import QTensor

Sown = TypeVar("Sown")


def diagnostics_by_layer(captured: nnx.State) -> dict[str, Diagnostics]:
    """Sort out what quantisers sowed during a forward pass.

    Collect it with Flax's own ``nnx.capture``, inside or outside ``jax.jit``; a forward pass that
    nobody listens to computes no diagnostics.

    Args:
      captured: the second result of a function wrapped in ``nnx.capture(…, Diagnostic)``.

    Returns:
      Diagnostics by ``"path of the layer/operand"``. A layer that ran more than once has its
      later runs under ``"…/operand/1"`` and so on.

    Example:
      >>> import jax.numpy as jnp
      >>> from qat_jax import Diagnostic, quantize_model
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
      >>> forward = nnx.capture(quantize_model(model, "octav-w4a4"), Diagnostic)
      >>> y, captured = forward(jnp.ones((2, 4)))
      >>> sorted(diagnostics_by_layer(captured))
      ['layers/0/activations', 'layers/0/weights']
    """
    return captured_by_operand(captured, Diagnostics)


def captured_by_operand(captured: nnx.State, kind: type | None = None) -> dict[str, Any]:
    """What quantisers sowed, by ``"path of the layer/operand"``.

    Args:
      captured: the second result of a function wrapped in ``nnx.capture``.
      kind: the type of what was sown, if that is a tree; arrays if None.

    Returns:
      See `diagnostics_by_layer`.
    """
    found = {}
    is_leaf = None if kind is None else lambda x: isinstance(x, kind)
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(captured), is_leaf=is_leaf)
    for keys, sown in leaves:
        *path, _, run = (str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)
        found[operand_path(path) + ("" if run == "0" else f"/{run}")] = sown
    return found


def captured_in_evaluation(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    what: type[nnx.Variable],
    *inputs: Any,
    kind: type | None = None,
) -> dict[str, Any]:
    """What quantisers sow in a forward pass of the evaluation mode; can be traced.

    Args:
      graphdef: of a quantised model.
      state: of it.
      what: the type under which they sow it.
      *inputs: a batch for the model.
      kind: as for `captured_by_operand`.

    Returns:
      By ``"path of the layer/operand"``.

    Raises:
      ValueError: a quantised layer runs inside control flow that carries the model.
    """
    model = nnx.merge(graphdef, state)
    model.eval()
    try:
        with keep_padding():
            _, captured = nnx.capture(model, what)(*inputs)
    except TypeError as error:
        if "__captures__" not in str(error):
            raise
        raise ValueError(
            "the model has layers inside nnx.cond, nnx.fori_loop, nnx.RNN or an nnx.scan that "
            "carries them, from where nothing gets out that is observed in a forward pass: leave "
            "these layers in float, or call them one by one"
        ) from error
    return captured_by_operand(captured, kind)


def operand_codes(graphdef: nnx.GraphDef, state: nnx.State, *inputs: Any) -> dict[str, QTensor]:
    """Every operand as it is quantised in evaluation: see `captured_in_evaluation`."""
    return captured_in_evaluation(graphdef, state, Codes, *inputs, kind=QTensor)


def in_all_runs(sown: Mapping[str, Sown], operand: str) -> list[Sown]:
    """What an operand sowed in each run of its layer.

    Args:
      sown: from `captured_by_operand`, where later runs have a number after the path.
      operand: its path.

    Returns:
      In the order of the runs; empty if there was none.
    """
    own = re.compile(re.escape(operand) + r"(/\d+)?")
    return [value for path, value in sown.items() if own.fullmatch(path)]
