"""Look into a quantised network: each operand's figures, what each layer costs, and better bits.

Usage:
    python -m experiments.inspect --config=configs/NAME_ptq.py[:NOTATION] --workdir=DIR \
        [--config.inspect.sensitivity] [--config.inspect.suggest_bits=4.5] [--config.KEY=VALUE …]

Quantises after training what the config names and prints a table of all operands: shape, format,
who shares a scale, threshold over the largest magnitude and over the optimum, SQNR, clipped share,
bits an element with the scales, and a histogram of magnitudes.

--config.inspect.sensitivity measures the loss with each layer alone quantised, and with it alone in
float, on --config.inspect.examples training examples. --config.inspect.suggest_bits looks for the
bits of each kernel that lose least at so many on average, writes them to DIR/policy.yaml, which
train and ptq take by --config.quant.policy, and measures both policies on the test examples.

Example:
    python -m experiments.inspect --config=configs/cifar10_resnet20_ptq.py:3/8U \
        --workdir=runs/inspect --config.inspect.sensitivity --config.inspect.suggest_bits=3.1 \
        --config.model.pretrained=FILE --config.dataset.name=cifar10_local

DIR gets config.json, result.json, operands.csv and, if measured, layers.csv and policy.yaml.
"""

import dataclasses
import logging
import math
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track
from rich.table import Table

import qat_jax as qj
from experiments import build, cli, tasks
from experiments.ptq import Bench, diagnose, operands
from experiments.tables import write_csv
from qat_jax.bit_allocation import allocate_bits, average_bits
from qat_jax.formats import Format
from qat_jax.granularity import ChannelAxis, Granularity, VectorAxis
from qat_jax.nnx import OperandQuantizer, is_weight, layer_sites, rules_of
from qat_jax.padding import without_padding
from qat_jax.sensitivity import OWN, losses_of, with_replaced_quantizers, with_switches
from qat_jax.training.workdir import Workdir

logger = logging.getLogger("experiments.inspect")

OPERANDS, LAYERS, POLICY = "operands.csv", "layers.csv", "policy.yaml"
_BLOCKS = " ▁▂▃▄▅▆▇█"
_BINS = 12
_WIDE = 160  # characters of a table that no terminal bounds


@cli.once("dataset", "model", "quant", "calibration", "inspect")
def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Looks into what `config` describes.

    Args:
        config: see `configs/`.
        workdir: the run folder.

    Returns:
        The content of result.json.

    Raises:
        cli.UsageError: the config asks for something that cannot be; nothing is written.
        WorkdirError: the folder holds something else; nothing is written.
    """
    started = time.monotonic()
    settings, folder = config.to_dict(), Workdir(workdir)
    wanted = config.inspect
    with cli.setup_errors():
        policy = build.ptq_policy(config)
        if policy is None:
            raise ValueError("a float network has no quantisers: give a notation, such as 4/4U")
        if wanted.suggest_bits and wanted.suggest_bits < min(wanted.candidates):
            raise ValueError(
                f"{wanted.suggest_bits} bits on average cannot be had from candidates "
                f"{tuple(wanted.candidates)}: add fewer bits, or raise inspect.suggest_bits"
            )
        bench = Bench.from_config(config)
        sites = layer_sites(bench.model)
        placed = rules_of(sites, policy)
        rules = {site.path: placed[site.path] for site in sites if site.path in placed}
        model = bench.quantised(config)
        alternatives = candidates(model, wanted.candidates) if wanted.suggest_bits else {}
        if wanted.examples < 1:
            raise ValueError(f"inspect.examples is {wanted.examples}: give at least 1")
        if wanted.sensitivity or alternatives:
            bench.task.calibration_source()  # its errors come before the minutes of the rest

    folder.begin(settings)
    inputs = bench.first_inputs(config.batch_size)
    rows = operand_rows(model, *inputs)
    write_csv(workdir / OPERANDS, rows)
    show(rows)
    metrics: dict[str, Any] = {"operands": len(rows), "batch_size": config.batch_size}
    if wanted.sensitivity:
        layers = layer_rows(bench, config, model, list(rules))
        write_csv(workdir / LAYERS, layers)
        show(sorted(layers, key=lambda row: -row["loss alone quantised"]))
        metrics["layers"] = layers
    if alternatives:
        suggested, found = suggest(bench, config, model, rules, alternatives)
        qj.save_policy(suggested, workdir / POLICY)
        metrics |= found
        logger.info(
            "%s on the test examples: %.2f %% at %.3f bits by the policy of the config, %.2f %% at "
            "%.3f bits by %s",
            bench.task.headline,
            *(100 * found["own_accuracy"], found["own_bits"]),
            *(100 * found["suggested_accuracy"], found["suggested_bits"], workdir / POLICY),
        )
    return folder.finish(settings, metrics, wall_seconds=time.monotonic() - started)


class BesideOptimum(nnx.Module):
    """Takes the place of a quantiser, and tells what the optimal threshold would have done.

    Attributes:
        own: the quantiser itself.
        quantizer: it, with the exact optimum (static).
    """

    def __init__(self, own: OperandQuantizer) -> None:
        self.own = own
        self.quantizer = dataclasses.replace(own.quantizer, clipping=qj.Exact())

    def __call__(
        self, x: jax.Array, channel_axis: ChannelAxis = None, vector_axis: VectorAxis = None
    ) -> jax.Array:
        """What the quantiser makes of x."""
        # Diagnostics of the same x: a network quantised at all optima would have others.
        seen = without_padding(x, self.own.token_axes)
        _, figures = qj.fake_quant_with_diagnostics(
            seen, self.quantizer, channel_axis=channel_axis, vector_axis=vector_axis
        )
        self.sow(qj.Diagnostic, "diagnostics", figures)
        return self.own(x, channel_axis, vector_axis)


def operand_rows(model: nnx.Module, *inputs: jax.Array) -> list[dict[str, Any]]:
    """The table of operands of a quantised network, of one batch."""
    beside = with_replaced_quantizers(model, lambda _, own: BesideOptimum(own))
    figures, arrays = diagnose(beside, *inputs), operands(model, *inputs)
    storage = qj.operand_storage(model, *inputs)
    rows = []
    for path, holder in qj.operand_quantizers(model).items():
        quantizer, x = holder.quantizer, arrays[path]
        own, best = figures[f"{path}/own"], figures[path]
        threshold, optimum = own["threshold_over_max"], best["threshold_over_max"]
        rows.append(
            {
                "operand": path,
                "shape": "×".join(map(str, x.shape)),
                "codes": short(quantizer.format),
                "scales": short(quantizer.granularity),
                "threshold / max": threshold,
                "threshold / optimum": round(threshold / optimum, 4) if optimum else math.nan,
                "SQNR, dB": own["sqnr_db"],
                "SQNR at optimum, dB": best["sqnr_db"],
                "clipped, %": round(100 * own["clipped_fraction"], 3),
                "bits": round(storage[path].bits_per_element, 3),
                "magnitudes": thumbnail(np.abs(np.asarray(x, np.float32))),
            }
        )
    return rows


def layer_rows(
    bench: Bench, config: ConfigDict, model: nnx.Module, layers: Sequence[str]
) -> list[dict[str, Any]]:
    """What each layer costs: losses over that of the float network, and under that of all."""
    of_layer: dict[str, list[str]] = {layer: [] for layer in layers}
    for path in qj.operand_quantizers(model):
        of_layer[path.rpartition("/")[0]].append(path)
    everything = {path: OWN for paths in of_layer.values() for path in paths}
    choices: list[dict[str, int]] = [{}, everything]
    for paths in of_layer.values():
        choices += [dict.fromkeys(paths, OWN), {p: OWN for p in everything if p not in paths}]
    in_float, quantised, *each = measured(bench, config, with_switches(model), choices)
    return [
        {
            "layer": layer,
            "loss alone quantised": round(each[2 * number] - in_float, 5),
            "gain alone in float": round(quantised - each[2 * number + 1], 5),
        }
        for number, layer in enumerate(layers)
    ]


def candidates(model: nnx.Module, bits: Sequence[int]) -> dict[str, dict[int, qj.Quantizer]]:
    """By kernel and bits: the quantisers that a suggestion chooses from.

    Raises:
        ValueError: a kernel's codes are not integers.
    """
    found = {}
    for path, operand in qj.operand_quantizers(model).items():
        if not is_weight(path):
            continue
        own = operand.quantizer
        if not isinstance(own.format, qj.Int):
            raise ValueError(f"{path} has codes of {own.format}, of which there are no other bits")
        found[path] = {
            b: dataclasses.replace(own, format=dataclasses.replace(own.format, bits=b))
            for b in bits
        }
    return found


def suggest(
    bench: Bench,
    config: ConfigDict,
    model: nnx.Module,
    rules: Mapping[str, qj.Rule],
    alternatives: Mapping[str, Mapping[int, qj.Quantizer]],
) -> tuple[qj.Policy, dict[str, Any]]:
    """A policy with other bits for each kernel, and what both policies come to."""
    switched = with_switches(
        model, {k: list(by_bits.values()) for k, by_bits in alternatives.items()}
    )
    choices = [{k: OWN + 1 + n} for k, by_bits in alternatives.items() for n in range(len(by_bits))]
    losses = measured(bench, config, switched, choices)
    of_kernel = {k: {b: next(losses) for b in by_bits} for k, by_bits in alternatives.items()}
    kernels = {site.weights: site for site in layer_sites(model) if site.weights in alternatives}
    sizes = {kernel: site.kernel.get_value().size for kernel, site in kernels.items()}
    bits = allocate_bits(of_kernel, sizes, config.inspect.suggest_bits)
    made = []
    for layer, rule in rules.items():
        rule = dataclasses.replace(rule, pattern=re.escape(layer))
        if (kernel := f"{layer}/weights") in bits:
            chosen = alternatives[kernel][bits[kernel]]
            if kernels[kernel].is_embedding:
                rule = dataclasses.replace(rule, embeddings=chosen)
            else:
                rule = dataclasses.replace(rule, weights=chosen)
        made.append(rule)
    policy = qj.Policy(made)

    quantizers = qj.operand_quantizers(model)
    own_bits = {kernel: quantizers[kernel].quantizer.format.bits for kernel in bits}
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        changed.quant.policy = qj.policy_to_yaml(policy)
    headline = bench.task.headline
    return policy, {
        "own_bits": average_bits(own_bits, sizes),
        "own_accuracy": bench.measure(model)[headline],
        "suggested_bits": average_bits(bits, sizes),
        "suggested_accuracy": bench.measure(bench.quantised(changed))[headline],
        "float_accuracy": bench.measure(bench.model)[headline],
        "bits": bits,
    }


def measured(
    bench: Bench, config: ConfigDict, switched: nnx.Module, choices: Sequence[Mapping[str, int]]
) -> Iterator[float]:
    """Losses on training examples, so that test examples stay unseen.

    Where the config re-estimates batch norms they take the statistics of these examples: those that
    suit one choice of quantisers ruin another.
    """
    task = bench.task
    batch = tasks.calibration_batch(
        task, task.calibration_source(), batch_size=config.inspect.examples, seed=config.seed
    )
    switched.eval()
    if config.calibration.batch_norm_batches:
        switched.set_attributes(nnx.BatchNorm, use_running_average=False, raise_if_not_found=False)

    def loss(model: nnx.Module, batch: Mapping[str, jax.Array]) -> jax.Array:
        return jnp.mean(task.objective.losses(model(*task.objective.inputs(batch)), batch))

    found = losses_of(switched, loss, choices, batch)
    console = Console(stderr=True)
    quiet = not console.is_terminal
    return iter(
        track(found, "measuring", len(choices), console=console, disable=quiet, transient=True)
    )


def thumbnail(magnitudes: np.ndarray) -> str:
    """A histogram from 0 to the maximum in a line of text; heights are square roots.

    Example:
        >>> thumbnail(np.array([0.0] * 64 + [0.5] * 16 + [1.0]))
        '█     ▄    ▁'
    """
    counts, _ = np.histogram(magnitudes, _BINS, range=(0, float(magnitudes.max()) or 1.0))
    heights = np.sqrt(counts)
    levels = np.ceil(heights / heights.max() * (len(_BLOCKS) - 1)).astype(int)
    return "".join(_BLOCKS[level] for level in levels)


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints a table."""
    table = Table()
    for name, value in rows[0].items():
        number = isinstance(value, int | float)
        table.add_column(name, justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        table.add_row(*map(str, row.values()))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    console.print(table)


def short(choice: Format | Granularity) -> str:
    """A format or a granularity in a word.

    Example:
        >>> short(qj.Int(4, narrow=True)), short(qj.Float(2, 1)), short(qj.PerVector(16))
        ('int4', 'e2m1', 'vector 16')
    """
    match choice:
        case qj.Int():
            return f"{'u' if choice.signed is False else ''}int{choice.bits}"
        case qj.Float():
            return f"e{choice.exponent}m{choice.mantissa}"
        case qj.PerVector():
            return f"vector {choice.size}"
    return type(choice).__name__.removeprefix("Per").lower()


if __name__ == "__main__":
    sys.exit(cli.main(run, __doc__, sys.argv))
