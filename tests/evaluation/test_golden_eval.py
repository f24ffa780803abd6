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
    benchmark_of,
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


@pytest.mark.parametrize(
    "case", FOUND or [None], ids=[str(case.relative_to(golden_eval_root())) for case in FOUND] or ["no-golden-data"]
)
def test_scores_equal_the_original_scorers(case: Path | None) -> None:
    if case is None:
        leave_for_lack_of_data()
    expected = json.loads((case / "expected.json").read_text(encoding="utf-8"))
    found = list(differences(expected, score_case(case)))
    assert not found, f"{len(found)} differences, e.g. {found[:5]}"


def test_every_folder_with_predictions_is_a_case() -> None:
    if not FOUND:
        leave_for_lack_of_data()
    folders = {file.parent for file in golden_eval_root().rglob("predictions.jsonl")}
    assert sorted(folders - set(FOUND)) == []


@pytest.mark.parametrize(
    ("folder", "benchmark"),
    [
        ("textvqa", "textvqa"),
        ("TextVQA-b", "textvqa"),
        ("held2_textvqa", "textvqa"),
        ("deep/pope/seed7", "pope"),
        ("held_mmmu_parse", "mmmu_parse"),
        ("held/cmmmu_response2", "cmmmu_response"),
        ("aokvqa_held", "aokvqa"),
    ],
)
def test_the_name_of_a_folder_says_the_benchmark(
    folder: str, benchmark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert benchmark_of(tmp_path / folder) == benchmark


@pytest.mark.parametrize("folder", ["vizwiz", "held-cmmmu", "held/seed7"])
def test_a_benchmark_without_a_scorer_is_an_error(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(AssertionError, match=r"Known are ai2d, aokvqa, .*, vqav2; rename the folder"):
        benchmark_of(tmp_path / folder)


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
