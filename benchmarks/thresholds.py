"""What finding a threshold costs, in passes over the data, and how good it is.

Usage:
    python -m benchmarks.thresholds [--out=results/NAME] [--elements=1048576] [--bits=4]
        [--rounds=5]

Every calibrator finds the thresholds of one array: of the whole, of its 256 columns, and of
vectors of 16, 32 and 64 along its rows. Times are medians in units of one pass, sum(abs(x)), all
measured in this process in alternation. Beside them stands the squared error of quantising so, over
that of the exact optimum of the same groups (of large groups, within 1 % of it). The numbers are
Gaussian, heavy-tailed (Student's t, three degrees of freedom), or Gaussian with every other one
zero. Entropy is left out of vectors, which are no histograms.

Prints a table for each kind of numbers and, with --out, writes all of it as JSON with command,
commit, versions and device.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import qat_jax as qj
from benchmarks import peers, record
from qat_jax.clipping import Clipping
from qat_jax.granularity import Granularity
from qat_jax.training.workdir import device

COLUMNS = 256
GRANULARITIES: dict[str, Granularity] = {
    "tensor": qj.PerTensor(),
    "channels": qj.PerChannel(),
    **{f"vectors of {size}": qj.PerVector(size) for size in (16, 32, 64)},
}
EXACT = "exact"
CALIBRATORS: dict[str, Clipping] = {
    "max": qj.AbsMax(),
    "octav": qj.Octav(),
    "octav, 10 iterations": qj.Octav(10),
    "percentile 99.9": qj.Percentile(99.9),
    "mse sweep, 100 points": qj.MseSweep(100),
    "entropy": qj.Entropy(),
    "refit, 8 points": qj.Refit(),
    EXACT: qj.Exact(),
}


class Case(NamedTuple):
    """A calibrator at a granularity.

    Attributes:
        granularity: its name.
        calibrator: its name.
    """

    granularity: str
    calibrator: str


def numbers(elements: int) -> dict[str, np.ndarray]:
    """The arrays by the kind of their numbers, float32 [elements / 256, 256]."""
    rng = np.random.default_rng(record.SEED)
    shape = (elements // COLUMNS, COLUMNS)
    gaussian = rng.standard_normal(shape, np.float32)
    return {
        "Gaussian": gaussian,
        "heavy-tailed": rng.standard_t(3, shape).astype(np.float32),
        "half zeros": np.where(rng.random(shape) < 0.5, 0, gaussian),
    }


def quantizers(bits: int) -> dict[Case, qj.Quantizer]:
    """What is compared, on narrow grids."""
    return {
        Case(where, name): qj.Quantizer(qj.Int(bits, narrow=True), granularity, clipping)
        for where, granularity in GRANULARITIES.items()
        for name, clipping in CALIBRATORS.items()
        if not (name == "entropy" and where.startswith("vectors"))
    }


def measure(x: jax.Array, bits: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each case: passes (median, least, most), and the error over the exact one's."""
    compared = quantizers(bits)
    one_pass = jax.jit(lambda x: jnp.sum(jnp.abs(x))).lower(x).compile()
    searches = {case: _compiled(q.threshold, x) for case, q in compared.items()}
    errors = {
        case: float(_compiled(lambda x, *axes, q=q: jnp.mean((x - q(x, *axes)) ** 2), x)(x))
        for case, q in compared.items()
    }
    for names, peer in peers.searches(np.asarray(x), bits).items():
        case = Case(*names)
        quantizer = compared[Case(case.granularity, EXACT)]
        quantised = qj.fake_quant(x, quantizer, channel_axis=1, threshold=jnp.asarray(peer()))
        errors[case] = float(jnp.mean((x - quantised) ** 2))
        searches[case] = lambda x, peer=peer: peer()
    passes: dict[Case, list[float]] = {case: [] for case in searches}
    for _ in range(rounds):
        for case, search in searches.items():
            unit = min(seconds(one_pass, x) for _ in range(3))
            passes[case].append(seconds(search, x) / unit)
    return [
        {
            **case._asdict(),
            "passes": float(np.median(found)),
            "passes_min": min(found),
            "passes_max": max(found),
            "error_over_exact": errors[case] / errors[Case(case.granularity, EXACT)],
        }
        for case, found in passes.items()
    ]


def _compiled(function: Callable[..., jax.Array], x: jax.Array) -> Callable[..., jax.Array]:
    """A function of x, whose columns are channels and whose rows hold the vectors, run once."""
    compiled = jax.jit(lambda x: function(x, 1, 1)).lower(x).compile()
    jax.block_until_ready(compiled(x))
    return compiled


def seconds(function: Callable[..., Any], x: jax.Array) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    jax.block_until_ready(function(x))
    return time.perf_counter() - started


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Print a table: passes and, in brackets, the error over the exact optimum's."""
    table = Table(title=title)
    table.add_column("passes (error over the optimum's)")
    for granularity in GRANULARITIES:
        table.add_column(granularity, justify="right")
    cells = {
        (row["calibrator"], row["granularity"]): (
            f"{row['passes']:.3g} ({row['error_over_exact']:.3f})"
        )
        for row in rows
    }
    for name in dict.fromkeys(row["calibrator"] for row in rows):
        table.add_row(name, *(cells.get((name, where), "–") for where in GRANULARITIES))
    Console().print(table)


def main() -> int:
    """Reads the flags, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=record.out_path, help="where to write JSON, without a suffix")
    parser.add_argument("--elements", type=record.count, default=2**20, help="of the array")
    parser.add_argument("--bits", type=record.bits, default=4, help="of a code")
    parser.add_argument(
        "--rounds", type=record.count, default=5, help="timed searches of each calibrator"
    )
    arguments = parser.parse_args()
    if arguments.elements < COLUMNS or arguments.elements % COLUMNS:
        parser.error(f"--elements={arguments.elements}: give a multiple of {COLUMNS}")

    measured = {}
    for kind, array in numbers(arguments.elements).items():
        print(f"measuring: {kind}", file=sys.stderr)
        x = jax.device_put(array)
        measured[kind] = measure(x, arguments.bits, arguments.rounds)
        title = f"{kind}, {arguments.elements} numbers, {arguments.bits} bits, {device()['kind']}"
        show(measured[kind], title)
    if arguments.out is not None:
        record.write(
            arguments.out,
            "threshold search",
            rounds=arguments.rounds,
            elements=arguments.elements,
            bits=arguments.bits,
            rows=measured,
        )
    return 0


if __name__ == "__main__":
    record.run(main)
