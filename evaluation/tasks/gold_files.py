"""Gold answers that come in files of their own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .records import read_records


def vqa_annotations(files: Mapping[str, Path]) -> dict[Any, list[str]]:
    """The VQA format: `annotations` with `question_id` and ten `answers`."""
    return {
        record["question_id"]: [answer["answer"] for answer in record["answers"]]
        for record in read_records(files["gold"])
    }


def answers_beside(files: Mapping[str, Path]) -> dict[Any, list[str]]:
    """A-OKVQA in Uni-MoE's form: ten answers in the question's own record."""
    return {record["question_id"]: record["gt"] for record in read_records(files["questions"])}
