"""Our metrics against the original scorers: total, per category and per sample, on every case of the golden folder."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
from golden_eval import (
    SCORERS,
    VARIABLE,
    cases,
    default_root,
    differences,
    golden_eval_root,
    score_case,
)

FOUND = cases()


def leave_for_lack_of_data() -> None:
    reason = f"{golden_eval_root()} holds no case; set {VARIABLE} to a folder of golden evaluation data."
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.parametrize("case", FOUND or [None], ids=[case.name for case in FOUND] or ["no-golden-data"])
def test_scores_equal_the_original_scorers(case: Path | None) -> None:
    if case is None:
        leave_for_lack_of_data()
    expected = json.loads((case / "expected.json").read_text(encoding="utf-8"))
    found = list(differences(expected, score_case(case)))
    assert not found, f"{len(found)} differences, e.g. {found[:5]}"


def test_every_folder_is_a_case() -> None:
    if not FOUND:
        leave_for_lack_of_data()
    tested = {folder for case in FOUND for folder in (case, *case.parents)}
    folders = [path for path in golden_eval_root().iterdir() if path.is_dir() and path.name != "questions"]
    assert [folder.name for folder in folders if folder not in tested] == []


def test_the_default_folder_has_every_benchmark() -> None:
    if golden_eval_root() != default_root() or not FOUND:
        pytest.skip("other cases than the default ones were asked for")
    assert {case.name for case in FOUND} == set(SCORERS)


def change_each_leaf(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        keys = value if isinstance(value, dict) else range(min(len(value), 2))
        return [leaf for key in keys for leaf in change_each_leaf(value[key], (*path, key))]
    return [path]


def test_a_change_of_any_field_is_seen() -> None:
    expected = {
        "score": 48.6,
        "unit": "percent",
        "per_category": {"VD": {"acc": 0.5, "tp_fp_tn_fn": [1, 2]}},
        "per_sample": [{"question_id": 1, "parsed": "b", "score": None}, {"question_id": 2, "score": 1}],
    }
    assert not list(differences(expected, copy.deepcopy(expected)))
    leaves = change_each_leaf(expected)
    assert len(leaves) == 10
    for leaf in leaves:
        changed = copy.deepcopy(expected)
        inner = changed
        for key in leaf[:-1]:
            inner = inner[key]
        old = inner[leaf[-1]]
        inner[leaf[-1]] = old + 1e-9 * old if isinstance(old, float) else "another"
        assert list(differences(expected, changed)), leaf
