"""Draws figures/estimators.png: what three estimators say of a quantiser's derivative.

python docs/figures/estimators.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

import qat_jax as qj

THRESHOLD = 1.0
COLOURS = {"ste": "#D55E00", "pwl": "#7F7F7F", "mad": "#0072B2"}  # Okabe and Ito's


def main() -> None:
    """Draw the quantiser on the left and its derivatives on the right."""
    x = jnp.linspace(-2.5, 2.5, 2001)
    figure = Figure(figsize=(9, 3.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for rule, colour in COLOURS.items():
        quantizer = qj.Quantizer(qj.Int(3, narrow=True), gradient=rule)

        def quantised(x: jax.Array, quantizer: qj.Quantizer = quantizer) -> jax.Array:
            return qj.fake_quant(x, quantizer, threshold=jnp.asarray(THRESHOLD))

        if rule == "ste":
            left.plot(x, quantised(x), color="black")
        slope = jax.grad(lambda x, quantised=quantised: quantised(x).sum())(x)
        right.plot(x, slope, color=colour, label=rule.upper(), linewidth=2)
    left.set(title="3 bits, threshold 1", xlabel="x", ylabel="quantised")
    right.set(title="What the backward pass believes", xlabel="x", ylabel="derivative")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
