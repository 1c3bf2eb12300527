"""What quantised answers cost: simulated, from packed kernels, and in integers.

Usage:
    python -m benchmarks.inference [--workload=resnet20|minilm-block] [--out=results/NAME]
        [--batch=32] [--rounds=9]

The forward pass of a network in evaluation mode, at 4 bits: in float; simulated, thresholds found
in every call or calibrated before; the calibrated network packed, its kernels unpacked in every
call; and computed in integers. The same of vectors of 16 under integer scales. All are measured
in one process in turn; ratios are to the float pass of the same round. Beside them stand the bytes
of what each keeps.

Prints a table and, with --out, writes it as JSON, with command, commit, versions and device.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx

import qat_jax as qj
from benchmarks import record, rounds
from benchmarks.workloads import WORKLOADS, Workload, w4a4
from qat_jax import integer
from qat_jax.training.workdir import device

BASELINE = "float"


@dataclasses.dataclass
class Contestant:
    """A compiled forward pass, what it keeps, and the seconds it took."""

    forward: Callable[..., Any]
    model: nnx.State
    seconds: list[float] = dataclasses.field(default_factory=list)

    def run(self, inputs: tuple[Any, ...]) -> None:
        """One timed pass."""
        started = time.perf_counter()
        jax.block_until_ready(self.forward(self.model, *inputs))
        self.seconds.append(time.perf_counter() - started)

    @property
    def kept_bytes(self) -> int:
        """Of kernels, codes, scales and all else."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.model))


def models(workload: Workload, inputs: tuple[Any, ...]) -> Iterator[tuple[str, nnx.Module]]:
    """What is compared, by name."""

    def plain() -> nnx.Module:
        model = workload.model()
        model.eval()
        return model

    yield BASELINE, plain()
    first, last = workload.ends
    vectors = qj.Policy.from_notation(workload.vectors, first=first, last=last)
    yield "simulated, OCTAV", w4a4(workload.ends, qj.Octav())(plain(), inputs)
    for name, quantise in {
        "OCTAV, calibrated": w4a4(workload.ends, qj.Octav()),
        f"vectors, {workload.vectors}": lambda model, inputs: qj.quantize_model(model, vectors),
    }.items():
        model = quantise(plain(), inputs)
        if name.endswith("calibrated"):
            qj.calibrate(model, [inputs])
        yield f"simulated, {name}", model
        packed = integer.pack_model(model, *inputs)
        yield f"packed, {name}", packed
        yield f"integers, {name}", integer.integer_model(packed)


def prepare(model: nnx.Module, inputs: tuple[Any, ...]) -> Contestant:
    """Compile a forward pass and run it once."""
    definition, state = nnx.split(model)

    def forward(state: nnx.State, *inputs: Any) -> Any:
        return nnx.merge(definition, state)(*inputs)

    compiled = jax.jit(forward).lower(state, *inputs).compile()
    jax.block_until_ready(compiled(state, *inputs))
    return Contestant(compiled, state)


def main() -> int:
    """Reads the flags, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=list(WORKLOADS), default="resnet20")
    parser.add_argument("--out", type=record.out_path, help="where to write JSON, without a suffix")
    parser.add_argument("--batch", type=record.count, default=32, help="examples in a pass")
    parser.add_argument(
        "--rounds", type=record.count, default=9, help="timed passes of each contestant"
    )
    arguments = parser.parse_args()

    workload = WORKLOADS[arguments.workload]
    batch = jax.device_put(workload.batch(arguments.batch))
    inputs = tuple(jax.device_put(workload.objective.inputs(batch)))
    measured = {}
    for name, model in models(workload, inputs):
        print(f"compiling: {name}", file=sys.stderr)
        measured[name] = prepare(model, inputs)
    rounds.run(measured, inputs, arguments.rounds)
    rows = {
        name: rounds.ratios(contestant.seconds, measured[BASELINE].seconds)
        | {"kept_bytes": contestant.kept_bytes}
        for name, contestant in measured.items()
    }
    title = f"{workload.title}, forward pass at 4 bits, batch {arguments.batch}"
    kept = {"keeps KiB": lambda row: f"{row['kept_bytes'] / 1024:.0f}"}
    rounds.show(rows, f"{title}, {device()['kind']}", "forward pass", BASELINE, kept)
    if arguments.out is not None:
        record.write(arguments.out, title, rounds=arguments.rounds, rows=rows)
    return 0


if __name__ == "__main__":
    record.run(main)
