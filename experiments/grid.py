"""The cells of a sweep: all combinations of what some settings of a config are to be."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qat_jax.text_file import read_text

ARGUMENT = "quant"  # sweeps the config's ARG, which says how to quantise
SEED = "seed"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: of its folder.
        values: what each swept setting is in it, as on a command line.
    """

    name: str
    values: Mapping[str, str]

    @property
    def setting(self) -> tuple[str, ...]:
        """The values without the seed: cells that share it are averaged."""
        return tuple(value for key, value in self.values.items() if key != SEED)

    def flags(self, config: str) -> list[str]:
        """The flags that make a main run this cell.

        Args:
            config: FILE or FILE:ARG. A value of `quant` is the ARG, or is added to it.
        """
        path, _, argument = config.partition(":")
        argument = ",".join(filter(None, (argument, self.values.get(ARGUMENT))))
        return [
            f"--config={path}:{argument}" if argument else f"--config={path}",
            *(f"--config.{key}={value}" for key, value in self.values.items() if key != ARGUMENT),
        ]


def cells(
    grid: Mapping[str, Sequence[str]], listed: Sequence[Mapping[str, str]] = ()
) -> list[Cell]:
    """All combinations of a grid's values; with a list, all of them with each of its entries.

    Args:
        grid: the values of each swept setting.
        listed: settings that go together.

    Raises:
        ValueError: nothing is swept, a setting twice, or two cells cannot be told apart.

    Example:
        >>> [cell.name for cell in cells({"quant": ["4/4U", "3/3U"], "seed": ["0"]})]
        ['quant=4-4U,seed=0', 'quant=3-3U,seed=0']
    """
    if not grid and not listed:
        raise ValueError("nothing is swept: pass --sweep.KEY=VALUE,VALUE or --sweep=FILE.yaml")
    for key in grid:
        if any(key in entry for entry in listed):
            raise ValueError(f"{key} is both in the grid and in the list: leave it out of one")
    combined = [
        {**entry, **dict(zip(grid, values, strict=True))}
        for entry in (listed or [{}])
        for values in itertools.product(*grid.values())
    ]
    if len({frozenset(values) for values in combined}) > 1:
        raise ValueError("the entries of cells differ in what they set: give each the same keys")
    short = _short_keys(combined[0])
    made = [
        Cell(",".join(f"{short[key]}={_clean(value)}" for key, value in values.items()), values)
        for values in combined
    ]
    names = [cell.name for cell in made]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two cells would be called {min(twice)}: give each value once")
    return made


def split_values(text: str) -> list[str]:
    """The values of a flag: between semicolons if it has any, else between commas.

    Example:
        >>> split_values("4/4U/4/6,3/3U/4/6")
        ['4/4U/4/6', '3/3U/4/6']
        >>> split_values("bits=4,clipping=max;bits=3")
        ['bits=4,clipping=max', 'bits=3']
        >>> split_values("(3, 4),(5, 6)")
        ['(3, 4)', '(5, 6)']
    """
    between = ";" if ";" in text else r",(?![^(\[]*[)\]])"  # not inside of brackets
    return [value.strip() for value in re.split(between, text)]


def read_file(path: Path) -> tuple[dict[str, list[str]], list[dict[str, str]]]:
    """A sweep from a YAML file: `grid`, values by setting, and `cells`, a list of settings.

    Returns:
        The two, as `cells` takes them; one that the file lacks is empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold that.
    """
    if not path.is_file():
        raise FileNotFoundError(f"sweep file {path} does not exist")
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    shape = "give `grid:` with a list of values for each key, `cells:` with a list of mappings"
    if not isinstance(content, dict) or not content or set(content) - {"grid", "cells"}:
        raise ValueError(f"{path} is no sweep: {shape}")
    grid, listed = content.get("grid") or {}, content.get("cells") or []
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        raise ValueError(f"{path}: {shape}; grid is {grid!r}")
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise ValueError(f"{path}: {shape}; cells is {listed!r}")
    return (
        {str(key): [_text(value) for value in values] for key, values in grid.items()},
        [{str(key): _text(value) for key, value in entry.items()} for entry in listed],
    )


def _text(value: Any) -> str:
    """A YAML value as on a command line."""
    return str(tuple(value)) if isinstance(value, list) else str(value)


def _short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Each key's last part, where no other key has the same."""
    keys = list(keys)
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)
    }


def _clean(value: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^\w.+=-]+", "-", value).strip("-") or "none"
