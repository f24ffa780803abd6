"""What a quickstart run refuses, and how it keeps account of itself."""

import json
import os
from pathlib import Path

import pytest

from unimoe import cli
from unimoe.errors import CheckpointError, RecipeError
from unimoe.quickstart.parts import Part
from unimoe.quickstart.run import Quickstart
from unimoe.quickstart.schedule import SHORTEST_MINUTES, Budget, budget_for


def _part(folder: Path, digest: str) -> Part:
    return Part("vision-tower", "tower", "MIT", "a folder", digest, folder)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--minutes", "nan"],
        ["--minutes", "inf"],
        ["--minutes", "1e300"],
        ["--minutes", "-1"],
        ["--minutes", "4"],
        ["--seed", "-5"],
        ["--seed", "99999999999999999999999"],
    ],
)
def test_impossible_options_are_refused_before_anything_is_done(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["quickstart", "--out", str(tmp_path / "out"), *arguments]) == 2
    message = capsys.readouterr().err
    assert arguments[0] in message
    assert len(message.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    assert cli.main(["quickstart", "--out", str(file)]) == 2
    assert f"--out {file}" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == "mine"


def test_a_second_process_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    first, second = (Quickstart(out=tmp_path, seed=0, budget=Budget()) for _ in range(2))
    with first.attempt(), pytest.raises(CheckpointError, match="Another process"), second.attempt():
        pass


def test_what_a_killed_save_left_goes(tmp_path: Path) -> None:
    (tmp_path / ".model-abc").mkdir(parents=True)
    with Quickstart(out=tmp_path, seed=0, budget=Budget()).attempt():
        assert not (tmp_path / ".model-abc").exists()


@pytest.mark.parametrize(
    ("changes", "digest", "option"),
    [
        ({"seed": 1}, "a", "--seed"),
        ({"budget": budget_for(20.0)}, "a", "--minutes"),
        ({"words": ("cat",)}, "a", "words"),
        ({}, "b", "--vision-tower"),
    ],
)
def test_another_run_does_not_go_on_from_this_ones_work(
    changes: dict, digest: str, option: str, tmp_path: Path
) -> None:
    settings = {"out": tmp_path, "seed": 0, "budget": budget_for(13.0)}
    run = Quickstart(**settings)
    with run.attempt():
        run.require_same_run([_part(tmp_path, "a")])
        run.require_same_run([_part(tmp_path, "a")])
    other = Quickstart(**{**settings, **changes})
    with other.attempt(), pytest.raises(RecipeError, match=f"another {option}"):
        other.require_same_run([_part(tmp_path, digest)])


def test_time_counts_up_to_the_last_thing_said_before_a_kill(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        run = Quickstart(out=tmp_path, seed=0, budget=Budget())
        run.started -= 100
        with run.attempt():
            run.say("working")
            os._exit(9)  # no finally runs, as after a kill
    os.waitpid(child, 0)
    run = Quickstart(out=tmp_path, seed=0, budget=Budget())
    with run.attempt():
        assert 100 <= run.total_seconds < 160
    assert len(json.loads((run.work / "attempts.json").read_text(encoding="utf-8"))) == 2


def test_a_run_is_finished_when_all_of_its_result_is_there(tmp_path: Path) -> None:
    run = Quickstart(out=tmp_path, seed=0, budget=Budget())
    (tmp_path / "metrics.json").write_text('{"seconds": 1}', encoding="utf-8")
    assert run.finished_metrics() is None
    (tmp_path / "model").mkdir()
    for name in ("model/config.json", "report.html"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    assert run.finished_metrics() == {"seconds": 1}


def test_the_shortest_plan_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    from unimoe.quickstart.schedule import print_plan

    for minutes in (SHORTEST_MINUTES, 13.0, 60.0):
        print_plan(budget_for(minutes), teach_language=True)
        assert f"at most about {minutes:g} minutes" in capsys.readouterr().out
