"""Run an experiment once for every combination of some settings, and gather what came out.

Usage:
    python -m experiments.sweep --config=configs/NAME.py[:ARG] --workdir=DIR \
        --sweep.KEY=VALUE,VALUE… [--sweep.KEY=…] [--sweep=FILE.yaml] [--main=train] [--jobs=1] \
        [--cluster=slurm [--cluster.PARAMETER=VALUE …]] [--config.KEY=VALUE …]

Examples:
    Two bit widths and three seeds, six runs, one after the other:

        python -m experiments.sweep --config=configs/digits.py --workdir=runs/bits \
            --sweep.quant=bits=4,bits=2 --sweep.seed=0,1,2 --config.total_epochs=5

    Formats after training:

        python -m experiments.sweep --main=ptq --config=configs/cifar10_resnet20_ptq.py \
            --workdir=runs/formats --sweep.quant=4/4U/4/6,3/3U/4/6 --config.model.pretrained=FILE

    Four GPUs, or a cluster (pip install 'qat_jax[cluster]'):

        CUDA_VISIBLE_DEVICES=0,1,2,3 python -m experiments.sweep --jobs=4 …
        python -m experiments.sweep --cluster=slurm --cluster.slurm_partition=gpu \
            --cluster.gpus_per_node=1 --cluster.timeout_min=600 …

KEY is any key of the config, or `quant`: the config's ARG, added to one that --config has. Values
that have commas are separated by semicolons: --sweep.quant="bits=4,clipping=octav;bits=4".
FILE.yaml has `grid:` (values of each key) and `cells:` (a list of settings that go together).
--main is a main that takes --config and --workdir: train, ptq, inspect, integers, onnx_runtime or
outliers.

Every run is a normal one, in a folder of its own in DIR; what it says is in DIR/logs. Run the same
command again, with more values if you like: finished runs are skipped, unfinished ones resumed. A
run that fails does not stop the others. DIR/sweep.csv has a row for each combination: mean and
sample standard deviation over the seeds of all that the runs measured.
"""

import argparse
import contextlib
import csv
import dataclasses
import io
import logging
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments import cli
from experiments.grid import SEED, Cell, cells, read_file, split_values
from experiments.launchers import ClusterJobs, Job, Launcher, LocalProcesses
from qat_jax.training.workdir import Status, Workdir, write_text

logger = logging.getLogger("experiments.sweep")

MAINS = ("train", "ptq", "inspect", "integers", "onnx_runtime", "outliers")
CSV, LOGS = "sweep.csv", "logs"
_POLL_SECONDS = 0.2
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_HEADLINES = re.compile(r"(accuracy|f1|exact_match)$")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a command line asks for.

    Attributes:
        main: the module of `experiments` that runs a cell.
        config: FILE or FILE:ARG.
        overrides: flags for all cells.
        cells: all of them.
        workdir: the folder of their folders.
    """

    main: str
    config: str
    overrides: Sequence[str]
    cells: Sequence[Cell]
    workdir: Path

    def arguments(self, cell: Cell) -> list[str]:
        """The module and the arguments that run a cell."""
        return [
            f"experiments.{self.main}",
            *cell.flags(self.config),
            f"--workdir={self.workdir / cell.name}",
            *self.overrides,
        ]

    def settings(self) -> dict[str, Any]:
        """What config.json says of the sweep."""
        return {
            "experiment": "sweep",
            "seed": None,
            "main": self.main,
            "config": self.config,
            "overrides": list(self.overrides),
            "cells": {cell.name: dict(cell.values) for cell in self.cells},
        }


def run(sweep: Sweep, launcher: Launcher) -> dict[str, str]:
    """Runs the cells that are not finished and writes sweep.csv.

    Args:
        sweep: the cells.
        launcher: where they run.

    Returns:
        Of each cell that failed, the last line it said.

    Raises:
        cli.UsageError: a cell's command is wrong; nothing is written.
        WorkdirError: a folder holds something else, or another process sweeps in it; nothing is
            written.
        KeyboardInterrupt: the runs were told to save and have ended.
    """
    started = time.monotonic()
    waiting = [cell for cell in sweep.cells if not is_finished(sweep, cell)]
    folder = Workdir(sweep.workdir)
    _check_folder(folder)
    # A sweep that was killed after its last cell has nothing to run but its own result to write.
    unfinished = bool(waiting) or not folder.result_path.exists()
    with folder.locked():
        _tell_of_others(sweep, folder)
        if unfinished:
            folder.begin(sweep.settings())
            folder.result_path.unlink(missing_ok=True)  # of fewer cells
        failed = _run_all(sweep, waiting, launcher)
        rows = gather(sweep)
        show(sweep, rows)
        if unfinished and not failed:
            folder.finish(sweep.settings(), {"rows": rows}, wall_seconds=time.monotonic() - started)
    return failed


def _tell_of_others(sweep: Sweep, folder: Workdir) -> None:
    """Says which runs of an earlier command are not of this one."""
    if not folder.config_path.exists():
        return
    names = {cell.name for cell in sweep.cells}
    others = [name for name in folder.settings().get("cells", ()) if name not in names]
    if others:
        logger.warning(
            "%s will not name %s, which an earlier command swept: name all values for one table",
            CSV,
            ", ".join(others),
        )


def is_finished(sweep: Sweep, cell: Cell) -> bool:
    """Whether the cell's folder holds its result.

    Raises:
        cli.UsageError: its command is wrong.
        WorkdirError: the folder holds something else.
    """
    try:
        config = cli.parse(sweep.arguments(cell)).config
    except cli.UsageError as error:
        raise cli.UsageError(f"{cell.name}: {error}") from error
    return Workdir(sweep.workdir / cell.name).status(config.to_dict()) is Status.FINISHED


def gather(sweep: Sweep) -> list[dict[str, Any]]:
    """Writes sweep.csv of what is finished.

    Returns:
        Its rows, one for each combination without the seed: the swept settings, how many `runs`
        are finished, and of each number that they measured mean and sample standard deviation.
    """
    by_setting: dict[tuple[str, ...], list[Cell]] = {}
    for cell in sweep.cells:
        by_setting.setdefault(cell.setting, []).append(cell)
    rows = [_row(sweep, alike) for alike in by_setting.values()]
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    if sweep.workdir.is_dir():
        write_text(sweep.workdir / CSV, text.getvalue())
    return rows


def show(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the rows: accuracies and the like, in per cent."""
    keys = [key for key in sweep.cells[0].values if key != SEED]
    measured = dict.fromkeys(
        name.removesuffix("_mean") for row in rows for name in row if name.endswith("_mean")
    )
    headlines = [name for name in measured if _HEADLINES.search(name)]
    table = Table(caption=f"± standard deviation over seeds; all of it: {sweep.workdir / CSV}")
    for column in (*keys, "runs", *(name.replace("_", " ") + ", %" for name in headlines)):
        table.add_column(column, justify="left" if column in keys else "right")
    for row in rows:
        values = (_percent(row.get(f"{name}_mean"), row.get(f"{name}_std")) for name in headlines)
        table.add_row(*(row[key] for key in keys), str(row["runs"]), *values)
    Console(highlight=False, soft_wrap=True).print(table)


def _row(sweep: Sweep, alike: Sequence[Cell]) -> dict[str, Any]:
    folders = [Workdir(sweep.workdir / cell.name) for cell in alike]
    results = [folder.result() for folder in folders if folder.result_path.exists()]
    row: dict[str, Any] = {key: v for key, v in alike[0].values.items() if key != SEED}
    row["runs"] = len(results)
    for name in dict.fromkeys(name for result in results for name in result["metrics"]):
        values = [result["metrics"].get(name) for result in results]
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            continue
        row[f"{name}_mean"] = statistics.fmean(values)
        row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return row


def _run_all(sweep: Sweep, waiting: Sequence[Cell], launcher: Launcher) -> dict[str, str]:
    """Runs cells; of each that failed the last line it said."""
    queue, running = list(waiting), dict[str, Job]()
    failed: dict[str, str] = {}
    skipped = len(sweep.cells) - len(waiting)
    if skipped:
        logger.info("%d of %d runs are finished already", skipped, len(sweep.cells))
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with _Progress(console, len(sweep.cells), skipped) as progress:
        try:
            while queue or running:
                while queue and len(running) < launcher.places:
                    cell = queue.pop(0)
                    running[cell.name] = launcher.start(cell.name, sweep.arguments(cell))
                for name, job in list(running.items()):
                    if (status := job.status()) is None:
                        continue
                    del running[name]
                    said = last_line(job.log)
                    if status:
                        failed[name] = said
                    console.print(f"{name}: {'failed, ' if status else ''}{said}", markup=False)
                    progress.advance()
                    gather(sweep)
                progress.update(running)
                time.sleep(_POLL_SECONDS)
        except BaseException:  # whatever it is, no run outlives its sweep
            console.print(f"stopping {len(running)} runs, which save what they have")
            _stop(running.values())
            raise
    return failed


def _stop(jobs: Collection[Job]) -> None:
    """Ends runs; an impatient user's second Ctrl-C goes to them as well."""
    for job in jobs:
        job.stop()
    try:
        while any(job.status() is None for job in jobs):
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        for job in jobs:
            job.stop()
        raise


class _Progress:
    """A bar and what each running cell said last, where a person looks on."""

    def __init__(self, console: Console, total: int, completed: int):
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn()
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("", total=total, completed=completed)
        self._live = Live(self._bar, console=console, auto_refresh=False)
        self._shown = console.is_terminal

    def __enter__(self) -> "_Progress":
        if self._shown:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def advance(self) -> None:
        """One run more is over."""
        self._bar.advance(self._task)

    def update(self, running: Mapping[str, Job]) -> None:
        """Shows what the running ones say."""
        if not self._shown:
            return
        table = Table.grid(padding=(0, 2))
        for name, job in running.items():
            table.add_row(name, last_line(job.log))
        self._live.update(Group(table, self._bar), refresh=True)


def last_line(log: Path) -> str:
    """What a run said last; empty if nothing."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - 2000, 0))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _percent(mean: float | None, spread: float | None) -> str:
    if mean is None:
        return "-"
    return f"{100 * mean:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def _check_folder(folder: Workdir) -> None:
    if not folder.path.exists():
        return
    if folder.path.is_dir():
        ours = folder.config_path.exists() and folder.settings().get("experiment") == "sweep"
        if ours or folder.is_empty():
            return
    raise cli.UsageError(
        f"{folder.path} holds something else than a sweep: choose another --workdir"
    )


def parse(argv: Sequence[str]) -> tuple[Sweep, Launcher]:
    """Reads the command line.

    Returns:
        The cells and where to run them.

    Raises:
        cli.UsageError: anything is wrong with it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--main", default="train", choices=MAINS)
    parser.add_argument("--config")
    parser.add_argument("--workdir", type=cli.path)
    parser.add_argument("--sweep", type=cli.path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--cluster")
    try:
        known, rest = parser.parse_known_args(list(argv[1:]))
    except argparse.ArgumentError as error:
        raise cli.UsageError(f"{error}; see --help") from error
    if known.config is None or known.workdir is None:
        raise cli.UsageError("give --config=configs/NAME.py and --workdir=DIR; see --help")
    grid, parameters, overrides = dict[str, list[str]](), dict[str, Any](), list[str]()
    for argument in rest:
        if match := re.fullmatch(r"--sweep\.([^=]+)=(.*)", argument, re.DOTALL):
            if match[1] in grid:
                raise cli.UsageError(f"--sweep.{match[1]} is given twice: give all values at once")
            grid[match[1]] = split_values(match[2])
        elif match := re.fullmatch(r"--cluster\.([^=]+)=(.*)", argument):
            parameters[match[1]] = int(match[2]) if match[2].isdigit() else match[2]
        elif re.match(r"--(no)?config\.", argument):
            overrides.append(argument)
        else:
            raise cli.UsageError(
                f"{argument!r} is none of --sweep.KEY=VALUE,VALUE, --config.KEY=VALUE and "
                "--cluster.PARAMETER=VALUE; see --help"
            )
    if parameters and known.cluster is None:
        raise cli.UsageError("--cluster.PARAMETER needs --cluster=slurm")
    with cli.setup_errors():
        in_file, listed = read_file(known.sweep) if known.sweep else ({}, [])
        made = cells({**in_file, **grid}, listed)
        _check_given_once(overrides, made[0])
        logs = known.workdir / LOGS
        launcher: Launcher
        if known.cluster is None:
            launcher = LocalProcesses(known.jobs, logs)
        else:
            launcher = ClusterJobs(known.cluster, logs, parameters)
    return Sweep(known.main, known.config, overrides, made, known.workdir), launcher


def _check_given_once(overrides: Sequence[str], cell: Cell) -> None:
    """Raises ValueError if an override, which comes last, would undo what is swept."""
    for override in overrides:
        key = re.sub(r"^--(no)?config\.", "", override).partition("=")[0]
        if key in cell.values:
            raise ValueError(f"{key} is swept and also given, by {override}: leave one of them out")


@contextlib.contextmanager
def shared_compilations() -> Iterator[None]:
    """Lets the runs of a sweep share what they compile: seeds differ in numbers alone.

    A cache that the user has chosen for JAX stays in use.
    """
    if _CACHE in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="qat_jax-sweep-") as folder:
        os.environ[_CACHE] = folder
        try:
            yield
        finally:
            del os.environ[_CACHE]


def _interrupt(number: int, *_: object) -> None:
    raise cli.Terminated(number)


def main(argv: Sequence[str]) -> int:
    """The command line; the exit status is 0 if every cell is finished."""
    if any(argument in ("-h", "-help", "--help") for argument in argv[1:]):
        print((__doc__ or "").strip())
        return 0

    def work() -> int:
        sweep, launcher = parse(argv)
        signal.signal(signal.SIGTERM, _interrupt)
        with shared_compilations():
            failed = run(sweep, launcher)
        for name, said in failed.items():
            print(f"{name} failed: {said} ({sweep.workdir / LOGS})", file=sys.stderr)
        return cli.FAILED if failed else 0

    return cli.guarded(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
