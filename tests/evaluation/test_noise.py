"""Intervals, comparisons of runs, and the bias across modalities."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unimoe.errors import DataError
from unimoe.evaluation.compare_runs import compare_runs, comparison_rows
from unimoe.evaluation.noise.comparison import paired_difference
from unimoe.evaluation.noise.intervals import Additive, additive, interval
from unimoe.evaluation.noise.modality_bias import modality_bias
from unimoe.evaluation.task_result import TaskResult
from unimoe.evaluation.tasks.item import Item


def data_of(scores: list[float], clusters: list[str] | None = None) -> Additive:
    names = clusters or [""] * len(scores)
    items = [Item(i, "", cluster=name) for i, name in enumerate(names)]
    return additive(items, [{"score": score} for score in scores], None, 100.0)


def ends(data: Additive) -> tuple[float, float]:
    return interval(data, data.replicates(), 100.0)


def test_the_interval_is_that_of_a_share() -> None:
    scores = [1.0] * 60 + [0.0] * 40
    low, high = ends(data_of(scores))
    standard_error = 100 * (0.6 * 0.4 / 100) ** 0.5
    assert low == pytest.approx(60 - 1.96 * standard_error, abs=1)
    assert high == pytest.approx(60 + 1.96 * standard_error, abs=1)


def test_95_of_100_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(100):
        data = data_of((rng.random(80) < 0.7).astype(float).tolist())
        low, high = interval(data, data.replicates(resamples=400), 100.0)
        hits += low <= 70 <= high
    assert 88 <= hits <= 99


def test_copies_of_an_item_add_no_certainty() -> None:
    scores = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    once = ends(data_of(scores))
    tripled = ends(data_of(scores * 3, [f"picture {i}" for i in range(8)] * 3))
    assert tripled == once
    assert ends(data_of(scores * 3))[0] > once[0] + 5


def test_what_never_happened_is_not_impossible() -> None:
    assert ends(data_of([1.0] * 20)) == (pytest.approx(100 * 0.025 ** (1 / 20)), 100.0)
    assert ends(data_of([0.0] * 20)) == (0.0, pytest.approx(100 * (1 - 0.025 ** (1 / 20))))
    # Four copies of five pictures are five, not twenty.
    assert ends(data_of([1.0] * 20, [str(i % 5) for i in range(20)]))[0] == pytest.approx(100 * 0.025 ** (1 / 5))


def test_items_without_a_score_are_left_out() -> None:
    items = [Item(0, ""), Item(1, "")]
    data = additive(items, [{"score": None}, {"score": 1}], None, 100.0)
    assert (data.total, len(data.keys)) == (100.0, 1)


def test_pairing_sees_what_two_intervals_cannot() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(300)
    first = (hard < 0.50).astype(float)
    second = (hard < 0.55).astype(float)  # the same items, and some more
    one, other = data_of(first.tolist()), data_of(second.tolist())
    assert ends(one)[1] > ends(other)[0]  # the intervals overlap
    difference = paired_difference(one, other)
    assert difference.is_beyond_noise
    assert difference.value == pytest.approx(100 * (second.mean() - first.mean()))
    unrelated = paired_difference(one, data_of(rng.permutation(second).tolist()))
    assert not unrelated.is_beyond_noise


def test_a_run_does_not_differ_from_itself() -> None:
    data = data_of([1.0, 0.0] * 30)
    difference = paired_difference(data, data)
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)
    assert not difference.is_beyond_noise


def write_run(folder: Path, scores: dict[str, list[float | None]], **fields: Any) -> Path:
    (folder / "scores").mkdir(parents=True)
    results = []
    for name, values in scores.items():
        results.append(
            {"name": name, "title": name, "unit": "percent", "score": 1.0, "lower_is_better": False, **fields}
        )
        rows = [
            {"question_id": i, "score": value, "cluster": f"item {i}", "category": "c", "gold": "yes", "parsed": "yes"}
            for i, value in enumerate(values)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "scores" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "results.json").write_text(json.dumps({"tasks": results}), encoding="utf-8")
    return folder


def test_runs_are_compared_on_what_both_answered(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", {"mmbench": [0, 0, 0, 0, 1, None, 1], "textvqa": [0.3, 0.6] * 20, "gqa": [1]})
    second = write_run(tmp_path / "b", {"mmbench": [1, 1, 1, 1, 1, 1], "textvqa": [0.6, 0.3] * 20})
    mmbench, textvqa = compare_runs(first, second)
    assert (mmbench.difference.clusters, mmbench.better, mmbench.worse) == (5, 4, 0)
    assert (mmbench.difference.first, mmbench.difference.second) == (20.0, 100.0)
    assert mmbench.verdict == "better"
    assert textvqa.verdict == "within noise"
    assert comparison_rows([mmbench, textvqa])[1][:4] == ["mmbench", "20.0", "100.0", "+80.0"]
    with pytest.raises(DataError, match="no scored task in common"):
        compare_runs(write_run(tmp_path / "c", {"vizwiz": [1]}), second)


def test_fewer_word_errors_are_better(tmp_path: Path) -> None:
    runs = []
    for name, errors in (("a", 2), ("b", 1)):
        folder = write_run(tmp_path / name, {"transcripts": []}, lower_is_better=True)
        rows = [
            {"question_id": i, "score": 10.0 * errors, "errors": errors, "length": 10, "cluster": str(i), "category": "", "gold": None}
            for i in range(20)
        ]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "scores" / "transcripts.jsonl").write_text(text, encoding="utf-8")
        runs.append(folder)
    comparison = compare_runs(*runs)[0]
    assert (comparison.difference.first, comparison.difference.second) == (20.0, 10.0)
    assert (comparison.verdict, comparison.better, comparison.worse) == ("better", 20, 0)


def result(name: str, modality: str, score: float, chance: float | None = None) -> TaskResult:
    replicates = np.full(2000, score)
    return TaskResult(
        name, name, modality, "test", "here", "percent", score, score, score, 10, 10, 0, 0, chance, 10.0, 100.0,
        replicates=replicates,
    )  # fmt: skip


def test_the_bias_is_the_gap_between_gains() -> None:
    results = [
        result("a", "image", 75.0, 50.0),  # half of what is possible above chance
        result("b", "image", 100.0, 50.0),  # all of it
        result("c", "speech", 25.0, 0.0),
        result("d", "video", 10.0),  # no more than the most frequent answer
    ]
    bias = modality_bias(results)
    assert bias is not None
    assert {name: gain[0] for name, gain in bias.gains.items()} == {"image": 0.75, "speech": 0.25, "video": 0.0}
    assert (bias.value, bias.low, bias.high) == (0.75, 0.75, 0.75)
    assert modality_bias(results[:2]) is None
