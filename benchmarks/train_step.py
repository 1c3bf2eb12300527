"""How much a quantised training step costs over the unquantised one.

Usage:
    python -m benchmarks.train_step [--workload=resnet20|minilm-block|resnet50|bert-base]
        [--out=results/NAME] [--batch=N] [--rounds=9] [--compilations=2]

Times whole training steps (forward, backward, optimiser; state donated) of a network quantised to
4 bits: unquantised; with given thresholds, so that nothing is searched; with max scaling; with
OCTAV; with its ten Newton steps on all elements; from the thresholds of the step before (carried);
with a scale for each token of an activation, or each image of a convolution's; with features turned
before (rotated); with thresholds that are parameters (learned); with vectors of 16 whose scales are
integers; and with Qwix (int8, the maximum), where that is installed. All run in this process in
alternation, so that what slows the machine slows them alike; ratios are medians over rounds of the
two times of one round, those of compilations of the shorter of two. The last two workloads are for
an accelerator, whose compilers choose among kernels by trying them: --compilations=0 compiles all
contestants at once and does not time it.

Prints a table and, with --out, writes it as JSON with command, commit, versions and device.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

import qat_jax as qj
from benchmarks import record, rounds
from benchmarks.workloads import (
    WORKLOADS,
    Quantise,
    Workload,
    carried,
    learned,
    rotated,
    unquantised,
    w4a4,
)
from qat_jax.training.state import create_state
from qat_jax.training.step import make_train_step
from qat_jax.training.workdir import device

BASELINE = "unquantised"
COMPILATIONS = 2  # timed ones of each contestant
PREFIX = "step_"  # of what is written of the steps' times


@dataclasses.dataclass
class Contestant:
    """A step with its state, and the seconds that it and its compilation took."""

    lower: Callable[..., jax.stages.Lowered]
    state: Any
    step: Any = None
    temporary_bytes: int = 0
    compile_seconds: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def compile(self, batch: dict[str, jax.Array]) -> None:
        """One timed compilation, tracing not counted."""
        lowered = self.lower(self.state, batch)
        started = time.perf_counter()
        compiled: Any = lowered.compile()
        self.compile_seconds.append(time.perf_counter() - started)
        self.step = compiled
        self.temporary_bytes = compiled.memory_analysis().temp_size_in_bytes

    def run(self, batch: dict[str, jax.Array]) -> None:
        """One timed step."""
        started = time.perf_counter()
        self.state, metrics = self.step(self.state, batch)
        jax.block_until_ready((self.state, metrics))
        self.seconds.append(time.perf_counter() - started)


def contestants(workload: Workload) -> dict[str, Quantise]:
    """What is compared: the paper's W4A4 recipe with one choice changed at a time, and others."""
    ends = workload.ends

    def vectors(model: nnx.Module, inputs: tuple[Any, ...]) -> nnx.Module:
        first, last = ends
        policy = qj.Policy.from_notation(workload.vectors, first=first, last=last, gradient="mph")
        return qj.quantize_model(model, policy)

    found: dict[str, Quantise] = {
        BASELINE: unquantised,
        "fixed thresholds": w4a4(ends, qj.Fixed(1.0)),
        "max": w4a4(ends, qj.AbsMax()),
        "octav": w4a4(ends, qj.Octav()),
        "octav, 10 iterations": w4a4(ends, qj.Octav(10)),
        "octav, carried": carried(w4a4(ends, qj.Octav())),
        "octav, a scale a token": w4a4(ends, qj.Octav(), qj.PerChannel()),
        "octav, rotated": rotated(w4a4(ends, qj.Octav())),
        "learned": learned(w4a4(ends, qj.Octav())),
        f"vectors of 16, {workload.vectors}": vectors,
    }
    if importlib.util.find_spec("qwix"):
        found["Qwix, int8, max"] = _qwix
    return found


def _qwix(model: nnx.Module, inputs: tuple[Any, ...]) -> nnx.Module:
    """Every layer by Qwix; its int4 convolutions do not run on CPUs."""
    qwix = importlib.import_module("qwix")
    rule = qwix.QtRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
    return qwix.quantize_model(model, qwix.QtProvider([rule]), *inputs)


def prepare(workload: Workload, batch: dict[str, jax.Array], quantise: Quantise) -> Contestant:
    """A training step of a quantised model, not compiled yet."""
    model = workload.model()
    model.train()
    model = quantise(model, workload.objective.inputs(batch))
    schedule = optax.constant_schedule(1e-4)
    optimizer = optax.sgd(schedule, momentum=0.9)
    graphdefs, state = create_state(model, optimizer)
    step = make_train_step(graphdefs, optimizer, objective=workload.objective, schedule=schedule)
    return Contestant(step.lower, state)  # type: ignore[attr-defined]


def compile_in_turn(
    measured: dict[str, Contestant], batch: dict[str, jax.Array], compilations: int
) -> None:
    """Compiles each so many times."""
    for round_ in range(compilations):
        print(f"compilation {round_ + 1} of {compilations}", file=sys.stderr)
        for contestant in measured.values():
            jax.clear_caches()  # or the program of the last one would be returned
            contestant.compile(batch)


def compile_at_once(measured: dict[str, Contestant], batch: dict[str, jax.Array]) -> None:
    """Compiles all side by side, where the time of one says nothing.

    What is compared with the baseline is left out if it does not compile.
    """
    print("compiling", file=sys.stderr)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        compiled = {name: threads.submit(c.compile, batch) for name, c in measured.items()}
    compiled.pop(BASELINE).result()
    for name, result in compiled.items():
        if (error := result.exception()) is not None:
            print(f"{name} does not compile: {error}", file=sys.stderr)
            del measured[name]
    for contestant in measured.values():
        contestant.compile_seconds.clear()


def summary(measured: dict[str, Contestant]) -> dict[str, dict[str, float]]:
    """Medians, and ratios to the baseline round by round; of timed compilations the shortest."""
    base = measured[BASELINE]

    def compilation(contestant: Contestant) -> dict[str, float]:
        if not contestant.compile_seconds:
            return {}
        shortest = min(contestant.compile_seconds)
        ratio = shortest / min(base.compile_seconds)
        return {"compile_seconds": shortest, "compile_ratio": ratio}

    return {
        name: rounds.ratios(contestant.seconds, base.seconds, PREFIX)
        | compilation(contestant)
        | {
            "temporary_memory_mib": contestant.temporary_bytes / 2**20,
            "memory_ratio": contestant.temporary_bytes / base.temporary_bytes,
        }
        for name, contestant in measured.items()
    }


def main() -> int:
    """Reads the flags, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=list(WORKLOADS), default="resnet20")
    parser.add_argument("--out", type=record.out_path, help="where to write JSON, without a suffix")
    parser.add_argument(
        "--batch", type=record.count, help="examples in a step; the workload's own if not"
    )
    parser.add_argument(
        "--rounds", type=record.count, default=9, help="timed steps of each contestant"
    )
    parser.add_argument(
        "--compilations",
        type=int,
        default=COMPILATIONS,
        help="timed ones of each; 0: all at once, untimed",
    )
    arguments = parser.parse_args()
    if arguments.compilations < 0:
        parser.error("--compilations is a count")

    workload = WORKLOADS[arguments.workload]
    batch_size = arguments.batch or workload.batch_size
    batch = jax.device_put(workload.batch(batch_size))
    measured = {}
    for name, quantise in contestants(workload).items():
        print(f"quantising: {name}", file=sys.stderr)
        measured[name] = prepare(workload, batch, quantise)
    if arguments.compilations:
        compile_in_turn(measured, batch, arguments.compilations)
    else:
        compile_at_once(measured, batch)
    for contestant in measured.values():  # the first step of a program is not like the others
        contestant.run(batch)
        contestant.seconds.clear()
    rounds.run(measured, batch, arguments.rounds)
    rows = summary(measured)
    title = f"{workload.title}, training step at 4 bits, batch {batch_size}"
    others = {
        "compile": lambda row: f"{row['compile_ratio']:.2f}" if "compile_ratio" in row else "-",
        "memory": lambda row: f"{row['memory_ratio']:.2f}",
    }
    rounds.show(rows, f"{title}, {device()['kind']}", "step", BASELINE, others, PREFIX)
    if arguments.out is not None:
        record.write(arguments.out, title, rounds=arguments.rounds, rows=rows)
    return 0


if __name__ == "__main__":
    record.run(main)
