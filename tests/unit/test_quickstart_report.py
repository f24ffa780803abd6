"""The quickstart's report: every figure that was measured is in it, and it needs no other file."""

import re
from pathlib import Path
from typing import Any

import pytest

from unimoe.quickstart import report, results
from unimoe.quickstart.accuracy_table import accuracy_rows
from unimoe.quickstart.stages import MOMENTS
from unimoe.starter_corpus.corpus import load_samples

BY_STAGE = {moment: {"image": 0.25, "speech": 0.75} for moment in MOMENTS.values()}
ROW = {"chance": 0.1, "majority": 0.2, "probe_accuracy": 0.5, "n": 40, "accuracy": 0.625}
HELDOUT = {"image": {**ROW, "pixel_probe_accuracy": 0.05}, "speech": ROW}


def _details() -> dict[str, Any]:
    examples = []
    for task in ("image", "speech", "video_direction"):
        content = next(s for s in load_samples("heldout") if s["task"] == task)["messages"][0]["content"]
        media = [(item["type"], item["path"]) for item in content if item["type"] != "text"]
        examples.append({"task": task, "question": "What <b>?", "answer": "a", "truth": "cat", "media": media})
    return {
        "loss_curves": {"stage0": [(1, 2.0), (2, 1.0)]},
        "router_load": {
            "layers": [1],
            "experts": ["image", "text"],
            "modalities": {"image": [[0.25, 0.75]], "text": [[0.5, 0.5]]},
        },
        "parts": [("tower", "MIT", "a folder", "abc")],
        "examples": examples,
        "limits": ["small & quick"],
        "machine": "x",
    }


def test_screen_and_card_hold_the_same_cells(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"heldout": HELDOUT, "accuracy_by_stage": BY_STAGE, "seconds": 60.0, "peak_memory_bytes": 2**30}
    header, rows = accuracy_rows(metrics)
    assert header == ["task", "n", "chance", "majority", "linear probe", *BY_STAGE, "final"]
    assert rows[0] == ["image", "40", "10 %", "20 %", "50 % (pixels 5 %)", *["25 %"] * len(BY_STAGE), "62 %"]
    results._print_accuracy(metrics)
    printed = capsys.readouterr().out
    card = results._accuracy_markdown(metrics)
    for cells in (header, *rows):
        assert f"| {' | '.join(cells)} |" in card
        assert "".join(cells).replace(" ", "") in printed.replace(" ", "")


def test_bars_show_probe_model_and_the_model_before_stage_3() -> None:
    axes = report._accuracy_figure(HELDOUT, BY_STAGE).axes[0]
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert heights[MOMENTS["stage2"]] == [25, 75]
    assert heights["the model"] == [62.5, 62.5]
    assert sorted(map(max, heights.values())) == [50, 62.5, 75]


def test_the_page_holds_every_figure_and_medium(tmp_path: Path) -> None:
    metrics = {
        "seconds": 600.0,
        "seed": 3,
        "stages": [
            {"name": "s", "seconds": 1.0, "steps": 5, "trainable_parameters": 1234, "loss_first": 2, "loss_last": 1}
        ],
        "heldout": HELDOUT,
        "accuracy_by_stage": BY_STAGE,
        "dense_twin": {"accuracy": {"image": 0.99}},
        "upcycling": {"max_abs_logit_difference": 3e-6},
        "peak_memory_bytes": 2**30,
    }
    page = report.write_report(tmp_path, metrics, _details()).read_text(encoding="utf-8")
    for text in (
        "62&nbsp;%",
        "dense twin",
        "99&nbsp;%",
        "50&nbsp;% (pixels 5&nbsp;%)",
        "25&nbsp;%",
        "1,234",
        "3.0e-06",
        "small &amp; quick",
        "What &lt;b&gt;?",
        "Seed 3",
    ):
        assert text in page, text
    assert page.count("<img") == 3 + 1 + 2  # three figures, one picture, two frames of the video
    assert page.count("<audio") == 1
    assert page.count("src=") == page.count('src="data:')


def test_pages_without_examples_are_written(tmp_path: Path) -> None:
    details = {**_details(), "examples": []}
    metrics = {"seconds": 1.0, "seed": 0, "stages": [], "heldout": HELDOUT, "accuracy_by_stage": {}}
    metrics |= {"upcycling": {"max_abs_logit_difference": 0.0}, "peak_memory_bytes": 1}
    page = report.write_report(tmp_path, metrics, details).read_text(encoding="utf-8")
    assert "class=card>" not in page
    assert "<audio" not in page
    headings = re.findall("<h2>(.+?)</h2>", page)
    assert headings[:3] == ["Held-out accuracy", "Some held-out answers", "What each stage trained"]
    assert "62&nbsp;%" in page
