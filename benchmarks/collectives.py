"""What devices say to each other in one training step, counted from the compiled program.

Usage:
    python -m benchmarks.collectives [--out=results/NAME] [--depth=20] [--batch=32]
        [--devices=1,2,4,8]

Compiles whole training steps of a CIFAR ResNet for simulated devices that split the batch, and
counts the collectives that run in one step and the bytes that each device contributes to them;
those in loops count once for each iteration. Nothing is timed: on simulated devices time says
nothing.

The steps are unquantised; W4A4 with the thresholds of whole activations, by the maximum, by OCTAV's
ten Newton steps and by OCTAV from the thresholds of the step before (carried), where a search is
counted as one iteration, its usual length; and OCTAV with a threshold for each device's shard of an
activation.

Prints a table and, with --out, writes it as JSON with command, commit and versions.
"""

import argparse
import re
import sys
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.table import Table

import qat_jax as qj
from benchmarks import record
from benchmarks.workloads import (
    NORMALISATION,
    WORKLOADS,
    Quantise,
    carried,
    unquantised,
    w4a4,
)
from qat_jax.models import CifarResNet
from qat_jax.training.objective import Classification
from qat_jax.training.sharding import Placement
from qat_jax.training.state import create_state
from qat_jax.training.step import make_train_step

_COLLECTIVE = re.compile(
    r"= (?P<shape>\(.*?\)|\S+) (?:all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute)(?:-start)?\("
)
_WHILE = re.compile(r" while\(.*body=%?(?P<body>[\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALL = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)|branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}


class Traffic(NamedTuple):
    """What runs in one call of a program: collectives, and the bytes of their results."""

    collectives: int
    bytes: int

    def __add__(self, other: "Traffic") -> "Traffic":  # type: ignore[override]
        return Traffic(self.collectives + other.collectives, self.bytes + other.bytes)

    def times(self, count: int) -> "Traffic":
        """That of `count` calls."""
        return Traffic(self.collectives * count, self.bytes * count)


def traffic(program: str, unknown_trips: int | None = None) -> Traffic:
    """The traffic of a compiled program, from its text.

    Args:
        program: the text.
        unknown_trips: how often loops run that end when their values say so.

    Raises:
        ValueError: a loop with collectives does not say how often it runs, and nobody else does.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            name = match[2]
            bodies[name] = []
            entry = name if match[1] else entry
        elif name:
            bodies[name].append(line)

    def of(name: str) -> Traffic:
        total = Traffic(0, 0)
        for line in bodies.get(name, []):
            if match := _COLLECTIVE.search(line):
                total += Traffic(1, _size(match["shape"]))
            elif match := _WHILE.search(line):
                each = of(match["body"])
                trips = _TRIPS.search(line)
                count = int(trips[1]) if trips else unknown_trips
                if each.collectives and count is None:
                    raise ValueError(f"nobody knows how often {match['body']} runs")
                total += each.times(count or 0)
            else:
                for called, branches in _CALL.findall(line):
                    for callee in filter(None, [called, *re.split(r",\s*%?", branches.strip("%"))]):
                        total += of(callee)
        return total

    return of(entry)


def _size(shape: str) -> int:
    return sum(
        _BYTES[dtype] * int(np.prod([int(size) for size in sizes.split(",") if size]))
        for dtype, sizes in _ARRAY.findall(shape)
    )


def contestants(devices: int) -> dict[str, Quantise]:
    """What is compared: no quantisers, and the paper's W4A4 recipe."""
    ends = WORKLOADS["resnet20"].ends
    return {
        "float32": unquantised,
        "max": w4a4(ends, qj.AbsMax()),
        "octav": w4a4(ends, qj.Octav(10)),
        "octav, carried": carried(w4a4(ends, qj.Octav(10))),
        "octav, a threshold a shard": w4a4(ends, qj.Octav(10), qj.PerShard(devices)),
    }


def step_traffic(depth: int, batch_size: int, devices: int, quantise: Quantise) -> Traffic:
    """The traffic of one training step over the first so many devices."""
    model = quantise(CifarResNet(depth, rngs=nnx.Rngs(0)), (np.ones((1, 32, 32, 3), np.float32),))
    placement = Placement.over(jax.devices()[:devices])
    schedule = optax.constant_schedule(0.01)
    optimizer = optax.sgd(schedule, momentum=0.9)
    graphdefs, state = create_state(model, optimizer)
    step = make_train_step(
        graphdefs,
        optimizer,
        objective=Classification(NORMALISATION),
        schedule=schedule,
        placement=placement,
    )
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, 32, 32, 3), np.uint8, sharding=placement.batch),
        "label": jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=placement.batch),
    }
    compiled = step.lower(placement.shard_state(state), batch).compile()  # type: ignore[attr-defined]
    return traffic(compiled.as_text(), unknown_trips=1)


def counts(text: str) -> list[int]:
    """The value of --devices."""
    return [record.count(each) for each in text.split(",")]


def main() -> int:
    """Compiles, counts, prints and, with --out, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=record.out_path, help="where to write JSON, without a suffix")
    parser.add_argument("--depth", type=record.count, default=20, help="of the ResNet")
    parser.add_argument(
        "--batch", type=record.count, default=32, help="images in a step, on all devices"
    )
    parser.add_argument("--devices", type=counts, default="1,2,4,8", help="how many to simulate")
    arguments = parser.parse_args()
    if wrong := [devices for devices in arguments.devices if arguments.batch % devices]:
        parser.error(f"--batch={arguments.batch} does not divide into {wrong[0]} devices")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(arguments.devices))

    title = f"ResNet-{arguments.depth} W4A4 training step, batch {arguments.batch}"
    table = Table(title=f"{title}: collectives, and KiB that a device contributes")
    table.add_column("step")
    rows: dict[str, dict[str, dict[str, int]]] = {}
    for devices in arguments.devices:
        table.add_column(f"{devices} devices", justify="right")
        for name, quantise in contestants(devices).items():
            print(f"compiling for {devices}: {name}", file=sys.stderr)
            found = step_traffic(arguments.depth, arguments.batch, devices, quantise)
            rows.setdefault(name, {})[str(devices)] = found._asdict()
    for name, row in rows.items():
        cells = (f"{cell['collectives']}, {cell['bytes'] / 1024:.0f}" for cell in row.values())
        table.add_row(name, *cells)
    Console().print(table)
    if arguments.out is not None:
        counted = "simulated on CPU, counted and not timed"
        record.write(arguments.out, title, device=counted, rows=rows)
    return 0


if __name__ == "__main__":
    record.run(main)
