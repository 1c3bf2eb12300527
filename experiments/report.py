"""Make one page of what runs and sweeps came to, with figures, configs and commands.

Usage:
    python -m experiments.report --runs=DIR --out=PATH

Reads every finished run in DIR and below it, whichever main made it, and writes PATH.html, which
needs nothing else and no network, and its figures as PATH-NAME.png: accuracy against bits, losses
and thresholds in training, and each layer's SQNR and clipped fraction. Those need
--config.quant.diagnostics in training. Runs that differ in their seed alone are taken together.

Example:
    python -m experiments.sweep --config=configs/digits.py --workdir=runs/bits \
        --sweep.quant=bits=4,bits=2 --sweep.seed=0,1,2 --config.quant.diagnostics
    python -m experiments.report --runs=runs/bits --out=runs/bits/report
"""

import base64
import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2

from experiments import cli
from experiments.collect import without_folders
from experiments.records import Group, group, read_runs
from experiments.report_figures import Drawing, drawings

TEMPLATE = "report.html.j2"


def write(runs: Path, out: Path) -> str:
    """Writes the page and its figures; what to print.

    Raises:
        FileNotFoundError: there is no finished run, or no folder to write to.
    """
    found, unfinished = read_runs(runs)
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"folder {out.parent} does not exist: make it first")
    groups = group(found)
    drawn = list(drawings(groups))
    for drawing in drawn:
        out.with_name(f"{out.name}-{drawing.name}.png").write_bytes(drawing.light)
    path = out.with_name(f"{out.name}.html")
    title = runs.absolute().name
    ours = [f"{out.name}-{drawing.name}.png" for drawing in drawn]
    path.write_text(page(title, groups, drawn, unfinished, ours), encoding="utf-8")
    return f"{path}: {len(found)} runs, {len(drawn)} figures"


def page(
    title: str,
    groups: Sequence[Group],
    drawn: Sequence[Drawing],
    unfinished: Sequence[str],
    ours: Sequence[str] = (),
) -> str:
    """The HTML page.

    Args:
        title: of the page.
        groups: the runs.
        drawn: figures of them together.
        unfinished: names of runs that are not shown.
        ours: names of PNGs in a run's folder that the run did not make.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    environment.filters["without_folders"] = without_folders
    runs = [run for alike in groups for run in alike.runs]
    return environment.get_template(TEMPLATE).render(
        title=title,
        groups=groups,
        drawings=drawn,
        unfinished=unfinished,
        runs=runs,
        pictures=[
            (f"{run.name}/{path.name}", path.read_bytes())
            for run in runs
            for path in sorted(run.folder.glob("*.png"))
            if path.name not in ours
        ],
    )


if __name__ == "__main__":
    sys.exit(cli.gathering_main(__doc__, write))
