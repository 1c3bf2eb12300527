"""What the search for one threshold costs an element, over the size of the array.

Usage:
    python -m benchmarks.sizes [--out=results/NAME] [--largest=100000000] [--bits=4] [--rounds=5]

Arrays of 256 columns and 10⁴, 10⁵, … Gaussian numbers: one pass, sum(abs(x)), the maximum, OCTAV,
and OCTAV's ten iterations over all elements. Nanoseconds an element, medians over rounds in which
all are measured in turn.

Prints a table and, with --out, writes it as JSON, with command, commit, versions and device, and
as PNG.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.console import Console
from rich.table import Table

import qat_jax as qj
from benchmarks import record
from benchmarks.thresholds import COLUMNS, seconds
from qat_jax.training.workdir import device

SMALLEST = 10_000
ONE_PASS = "one pass"


def measure(elements: int, bits: int, rounds: int) -> dict[str, float]:
    """Nanoseconds an element, by what is done."""
    shape = (elements // COLUMNS, COLUMNS)
    x = jnp.asarray(np.random.default_rng(record.SEED).standard_normal(shape, np.float32))
    format = qj.Int(bits, narrow=True)
    rules = {"max": qj.AbsMax(), "octav": qj.Octav(), "octav, 10 iterations": qj.Octav(10)}
    functions = {ONE_PASS: lambda x: jnp.sum(jnp.abs(x))} | {
        name: lambda x, rule=rule: rule.threshold(x, format, (0, 1)) for name, rule in rules.items()
    }
    compiled = {name: jax.jit(f).lower(x).compile() for name, f in functions.items()}
    found: dict[str, list[float]] = {name: [] for name in compiled}
    for round_ in range(rounds + 1):  # the first is not counted
        for name, function in compiled.items():
            # As often as makes a tenth of a second or so: single calls on small arrays are noise.
            taken = [seconds(function, x) for _ in range(max(1, 2_000_000 // elements))]
            if round_:
                found[name].append(float(np.median(taken)))
    return {name: 1e9 * float(np.median(taken)) / x.size for name, taken in found.items()}


def draw(rows: list[dict[str, float]], title: str, path: Path) -> None:
    """A line for each thing done."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    sizes = [row["elements"] for row in rows]
    for name in list(rows[0])[1:]:
        style = "--" if name == ONE_PASS else "-"
        axes.loglog(sizes, [row[name] for row in rows], style, marker="o", label=name)
    axes.set(title=title, xlabel="elements", ylabel="nanoseconds an element")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Reads the flags, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=record.out_path, help="where to write, without a suffix")
    parser.add_argument(
        "--largest", type=record.count, default=10**8, help="elements of the largest array"
    )
    parser.add_argument("--bits", type=record.bits, default=4, help="of the narrow grid")
    parser.add_argument(
        "--rounds", type=record.count, default=5, help="counted measurements of each"
    )
    arguments = parser.parse_args()
    if arguments.largest < SMALLEST:
        parser.error(f"--largest is at least {SMALLEST:,}")

    rows = []
    elements = SMALLEST
    while elements <= arguments.largest:
        print(f"{elements:,} elements", file=sys.stderr)
        measured = measure(elements, arguments.bits, arguments.rounds)
        rows.append({"elements": elements} | measured)
        elements *= 10
    title = f"One threshold at {arguments.bits} bits, {device()['kind']}"
    table = Table(title=f"{title}, nanoseconds an element")
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(f"{row['elements']:,}", *(f"{row[name]:.3g}" for name in list(row)[1:]))
    Console().print(table)
    if arguments.out is not None:
        draw(rows, title, arguments.out.with_suffix(".png"))
        record.write(arguments.out, title, bits=arguments.bits, rounds=arguments.rounds, rows=rows)
    return 0


if __name__ == "__main__":
    record.run(main)
