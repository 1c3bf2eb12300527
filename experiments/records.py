"""What finished runs left behind."""

import ast
import dataclasses
import functools
import json
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qat_jax import Notation
from qat_jax.training.workdir import Workdir, with_floats

# What a run is judged by, the first that it measured: shares in [0, 1].
HEADLINES = ("test_f1", "test_accuracy", "integer_accuracy")
_IN_FLOAT = ("float_f1", "float_accuracy")
FLOAT_BITS = 32
_SEED = "seed"
_UNTOLD = ("experiment", _SEED)
_OF_QUANTISATION = ("quant.", "clipping.", "scale.")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: of its folder, below the one that was read.
        folder: where it is.
        result: the content of its result.json.
    """

    name: str
    folder: Path
    result: Mapping[str, Any]

    @functools.cached_property
    def metrics(self) -> Mapping[str, Any]:
        """What it measured."""
        return with_floats(self.result["metrics"])

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """Its config, the keys of sections joined by dots."""
        return dict(_leaves(self.result["config"]))

    @functools.cached_property
    def lines(self) -> list[dict[str, Any]]:
        """Its metrics.jsonl; empty if it has none."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [with_floats(json.loads(line)) for line in lines]

    @property
    def bits(self) -> int | None:
        """Of the weights; None if the config does not say, or a policy says it layer by layer."""
        return self._bits("weight")

    @property
    def activation_bits(self) -> int | None:
        """Likewise; 32 where a notation leaves activations alone."""
        return self._bits("activation")

    def _bits(self, side: str) -> int | None:
        quant = self.result["config"].get("quant", {})
        if quant.get("policy"):
            return None
        notation = quant.get("notation")
        if notation == "float":
            return FLOAT_BITS
        if not notation:
            return quant.get(f"{side}_bits")
        try:
            return getattr(Notation.parse(notation), f"{side}_bits") or FLOAT_BITS
        except ValueError:  # a block format
            return None

    @property
    def in_float(self) -> float | None:
        """What the network had before it was quantised; None if nobody measured."""
        found = (value for name, value in self.metrics.items() if name in _IN_FLOAT)
        return next(found, None)

    @property
    def headline(self) -> tuple[str, float] | None:
        """The name and the value of what it is judged by."""
        found = (name for name in HEADLINES if name in self.metrics)
        return next(((name, self.metrics[name]) for name in found), None)

    @functools.cached_property
    def diagnostics(self) -> dict[str, dict[str, float]]:
        """Of each quantised operand its figures: after quantisation, or in the last step."""
        kept = self.metrics.get("diagnostics")
        if kept is not None:
            return kept
        found: dict[str, dict[str, float]] = {}
        for line in self.lines:
            for key, value in line.items():
                if key.startswith("diagnostics/"):
                    operand, _, figure = key.removeprefix("diagnostics/").rpartition("/")
                    found.setdefault(operand, {})[figure] = value
        return found

    @property
    def says(self) -> str:
        """What the file of its config says of itself, if the file is here; else nothing."""
        words = shlex.split(self.result["command"])
        spec = next((word for word in words if word.startswith("--config=")), "")
        path = Path(spec.removeprefix("--config=").partition(":")[0])
        if path.suffix != ".py" or not path.is_file():
            return ""
        return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone.

    Attributes:
        label: what tells them from the others.
        series: likewise without the bits.
        runs: one or more.
    """

    label: str
    series: str
    runs: Sequence[Run]

    @property
    def bits(self) -> int | None:
        """Of the weights."""
        return self.runs[0].bits

    @property
    def headline(self) -> tuple[str, float, float] | None:
        """Name, mean and sample standard deviation (0 of one run) of what they are judged by."""
        found = [headline for run in self.runs if (headline := run.headline) is not None]
        if not found:
            return None
        values = [value for _, value in found]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return found[0][0], statistics.fmean(values), spread


def read_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """The runs in a folder and below it.

    Returns:
        The finished ones by name, and the names of the unfinished.

    Raises:
        FileNotFoundError: there is no finished run.
        WorkdirError: a file of a run cannot be read.
    """
    runs, unfinished = [], []
    for path in sorted(folder.rglob("config.json")):
        name = str(path.parent.relative_to(folder)) if path.parent != folder else folder.name
        run = Workdir(path.parent)
        settings = run.settings()
        if settings.get("experiment") == "sweep":
            continue
        if run.result_path.exists():
            runs.append(Run(name, path.parent, run.result()))
        else:
            unfinished.append(name)
    if not runs:
        raise FileNotFoundError(f"no finished run in {folder}: give the folder above run folders")
    return runs, unfinished


def differing(runs: Sequence[Run]) -> list[str]:
    """The settings in which runs differ, seeds apart.

    Of settings that tell the same runs apart, such as the bits of weights and of activations where
    they are always equal, the one with the shortest name.
    """
    keys = sorted(dict.fromkeys(key for run in runs for key in run.settings), key=len)
    quantised = [run for run in runs if run.bits != FLOAT_BITS]
    told: dict[tuple[int, ...], str] = {}
    for key in keys:
        # What a float network's config says of quantisation has no use.
        values = [
            json.dumps(run.settings.get(key))
            for run in (quantised if key.startswith(_OF_QUANTISATION) else runs)
        ]
        if key not in _UNTOLD and len(set(values)) > 1:
            told.setdefault(tuple(values.index(value) for value in values), key)
    return list(told.values())


def group(runs: Sequence[Run]) -> list[Group]:
    """Runs by what they differ in, seeds together; the most bits first."""
    keys = differing(runs)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        alike = {k: v for k, v in run.settings.items() if k != _SEED}
        groups.setdefault(json.dumps(alike, sort_keys=True), []).append(run)
    made = [
        Group(
            label=_label(alike[0], keys, bits=True),
            series=_label(alike[0], keys, bits=False),
            runs=alike,
        )
        for alike in groups.values()
    ]
    return sorted(made, key=lambda alike: (-(alike.bits or 0), alike.label))


def _label(run: Run, keys: Sequence[str], *, bits: bool) -> str:
    parts = []
    if run.bits == FLOAT_BITS:
        keys = [key for key in keys if not key.startswith(_OF_QUANTISATION)]
        parts.append("float")
    elif not bits and run.activation_bits != run.bits:
        in_float = run.activation_bits == FLOAT_BITS
        parts.append(f"activations {'in float' if in_float else f'{run.activation_bits} bits'}")
    for key in keys:
        name, value = key.rpartition(".")[2], run.settings.get(key)
        if isinstance(value, list):  # such as overrides, mostly none
            value = " ".join(map(str, value))
        if name == "policy":
            parts.append("policy of its own" if value else "")
        elif name == "notation" and value:
            parts.append(str(value) if bits else _scales(str(value)))
        elif value not in (None, "") and (bits or not name.endswith("_bits")):
            parts.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(filter(None, parts)) or run.result["experiment"]


def _scales(notation: str) -> str:
    """A notation without its bits of codes."""
    try:
        read = Notation.parse(notation)
    except ValueError:  # a block format
        return notation
    stored = (read.weight_scale, read.activation_scale)
    return "scales " + "/".join("-" if bits is None else str(bits) for bits in stored)


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
