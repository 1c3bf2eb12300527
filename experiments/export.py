"""Take a quantised network out of a finished run, its thresholds as they were trained.

Usage:
    python -m experiments.export --checkpoint=RUN --format=FORMAT --out=FILE \
        [--integers] [--batch-size=N] [--calibrate=BATCHES]

RUN is the folder of a finished run of experiments.train or experiments.ptq with fewer than 32 bits.

    safetensors  codes and integer scales packed densely, with what is needed to read them; read by
                 qat_jax.export.load_packed, or with NumPy alone by docs/read_packed.py
    stablehlo    a program with the packed weights inside, for CPU, GPU and TPU; read by
                 jax.export.deserialize
    onnx         a graph with the weights as integers of 4 or 8 bits inside, and QuantizeLinear and
                 DequantizeLinear pairs; for ONNX Runtime and its like

Programs and graphs take batches of any size where no threshold of an activation is searched for in
the batch itself (train with quant.static_batches, calibrate with calibration.batches, or use one
scale a vector), programs else batches of --batch-size. --calibrate freezes those of a network that
was trained with such searches, on so many batches of its training data. With --integers a program
multiplies and adds integers.

Examples:
    python -m experiments.export --checkpoint=runs/ptq-4 --format=safetensors --out=net.safetensors
    python -m experiments.export --checkpoint=runs/qat-4 --calibrate=5 --format=onnx --out=net.onnx
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from flax import nnx
from ml_collections import ConfigDict

from experiments import build, cli, runs, tasks
from qat_jax.batch_norm import fold_batch_norm
from qat_jax.calibration import calibrate as freeze_thresholds
from qat_jax.export import load_packed, save_packed, save_stablehlo
from qat_jax.integer import integer_model, pack_model
from qat_jax.nnx import operand_quantizers, quantize_model
from qat_jax.training.checkpoint import CheckpointError
from qat_jax.training.workdir import WorkdirError

FORMATS = ("safetensors", "stablehlo", "onnx")


def packed_model(run: Path, calibrate: int = 0) -> tuple[nnx.Module, tuple[jax.Array, ...]]:
    """The quantised network of a finished run, packed, and an example of its inputs or a few.

    Args:
        run: the run folder.
        calibrate: on how many batches of training data its thresholds are frozen; 0: they stay as
            they are.

    Raises:
        cli.UsageError: there is no such run, it is not finished, nothing in it is quantised, or its
            thresholds are frozen already.
    """
    with cli.setup_errors():
        config = runs.finished_config(run)
        task = build.task(config)
        is_calibrated = "calibration" in config
        untrained = config.copy_and_resolve_references()
        untrained.model.pretrained = None  # only its quantisers count
        make = _quantised_for_calibration if is_calibrated else build.quantised_model
        count = build.fewest_examples(nnx.eval_shape(lambda: make(untrained)))
        example = tasks.first_inputs(task, task.test_source(), count)
        if is_calibrated:
            if calibrate:
                raise ValueError(
                    f"{run} was calibrated by its own config: repeat experiments.ptq with "
                    f"--config.calibration.batches={calibrate}"
                )
            model = _calibrated(config, run, example)
        else:
            trained = runs.trained_model(config, run, *example)
            if not operand_quantizers(trained):
                raise ValueError(f"{run} is in float: name a run with fewer than 32 bits")
            if calibrate:
                _freeze(trained, config, task, calibrate)
            model = pack_model(trained, *example)
    model.eval()
    return model, example


def _freeze(model: nnx.Module, config: ConfigDict, task: tasks.Task, batches: int) -> None:
    """Freezes thresholds that training found in every step."""
    if config.quant.static_batches:
        raise ValueError("thresholds of this run are frozen, as they were trained: no --calibrate")
    freeze_thresholds(model, tasks.training_inputs(task, config, batches))


def _quantised_for_calibration(config: ConfigDict) -> nnx.Module:
    model, policy = build.float_model(config), build.ptq_policy(config)
    return model if policy is None else quantize_model(model, policy)


def _calibrated(config: ConfigDict, run: Path, example: tuple[jax.Array, ...]) -> nnx.Module:
    if not (run / runs.PACKED).is_file():
        raise ValueError(f"{run} has no {runs.PACKED}: name a finished run that is not in float")
    config.model.pretrained = None  # its weights are in the run
    model = build.undrawn(lambda: build.float_model(config))
    if config.fold_batch_norm:
        model = fold_batch_norm(model, *example)
    return load_packed(model, run / runs.PACKED)


def _save_onnx(
    model: nnx.Module, out: Path, example: tuple[jax.Array, ...], batch_size: int | None
) -> None:
    try:
        from qat_jax.export.onnx import save_onnx
    except ModuleNotFoundError as error:
        raise ValueError(error) from error
    save_onnx(model, out, *example, batch_size=batch_size)


def export(
    run: Path,
    format: str,
    out: Path,
    *,
    integers: bool = False,
    batch_size: int | None = None,
    calibrate: int = 0,
) -> str:
    """Writes a file.

    Args:
        run: the run folder.
        format: one of FORMATS.
        out: the file.
        integers: whether a program computes in integers.
        batch_size: of a program; None for any.
        calibrate: as of `packed_model`.

    Returns:
        What was written, in a line.

    Raises:
        cli.UsageError: this cannot be done; nothing is written.
    """
    model, example = packed_model(run, calibrate)
    with cli.setup_errors():
        if format == "safetensors":
            save_packed(model, out)
        elif format == "onnx":
            _save_onnx(model, out, example, batch_size)
        else:
            model = integer_model(model) if integers else model
            save_stablehlo(model, out, *example, batch_size=batch_size)
    return f"{out}: {out.stat().st_size:,} bytes"


def main(argv: Sequence[str]) -> int:
    """The exit status: 0 written, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", type=cli.path, required=True, metavar="RUN", help="see above"
    )
    parser.add_argument("--format", choices=FORMATS, required=True, help="see above")
    parser.add_argument("--out", type=cli.path, required=True, metavar="FILE", help="what to write")
    parser.add_argument("--integers", action="store_true", help="a program that adds integers")
    parser.add_argument("--batch-size", type=int, help="of a program; any if not given")
    parser.add_argument(
        "--calibrate", type=int, default=0, metavar="BATCHES", help="freeze thresholds on so many"
    )
    arguments = parser.parse_args(argv)
    if arguments.calibrate < 0:
        parser.error(f"--calibrate is a number of batches, not {arguments.calibrate}")
    if arguments.format != "stablehlo" and arguments.integers:
        parser.error("--integers is for --format=stablehlo")
    if arguments.batch_size is not None and arguments.batch_size < 1:
        parser.error(f"--batch-size is a number of examples, not {arguments.batch_size}")
    if arguments.format == "safetensors" and arguments.batch_size is not None:
        parser.error("--batch-size is for --format=stablehlo and onnx: a file of weights has none")
    try:
        written = export(
            arguments.checkpoint,
            arguments.format,
            arguments.out,
            integers=arguments.integers,
            batch_size=arguments.batch_size,
            calibrate=arguments.calibrate,
        )
    except (cli.UsageError, WorkdirError, CheckpointError) as error:
        return cli.fail(error, cli.WRONG_USAGE)
    print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
