"""Draws figures/performance.png: the cost of quantised training steps, of results/train_step_*.

python docs/figures/performance.py
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[2] / "results"
FILES = {
    "ResNet-20": "train_step_cpu_jax012.json",
    "one layer of MiniLM": "train_step_minilm_cpu_jax012.json",
}


def main() -> None:
    """Draw a bar for each contestant, from the least to the largest ratio of its rounds."""
    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    for axes, (title, file) in zip(figure.subplots(1, 2), FILES.items(), strict=True):
        rows = json.loads((RESULTS / file).read_text())["rows"]
        del rows["unquantised"]
        ratios = np.array([row["step_ratio"] for row in rows.values()])
        spread = [
            [row["step_ratio"] - row["step_ratio_min"] for row in rows.values()],
            [row["step_ratio_max"] - row["step_ratio"] for row in rows.values()],
        ]
        colours = ["#7F7F7F" if name.startswith("Qwix") else "#0072B2" for name in rows]
        axes.barh(list(rows), ratios, color=colours, xerr=spread, ecolor="#00000066")
        axes.axvline(1, color="black", linewidth=1)
        axes.invert_yaxis()
        axes.set(title=title, xlabel="step over the unquantised one")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
