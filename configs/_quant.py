"""The part of a config that says how to quantise, from the config's argument."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from qat_jax import Notation

DEFAULTS = {
    "bits": "32",
    "notation": "",
    "clipping": "octav",
    "gradient": "mph",
    "scaling": "dynamic",
}
_STATIC_BATCHES = 5


def quant_config(arg: str) -> ConfigDict:
    """Reads "bits=4,clipping=octav,gradient=mph"; "" and "float" mean no quantisation.

    "bits=w4" quantises weights alone: activations stay in float, the ends' too.

    "notation=3/3U/4/6" in the place of bits asks for vectors (see `qat_jax.Notation`); the clipping
    is then that of the weights, activations being scaled by their maximum.

    "clipping=octav10" is OCTAV as in the paper, ten iterations on all elements; "octav" spends them
    on a sample of large arrays.

    "scaling=static" finds all thresholds once, before the first step: the mean of what five batches
    suggest (arXiv:2206.06501, section 5). They are "dynamic" by default, found in every step;
    "carried" finds the same ones sooner, beginning where the search of the step before ended.
    "learned" lets training change the static ones by their gradient (LSQ, arXiv:1902.08153).

    Args:
        arg: comma-separated `key=value`; a key that is not given has its default.

    Raises:
        ValueError: a part is not `key=value`, the key is unknown, or bits stand beside a notation.

    Example:
        >>> quant_config("bits=4,clipping=max").to_dict()
        {'activation_bits': 4, 'carried': False, 'clipping': 'max', 'diagnostics': False,
         'edge_bits': 8, 'edge_clipping': 'max', 'embeddings': '', 'gradient': 'mph',
         'learned': False, 'narrow': True, 'notation': '', 'overrides': (), 'policy': None,
         'rotate': False, 'shards': 1, 'smoothing_batches': 0, 'static_batches': 0,
         'weight_bits': 4}
    """
    values = dict(DEFAULTS)
    parts = [] if arg == "float" else [part for part in arg.split(",") if part]
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in DEFAULTS:
            raise ValueError(
                f"cannot read {part!r}: give 'float' or some of bits=4|w4, notation=4/4U/4/6, "
                "clipping=octav|octav10|max|refit|exact|mse|p99.9, gradient=mph|mad|pwl|ste, "
                "scaling=dynamic|carried|static|learned, separated by commas"
            )
        values[key] = value
    if values["notation"] and any(part.startswith("bits=") for part in parts):
        raise ValueError("bits and notation are both given: leave bits out, a notation says them")
    weights_alone = values["bits"].startswith("w")
    bits = "32" if values["bits"] == "float" else values["bits"].removeprefix("w")
    if not bits.isdigit():
        raise ValueError(
            f"bits={values['bits']} is not a whole number: give bits=4, bits=w4 of weights alone, "
            "or the like"
        )
    if values["scaling"] not in ("dynamic", "carried", "static", "learned"):
        raise ValueError(f"scaling={values['scaling']}: give dynamic, carried, static or learned")
    if values["notation"]:
        values["notation"] = str(Notation.parse(values["notation"]))
    return ConfigDict(
        {
            "policy": placeholder(str),  # a YAML file that says all of what follows; see README
            "notation": values["notation"],  # of vectors; "" for the bits below
            "weight_bits": int(bits),
            "activation_bits": 32 if weights_alone else int(bits),  # 32: in float
            "clipping": values["clipping"],
            "gradient": values["gradient"],
            "narrow": True,  # the threshold is itself a code; the paper's grids are not narrow
            "edge_bits": 8,  # of the first convolution and the classifier
            "edge_clipping": values["clipping"],
            # "PATTERN=NOTATION", first match first, for layers that need something else: weights
            # and activations clipped as above. ".*/attention=4/4U/-/token" gives the softmax's
            # output one scale a query, and so on: see qat_jax.Notation.
            "overrides": (),
            "embeddings": "",  # bits of their tables, or a notation such as 4/-/6/-; "": in float
            # Of training images by which outliers move into kernels before the first step: see
            # qat_jax.smooth.
            "smoothing_batches": 0,
            "rotate": False,  # whether features are turned after that: see qat_jax.rotate
            # Of training images behind thresholds that stay; 0: every step finds its own.
            "static_batches": _STATIC_BATCHES if values["scaling"] in ("static", "learned") else 0,
            # Whether those are parameters, which training changes.
            "learned": values["scaling"] == "learned",
            # Whether training begins its searches with the thresholds of the step before.
            "carried": values["scaling"] == "carried",
            # Parts of a batch whose activations have thresholds of their own; as many as devices
            # save a collective in every iteration of a search.
            "shards": 1,
            "diagnostics": False,  # SQNR, clipped share and threshold of each layer in each step
        }
    )
