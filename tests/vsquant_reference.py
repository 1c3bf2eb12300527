"""Equations 7a to 7j of arXiv:2102.04503, element by element, in NumPy and float64."""

import numpy as np


def vectors(length, size):
    """The index ranges of the vectors of a dimension."""
    return [range(start, min(start + size, length)) for start in range(0, length, size)]


def two_level(x, bits, scale_bits, size, *, signed, coarse_axis=None, codes="float"):
    """x̂, codes, integer scales and coarse scales of a matrix whose rows are cut into vectors.

    ``coarse_axis`` 0 has a coarse scale for each row, None one for all.
    """
    rows, columns = x.shape
    high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    low = -high if signed else 0
    top = 2**scale_bits - 1
    cuts = vectors(columns, size)
    scale = np.zeros((rows, len(cuts)))
    for i in range(rows):
        for j, cut in enumerate(cuts):
            magnitudes = [abs(x[i, k]) if signed else max(x[i, k], 0) for k in cut]
            scale[i, j] = max(magnitudes) / high
    largest = scale.max(axis=1, keepdims=True) if coarse_axis == 0 else scale.max(keepdims=True)
    gamma = largest / top
    wide = np.broadcast_to(gamma, scale.shape)
    stored = np.zeros_like(scale)
    np.divide(scale, wide, out=stored, where=wide > 0)
    stored = np.round(stored)
    x_hat, x_codes = np.zeros_like(x), np.zeros_like(x)
    for i in range(rows):
        for j, cut in enumerate(cuts):
            step = scale[i, j] if codes == "float" else stored[i, j] * wide[i, j]
            for k in cut:
                code = 0.0 if step == 0 else min(max(np.round(x[i, k] / step), low), high)
                x_codes[i, k] = code
                x_hat[i, k] = code * stored[i, j] * wide[i, j]
    return x_hat, x_codes, stored, gamma
