"""What a training step on CPUs gains where the memory that it frees is kept for the next one.

Usage:
    python -m benchmarks.freed_memory [--workload=resnet20|minilm-block] [--out=results/NAME]
        [--batch=N] [--rounds=9]

Times training steps, unquantised and by OCTAV at 4 bits, in two processes in turn: one as JAX
leaves it, and one that keeps what it frees, as the mains do (experiments/freed_memory.py). Ratios
are medians over rounds of the two times of one round, by keeping over as JAX leaves it.

Prints a table and, with --out, writes it as JSON with command, commit, versions and device.
"""

import argparse
import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection

import jax

from benchmarks import record, rounds, train_step
from benchmarks.workloads import WORKLOADS
from experiments.freed_memory import keep_freed_memory

_STEPS = ("unquantised", "octav")
_BASELINE, _KEEPING = "as JAX leaves it", "kept"
_WARM_UP = 8  # steps until kept pieces are of the sizes that are asked for


class Remote:
    """A step that runs in another process, and the seconds that it took there."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.seconds: list[float] = []

    def run(self, inputs: str) -> None:
        """One timed step of those the process has."""
        self._connection.send(inputs)
        self.seconds.append(self._connection.recv())


def serve(connection: Connection, workload: str, batch_size: int, keeps: bool) -> None:
    """Runs steps as they are asked for by name, and answers with their seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    if keeps:
        keep_freed_memory()
    batch = jax.device_put(WORKLOADS[workload].batch(batch_size))
    everything = train_step.contestants(WORKLOADS[workload])
    steps = {}
    for name in _STEPS:
        steps[name] = train_step.prepare(WORKLOADS[workload], batch, everything[name])
        steps[name].compile(batch)
        for _ in range(_WARM_UP):
            steps[name].run(batch)
    connection.send(True)
    with contextlib.suppress(EOFError):
        while True:
            step = steps[connection.recv()]
            step.run(batch)
            connection.send(step.seconds[-1])


@contextlib.contextmanager
def processes(workload: str, batch_size: int) -> Iterator[dict[str, Connection]]:
    """The two, ready to run steps."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        found = {}
        print("compiling", file=sys.stderr)
        for name in (_BASELINE, _KEEPING):
            ours, theirs = context.Pipe()
            arguments = (theirs, workload, batch_size, name == _KEEPING)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            stack.callback(process.terminate)
            theirs.close()
            found[name] = ours
        for connection in found.values():
            connection.recv()
        yield found


def main() -> int:
    """Reads the flags, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=["resnet20", "minilm-block"], default="resnet20")
    parser.add_argument("--out", type=record.out_path, help="where to write JSON, without a suffix")
    parser.add_argument(
        "--batch", type=record.count, help="examples in a step; the workload's own if not"
    )
    parser.add_argument("--rounds", type=record.count, default=9, help="timed steps of each")
    arguments = parser.parse_args()
    if not keep_freed_memory():  # asked here, where it can be told; each process does it for itself
        parser.error(
            "memory is not kept here: it needs glibc, and MALLOC_… and GLIBC_TUNABLES not to be set"
        )

    workload = WORKLOADS[arguments.workload]
    batch_size = arguments.batch or workload.batch_size
    rows: dict[str, dict[str, float]] = {}
    with processes(arguments.workload, batch_size) as connections:
        for name in _STEPS:
            remotes = {kind: Remote(connection) for kind, connection in connections.items()}
            rounds.run(remotes, name, arguments.rounds)
            base = remotes[_BASELINE].seconds
            rows |= {
                f"{name}, {kind}": rounds.ratios(remote.seconds, base)
                for kind, remote in remotes.items()
            }
    title = f"{workload.title}, training step, batch {batch_size}"
    rounds.show(rows, title, "memory", _BASELINE, {})
    if arguments.out is not None:
        record.write(arguments.out, title, rounds=arguments.rounds, rows=rows)
    return 0


if __name__ == "__main__":
    record.run(main)
