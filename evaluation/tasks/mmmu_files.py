"""MMMU's and CMMMU's questions, whose pictures stand inside texts."""

import ast
import re
from collections.abc import Mapping
from pathlib import Path

from ..metrics.cmmmu import CHOICE, FILL_IN, TRUE_FALSE
from ..metrics.mmmu import subject_of
from .item import Item
from .prompts import LETTER_CHINESE, SHORT, SHORT_CHINESE, TRUE_FALSE_CHINESE
from .readers import picture_of, tables
from .records import read_json_value, read_records

_MAX_PICTURES = 7
_PICTURE_MARK = re.compile(r"<image (\d+)>")
_CMMMU_TEMPLATES = {CHOICE: LETTER_CHINESE, FILL_IN: SHORT_CHINESE, TRUE_FALSE: TRUE_FALSE_CHINESE}
_CMMMU_MARK = re.compile(r'<img="([^"]+)">')


def mmmu(files: Mapping[str, Path]) -> list[Item]:
    """MMMU: `id`, `question`, `options` (a list, or its text), `image_1` to `image_7`; gold from the answer file."""
    gold = read_json_value(files["gold"])
    items = []
    for record in tables(files):
        if record["id"] not in gold:
            continue
        options = record["options"]
        options = ast.literal_eval(options) if isinstance(options, str) else options
        truth = gold[record["id"]]
        texts = [record["question"], *options]
        numbers = list(dict.fromkeys(n for text in texts for n in _PICTURE_MARK.findall(text)))
        pictures = [record[f"image_{n}"] for n in numbers if int(n) <= _MAX_PICTURES and record.get(f"image_{n}")]
        media = tuple(("image", picture_of(value)) for value in pictures)
        answer, subject = truth["ground_truth"], subject_of(record["id"])
        choices = tuple(map(str, options)) if truth["question_type"] == "multiple-choice" else ()
        template = "" if choices else SHORT
        items.append(
            Item(
                record["id"],
                record["question"],
                answer,
                media,
                options=choices,
                category=subject,
                record=truth,
                template=template,
            )
        )
    return items


def cmmmu(files: Mapping[str, Path]) -> list[Item]:
    """CMMMU: pictures are named where they stand in questions and options."""
    items = []
    for record in read_records(files["questions"]):
        options = tuple(record[f"option{i}"] for i in range(1, 5)) if record["type"] == CHOICE else ()
        names = dict.fromkeys(n for text in (record["question"], *options) for n in _CMMMU_MARK.findall(text))
        media = tuple(("image", name) for name in names)
        question = _CMMMU_MARK.sub("", record["question"])
        template = _CMMMU_TEMPLATES[record["type"]]
        items.append(
            Item(
                record["id"],
                question,
                record["answer"],
                media,
                options=options,
                category=record["category"],
                record=record,
                template=template,
            )
        )
    return items
