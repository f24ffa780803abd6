"""The metrics as modules of `evaluate`, loaded without the Hub."""

from typing import Any

import pytest

from unimoe.errors import DataError
from unimoe.evaluation.modules import load_module, module_names

PEOPLE = ["a red bus"] * 2 + ["bus"] * 8
CASES: dict[str, tuple[list[str], list[Any], float]] = {
    "any_answer_accuracy": (["The bus", "van"], [["bus", "red bus"], ["car"]], 0.5),
    "anls": (["12 $", "x"], [["12", "12 $"], ["y"]], 0.5),
    "cider": (["rain falls on the roof", "a dog"], [["rain falls on the roof"], ["birds sing"]], 500.0),
    "exact_match_percent": ([" cat ", "Cat"], ["cat", "cat"], 50.0),
    "relaxed_accuracy": (["105", "106"], ["100", "100"], 50.0),
    "vqa_soft_accuracy": (["Red bus", "BUS."], [PEOPLE, PEOPLE], 80.0),
    "word_error_rate": (["the cat sat", "it rains"], ["The cat sat.", "it rained"], 20.0),
    "yes_no_f1": (["Yes", "No.", "yes"], ["yes", "no", "no"], 2 / 3),
}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import socket

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", module_names())
def test_module(name: str) -> None:
    predictions, references, expected = CASES[name]
    metric = load_module(name)
    assert metric.compute(predictions=predictions, references=references) == {name: pytest.approx(expected)}
    for prediction, reference in zip(predictions, references, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute() == {name: pytest.approx(expected)}


def test_unknown_names_are_told() -> None:
    with pytest.raises(DataError, match="no metric module 'bleu'; there are anls, any_answer_accuracy"):
        load_module("bleu")
