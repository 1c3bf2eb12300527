"""What the papers published, to stand beside what is measured.

VS-Quant, arXiv:2102.04503, tables 2 to 6; OCTAV, arXiv:2206.06501, table 5, where networks were
trained as they were quantised.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

BEST_PER_CHANNEL = "best per channel"

_Rows = dict[str, dict[str, float]]


class Published(NamedTuple):
    """A table.

    Attributes:
        network: what was quantised.
        column: how a CSV calls it.
        in_float: what it has in float, per cent.
        values: per cent, by row and column.
    """

    network: str
    column: str
    in_float: float
    values: _Rows


def _table(columns: Sequence[str], rows: Mapping[str, Sequence[float]]) -> _Rows:
    return {row: dict(zip(columns, values, strict=True)) for row, values in rows.items()}


def _vectors(values: Mapping[str, float], best: Mapping[str, float]) -> _Rows:
    return {row: {"V16 max": value, BEST_PER_CHANNEL: best[row]} for row, value in values.items()}


_CALIBRATORS = ("max", "entropy", "p99.9", "p99.99", "p99.999", "p99.9999", "mse")
_RESNET_SIZES = ("1", "2", "4", "8", "16", "32", "64")
_RESNET_SCALES = ("3/4", "3/6", "4/4", "4/6", "6/4", "6/6", "fp32/fp32")
_BERT_SCALES = ("4/8", "4/10", "6/8", "6/10", "fp16/fp16", "fp32/fp32")
_BERT_PER_CHANNEL = {"3/8": 11.03, "4/8": 73.61, "6/8": 80.18, "8/8": 81.25}


def _resnet50(values: _Rows) -> Published:
    return Published("ResNet-50, ImageNet", "published_resnet50_imagenet_percent", 76.16, values)


def _bert_base(values: _Rows) -> Published:
    return Published("BERT-base, SQuAD, F1", "published_bert_base_squad_f1", 86.88, values)


PUBLISHED = {
    "calibrators": _resnet50(
        _table(
            _CALIBRATORS,
            {
                "3/3U": (0.18, 6.61, 7.11, 4.6, 1.54, 0.45, 0.23),
                "4/4U": (60.31, 70.76, 70.46, 70.55, 68.71, 66.47, 55.27),
                "6/6U": (75.43, 75.79, 75.24, 75.8, 75.73, 75.66, 75.34),
                "8/8U": (76.16, 76.13, 75.37, 76.07, 76.11, 76.07, 76.06),
            },
        )
    ),
    "vectors": _resnet50(
        _vectors(
            {"3/3U": 69.78, "4/4U": 75.28, "6/6U": 76.0, "8/8U": 76.15},
            {"3/3U": 7.97, "4/4U": 70.76, "6/6U": 75.8, "8/8U": 76.16},
        )
    ),
    "sizes": _resnet50(
        _table(_RESNET_SIZES, {"6/6U": (76.13, 76.08, 76.05, 76.05, 76.0, 75.96, 75.96)})
    ),
    "scales": _resnet50(
        _table(
            _RESNET_SCALES,
            {
                "4/3U": (72.64, 73.51, 73.53, 74.33, 73.82, 74.69, 74.71),
                "4/4U": (73.39, 74.2, 74.36, 75.04, 74.58, 75.35, 75.28),
                "4/8U": (73.65, 74.42, 74.66, 75.21, 74.83, 75.42, 75.42),
                "6/6U": (74.69, 75.13, 75.13, 75.74, 75.4, 75.96, 76.0),
            },
        )
    ),
    "bert_calibrators": _bert_base(
        _table(
            _CALIBRATORS,
            {
                "4/4": (2.23, 6.4, 5.66, 6.91, 5.44, 0.06, 6.82),
                "6/6": (7.31, 8.16, 66.85, 45.14, 14.16, 7.5, 39.86),
                "8/8": (64.33, 63.7, 74.61, 80.63, 78.95, 71.81, 81.25),
            },
        )
    ),
    "bert_dynamic": Published(
        "BERT-base, SQuAD, F1, trained so",
        "published_bert_base_squad_f1_trained",
        88.24,
        _table(
            ("max", "octav"), {"4/4": (11.51, 84.51), "6/6": (85.17, 87.43), "8/8": (88.01, 88.34)}
        ),
    ),
    "bert_vectors": _bert_base(
        _vectors({"3/8": 82.84, "4/8": 86.24, "6/8": 86.66, "8/8": 86.6}, _BERT_PER_CHANNEL)
    ),
    "bert_scales": _bert_base(
        _table(
            _BERT_SCALES,
            {
                "3/8": (76.28, 81.84, 78.44, 82.81, 82.9, 82.93),
                "4/8": (82.87, 85.91, 83.39, 86.35, 86.34, 86.33),
                "6/8": (83.47, 86.16, 83.63, 86.54, 86.57, 86.61),
                "8/8": (83.53, 86.33, 83.75, 86.59, 86.74, 86.74),
            },
        )
    ),
}
