"""The quickstart: the digits of `configs/digits.py`, trained in float32 and in five ways quantised.

    make quickstart
    python -m experiments.quickstart --workdir=runs/quickstart

Every cell of the comparison is the recipe of `configs/digits.py` as it stands (ResNet-8 of width 8,
15 epochs, from scratch) with another `quant`; seed by seed the cells share initial weights, data
order and number of steps. Nothing is tuned for any of them.

Expected test accuracy (360 images, mean ± standard deviation of 3 seeds; an image is 0.28 points):

    float32              98.6 ± 0.8
    max, 4 bits          97.7 ± 0.2
    OCTAV + MPH, 4 bits  98.1 ± 0.2
    max, 2 bits          95.0 ± 1.9
    OCTAV + STE, 2 bits  97.8 ± 1.0
    OCTAV + MPH, 2 bits  96.9 ± 0.3

So on digits four bits cost a point with the maximum and half of one with OCTAV; two bits cost 3.6
with the maximum and 0.8 to 1.8 with OCTAV. Three seeds tell no more than that: another rounding
moves a row by a point (results/quickstart.json). About four minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from configs import digits
from configs._quant import quant_config


def get_config() -> ConfigDict:
    recipe = digits.get_config()
    # Only the end is compared. How often a run is evaluated does not change what it learns.
    del recipe.eval_every_epochs
    recipe.eval_every_percent = 100.0
    return ConfigDict(
        {
            "experiment": "quickstart",
            "seed": 0,  # of the first run of each cell
            "num_seeds": 3,
            "recipe": recipe,  # its seed, quant and experiment are set for each run
            "cells": ConfigDict(
                {
                    "float32": quant_config("float"),
                    # Nothing lies beyond the maximum, so every gradient rule is STE there.
                    "max-w4a4": quant_config("bits=4,clipping=max,gradient=ste"),
                    "octav-w4a4": quant_config("bits=4,clipping=octav,gradient=mph"),
                    "max-w2a2": quant_config("bits=2,clipping=max,gradient=ste"),
                    "octav-w2a2-ste": quant_config("bits=2,clipping=octav,gradient=ste"),
                    "octav-w2a2": quant_config("bits=2,clipping=octav,gradient=mph"),
                },
                sort_keys=False,
            ),
            "figure_layer": "layer2/0/conv2",  # whose input the error curves are of
        }
    )
