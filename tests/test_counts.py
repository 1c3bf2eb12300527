import numpy as np
import pytest

from qat_jax import Entropy, IntScale, MseSweep, Octav, PerShard, PerVector, Refit

COUNTED = [
    (Octav, "iterations"),
    (MseSweep, "points"),
    (Refit, "points"),
    (Entropy, "bins"),
    (Entropy, "candidates"),
    (PerShard, "count"),
    (PerVector, "size"),
    (IntScale, "bits"),
]


@pytest.mark.parametrize(("kind", "field"), COUNTED)
def test_counts_of_numpy_are_like_those_of_python(kind, field):
    made = kind(**{field: np.int64(4)})
    assert type(getattr(made, field)) is int
    assert repr(made) == repr(kind(**{field: 4}))


@pytest.mark.parametrize(("kind", "field"), COUNTED)
@pytest.mark.parametrize("wrong", [-1, 2.5, 4.0, "4", True, float("nan")])
def test_what_is_no_count_is_refused(kind, field, wrong):
    with pytest.raises(ValueError, match=f"not {wrong!r}"):
        kind(**{field: wrong})
