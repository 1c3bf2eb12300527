"""Which designs are worth building."""

from collections.abc import Sequence


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """The designs that no other beats: none is as cheap and better, or as good and cheaper.

    Args:
      costs: of each design; less is better.
      values: of each design; more is better.

    Returns:
      Their indices, the cheapest first; of designs alike in both, the first.

    Example:
      >>> pareto_front([3, 1, 2, 2], [9, 5, 5, 7])
      [1, 3, 0]
    """
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
        if not front or values[index] > values[front[-1]]:
            front.append(index)
    return front
