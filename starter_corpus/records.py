"""How the builders write one sample: the JSON line of the data format used for training and evaluation."""

import hashlib
from typing import Any

import numpy as np

Row = dict[str, Any]


def make_row(
    identity: str,
    modality: str,
    task: str,
    split: str,
    question: str,
    answer: str,
    source: dict[str, Any],
    media: tuple[str, str] | None = None,
) -> Row:
    """One question with its answer.

    Args:
        media: (content type, path relative to the folder of the JSON file), for example ("image", "images/x.png").
    """
    content: list[dict[str, str]] = []
    if media is not None:
        content.append({"type": media[0], "path": media[1]})
    content.append({"type": "text", "text": question})
    return {
        "id": identity,
        "modality": modality,
        "task": task,
        "split": split,
        "messages": conversation(content, answer),
        "source": source,
    }


def conversation(content: list[dict[str, str]], answer: str) -> list[Row]:
    """A user's message and the assistant's answer."""
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def question_of(row: Row) -> str:
    """The text of the user's message."""
    return "".join(item["text"] for item in row["messages"][0]["content"] if item["type"] == "text")


def answer_of(row: Row) -> str:
    """The text of the assistant's message."""
    return str(row["messages"][-1]["content"][0]["text"])


def rng_for(*names: str) -> np.random.Generator:
    """A random generator that depends on the names only, so that one sample never changes another."""
    digest = hashlib.sha256("/".join(names).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))
