"""How much a quantised training step costs over the float32 step.

Usage:
    python -m benchmarks.train_step [--out=results/NAME] [--depth=20] [--batch=128] [--rounds=9]

Times whole training steps of a CIFAR ResNet (forward, backward, optimiser; state donated) with
every convolution at W4A4: unquantised, with given thresholds (no search), with max scaling, and
with OCTAV's ten Newton steps. All run in this process in alternation, so that what slows the
machine slows them alike; ratios are medians over rounds of the two times of one round.

Prints a table and, with --out, writes it as JSON with command, commit, versions and device.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

import qat_jax as qj
from benchmarks import record
from qat_jax.models import CifarResNet
from qat_jax.training.objective import Classification, Normalisation
from qat_jax.training.state import create_state
from qat_jax.training.step import make_train_step
from qat_jax.training.workdir import device

BASELINE = "float32"


@dataclasses.dataclass
class Contestant:
    """A compiled step with its state, and the seconds it took."""

    step: Callable[..., Any]
    state: Any
    compile_seconds: float
    temporary_bytes: int
    seconds: list[float] = dataclasses.field(default_factory=list)

    def run(self, batch: dict[str, jax.Array]) -> None:
        """One timed step."""
        started = time.perf_counter()
        self.state, metrics = self.step(self.state, batch)
        jax.block_until_ready((self.state, metrics))
        self.seconds.append(time.perf_counter() - started)


def policies() -> dict[str, qj.Policy | None]:
    """What is compared: the paper's W4A4 recipe with one choice changed at a time."""

    def w4a4(clipping: Any) -> qj.Policy:
        return qj.uniform_policy(4, 4, clipping=clipping, first="conv1", last="linear")

    return {
        BASELINE: None,
        "fixed thresholds": w4a4(qj.Fixed(1.0)),
        "max": w4a4(qj.AbsMax()),
        "octav, 10 iterations": w4a4(qj.Octav(10)),
    }


def prepare(depth: int, batch: dict[str, jax.Array], policy: qj.Policy | None) -> Contestant:
    """Compile a training step and run it once."""
    model: nnx.Module = CifarResNet(depth, rngs=nnx.Rngs(0))
    if policy is not None:
        model = qj.quantize_model(model, policy)
    schedule = optax.constant_schedule(0.01)
    optimizer = optax.sgd(schedule, momentum=0.9)
    graphdefs, state = create_state(model, optimizer)
    objective = Classification(Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    step = make_train_step(graphdefs, optimizer, objective=objective, schedule=schedule)
    started = time.perf_counter()
    compiled = step.lower(state, batch).compile()  # type: ignore[attr-defined]
    compile_seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    state, metrics = compiled(state, batch)
    jax.block_until_ready((state, metrics))
    return Contestant(compiled, state, compile_seconds, memory.temp_size_in_bytes)


def summary(contestants: dict[str, Contestant]) -> dict[str, dict[str, float]]:
    """Medians, and ratios to the baseline round by round."""
    base = contestants[BASELINE]
    rows = {}
    for name, contestant in contestants.items():
        ratios = np.array(contestant.seconds) / np.array(base.seconds)
        rows[name] = {
            "step_seconds": float(np.median(contestant.seconds)),
            "step_ratio": float(np.median(ratios)),
            "step_ratio_min": float(ratios.min()),
            "step_ratio_max": float(ratios.max()),
            "compile_seconds": contestant.compile_seconds,
            "compile_ratio": contestant.compile_seconds / base.compile_seconds,
            "temporary_memory_mib": contestant.temporary_bytes / 2**20,
            "memory_ratio": contestant.temporary_bytes / base.temporary_bytes,
        }
    return rows


def show(rows: dict[str, dict[str, float]], title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    table.add_column("step")
    for heading in ("seconds", "over float32", "min … max", "compile", "memory"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['step_seconds']:.3f}",
            f"{row['step_ratio']:.2f}",
            f"{row['step_ratio_min']:.2f} … {row['step_ratio_max']:.2f}",
            f"{row['compile_ratio']:.2f}",
            f"{row['memory_ratio']:.2f}",
        )
    Console().print(table)


def main() -> int:
    """Reads the flags, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where to write the JSON, without a suffix")
    parser.add_argument("--depth", type=int, default=20, help="of the ResNet")
    parser.add_argument("--batch", type=int, default=128, help="images in a step")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each contestant")
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    batch = {
        "image": jax.device_put(rng.integers(0, 256, (arguments.batch, 32, 32, 3), np.uint8)),
        "label": jax.device_put(rng.integers(0, 10, arguments.batch, np.int32)),
    }
    contestants = {}
    for name, policy in policies().items():
        print(f"compiling: {name}", file=sys.stderr)
        contestants[name] = prepare(arguments.depth, batch, policy)
    for round_ in range(arguments.rounds):
        print(f"round {round_ + 1} of {arguments.rounds}", file=sys.stderr)
        for contestant in contestants.values():
            contestant.run(batch)

    rows = summary(contestants)
    title = f"ResNet-{arguments.depth} W4A4 training step, batch {arguments.batch}"
    show(rows, f"{title}, {device()['kind']}")
    if arguments.out is not None:
        record.write(arguments.out, title, rounds=arguments.rounds, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
