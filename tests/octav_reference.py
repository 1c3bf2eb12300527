"""OCTAV written anew in float64 NumPy, one group at a time, and by numerical integration."""

import numpy as np
from scipy import integrate, optimize, stats


def newton(x, c, iterations=10, positive=False):
    """Equation 6 from the mean of the non-zero magnitudes."""
    a = np.asarray(x, np.float64).ravel()
    a = np.maximum(a, 0) if positive else np.abs(a)
    a = a[a > 0]
    if not a.size:
        return 0.0
    # In order, so that what lies above a threshold is the end: one look at the data does.
    a.sort()
    beyond = np.append(np.cumsum(a[::-1])[::-1], 0)
    s = a.mean()
    for _ in range(iterations):
        inside = np.searchsorted(a, s, "right")
        s = beyond[inside] / (c * inside + len(a) - inside)
    return s


def modelled_error(x, s, c):
    """J(s) of section 3, for signed x."""
    a = np.abs(np.asarray(x, np.float64))
    return c * s**2 * np.sum((a > 0) & (a <= s)) + np.sum((a[a > s] - s) ** 2)


def per_group(x, axes, c, **kwargs):
    """`newton` for every group, keepdims."""
    x = np.asarray(x, np.float64)
    kept = [i for i in range(x.ndim) if i not in axes]
    groups = x.transpose(kept + list(axes)).reshape([x.shape[i] for i in kept] + [-1])
    s = np.apply_along_axis(lambda group: newton(group, c, **kwargs), -1, groups)
    return s.reshape([1 if i in axes else n for i, n in enumerate(x.shape)])


def fixed_point(distribution: stats.rv_continuous, c: float) -> float:
    """s with s = E[|X|; |X| > s] / (c P(|X| ≤ s) + P(|X| > s)), X symmetric around 0."""

    def residual(s):
        tail = 2 * integrate.quad(lambda t: t * distribution.pdf(t), s, np.inf)[0]
        beyond = 2 * distribution.sf(s)
        return s * (c * (1 - beyond) + beyond) - tail

    return optimize.brentq(residual, 0.5, 20)
