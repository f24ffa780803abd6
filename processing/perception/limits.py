"""How much an adapter may add."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def best(items: Sequence[Item], score: Callable[[Item], float], most: int) -> tuple[Item, ...]:
    """The items of highest score, at most so many, in the order that they had."""
    ranked = sorted(range(len(items)), key=lambda i: -score(items[i]))[:most]
    return tuple(items[i] for i in sorted(ranked))
