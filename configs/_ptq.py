"""The parts of a config that say how to quantise a trained network."""

from typing import Any

from ml_collections.config_dict import placeholder

from qat_jax import Notation
from qat_jax.policy import BLOCK_FORMATS


def ptq_config(notation: str) -> dict[str, Any]:
    """Sections `quant`, `clipping`, `scale`, `calibration`, and what goes with them.

    Args:
        notation: W/A/ws/as, a block format such as "nvfp4" or "mxfp4-weights", or "float".

    Raises:
        ValueError: the notation cannot be read; the message teaches it.
    """
    if notation not in ("float", *BLOCK_FORMATS):
        notation = str(Notation.parse(notation))
    return {
        "quant": {
            "policy": placeholder(str),  # a YAML file instead of all but `calibration` below
            "notation": notation,
            "vector_size": 16,
            # Of the first convolution and the classifier, clipped at the maximum; None: 8/8U, and
            # 8/- where the notation leaves activations alone.
            "edges": placeholder(str),
            # "PATTERN=NOTATION", first match first, for layers that need something else.
            "overrides": (),
            "embeddings": "",  # bits of their tables, or a notation such as 4/-/6/-; "": in float
        },
        # max, octav, refit, exact, mse, entropy or a percentile such as p99.99.
        "clipping": {"weights": "max", "activations": "max"},
        # The integer scales of vectors: see qat_jax.IntScale.
        "scale": {
            "clipping": "max",
            "codes": "float",
            "order": "vector-first",
            "zero": "zero",
        },
        "calibration": {
            "batches": 0,  # of training images that freeze thresholds; 0: every batch finds its own
            "pool": False,  # one search in all batches instead of the mean of their thresholds
            "smoothing_batches": 0,  # by which outliers of activations move into kernels
            "rotate": False,  # whether features of activations are turned: see qat_jax.rotate
            "gptq_batches": 0,  # that kernels are rounded by; 0: to the nearest
            "batch_norm_batches": 0,  # that batch norms are re-estimated on, quantised
        },
        "fold_batch_norm": False,
        "scale_product_bits": (3, 4, 5, 6, 7, 8),  # that `experiments.integers` rounds to
        "inspect": {  # what `experiments.inspect` does besides its table
            "sensitivity": False,  # the loss with each layer alone quantised, and alone in float
            "suggest_bits": placeholder(float),  # of kernels on average, the best policy for that
            "candidates": (2, 3, 4, 5, 6, 8),  # bits that it may choose
            "examples": 250,  # training examples that losses are measured on
        },
        # Those that `experiments.ptq_tables` measures.
        "tables": ("calibrators", "vectors", "sizes", "scales", "clipping", "order"),
    }
