"""How good OCTAV's faster searches are in training, and how soon they end.

Usage:
    python -m benchmarks.searches --pretrained=FILE.safetensors [--data_dir=DIR] [--bits=4]
        [--steps=335] [--every=5] [--out=results/NAME]

Trains a CIFAR ResNet-20 from its float weights with scaling=carried (recipe, data and quantisers of
configs/cifar10_resnet20.py; data set cifar10_local, see qat_jax.data.cifar10_local). In every fifth
step it finds four thresholds of each operand: the carried one, the one of a search from a sample,
where the operand is large enough for that, the one that accelerators search, with many candidates
at once, and the one that forty Newton steps from nothing converge to. It compares the squared
errors of quantising with them, and counts the carried searches that were over after one iteration.

Prints a summary and, with --out, writes the trace as JSON, with command, commit, versions and
device, and as PNG.
"""

import argparse
import collections
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

import qat_jax as qj
from benchmarks import record
from configs import cifar10_resnet20
from experiments import build, cli, tasks
from qat_jax import data
from qat_jax.clipping.octav import noise_constant, settled
from qat_jax.nnx import Operand, is_weight
from qat_jax.training.optimizer import make_optimizer, make_schedule
from qat_jax.training.state import GraphDefs, TrainState, create_state
from qat_jax.training.step import make_train_step

# And their colours.
SEARCHES = {"carried": "tab:blue", "sampled": "tab:orange", "at once": "tab:green"}
_CONVERGED = 40  # iterations

Trace = dict[str, dict[str, jax.Array]]


def make_tracer(graphdefs: GraphDefs, inputs: Callable) -> Callable[[TrainState, Any], Trace]:
    """Of a state and a batch: what each operand's searches find.

    Of every search the squared error of quantising over the one with the converged threshold;
    `one_pass` says whether the carried threshold had settled after one iteration.
    """

    @jax.jit
    def trace(state: TrainState, batch: Any) -> Trace:
        model = nnx.merge(graphdefs.train, state.params, state.model_state)
        before = _carried(model)
        _, captured = nnx.capture(model, Operand)(*inputs(batch))
        after = _carried(model)
        quantizers = qj.operand_quantizers(model)
        found = {}
        for path, x in qj.captured_by_operand(captured).items():
            quantizer = quantizers[path].quantizer
            channel_axis = -1 if is_weight(path) else None
            axes = quantizer.granularity.groups(x.ndim, channel_axis, None).axes
            thresholds = {
                "carried": after[path],
                "sampled": qj.Octav().threshold(x, quantizer.format, axes),
                "at once": qj.Octav().at_once(x, quantizer.format, axes),
                "converged": qj.Octav(_CONVERGED).threshold(x, quantizer.format, axes),
            }
            errors = {
                name: jnp.sum((x - qj.fake_quant(x, quantizer, threshold=s)) ** 2)
                for name, s in thresholds.items()
            }
            found[path] = {
                **{name: errors[name] / errors["converged"] for name in SEARCHES},
                "one_pass": settled(after[path], before[path], noise_constant(x, quantizer.format)),
            }
        return found

    return trace


def _carried(model: nnx.Module) -> dict[str, jax.Array]:
    return {
        path: quantizer.carried.get_value()
        for path, quantizer in qj.operand_quantizers(model).items()
        if quantizer.carried is not None
    }


def measure(
    bits: int, steps: int, every: int, pretrained: Path, data_dir: str | None
) -> dict[str, list[float]]:
    """Trains; of each traced step the worst and the mean ratios, and the share of single passes."""
    config = cifar10_resnet20.get_config(f"bits={bits},scaling=carried")
    config.dataset.name, config.dataset.data_dir = "cifar10_local", data_dir
    config.model.pretrained = str(pretrained)
    config.seed = record.SEED
    with cli.setup_errors():
        task = build.task(config)
        source, augment = task.train_source()
        model = build.quantised_model(config)
        (inputs,) = tasks.calibration_inputs(
            task, task.calibration_source(), batch_size=config.batch_size, seed=config.seed, count=1
        )
    qj.carry_thresholds(model, *inputs)
    schedule = make_schedule(
        config.schedule,
        config.optimizer.learning_rate,
        total_steps=steps,
        steps_per_epoch=len(source) // config.batch_size,
    )
    optimizer = make_optimizer(config.optimizer, schedule)
    graphdefs, state = create_state(model, optimizer)
    objective = task.objective
    step = make_train_step(graphdefs, optimizer, objective=objective, schedule=schedule)
    trace = make_tracer(graphdefs, objective.inputs)
    batches = data.train_batches(
        source,
        batch_size=config.batch_size,
        seed=config.seed,
        fields=task.fields,
        augment=augment,
    )
    measured: dict[str, list[float]] = collections.defaultdict(list)
    for index, batch in zip(range(steps), batches, strict=False):
        on_device = jax.device_put(batch)
        traced = jax.device_get(trace(state, on_device)) if index % every == 0 else None
        state, metrics = step(state, on_device)
        if traced is not None:
            measured["step"].append(index)
            measured["loss"].append(float(metrics["loss"]))
            worst = {}
            for kind in SEARCHES:
                ratios = {path: float(row[kind]) for path, row in traced.items()}
                worst[kind] = max(ratios, key=ratios.__getitem__)
                measured[f"{kind}_worst"].append(ratios[worst[kind]])
                measured[f"{kind}_mean"].append(float(np.mean(list(ratios.values()))))
            measured["single_pass_share"].append(
                float(np.mean([row["one_pass"] for row in traced.values()]))
            )
            said = (f"{kind} {measured[f'{kind}_worst'][-1]:.5f} ({worst[kind]})" for kind in worst)
            print(f"step {index}: worst {', '.join(said)}", file=sys.stderr)
    return measured


def draw(measured: dict[str, list[float]], title: str, path: Path) -> None:
    """The trace as two curves over each other."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    errors, passes = figure.subplots(2, 1, sharex=True)
    steps = measured["step"]
    for kind in SEARCHES:
        for which, style in (("worst", "-"), ("mean", ":")):
            more = 100 * (np.array(measured[f"{kind}_{which}"]) - 1)
            errors.plot(steps, more, style, color=SEARCHES[kind], label=f"{kind}, {which}")
    errors.axhline(0.1, color="grey", linestyle="--", label="0.1 %")
    errors.set(title=title, ylabel="error over the converged\nthreshold's, % more")
    errors.legend()
    passes.plot(steps, 100 * np.array(measured["single_pass_share"]))
    passes.set(xlabel="step", ylabel="carried searches over\nafter one iteration, %", ylim=(0, 101))
    for axes in (errors, passes):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Reads the flags, measures, prints and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained", type=Path, required=True, help="weights of ResNet-20")
    parser.add_argument("--data_dir", help="where cifar10_local lies; the default folder if not")
    parser.add_argument("--bits", type=record.bits, default=4, help="of weights and activations")
    parser.add_argument("--steps", type=record.count, default=335, help="of training")
    parser.add_argument(
        "--every", type=record.count, default=5, help="steps between two that are traced"
    )
    parser.add_argument("--out", type=record.out_path, help="where to write, without a suffix")
    arguments = parser.parse_args()

    try:
        measured = measure(
            arguments.bits,
            arguments.steps,
            arguments.every,
            arguments.pretrained,
            arguments.data_dir,
        )
    except cli.UsageError as error:
        parser.error(str(error))
    title = f"ResNet-20 on CIFAR-10, {arguments.bits} bits, OCTAV's faster searches"
    worst = {kind: max(measured[f"{kind}_worst"]) for kind in SEARCHES}
    share = float(np.mean(measured["single_pass_share"]))
    print(f"{title}: error over the converged threshold's,")
    for kind, ratio in worst.items():
        print(f"  {kind}: at most {100 * (ratio - 1):.3f} % more")
    print(f"{100 * share:.1f} % of the carried searches over after one iteration")
    if arguments.out is not None:
        draw(measured, title, arguments.out.with_suffix(".png"))
        record.write(arguments.out, title, worst=worst, single_pass_share=share, trace=measured)
    return 0


if __name__ == "__main__":
    record.run(main)
