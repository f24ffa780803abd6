"""About how long samples are, without tokenising them or opening their media; for putting like beside like."""

from collections.abc import Callable
from typing import Any

from .conversations import Sample, media_items

# Of English text; only ratios matter.
_CHARACTERS_PER_TOKEN = 4.0


def length_estimate(processor: Any) -> Callable[[Sample], float]:
    """A function sample -> about how many tokens it has; of audio one window per clip."""
    audio = processor.speech_tokens + processor.sound_tokens
    of_medium = {"image": processor.image_tokens, "video": processor.video_tokens, "audio": audio}

    def estimate(sample: Sample) -> float:
        media = sum(of_medium[item["type"]] for item in media_items(sample))
        return media + _characters(sample) / _CHARACTERS_PER_TOKEN

    return estimate


def _characters(sample: Sample) -> int:
    if "text" in sample:
        return len(sample["text"])
    count = 0
    for message in sample.get("messages", ()):
        content = message["content"]
        texts = [content] if isinstance(content, str) else [item.get("text") or "" for item in content]
        count += sum(map(len, texts))
    return count
