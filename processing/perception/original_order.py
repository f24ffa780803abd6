"""The order in which numpy 1.26's partition leaves the largest values, on every machine and under every numpy.

MoAI tells the relations that `argpartition` puts last in the order in which it happens to put them. Later versions of
numpy, and other processors, give other orders; the released model was run with this one.
"""

from collections.abc import Sequence

# Below this many places from the start, numpy selects the smallest values one after another.
_FEW = 3


def largest_as_partitioned(values: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` largest values in numpy 1.26's order.

    Raises:
        ValueError: `count` is not in 1..len(values).
    """
    if not 1 <= count <= len(values):
        raise ValueError(f"{count} values of {len(values)} were asked for.")
    return _partitioned(values, len(values) - count)[-count:]


def _partitioned(values: Sequence[float], place: int) -> list[int]:
    """Indices such that the value at `place` is the one that sorting puts there, with smaller values before it."""
    order = list(range(len(values)))
    if place < _FEW:
        for i in range(place + 1):
            smallest = min(range(i, len(order)), key=lambda k: (values[order[k]], k))
            _swap(order, i, smallest)
    elif place == len(order) - 1:
        largest = max(range(len(order)), key=lambda k: (values[order[k]], k))
        _swap(order, place, largest)
    else:
        _select(values, order, place)
    return order


def _select(values: Sequence[float], order: list[int], place: int) -> None:
    """Quickselect with the median of the first, middle and last value as pivot.

    After many bad pivots numpy would take others; a hundred relations, which is the most there can be, do not get there
    unless somebody arranges them so.
    """
    low, high = 0, len(order) - 1
    while low + 1 < high:
        _place_median(values, order, low, high)
        pivot, left, right = values[order[low]], low + 1, high
        while True:
            left = next(k for k in range(left + 1, len(order)) if not values[order[k]] < pivot)
            right = next(k for k in range(right - 1, -1, -1) if not pivot < values[order[k]])
            if right < left:
                break
            _swap(order, left, right)
        _swap(order, low, right)
        if right >= place:
            high = right - 1
        if right <= place:
            low = left
    if high == low + 1 and values[order[high]] < values[order[low]]:
        _swap(order, low, high)


def _place_median(values: Sequence[float], order: list[int], low: int, high: int) -> None:
    """Put the median of three values at `low`, the smallest beside it and the largest at `high`."""
    middle = low + (high - low) // 2
    for one, other in ((high, middle), (high, low), (low, middle)):
        if values[order[one]] < values[order[other]]:
            _swap(order, one, other)
    _swap(order, middle, low + 1)


def _swap(order: list[int], one: int, other: int) -> None:
    order[one], order[other] = order[other], order[one]
