"""Every task reads its official files, asks in the wording of each system, and gives right answers the best score."""

from pathlib import Path
from typing import Any

import pytest
from official_files import FILES, as_archive, write_files

from unimoe.errors import DataError
from unimoe.evaluation.noise.intervals import interval
from unimoe.evaluation.results import sums_of
from unimoe.evaluation.running.requests import make_requests, spread
from unimoe.evaluation.tasks.baselines import majority_score
from unimoe.evaluation.tasks.catalogue import GROUPS, TASKS, find_tasks
from unimoe.evaluation.tasks.item import Item
from unimoe.evaluation.tasks.prompts import SYSTEMS
from unimoe.evaluation.tasks.task import Task

BEST = {"percent": 100.0, "fraction": 1.0, "points": 400.0}
DOWNLOADED = [name for name in TASKS if not name.startswith("starter_")]


def right_answer(item: Item) -> str:
    """What a perfect model would write."""
    if item.id == "validation_Math_2":
        return "so the result is 12"
    return item.answer[0] if isinstance(item.answer, list) else item.answer


def test_every_task_has_stand_in_files() -> None:
    assert set(DOWNLOADED) == set(FILES)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_right_answers_get_the_best_score(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    items = task.items(write_files(tmp_path, name))
    assert items
    assert len({item.id for item in items}) == len(items)
    for system in SYSTEMS:
        for item in items:
            prompt = task.prompt(item, system)
            assert prompt.strip()
            assert "{" not in prompt
            assert "<image" not in prompt or name == "mmmu"
    if task.score is None:
        assert task.scored_by != "here"
        assert task.submission or task.scored_by == "judge"
        return
    scores = task.score(items, {item.id: right_answer(item) for item in items})
    data = sums_of(task, items, scores.per_sample, scores.unit)
    assert data.total == pytest.approx(scores.score)
    low, high = interval(data, data.replicates(), BEST.get(scores.unit, 1.0))
    assert low <= high
    if scores.unit == "CIDEr x 100":
        wrong = task.score(items, {item.id: "a dog barks" for item in items})
        assert scores.score > 100 > 1 > wrong.score
    elif name == "transcripts":
        assert scores.score == 0
        assert task.score(items, {item.id: "nothing" for item in items}).score == 100
    elif name == "aokvqa":
        assert scores.score == 100.0
    else:
        assert scores.score == BEST[scores.unit]
        assert task.score(items, {item.id: "?" for item in items}).score < BEST[scores.unit]
    assert majority_score(task, items) is None or majority_score(task, items) <= max(scores.score, 100)
    if task.chance:
        assert 0 < task.chance(items) < BEST[scores.unit]


@pytest.mark.parametrize(
    ("name", "system", "expected"),
    [
        ("aokvqa", "unimoe", "What?\nAnswer the question using a single word or phrase."),
        ("vizwiz", "moiie", "What?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
         "Answer the question using a single word or phrase."),
        ("textvqa", "moai", "What brand?\nAnswer the question using a single word or phrase.\n"
         "Answer the question using a single word or phrase."),
        ("qbench", "moai", "Sharp?\nA. cat\nB. dog\nC. owl\nD. bee\n"
         "Answer with the option's letter from the given choices directly."),
        ("seed_image", "moai", "Which?\nA. cat B. dog C. owl D. bee\n"
         "Answer with the option's letter from the given choices directly."),
        ("mmbench", "unimoe", "Hint: h.\nWhich?\nOptions:\nA.cat\nB.dog\n"
         "Answer the question using a single word or phrase."),
        ("mmbench_cn", "moai", "Which?\nA. cat\nB. dog\nC. owl\n请直接回答选项字母。"),
        ("scienceqa_image", "moai", "Context: none.\nWhich?\nA. cat\nB. dog\n"
         "Answer with the option's letter from the given choices directly."),
        ("mme", "moai", "Is it red?\nPlease answer yes or no."),
        ("ehsl", "unimoe", "What is heard?\nA. cat\nB. dog"),
    ],
)  # fmt: skip
def test_wording(name: str, system: str, expected: str, tmp_path: Path) -> None:
    task = TASKS[name]
    assert task.prompt(task.items(write_files(tmp_path, name))[0], system) == expected


def test_lengths_of_answers_differ_by_system() -> None:
    assert [TASKS["pope"].longest_answer(system) for system in SYSTEMS] == [128, 128, 5]


def test_files_are_found_in_archives_and_one_folder_down(tmp_path: Path) -> None:
    root = write_files(tmp_path, "gqa")
    as_archive(root / "gqa" / "testdev_balanced_questions.json")
    (root / "gqa").rename(root / "elsewhere")
    assert len(TASKS["gqa"].items(root)) == 2


def test_a_missing_file_says_where_it_comes_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"textvqa needs llava_textvqa_val.json or .*Uni-MoE's data_sample"):
        TASKS["textvqa"].items(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1, 2]", "\x00", '{"a": 1}\n{'])
def test_a_damaged_file_is_named(content: str, tmp_path: Path) -> None:
    root = write_files(tmp_path, "qbench")
    (root / "qbench" / "llvisionqa_dev.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"llvisionqa_dev.json cannot be read"):
        TASKS["qbench"].items(root)


def requests_of(task: Task, root: Path) -> list[Any]:
    return make_requests(task, task.items(root), root, "unimoe")


def test_media_are_looked_up_below_the_data_folder(tmp_path: Path) -> None:
    root = write_files(tmp_path, "aokvqa")
    (root / "images").mkdir()
    (root / "images" / "0.jpg").write_bytes(b"")
    first, second = requests_of(TASKS["aokvqa"], root)
    assert first.media == ({"type": "image", "path": str(root / "images" / "0.jpg")},)
    assert second.missing == ("/coco/1.jpg",)


def test_official_paths_do_not_lead_out_of_the_data_folder(tmp_path: Path) -> None:
    root = write_files(tmp_path / "data", "qbench")
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"")
    file = root / "qbench" / "llvisionqa_dev.json"
    for path in ("../../secret.jpg", str(secret), "../secret.jpg", "a\\u0000b"):
        file.write_text(FILES["qbench"][file.name].replace("1.jpg", path), encoding="utf-8")
        assert requests_of(TASKS["qbench"], root)[0].missing


def test_a_limit_is_spread_and_keeps_pictures_whole(tmp_path: Path) -> None:
    items = TASKS["mme"].items(write_files(tmp_path, "mme"))
    chosen = spread(items, 4)
    assert [item.cluster for item in chosen] == ["existence/0.jpg"] * 2 + ["count/0.jpg"] * 2
    assert spread(items, None) == spread(items, 100) == items


def test_names_and_groups() -> None:
    assert next(task.name for task in find_tasks(["pope", "moai", "pope"])) == "pope"
    assert {name for system in SYSTEMS for name in GROUPS[system]} | set(GROUPS["starter"]) <= set(TASKS)
    with pytest.raises(DataError, match=r"no task 'textvq'. Did you mean textvqa"):
        find_tasks(["textvq"])
