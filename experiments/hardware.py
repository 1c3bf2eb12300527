"""What a format costs in an accelerator, and what it is worth.

Usage:
    python -m experiments.hardware --config=configs/hardware_resnet20.py --workdir=DIR \
        [--config.KEY=VALUE …]

Fits area and energy of VS-Quant's processing element to its published points, says how well
left-out points are predicted, sweeps W/A/ws/as, and joins that with the accuracies in results/.
With --config.bench.model.pretrained=FILE.safetensors and the data's flags (see `experiments.ptq`)
it measures what results/ lacks: accuracies in block formats, and how many rounded scale products
are zero, so that what they multiply can be skipped.

DIR gets config.json, result.json with the fit and the headline claims, and

    published.csv, fit.png         every published point, as modelled and as predicted when left out
    rounding.csv, rounding.png     energy with rounded scale products
    designs.csv, design_space.png  every design's widths, area, energy and accuracies; NETWORK_gptq
                                   is the better of kernels rounded to the nearest and by GPTQ
"""

import itertools
import logging
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import qat_jax as qj
from experiments import accuracies, cli, hardware_figures
from experiments.accuracies import Accuracies
from experiments.ptq import Bench
from experiments.tables import write_csv
from qat_jax import hardware
from qat_jax.hardware import Design, published
from qat_jax.training.workdir import Workdir

logger = logging.getLogger("experiments.hardware")

CLAIMS = ("4/4/4/6", "4/8/6/10", "4/6/4/-")
# What is fitted: the published points, what logic costs, and the blocks with a parameter.
MEASURES = {
    "area": (published.areas(), hardware.AREA_40NM, hardware.AREA_BLOCKS),
    "energy": (published.energies(), hardware.ENERGY_40NM, hardware.ENERGY_BLOCKS),
}
Row = dict[str, Any]


@cli.once("designs", "formats", "networks", "bench", "bench_network")
def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Models, measures and joins what `config` describes.

    Args:
        config: see `configs/hardware_resnet20.py`.
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
        networks = {name: accuracies.read(each) for name, each in config.networks.items()}
        if config.bench_network not in networks:
            raise ValueError(f"bench_network is not among the networks: {', '.join(networks)}")
        designs = designs_of(config)
        bench = None
        if config.bench.model.pretrained is not None:
            bench = Bench.from_config(config.bench)

    folder.begin(settings)

    # Model
    models = {name: hardware.fit(*measure) for name, measure in MEASURES.items()}
    area, energy = models["area"], models["energy"]
    points = {name: published_points(name) for name in MEASURES}

    # Measure
    gating: dict[str, hardware.ScalePairs] = {}
    if bench is None:
        logger.info("no --config.bench.model.pretrained: nothing is measured")
    else:
        of_formats = {name: accuracy(bench, config.bench, name) for name in config.formats}
        networks[config.bench_network].nearest.update(of_formats)
        gating = {n: zero_products(bench, config, n) for n in published.ROUNDED_ENERGY}

    # Join
    rounding = list(rounded(energy, gating))
    rows = [design_row(name, design, area, energy) for name, design in designs.items()]
    for name, measured in networks.items():
        join(rows, name, measured.nearest)
        if measured.gptq:
            join(rows, f"{name}_gptq", measured.best())

    # Write
    write_csv(workdir / "published.csv", list(itertools.chain(*points.values())))
    write_csv(workdir / "rounding.csv", rounding)
    write_csv(workdir / "designs.csv", rows)
    hardware_figures.fit(workdir / "fit.png", points)
    hardware_figures.rounding(workdir / "rounding.png", rounding)
    hardware_figures.design_space(workdir / "design_space.png", rows, networks)
    metrics = {
        "fit": {name: quality(models[name], points[name]) for name in MEASURES},
        "claims": [claim(n, area, energy, networks) for n in CLAIMS],
        "designs": len(rows),
        "networks": {
            name: {"float": each.in_float, **each.nearest, "gptq": each.gptq}
            for name, each in networks.items()
        },
    }
    result = folder.finish(settings, metrics, wall_seconds=time.monotonic() - started)
    show(metrics, points)
    return result


def designs_of(config: ConfigDict) -> dict[str, Design]:
    """Every design by name: all combinations, then the block formats.

    Raises:
        ValueError: a notation or a format does not exist.
    """
    choices = config.designs
    words = itertools.product(choices.weights, choices.activations, choices.scales, choices.scales)
    notations = ["/".join(map(str, word)) for word in words]
    found = {notation: Design.from_notation(notation) for notation in notations}
    return found | {name: Design.of(qj.preset(name).rules[0]) for name in config.formats}


def published_points(measure: str) -> list[Row]:
    """Every published point of area or energy, as modelled and as predicted when left out."""
    values, costs, blocks = MEASURES[measure]
    model = hardware.fit(values, costs, blocks)
    left_out = hardware.leave_one_out(values, costs, blocks)
    return [
        {
            "measure": measure,
            "design": notation,
            "published": value,
            "modelled": round(model(Design.from_notation(notation)), 4),
            "left_out": round(left_out[notation], 4) if notation in left_out else "",
            "left_out_error_percent": (
                round(100 * (left_out[notation] / value - 1), 2) if notation in left_out else ""
            ),
        }
        for notation, value in values.items()
    ]


def quality(model: hardware.CostModel, points: list[Row]) -> dict[str, Any]:
    """Errors of a fit in per cent, and its parameters as shares of two designs."""
    errors = {p["design"]: abs(p["left_out_error_percent"]) for p in points if p["left_out"] != ""}
    worst = max(errors, key=lambda design: errors[design])
    return {
        "points": len(errors),
        "left_out_mean_percent": round(statistics.fmean(errors.values()), 2),
        "left_out_median_percent": round(statistics.median(errors.values()), 2),
        "left_out_worst_percent": round(errors[worst], 2),
        "left_out_worst_design": worst,
        "parameters": dict(model.parameters),
        "shares": {
            notation: {
                block: round(cost, 4)
                for block, cost in model.blocks(Design.from_notation(notation)).items()
            }
            for notation in (published.REFERENCE, "4/8/6/10")
        },
    }


def accuracy(bench: Bench, config: ConfigDict, notation: str) -> float:
    """Per cent of the test examples, in some format."""
    changed = config.copy_and_resolve_references()
    changed.quant.notation = notation
    percent = 100 * bench.measure(bench.quantised(changed))[bench.task.headline]
    logger.info("%s: %.1f %%", notation, percent)
    return round(percent, 1)


def zero_products(bench: Bench, config: ConfigDict, notation: str) -> hardware.ScalePairs:
    """Which scales meet in the network, activations unsigned where they can be."""
    weights, activations, *scales = notation.split("/")
    changed = config.bench.copy_and_resolve_references()
    changed.quant.notation = "/".join([weights, f"{activations}U", *scales])
    inputs = bench.first_inputs(config.gating_images)
    pairs = hardware.scale_pairs(bench.quantised(changed), *inputs)
    logger.info("%s: %.2f %% of the scale products are zero", notation, 100 * pairs.zero_share())
    return pairs


def rounded(energy: hardware.CostModel, gating: Mapping[str, hardware.ScalePairs]) -> Iterable[Row]:
    """Energies with rounded scale products: published, by width alone, and gated as measured."""
    for notation, values in published.ROUNDED_ENERGY.items():
        for bits, value in values.items():
            design = Design.from_notation(notation, bits)
            row = {
                "design": notation,
                "product_bits": design.widths.scale_product,
                "column": "full" if bits is None else f"{bits} bits",
                "published": value,
                "width_alone": round(energy(design), 4),
                # What the model would have to skip to have the published energy.
                "needed_share": round(needed_share(energy, design, value), 3),
            }
            if notation in gating:
                share = gating[notation].zero_share(design.widths.scale_product)
                row |= {"measured_share": round(share, 4), "gated": round(energy(design, share), 4)}
            yield row


def needed_share(energy: hardware.CostModel, design: Design, value: float) -> float:
    """The share of vector products without which the model has a given energy."""
    return (energy(design) - value) / (energy(design) - energy(design, 1.0))


def design_row(
    name: str, design: Design, area: hardware.CostModel, energy: hardware.CostModel
) -> Row:
    """A design's widths and costs."""
    widths = design.widths
    return {
        "design": name,
        "area": round(area(design), 4),
        "energy": round(energy(design), 4),
        "product_bits": widths.product,
        "dot_bits": widths.dot,
        "scale_product_bits": widths.scale_product,
        "partial_sum_bits": widths.partial_sum,
        "accumulator_bits": widths.accumulator,
    }


def join(rows: list[Row], name: str, percents: Mapping[str, float]) -> None:
    """Adds some accuracies, and which designs are on the Pareto fronts of those measured."""
    known = [row for row in rows if row["design"] in percents]
    heights = [percents[row["design"]] for row in known]
    fronts = {
        cost: hardware.pareto_front([row[cost] for row in known], heights)
        for cost in ("area", "energy")
    }
    for row in rows:
        row |= {f"{name}_percent": "", f"{name}_area_front": "", f"{name}_energy_front": ""}
    for number, (row, percent) in enumerate(zip(known, heights, strict=True)):
        row[f"{name}_percent"] = percent
        for cost, front in fronts.items():
            row[f"{name}_{cost}_front"] = int(number in front)


def claim(
    notation: str,
    area: hardware.CostModel,
    energy: hardware.CostModel,
    networks: Mapping[str, Accuracies],
) -> Row:
    """What a design saves, published and modelled, in per cent, and what it classifies here."""
    design, theirs = Design.from_notation(notation), published.DESIGNS[notation]
    return {
        "design": notation,
        "published_area_saved": round(100 * (1 - theirs.area), 1),
        "modelled_area_saved": round(100 * (1 - area(design)), 1),
        "published_energy_saved": round(100 * (1 - theirs.energy), 1),
        "modelled_energy_saved": round(100 * (1 - energy(design)), 1),
        "accuracies": {
            name: {"percent": each.nearest[notation], "float": each.in_float}
            for name, each in networks.items()
            if notation in each.nearest
        },
    }


def show(metrics: Mapping[str, Any], points: Mapping[str, list[Row]]) -> None:
    """Prints every published point, how good the fits are, and the claims."""
    for measure, rows in points.items():
        print(f"{measure:<12}published  modelled  left out   error")
        for row in rows:
            predicted = " the unit"
            if row["design"] != published.REFERENCE:
                predicted = f"{row['left_out']:8.3f}  {row['left_out_error_percent']:+6.1f} %"
            print(f"{row['design']:<12}{row['published']:9.3f} {row['modelled']:9.3f}  {predicted}")
        fitted = metrics["fit"][measure]
        print(
            f"left-out points: mean {fitted['left_out_mean_percent']} %, worst "
            f"{fitted['left_out_worst_percent']} % ({fitted['left_out_worst_design']})\n"
        )
    for row in metrics["claims"]:
        saved = [
            f"{row[f'modelled_{measure}_saved']} % {measure} "
            f"(published {row[f'published_{measure}_saved']})"
            for measure in points
        ]
        print(f"{row['design']} saves {' and '.join(saved)}")


if __name__ == "__main__":
    sys.exit(cli.main(run, __doc__, sys.argv))
