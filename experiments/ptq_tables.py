"""VS-Quant's post-training tables (arXiv:2102.04503, tables 2 to 5) for a network of one's own.

Usage:
    python -m experiments.ptq_tables --config=configs/NAME_ptq.py --workdir=DIR \
        [--config.KEY=VALUE …]

Each table is a list of settings of the config; each setting is measured once and written to
DIR/cells.jsonl as soon as it is known, so that the same command goes on where it was stopped. At
the end DIR gets result.json.

    calibrators  seven calibrators, one scale a channel or layer, static thresholds  (table 2)
    vectors      vectors of 16, floating-point scales                                (table 3)
    sizes        vectors of 1 to 64                                                  (table 4)
    scales       the bits of the vectors' scales                                     (table 5)
    clipping     maximum, OCTAV or the exact optimum for each vector of the weights
    order        which scale is found first, and what the codes come from
    batch_norm   what re-estimating batch norms after quantisation gives back
    rounding     kernels rounded to the nearest or by GPTQ
    smoothing    outliers of activations moved into kernels, or not, and either rounded by GPTQ
    depthwise    what the layers of one input feature need: MobileNet with
                 --config.fold_batch_norm=False, since batch norms are re-estimated
    bert_calibrators, bert_vectors, bert_scales
                 the same for BERT: other bits, signed activations          (tables 2, 3, 6)
    bert_rounding
                 kernels of BERT rounded to the nearest or by GPTQ
    bert_outliers
                 outliers of BERT's activations as they are, smoothed, rotated, or both
    bert_where   which of BERT's operands 4 bits are too few for: one kind of them at 8
    bert_attention
                 what unsigned codes and scales of attention's rows give back at 4 bits
    bert_weight_calibrators
                 what vectors of BERT's weights are compared with
    bert_dynamic thresholds found in every batch   (OCTAV, arXiv:2206.06501, table 5)

--config.tables=calibrators,vectors picks some. Figures and CSVs are made by
`python -m experiments.ptq_figures`.
"""

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

import qat_jax as qj
from experiments import build, cli
from experiments.ptq import Bench, needs_training_examples
from qat_jax.training.sharding import Placement
from qat_jax.training.workdir import Workdir, keep_lines

logger = logging.getLogger("experiments.ptq_tables")

CALIBRATORS = ("max", "entropy", "p99.9", "p99.99", "p99.999", "p99.9999", "mse", "octav", "exact")
BITS = ("3/3U", "4/4U", "6/6U", "8/8U")
DEPTHWISE = r".*/depthwise"
ATTENTION = r".*/attention"  # the two products alone: the layers around them have longer paths
BERT_BITS = ("3/8", "4/8", "6/8", "8/8")
BERT_EQUAL_BITS = ("4/4", "6/6", "8/8")
BERT_DYNAMIC_BITS = ("4/8", "8/4", *BERT_EQUAL_BITS)  # which of both it is that costs
# A cell takes minutes: those that ResNets have shown to be of no use are left out.
BERT_CALIBRATORS = ("max", "p99.9", "p99.99", "p99.999", "mse", "octav")
STATIC_BATCHES, BERT_STATIC_BATCHES = 5, 10  # behind static thresholds
GPTQ_BATCHES = 4
SMOOTHING_BATCHES = 4
REESTIMATION = {"": 0, ", batch norms re-estimated": 10}  # and on how many batches


class Cell(NamedTuple):
    """One measurement.

    Attributes:
        table: which table it belongs to.
        row: its row there.
        column: its column there.
        changes: what it changes in the config, by dotted key.
    """

    table: str
    row: str
    column: str
    changes: dict[str, Any]


def cells(tables: tuple[str, ...]) -> Iterator[Cell]:
    """The measurements of some tables, in order.

    Raises:
        ValueError: there is no such table.
    """
    for name in ",".join(tables).split(","):  # a flag may name several in one word
        if name not in TABLES:
            raise ValueError(f"no table {name!r}: give some of {', '.join(TABLES)}")
        for row, column, changes in TABLES[name]():
            yield Cell(name, row, column, changes)


def _clipping(weights: str, activations: str) -> dict[str, Any]:
    return {"clipping.weights": weights, "clipping.activations": activations}


def _calibrators() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for bits in BITS:
        for name in CALIBRATORS:
            changes = {"quant.notation": bits, "calibration.batches": STATIC_BATCHES}
            yield bits, name, changes | _clipping(name, name)


def _vectors() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for bits in ("2/2U", *BITS):
        yield bits, "V16 max", {"quant.notation": f"{bits}/fp32/fp32"}


def _sizes() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for bits in ("4/4U", "6/6U"):
        for size in (1, 2, 4, 8, 16, 32, 64):
            changes = {"quant.notation": f"{bits}/fp32/fp32", "quant.vector_size": size}
            yield bits, str(size), changes


def _scales() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for bits in ("3/3U", "4/3U", "4/4U", "4/8U", "6/6U"):
        for scales in ("3/4", "3/6", "4/4", "4/6", "6/4", "6/6", "fp32/fp32"):
            yield bits, scales, {"quant.notation": f"{bits}/{scales}"}


def _vector_clipping() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for bits in ("2/4U", "3/4U", "4/4U"):
        for size in (16, 64):
            for weights in ("max", "octav", "exact"):
                changes = {"quant.notation": f"{bits}/fp32/fp32", "quant.vector_size": size}
                yield f"{bits} V{size}", weights, changes | _clipping(weights, "max")


def _order() -> Iterator[tuple[str, str, dict[str, Any]]]:
    variants = {
        "paper": {},
        "one for zero": {"scale.zero": "one"},
        "codes from stored": {"scale.codes": "stored"},
        "stored, one for zero": {"scale.codes": "stored", "scale.zero": "one"},
        "coarse first": {"scale.codes": "stored", "scale.order": "coarse-first"},
    }
    for notation in ("3/3U/4/6", "4/4U/3/4", "4/4U/4/6"):
        for clipping in ("max", "exact"):
            for name, changes in variants.items():
                both = {"quant.notation": notation} | changes | _clipping(clipping, "max")
                yield f"{notation}, weights {clipping}", name, both


def _batch_norm() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for notation in ("3/3U", "4/4U", "2/4U/fp32/fp32", "3/3U/fp32/fp32", "4/4U/4/6"):
        for clipping in ("max", "octav", "exact"):
            for refit, batches in REESTIMATION.items():
                changes = {"quant.notation": notation, "calibration.batch_norm_batches": batches}
                yield notation, f"{clipping}{refit}", changes | _clipping(clipping, "max")


def _rounding() -> Iterator[tuple[str, str, dict[str, Any]]]:
    # Vectors have their activations clipped at the maximum, as in the paper, layers by OCTAV.
    vectors = {f"{bits}/4/6": "max" for bits in ("2/8U", "3/3U", "3/8U", "4/4U")}
    layers = dict.fromkeys(("3/8U", "4/4U", "4/8U"), "octav")
    return _rounded(vectors | layers)


def _bert_rounding() -> Iterator[tuple[str, str, dict[str, Any]]]:
    vectors = dict.fromkeys(("3/8/6/10", "4/8/6/10"), "max")
    return _rounded(vectors | dict.fromkeys(("3/8", "4/8"), "octav"))


def _rounded(activations: dict[str, str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Either way, by notation and how activations are clipped there."""
    for notation, clipping in activations.items():
        for name, batches in {"nearest": 0, "GPTQ": GPTQ_BATCHES}.items():
            changes = {"quant.notation": notation, "calibration.gptq_batches": batches}
            yield notation, name, changes | _clipping("exact", clipping)


def _smoothing() -> Iterator[tuple[str, str, dict[str, Any]]]:
    layers = dict.fromkeys(("3/3U", "4/4U", "4/8U"), "octav")
    for notation, clipping in (layers | {"3/3U/4/6": "max", "4/4U/4/6": "max"}).items():
        for smoothed, batches in {"as they are": 0, "smoothed": SMOOTHING_BATCHES}.items():
            for rounded, gptq_batches in {"": 0, ", GPTQ": GPTQ_BATCHES}.items():
                changes = {
                    "quant.notation": notation,
                    "calibration.smoothing_batches": batches,
                    "calibration.gptq_batches": gptq_batches,
                }
                yield notation, f"{smoothed}{rounded}", changes | _clipping("exact", clipping)


def _bert_outliers() -> Iterator[tuple[str, str, dict[str, Any]]]:
    remedies = {
        "as they are": (0, False),
        "smoothed": (SMOOTHING_BATCHES, False),
        "rotated": (0, True),
        "both": (SMOOTHING_BATCHES, True),
    }
    for bits in BERT_EQUAL_BITS:
        for name, (batches, rotate) in remedies.items():
            changes = {
                "quant.notation": bits,
                "calibration.smoothing_batches": batches,
                "calibration.rotate": rotate,
            }
            yield bits, name, changes | _clipping("octav", "octav")


def _bert_where() -> Iterator[tuple[str, str, dict[str, Any]]]:
    at_8 = {
        "none": ("4/4", ()),
        "kernels": ("8/4", ()),
        "inputs of layers": ("4/8", (f"{ATTENTION}=4/4",)),
        "products of attention": ("4/4", (f"{ATTENTION}=8/8",)),
    }
    for name, rotate in {"as they are": False, "rotated": True}.items():
        for kind, (bits, overrides) in at_8.items():
            changes = {
                "quant.notation": bits,
                "quant.overrides": overrides,
                "calibration.rotate": rotate,
            }
            yield name, kind, changes | _clipping("octav", "octav")


def _bert_attention() -> Iterator[tuple[str, str, dict[str, Any]]]:
    by_rows = (f"{ATTENTION}=4/4U/-/token",)
    columns = {
        "signed": ("4/4", (), 0),
        "unsigned where the data is": ("4/4U", (), 0),
        "attention by rows": ("4/4U", by_rows, 0),
        "everything by rows": ("4/4U/-/token", (), 0),
        "attention by rows, GPTQ": ("4/4U", by_rows, GPTQ_BATCHES),
    }
    remedies = {
        "as they are": (0, False),
        "rotated": (0, True),
        "smoothed and rotated": (SMOOTHING_BATCHES, True),
    }
    for row, (smoothing_batches, rotate) in remedies.items():
        for column, (bits, overrides, gptq_batches) in columns.items():
            changes = {
                "quant.notation": bits,
                "quant.overrides": overrides,
                "calibration.smoothing_batches": smoothing_batches,
                "calibration.rotate": rotate,
                "calibration.gptq_batches": gptq_batches,
            }
            yield row, column, changes | _clipping("octav", "octav")


def _bert_calibrators() -> Iterator[tuple[str, str, dict[str, Any]]]:
    return _bert_calibrated(BERT_EQUAL_BITS)


def _bert_weight_calibrators() -> Iterator[tuple[str, str, dict[str, Any]]]:
    return _bert_calibrated(BERT_BITS)


def _bert_calibrated(bits: tuple[str, ...]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for notation in bits:
        for name in BERT_CALIBRATORS:
            changes = {"quant.notation": notation, "calibration.batches": BERT_STATIC_BATCHES}
            yield notation, name, changes | _clipping(name, name)


def _bert_dynamic() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for bits in BERT_DYNAMIC_BITS:
        for name in ("max", "octav"):
            yield bits, name, {"quant.notation": bits} | _clipping(name, name)


def _bert_vectors() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for bits in BERT_BITS:
        yield bits, "V16 max", {"quant.notation": f"{bits}/fp32/fp32"}


def _bert_scales() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for bits in BERT_BITS:
        for scales in ("4/8", "4/10", "6/8", "6/10", "fp16/fp16", "fp32/fp32"):
            yield bits, scales, {"quant.notation": f"{bits}/{scales}"}


def _depthwise() -> Iterator[tuple[str, str, dict[str, Any]]]:
    overrides = {"": (), ", depthwise 8/8U": (f"{DEPTHWISE}=8/8U",)}
    for notation in ("8/8U", "4/8U", "4/8U/fp32/fp32", "4/8U/4/6"):
        for name, override in overrides.items():
            if notation + name == "8/8U, depthwise 8/8U":
                continue
            for clipping in ("max", "exact"):
                for refit, batches in REESTIMATION.items():
                    changes = {
                        "quant.notation": notation,
                        "quant.overrides": override,
                        "calibration.batch_norm_batches": batches,
                    }
                    changes |= _clipping(clipping, "max")
                    yield notation + name, f"weights {clipping}{refit}", changes


TABLES = {
    "calibrators": _calibrators,
    "vectors": _vectors,
    "sizes": _sizes,
    "scales": _scales,
    "clipping": _vector_clipping,
    "order": _order,
    "batch_norm": _batch_norm,
    "rounding": _rounding,
    "smoothing": _smoothing,
    "depthwise": _depthwise,
    "bert_calibrators": _bert_calibrators,
    "bert_weight_calibrators": _bert_weight_calibrators,
    "bert_dynamic": _bert_dynamic,
    "bert_vectors": _bert_vectors,
    "bert_scales": _bert_scales,
    "bert_rounding": _bert_rounding,
    "bert_outliers": _bert_outliers,
    "bert_where": _bert_where,
    "bert_attention": _bert_attention,
}


@cli.once("dataset", "model", "quant", "clipping", "scale", "calibration", "tables")
def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Measures every cell of the tables that `config` asks for.

    Args:
        config: see `configs/`, and this main's docstring for `tables`.
        workdir: the run folder.

    Returns:
        The content of result.json.

    Raises:
        cli.UsageError: the config asks for something that cannot be; nothing is written.
        WorkdirError: the folder holds something else; nothing is written.
    """
    started = time.monotonic()
    settings, folder = config.to_dict(), Workdir(workdir)
    with cli.setup_errors():
        Placement.over_all_devices().check_batch_size(config.batch_size)
        build.require_notation(config)
        todo = list(cells(tuple(config.tables)))
        settled = [_changed(config, cell) for cell in todo]
        for changed in settled:
            build.ptq_policy(changed)
        # One that needs training examples, if any does, so that they are opened.
        bench = Bench.from_config(max(settled, key=needs_training_examples))
        bench = dataclasses.replace(bench, test=bench.task.held(bench.test))

    folder.begin(settings)
    log = workdir / "cells.jsonl"
    done = {(c["table"], c["row"], c["column"]): c for c in keep_lines(log)}
    in_float = bench.measure(bench.model)
    float_accuracy = in_float[bench.task.headline]
    logger.info("float: %.1f %%", 100 * float_accuracy)
    for number, (cell, changed) in enumerate(zip(todo, settled, strict=True), start=1):
        if cell[:3] in done:
            continue
        measured = measure(bench, changed)
        done[cell[:3]] = {**cell._asdict(), **measured}
        with log.open("a") as file:
            file.write(json.dumps(done[cell[:3]]) + "\n")
        logger.info(
            "%d/%d %s, %s, %s: %.1f %%", number, len(todo), *cell[:3], 100 * measured["accuracy"]
        )
    metrics = {
        "float_accuracy": float_accuracy,
        "count": in_float["count"],
        "cells": [done[cell[:3]] for cell in todo],
    }
    return folder.finish(settings, metrics, wall_seconds=time.monotonic() - started)


def measure(bench: Bench, config: ConfigDict) -> dict[str, Any]:
    """Accuracy in [0, 1], bits a parameter and seconds of one setting."""
    started = time.monotonic()
    model = bench.quantised(config)
    accuracy = bench.measure(model)[bench.task.headline]
    bits = qj.model_storage(model, *bench.first_inputs(1)).bits_per_element
    seconds = time.monotonic() - started
    return {"accuracy": accuracy, "bits_per_parameter": bits, "seconds": round(seconds, 1)}


def _changed(config: ConfigDict, cell: Cell) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(cell.changes)
    return changed


if __name__ == "__main__":
    sys.exit(cli.main(run, __doc__, sys.argv))
