"""Scores by a judge: any OpenAI-compatible endpoint that the user names reads question, gold answer and prediction.

The numbers are those of this judge with this prompt. Published ones come from other judges and prompts, so compare runs
of your own with each other.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .metrics.scores import Scores, percent
from .tasks.item import Item

PROMPT = """\
You grade answers to questions. Compare the prediction with the correct answer and give a grade from 0.0 (wrong) to 1.0
(right); partly right answers get a grade between them. In the correct answer, <AND> joins parts that must all be there,
and <OR> separates alternatives of which one is enough. Reply with the grade only.

Question: {question}
Correct answer: {answer}
Prediction: {prediction}
Grade:"""
_GRADE = re.compile(r"(?<![\d.])(0(?:\.\d+)?|1(?:\.0+)?)(?![\d.]*\d)")
_TRIES = 4
_WAIT_SECONDS = 1.0
_TIMEOUT_SECONDS = 120.0
_BUSY = {408, 409, 425, 429, 500, 502, 503, 504}
Ask = Callable[[str], str]


@dataclass(frozen=True)
class Endpoint:
    """Where judgements come from: base URL ("http://.../v1"), model name, and the key, which is never stored."""

    url: str
    model: str
    key: str = ""

    def ask(self, prompt: str) -> str:
        """The reply to one prompt; waits and tries again while the endpoint is busy.

        Raises:
            DataError: it cannot be reached, refuses, or does not speak the protocol.
        """
        import httpx

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        target = f"{self.url.rstrip('/')}/chat/completions"
        reason = ""
        for attempt in range(_TRIES):
            try:
                response = httpx.post(target, json=body, headers=headers, timeout=_TIMEOUT_SECONDS)
            except httpx.HTTPError as error:
                reason = f"{type(error).__name__}: {error}"
            except httpx.InvalidURL as error:
                raise DataError(f"--judge {self.url!r} is no URL ({error}).") from error
            else:
                if response.status_code == 200:
                    return _content(response, target)
                reason = f"status {response.status_code}"
                if response.status_code not in _BUSY:
                    break
            if attempt + 1 < _TRIES:
                time.sleep(_WAIT_SECONDS * 2**attempt)
        raise DataError(f"The judge at {target} does not answer ({reason}): check --judge, --judge-model and the key.")


def _content(response: Any, target: str) -> str:
    try:
        return str(response.json()["choices"][0]["message"]["content"])
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{target} sent no chat completion: is it an OpenAI-compatible endpoint?") from error


def read_grade(reply: str) -> float | None:
    """The first number from 0 to 1 in a reply."""
    found = _GRADE.search(reply)
    return float(found[1]) if found else None


def judgement_of(item: Item, text: str, ask: Ask) -> dict[str, Any]:
    """What the judge says of a prediction: `id`, `reply` and `grade` (None if the reply holds none)."""
    reply = ask(PROMPT.format_map({"question": item.question, "answer": str(item.answer), "prediction": text}))
    return {"id": item.id, "reply": reply, "grade": read_grade(reply)}


def judged_scores(items: Sequence[Item], judgements: dict[Any, dict[str, Any]]) -> Scores:
    """Mean grade in percent; items whose judgement holds no grade are left out."""
    rows: list[dict[str, Any]] = []
    groups: dict[str, list[float]] = {}
    for item in items:
        grade = judgements.get(item.id, {}).get("grade")
        rows.append({"question_id": item.id, "score": grade})
        if grade is not None:
            groups.setdefault(item.category, []).append(grade)
    known = [row["score"] for row in rows if row["score"] is not None]
    per_category = {name: percent(grades) for name, grades in groups.items()} if len(groups) > 1 else {}
    return Scores(percent(known), "percent", rows, per_category)
