"""The golden helper itself: what it accepts as equal, what it finds, what it records."""

from pathlib import Path

import golden
import pytest
import torch
from golden import (
    ROOT_VARIABLE,
    GoldenCase,
    GoldenMismatchError,
    Ledger,
    compare,
    coverage,
    discover,
    leave_for_lack_of_data,
    system_of,
)
from name_lists import fold_numbers, listed
from safetensors.torch import save_file


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    for name, tensors in (("first", ["stage.0", "stage.1", "input"]), ("nested/second", ["stage.0"])):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        save_file({tensor: torch.ones(2) for tensor in tensors}, folder / "io.safetensors")
        save_file({f"tower.{len(tensors)}": torch.ones(1)}, folder / "weights.safetensors")
        (folder / "config.json").write_text(f'{{"layers": {len(tensors)}}}', encoding="utf-8")
    return tmp_path


def test_rounding_errors_pass_and_larger_ones_do_not() -> None:
    expected = torch.tensor([100.0, -3.0, 1e-9])
    compare(expected * (1 + 5e-6), expected)
    with pytest.raises(GoldenMismatchError, match=r"1 of 3 values differ; worst at \(1,\)"):
        compare(expected + torch.tensor([0.0, 2e-3, 0.0]), expected)


@pytest.mark.parametrize(
    "actual",
    [
        torch.tensor([1.0, float("nan")]),
        torch.tensor([1.0, float("inf")]),
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([1, 2]),
        torch.tensor([2.0, 1.0]),
    ],
)
def test_nan_infinity_shape_kind_and_order_count(actual: torch.Tensor) -> None:
    with pytest.raises(GoldenMismatchError):
        compare(actual, torch.tensor([1.0, 2.0]))


def test_integers_and_booleans_must_be_equal() -> None:
    compare(torch.tensor([True, False]), torch.tensor([True, False]))
    with pytest.raises(GoldenMismatchError):
        compare(torch.tensor([1_000_000, 1]), torch.tensor([1_000_001, 1]))
    with pytest.raises(GoldenMismatchError):
        compare(torch.tensor([True, True]), torch.tensor([True, False]))


def test_cases_are_found_by_what_they_hold(root: Path) -> None:
    assert [case.name for case in discover("stage.*")] == ["first", "nested/second"]
    assert [case.name for case in discover("stage.1")] == ["first"]
    assert [case.name for case in discover("stage.*", weights="tower.1")] == ["nested/second"]
    assert [case.name for case in discover(where=lambda case: case.config["layers"] == 3)] == ["first"]
    assert discover("absent") == []


def test_the_report_tells_compared_read_and_unused_tensors_apart(root: Path) -> None:
    ledger = Ledger()
    case = GoldenCase(root / "first", ledger)
    case.check("stage.0", case.input("input"))
    with pytest.raises(GoldenMismatchError, match=r"first/io: stage\.1"):
        case.check("stage.1", torch.zeros(2))
    received = Ledger()
    received.merge(ledger.as_plain())
    first, second = coverage(received)
    assert (first.compared, first.only_read, first.unused) == (("stage.0",), ("input",), ("stage.1",))
    assert (second.compared, second.only_read, second.unused) == ((), (), ("stage.0",))
    assert case.comparisons == 1


def test_a_missing_folder_skips_here_and_fails_in_ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "absent"))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="golden data missing"):
        leave_for_lack_of_data()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="golden data missing"):
        leave_for_lack_of_data()


@pytest.mark.parametrize("held", [(), ("moiie-data",), ("moiie-data", "unimoe-8e")], ids=len)
def test_a_folder_without_the_system_of_a_test_fails_in_ci(
    held: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in held:
        (tmp_path / name).mkdir()
        save_file({"x": torch.ones(1)}, tmp_path / name / "io.safetensors")
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(golden, "SYSTEMS_FOUND", set())
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "tests/parity/test_unimoe_8e.py::test_losses (call)")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception):
        leave_for_lack_of_data()
    monkeypatch.setenv("CI", "true")
    there = "unimoe-8e" in held
    with pytest.raises(pytest.skip.Exception if there else pytest.fail.Exception, match=r"no .*case"):
        leave_for_lack_of_data()


def test_cases_that_tests_found_by_content_count_for_their_system(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "tests/parity/test_moai_model.py::test_x (call)")
    monkeypatch.setenv("CI", "true")
    for found, outcome in (
        (set(), pytest.fail.Exception),
        ({system_of("test_moai_modules.py")}, pytest.skip.Exception),
    ):
        monkeypatch.setattr(golden, "SYSTEMS_FOUND", found)
        with pytest.raises(outcome):
            leave_for_lack_of_data()


def test_a_case_of_texts_needs_no_tensors(root: Path) -> None:
    (root / "nested" / "spoken").mkdir()
    for folder in ("first", "nested/spoken"):
        (root / folder / "said.json").write_text("{}", encoding="utf-8")
    assert [case.name for case in discover(texts="said")] == ["first", "nested/spoken"]
    assert [case.name for case in discover("stage.*", texts="said")] == ["first"]
    assert discover("unknown", texts="said") == discover(texts="unheard") == []


def test_fields_of_cases_are_in_the_report(root: Path) -> None:
    (root / "first" / "cases.json").write_text('{"cases": [{"a": 1}, {"a": 1, "b": 2}], "demo": {"c": 3}, "note": ""}')
    (row,) = (row for row in coverage(Ledger(compared={"first/cases": {"cases.0.a"}})) if row.source == "first/cases")
    assert (row.compared, row.unused) == (("cases.0.a",), ("cases.1.a", "cases.1.b", "demo.c", "note"))


def test_the_summary_names_some_and_counts_the_rest() -> None:
    names = ["a0", "a1", "b", "c"]
    assert listed(names) == "a# (2), b, c"
    assert listed(names, 2) == "a# (2), b and 1 more"


def test_numbers_are_folded_in_the_report() -> None:
    assert fold_numbers(["layer0.out", "layer11.out", "loss"]) == ["layer#.out (2)", "loss"]
