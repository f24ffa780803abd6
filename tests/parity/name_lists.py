"""Long lists of tensor names in one line."""

import re
from collections.abc import Iterable


def fold_numbers(names: Iterable[str]) -> list[str]:
    """Names with their numbers replaced by `#` and counted: ["full.layer#.moe_in (4)", "wave.# (3)"]."""
    counts: dict[str, int] = {}
    for name in names:
        folded = re.sub(r"\d+", "#", name)
        counts[folded] = counts.get(folded, 0) + 1
    return [f"{name} ({count})" if count > 1 or "#" in name else name for name, count in sorted(counts.items())]


def listed(names: Iterable[str], shown: int | None = None) -> str:
    """Names in one line, numbers folded; after so many, how many more there are."""
    folded = fold_numbers(names)
    rest = f" and {len(folded) - shown} more" if shown is not None and len(folded) > shown else ""
    return ", ".join(folded[:shown]) + rest
