"""Run a network quantised after training in ONNX Runtime, beside its float32 export and JAX.

Usage:
    python -m experiments.onnx_runtime --config=configs/NAME_ptq.py[:NOTATION] --workdir=DIR \
        [--config.KEY=VALUE …]

Exports the float network and the quantised one, runs both over all test examples, and says how many
of them get another answer than in JAX, the largest difference of an output, the sizes of the files,
and the quantised one's time over the float one's, measured in turns.

ONNX Runtime multiplies 8-bit codes with instructions that saturate on processors without VNNI, and
rounds activations to 8 bits where they meet codes of a kernel alone: two options forbid that. Both
ways are measured: "exact" and "fast".

Example:
    python -m experiments.onnx_runtime --config=configs/cifar10_resnet20_ptq.py:8/8U \
        --workdir=runs/onnx --config.calibration.batches=4 --config.dataset.name=cifar10_local \
        --config.model.pretrained=PATH/akamaster_resnet20.safetensors

DIR gets config.json, result.json, float.onnx and quantised.onnx. It needs onnxruntime, which
qat_jax[export] brings.
"""

import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnxruntime
from flax import nnx
from ml_collections import ConfigDict

from experiments import build, cli, tasks
from experiments.ptq import Bench
from qat_jax.array_file import draft_of
from qat_jax.export.onnx import EXACT_SESSION, to_onnx
from qat_jax.training.workdir import Workdir

logger = logging.getLogger("experiments.onnx_runtime")

FLOAT, QUANTISED = "float.onnx", "quantised.onnx"
_TURNS = 15
Run = Callable[[list[np.ndarray]], np.ndarray]


@cli.once("dataset", "model", "quant", "calibration")
def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Exports and measures what `config` describes.

    Args:
        config: see `configs/`.
        workdir: the run folder.

    Returns:
        The content of result.json.

    Raises:
        cli.UsageError: the config asks for something that cannot be; nothing is written.
        WorkdirError: the folder holds something else; nothing is written.
    """
    started = time.monotonic()
    settings, folder = config.to_dict(), Workdir(workdir)
    with cli.setup_errors():
        if build.ptq_policy(config) is None:
            raise ValueError("a float network is there anyway: give a notation, such as 8/8U")
        bench = Bench.from_config(config)
        quantised = bench.quantised(config)
        example = bench.first_inputs(bench.batch_size)
        graphs = {
            FLOAT: to_onnx(bench.model, *example),
            QUANTISED: to_onnx(quantised, *example),
        }

    folder.begin(settings)
    for name, graph in graphs.items():
        with draft_of(workdir / name) as draft:
            draft.write_bytes(graph.SerializeToString())
    sessions = {
        "float": session(workdir / FLOAT, exact=True),
        "exact": session(workdir / QUANTISED, exact=True),
        "fast": session(workdir / QUANTISED, exact=False),
    }
    in_jax = {"JAX float": _jitted(bench.model), "JAX quantised": _jitted(quantised)}
    outputs = _outputs(bench, sessions | in_jax)
    expected = {"float": outputs.pop("JAX float")}
    expected["exact"] = expected["fast"] = outputs.pop("JAX quantised")
    seconds = _seconds(sessions, [np.asarray(x) for x in example])
    metrics: dict[str, Any] = {
        "count": len(outputs["float"]),
        "batch_size": bench.batch_size,
        "onnxruntime": onnxruntime.__version__,
        "float_bytes": (workdir / FLOAT).stat().st_size,
        "quantised_bytes": (workdir / QUANTISED).stat().st_size,
    }
    for name, found in outputs.items():
        # Classes of an image, positions of an answer.
        other = found.argmax(1) != expected[name].argmax(1)
        metrics[name] = {
            "other_answers": int(other.reshape(len(other), -1).any(1).sum()),
            "largest_difference": float(np.abs(found - expected[name]).max()),
            "largest_output": float(np.abs(expected[name]).max()),
            "seconds_a_batch": seconds[name],
            "time_over_float": seconds[name] / seconds["float"],
        }
        logger.info(
            "%s: %d other answers, outputs to within %.2g, %.2f times the float time",
            name,
            *(metrics[name][key] for key in ("other_answers", "largest_difference")),
            metrics[name]["time_over_float"],
        )
    return folder.finish(settings, metrics, wall_seconds=time.monotonic() - started)


def session(path: Path, *, exact: bool) -> Run:
    """A network in ONNX Runtime on the CPU.

    Args:
        path: of the file.
        exact: whether products may neither saturate nor round.
    """
    options = onnxruntime.SessionOptions()
    if exact:
        for name, value in EXACT_SESSION.items():
            options.add_session_config_entry(name, value)
    loaded = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in loaded.get_inputs()]
    return lambda inputs: loaded.run(None, dict(zip(names, inputs, strict=True)))[0]


def _jitted(model: nnx.Module) -> Run:
    model.eval()
    graphdef, state = nnx.split(model)
    forward = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))
    return lambda inputs: np.asarray(forward(state, *inputs))


def _outputs(bench: Bench, networks: dict[str, Run]) -> dict[str, np.ndarray]:
    """What each network says to all test examples, of which no more than a batch is held."""
    said: dict[str, list[np.ndarray]] = {name: [] for name in networks}
    for inputs, mask in tasks.eval_inputs(bench.task, bench.test, bench.batch_size):
        arrays = [np.asarray(x) for x in inputs]
        for name, network in networks.items():
            said[name].append(network(arrays)[mask])
    return {name: np.concatenate(parts) for name, parts in said.items()}


def _seconds(networks: dict[str, Run], inputs: list[np.ndarray]) -> dict[str, float]:
    """Medians, measured in turns."""
    taken: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(_TURNS):
        for name, network in networks.items():
            started = time.perf_counter()
            network(inputs)
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


if __name__ == "__main__":
    sys.exit(cli.main(run, __doc__, sys.argv))
