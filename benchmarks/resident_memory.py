"""Whether a training's memory stays what it is.

Usage:
    python -m benchmarks.resident_memory [--out=results/NAME] [--minutes=10] [--arg=ARG]
        [--batch=16]

Trains a network of configs/imagenet.py on noise, 224 pixels wide, in a process of its own
(experiments.train, ResNet-18 at 4 bits if --arg says nothing else), and asks the operating system
for that process's resident memory every five seconds, from the end of the first epoch of four
steps, when all is compiled and every buffer is in use. At the end the training is stopped as by
Ctrl-C; its folder is deleted.

Prints how the memory went and, with --out, writes the samples as JSON, with command, commit,
versions and device, and as PNG. Needs `ps`.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks import record
from configs import imagenet

_SECONDS = 5  # between two samples
_STEPS = 4  # of an epoch


def measure(arg: str, batch: int, minutes: float) -> dict[str, list[float]]:
    """Seconds since the first epoch's end, resident MiB then, and the training's steps so far."""
    measured: dict[str, list[float]] = {"seconds": [], "mib": [], "step": []}
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "experiments.train"),
            f"--config=configs/imagenet.py:{arg}",
            f"--workdir={folder}/run",
            f"--config.seed={record.SEED}",
            f"--config.batch_size={batch}",
            "--config.dataset.name=fake",
            f"--config.dataset.fake_examples={_STEPS * batch}",
            "--config.log_every_steps=1",
            "--config.eval_every_epochs=1000",
            "--config.checkpoint_every_epochs=1000",
        ]
        log = Path(folder) / "log"
        with log.open("w") as file:
            training = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            started = None
            while training.poll() is None:
                step = _steps(Path(folder) / "run" / "metrics.jsonl")
                if started is None and step >= _STEPS:
                    started = time.monotonic()
                if started is not None:
                    measured["seconds"].append(time.monotonic() - started)
                    measured["mib"].append(_resident_mib(training.pid))
                    measured["step"].append(step)
                    if time.monotonic() - started >= 60 * minutes:
                        return measured
                time.sleep(_SECONDS)
        finally:
            training.send_signal(signal.SIGINT)
            training.wait()
        raise RuntimeError(f"the training ended by itself:\n{log.read_text()}")


def _steps(metrics: Path) -> int:
    """How many steps a run has taken."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    steps = [json.loads(line) for line in lines]
    return max((line["step"] for line in steps if line["split"] == "train"), default=0)


def _resident_mib(pid: int) -> float:
    found = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, check=True)
    return int(found.stdout) / 1024


def draw(measured: dict[str, list[float]], title: str, path: Path) -> None:
    """Memory over time, from zero."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.array(measured["seconds"]) / 60, measured["mib"])
    axes.set(title=title, xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Reads the flags, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=record.out_path, help="where to write, without a suffix")
    parser.add_argument(
        "--minutes", type=float, default=10, help="of training, after the first epoch"
    )
    parser.add_argument(
        "--arg", default="model=resnet18,recipe=scratch,bits=4", help="the config's"
    )
    parser.add_argument("--batch", type=record.count, default=16, help="images in a step")
    arguments = parser.parse_args()
    if arguments.minutes <= 0:
        parser.error("--minutes is more than 0")
    try:
        imagenet.get_config(arguments.arg)
    except ValueError as error:
        parser.error(f"--arg: {error}")

    measured = measure(arguments.arg, arguments.batch, arguments.minutes)
    title = f"{arguments.arg} at 224 pixels, batch {arguments.batch}"
    mib, steps = measured["mib"], measured["step"]
    print(f"{title}: {steps[-1] - steps[0]} steps in {measured['seconds'][-1] / 60:.1f} minutes,")
    print(f"resident MiB: {mib[0]:.0f} at first, {mib[-1]:.0f} at last,")
    print(f"{min(mib):.0f} to {max(mib):.0f} in between")
    if arguments.out is not None:
        draw(measured, title, arguments.out.with_suffix(".png"))
        record.write(arguments.out, title, samples=measured)
    return 0


if __name__ == "__main__":
    record.run(main)
