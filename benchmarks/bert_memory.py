"""The memory that a fine-tuning step of BERT cannot do without, for abstract arrays.

    python -m benchmarks.bert_memory [--size=large] [--batch=4] [--length=384] [--out=FILE]

Counted are the state, the gradients, and what the forward pass keeps for the backward pass, read
off JAX's own trace: no weights are needed, nothing is computed, and no backend has a say. What a
compiler adds for the inside of a layer comes on top; what it fuses away may come off. XLA's CPU
backend undoes rematerialisation, so that its own figures would say nothing about an accelerator.
"""

import argparse
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

import qat_jax as qj
from benchmarks import record
from qat_jax.models import BERT_BASE, BERT_LARGE, MINILM, BertForQuestionAnswering, BertSize
from qat_jax.training.objective import SpanExtraction
from qat_jax.training.state import create_state

SIZES = {"minilm": MINILM, "base": BERT_BASE, "large": BERT_LARGE}


class Variant(NamedTuple):
    """A way to run the same step.

    Attributes:
        bits: of weights and activations; None is no quantisation.
        remat: whether the inside of a layer is computed twice.
        accumulate: parts of the batch.
        dtype: of the computation.
    """

    bits: int | None
    remat: bool
    accumulate: int
    dtype: str

    def __str__(self) -> str:
        words = ["float" if self.bits is None else f"OCTAV, {self.bits} bits", self.dtype]
        words += ["remat"] if self.remat else []
        words += [f"{self.accumulate} parts"] if self.accumulate > 1 else []
        return ", ".join(words)


VARIANTS = (
    Variant(None, False, 1, "float32"),
    Variant(4, False, 1, "float32"),
    Variant(4, True, 1, "float32"),
    Variant(4, True, 4, "float32"),
    Variant(4, True, 1, "bfloat16"),
)


def step_memory(size: BertSize, variant: Variant, batch_size: int, length: int) -> dict[str, int]:
    """Bytes of one AdamW step.

    Returns:
        `state`: parameters and the optimiser's moments; `gradients`: of the parameters;
        `residuals`: what the forward pass of a part of the batch keeps for the backward pass,
        besides the parameters.
    """
    optimizer = optax.adamw(3e-5)
    found: dict[str, Any] = {}

    def create() -> Any:
        model: nnx.Module = BertForQuestionAnswering(
            size, remat=variant.remat, dtype=jnp.dtype(variant.dtype), rngs=nnx.Rngs(0)
        )
        if variant.bits is not None:
            policy = qj.uniform_policy(variant.bits, variant.bits, last="answer")
            model = qj.quantize_model(model, policy)
        found["graphdefs"], state = create_state(model, optimizer)
        return state

    state = jax.eval_shape(create)
    examples = batch_size // variant.accumulate
    tokens = jax.ShapeDtypeStruct((examples, length), jnp.int32)
    position = jax.ShapeDtypeStruct((examples,), jnp.int32)
    batch = {
        "tokens": tokens,
        "token_types": tokens,
        "token_mask": jax.ShapeDtypeStruct(tokens.shape, bool),
        "start": position,
        "end": position,
    }
    objective = SpanExtraction()

    def loss(params: Any, model_state: Any, batch: Any) -> jax.Array:
        model = nnx.merge(found["graphdefs"].train, params, model_state)
        return objective.losses(model(*objective.inputs(batch)), batch).mean()

    def kept(params: Any, model_state: Any, batch: Any) -> Any:
        return jax.vjp(lambda params: loss(params, model_state, batch), params)[1]

    traced = jax.make_jaxpr(kept)(state.params, state.model_state, batch).jaxpr
    inputs = {id(variable) for variable in traced.invars}
    residuals = {id(v): v.aval for v in traced.outvars if id(v) not in inputs}
    parameters = _bytes(jax.tree.leaves(state.params))
    return {
        "state": parameters + _bytes(jax.tree.leaves(state.opt_state)),
        "gradients": parameters,
        "residuals": _bytes(residuals.values()),
    }


def _bytes(arrays: Iterable[Any]) -> int:
    return sum(array.size * array.dtype.itemsize for array in arrays)


def main() -> int:
    """Traces every variant, prints a table and writes it if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--batch", type=record.count, default=4)
    parser.add_argument("--length", type=record.count, default=384, help="tokens of a sequence")
    parser.add_argument("--out", type=record.out_path, help="where to write JSON, without a suffix")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    rows = {
        str(variant): step_memory(SIZES[arguments.size], variant, arguments.batch, arguments.length)
        for variant in track(VARIANTS, "tracing", console=Console(stderr=True))
    }
    table = Table("", "state, GiB", "gradients, GiB", "kept for backward, GiB", "together, GiB")
    for name, row in rows.items():
        cells = [*row.values(), sum(row.values())]
        table.add_row(name, *(f"{cell / 2**30:.2f}" for cell in cells))
    console.print(table)
    if arguments.out is not None:
        title = f"BERT {arguments.size}, a step of {arguments.batch} x {arguments.length} tokens"
        record.write(arguments.out, title, rows=rows)
    return 0


if __name__ == "__main__":
    record.run(main)
