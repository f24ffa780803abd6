"""Files that evaluation servers and external graders take."""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from .metrics.evalai_answers import normalise_answer
from .tasks.item import Item
from .tasks.task import Texts
from .writable_text import json_text

_MMBENCH_COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "category", "l2-category", "split", "prediction")
_SHEET_FILES = {
    "[Content_Types].xml": '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    '<Default Extension="xml" ContentType="application/xml"/><Override PartName="/xl/workbook.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"/>'
    '<Override PartName="/xl/worksheets/sheet1.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.worksheet+xml"/></Types>',
    "_rels/.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    '<Relationship Id="rId1" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" '
    'Target="xl/workbook.xml"/></Relationships>',
    "xl/workbook.xml": '<workbook xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main" '
    'xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships">'
    '<sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
    "xl/_rels/workbook.xml.rels": '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
    '<Relationship Id="rId1" Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/worksheet" '
    'Target="worksheets/sheet1.xml"/></Relationships>',
}
# What XML cannot hold.
_CONTROL = {code: None for code in [*range(32), *range(0xD800, 0xE000)] if chr(code) not in "\t\n\r"}


def write_submission(form: str, items: Sequence[Item], texts: Texts, folder: Path, task: str) -> Path:
    """Write the file of a form ("vqav2", "vizwiz", "docvqa", "mmvet", "mathvista" or "mmbench") and return its path.

    Items without a prediction are in it with an empty one, because servers want every question of the split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if form == "mmbench":
        path = folder / f"{task}.xlsx"
        write_sheet(path, [_MMBENCH_COLUMNS, *(_mmbench_row(item, texts.get(item.id, "")) for item in items)])
        return path
    path = folder / f"{task}.json"
    value = _JSON_FORMS[form](items, texts)
    path.write_text(json_text(value, indent=1), encoding="utf-8")
    return path


def _vqav2(items: Sequence[Item], texts: Texts) -> Any:
    return [{"question_id": item.id, "answer": normalise_answer(texts.get(item.id, ""))} for item in items]


def _vizwiz(items: Sequence[Item], texts: Texts) -> Any:
    return [{"image": item.record["image"], "answer": normalise_answer(texts.get(item.id, ""))} for item in items]


def _docvqa(items: Sequence[Item], texts: Texts) -> Any:
    return [{"questionId": int(item.id), "answer": texts.get(item.id, "")} for item in items]


def _mmvet(items: Sequence[Item], texts: Texts) -> Any:
    return {str(item.id): texts.get(item.id, "") for item in items}


def _mathvista(items: Sequence[Item], texts: Texts) -> Any:
    """By pid: the official record, without pictures, with the response."""
    kept = {item.id: {k: v for k, v in item.record.items() if k not in ("decoded_image", "image")} for item in items}
    return {str(key): {**record, "response": texts.get(key, "")} for key, record in kept.items()}


_JSON_FORMS: dict[str, Callable[[Sequence[Item], Texts], Any]] = {
    "vqav2": _vqav2,
    "vizwiz": _vizwiz,
    "docvqa": _docvqa,
    "mmvet": _mmvet,
    "mathvista": _mathvista,
}


def _mmbench_row(item: Item, prediction: str) -> list[Any]:
    return [*(item.record.get(name) or "" for name in _MMBENCH_COLUMNS[:-1]), prediction]


def write_sheet(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """A spread-sheet (.xlsx) with one sheet of texts and numbers."""
    lines = []
    for number, row in enumerate(rows, 1):
        cells = "".join(_cell(f"{chr(ord('A') + column)}{number}", value) for column, value in enumerate(row))
        lines.append(f'<row r="{number}">{cells}</row>')
    sheet = (
        '<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"><sheetData>'
        f"{''.join(lines)}</sheetData></worksheet>"
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**_SHEET_FILES, "xl/worksheets/sheet1.xml": sheet}.items():
            archive.writestr(name, f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n{content}')


def _cell(place: str, value: Any) -> str:
    text = str(value).translate(_CONTROL)
    if text.isdigit() and len(text) < 16:
        return f'<c r="{place}"><v>{text}</v></c>'
    return f'<c r="{place}" t="inlineStr"><is><t xml:space="preserve">{escape(text)}</t></is></c>'
