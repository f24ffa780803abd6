"""How often the text that was read in signs is what they say.

unimoe perceive signs/train.jsonl signs/heldout.jsonl --out signs-seen --text-side 320
python -m unimoe.quickstart.sign_rates signs-seen signs/train.jsonl signs/heldout.jsonl
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..processing.perception.results import Perception
from ..processing.perception.verbalize import DEFAULT, line_items
from ..trainers.caches.perception_cache import PerceptionCache
from ..trainers.data.conversations import Sample, read_samples


@dataclass
class ReadingRate:
    """Signs, and how many of them were read exactly, exactly but for upper and lower case, and not at all."""

    signs: int = 0
    exact: int = 0
    ignoring_case: int = 0
    nothing: int = 0

    def line(self) -> str:
        """The rates for a reader."""
        shares = (f"{name} {100 * count / self.signs:.1f} %" for name, count in self._counts().items())
        return f"{self.signs:,} signs: {', '.join(shares)}"

    def _counts(self) -> dict[str, int]:
        return {"exact": self.exact, "ignoring case": self.ignoring_case, "nothing read": self.nothing}


def reading_rate(samples: Iterable[Sample], cache: PerceptionCache) -> ReadingRate:
    """Compare what would be told of each sample's first image with its answer."""
    rate = ReadingRate()
    for sample in samples:
        answer = sample["messages"][-1]["content"][0]["text"]
        read = text_read(cache.of_sample(sample)[0])
        rate.signs += 1
        rate.exact += read == answer
        rate.ignoring_case += read.lower() == answer.lower()
        rate.nothing += not read
    return rate


def text_read(seen: Perception) -> str:
    """The lines that are told of an image, joined by a space."""
    return " ".join(line_items(seen.lines or (), DEFAULT))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare the text that was read in signs with what they say.")
    parser.add_argument("cache", help="folder that `unimoe perceive` filled")
    parser.add_argument("data", nargs="+", help="data files of `unimoe.quickstart.sign_data`")
    parser.add_argument("--perceiver", help="sub-folder of the cache, where it has several")
    args = parser.parse_args()
    cache = PerceptionCache(args.cache, args.perceiver)
    for file in args.data:
        print(f"{file}: {reading_rate(read_samples(Path(file)), cache).line()}")


if __name__ == "__main__":
    main()
