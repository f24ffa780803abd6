"""MoAI's mixers against signs: what is told to whom, words apart, a run that goes on, and an honest table."""

import json
import statistics
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import tiny_training

from unimoe.errors import RecipeError
from unimoe.processing.perception.results import TextLine
from unimoe.quickstart import moai_ocr, sign_reading, spelling
from unimoe.quickstart.evaluate import Answer, answer_samples
from unimoe.quickstart.moai_ocr import MODELS, OcrComparison, compare_reading, main
from unimoe.quickstart.reading_table import character_accuracy, print_table, reading_of, table_rows
from unimoe.quickstart.run import Quickstart
from unimoe.quickstart.sign_data import SignOptions
from unimoe.quickstart.sign_reading import UNTOLD, SignCounts, is_one_token, untold, words_to_read
from unimoe.trainers.caches.encoder_cache import EncoderCache
from unimoe.trainers.stages.mixer_stage import add_mixers

WORDS = ("a", "cab", "door", "exit", "fog", "gate", "hotel", "inn")


class PerfectReader:
    """Reads what the data files beside the pictures say."""

    def __init__(self, signs: Path) -> None:
        self.signs, self.read_pictures = signs, 0
        self._texts: dict[bytes, str] = {}

    def identity(self) -> dict[str, Any]:
        return {"adapter": "perfect"}

    def read(self, images: Any) -> list[tuple[TextLine, ...]]:
        if not self._texts:
            records = [json.loads(line) for file in self.signs.glob("*.jsonl") for line in file.open()]
            for record in records:
                picture = PIL.Image.open(self.signs / record["messages"][0]["content"][0]["path"])
                self._texts[picture.tobytes()] = record["source"]["word"]
        self.read_pictures += len(images)
        return [(TextLine(self._texts[image.tobytes()], 0.99),) for image in images]


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_training.processor()


@pytest.fixture
def comparison(processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OcrComparison:
    """Of a tiny model, few words and a step of each kind."""
    dense = tmp_path / "start" / "work" / "stages" / "stage1" / "model"
    tiny_training.model(processor).save_pretrained(dense)
    processor.save_pretrained(dense)
    monkeypatch.setattr(sign_reading, "words_to_read", lambda _: WORDS)
    monkeypatch.setattr(spelling, "_SAMPLES", 100)
    monkeypatch.setattr(Quickstart, "precision", lambda _: "float32")
    counts = SignCounts(train=6, known=2, unseen=2)
    return OcrComparison(tmp_path / "out", tmp_path / "start", 2, 1, 2, counts, SignOptions(size=48))


def test_a_comparison_goes_on_where_it_stopped(
    comparison: OcrComparison, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, told = moai_ocr.run_training, []

    def watched(model: Any, data: Any, stage: Any, *rest: Any) -> Any:
        aux = {sample["messages"][0]["content"][0]["aux"]["text"] for sample in data.samples}
        told.append((stage.name, stage.mixer_choice, len(aux)))
        return train(model, data, stage, *rest)

    monkeypatch.setattr(moai_ocr, "run_training", watched)
    reader = PerfectReader(comparison.out / "signs")
    first = compare_reading(comparison, reader)
    assert told == [
        ("experts_alone", "random", 6),
        ("gates", "gates", 6),
        ("experts_alone", "random", 1),
        ("gates", "gates", 1),
    ]
    assert reader.read_pictures == 10
    again = compare_reading(comparison, reader)
    assert len(told) == 4
    assert reader.read_pictures == 10
    assert again["results"] == first["results"]
    assert [(result["model"], result["seed"]) for result in first["results"]] == [(name, 0) for name in MODELS]
    assert {result["trained_parameters"] for result in first["results"]} == {first["results"][0]["trained_parameters"]}
    assert set(first["read_exactly"].values()) == {1.0}
    assert json.loads((comparison.out / "moai_ocr.json").read_text()) == again
    assert main(["--out", str(comparison.out), "--start", str(comparison.start)]) == 2
    assert "holds a comparison with steps = 2" in capsys.readouterr().out


def test_options_reach_the_comparison(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def refused(comparison: OcrComparison) -> None:
        asked.append(comparison)
        raise RecipeError("not today")

    monkeypatch.setattr(moai_ocr, "compare_reading", refused)
    options = {"--out": "o", "--start": "s", "--steps": "7", "--seeds": "2", "--train": "9", "--unseen": "5"}
    assert main([word for option in options.items() for word in option]) == 2
    counts = SignCounts(train=9, unseen=5)
    assert asked == [OcrComparison(Path("o"), Path("s"), steps=7, seeds=2, counts=counts, photographs=True)]
    assert main(["--no-photographs"]) == 2
    assert not asked[1].photographs
    assert "not today" in capsys.readouterr().out


def test_words_of_the_tests_are_new(comparison: OcrComparison, processor: Any) -> None:
    sign_reading.draw_signs(comparison.out, processor.tokenizer, comparison.counts, comparison.options)
    reader = PerfectReader(comparison.out)
    signs = sign_reading.sign_test(
        comparison.out, comparison.out.parent / "seen", processor.tokenizer, comparison.counts, reader
    )
    assert set(signs.trained_words) == _words(signs.train)
    lesson = spelling.spelling_samples(processor.tokenizer, signs.trained_words, signs.unseen_words, 400)
    taught = {sample["messages"][1]["content"][0]["text"] for sample in lesson}
    assert signs.unseen_words == {"a", "cab", "door", "exit", "fog", "gate", "hotel", "inn"} - _words(signs.train)
    assert set(signs.trained_words) <= taught
    assert len(taught) > 100
    assert not signs.unseen_words & taught
    lesson = spelling.spelling_samples(processor.tokenizer, ["cab", "door"], {"door"}, 40)
    assert "door" not in {sample["messages"][1]["content"][0]["text"] for sample in lesson}
    trained, tests = _words(signs.train), {name: _words(samples) for name, samples in signs.tests.items()}
    assert tests.pop("trained words") <= trained
    assert tests
    assert all(not words & trained for words in tests.values())
    told = [sample["messages"][0]["content"][0]["aux"]["text"] for sample in signs.train]
    assert told == [f"The image includes text descriptions: {s['source']['word']}." for s in signs.train]
    nothing = untold(signs.train)
    assert {sample["messages"][0]["content"][0]["aux"]["text"] for sample in nothing} == {UNTOLD}
    assert [sample["messages"][1] for sample in nothing] == [sample["messages"][1] for sample in signs.train]


def test_words_are_those_that_the_tokenizer_has(processor: Any) -> None:
    words = words_to_read(processor.tokenizer)
    assert {"bakery", "zebra"} <= set(words)
    assert len(set(words)) == len(words)
    assert not is_one_token(processor.tokenizer, "bakery")


def test_answers_depend_on_aux(processor: Any, tmp_path: Path) -> None:
    PIL.Image.new("RGB", (24, 20), (90, 90, 90)).save(tmp_path / "x.png")
    model = tiny_training.model(processor, initializer_range=0.5)
    add_mixers(model, {"layers": [0, 1, 2], "rank": 8, "num_heads": 2, "num_latents": 3, "compressor_depth": 1})
    items = [{"type": "image", "path": str(tmp_path / "x.png"), "aux": {"text": text}} for text in ("stop", "harbor")]
    samples = [tiny_training.sample("image", i, item, "What?", "stop") for i, item in enumerate(items)]
    cache = EncoderCache(tmp_path / "states", model, processor)
    cache.build(samples, progress=False)
    told = [answer.text for answer in answer_samples(model, processor, cache, samples)]
    assert told[0] != told[1]


def test_a_start_that_is_no_quickstart_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no model after stage 1"):
        compare_reading(OcrComparison(tmp_path / "out", tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("said", "share"), [("exit", 1.0), (" exit ", 1.0), ("exist", 0.75), ("ext", 0.75), ("", 0.0), ("boulevard", 0.0)]
)
def test_character_accuracy(said: str, share: float) -> None:
    assert character_accuracy(said, "exit") == pytest.approx(share)


def test_the_table_shows_means_and_deviations(capsys: pytest.CaptureFixture[str]) -> None:
    reading = reading_of([Answer({}, "exit", "exit"), Answer({}, "exist", "exit")])
    assert (reading.answers, reading.exact, reading.characters) == (2, 0.5, 0.875)

    def result(name: str, seed: int, exact: float) -> dict[str, Any]:
        readings = {"new words": {"answers": 40, "exact": exact, "characters": 0.5}}
        return {"model": name, "seed": seed, "readings": readings, "steps": 9, "trained_parameters": 1234}

    results = [result("B", 0, 0.5), result("A", 0, 0.1), result("B", 1, 0.7), result("A", 1, 0.1)]
    assert table_rows(results) == [
        ["model", "new words: exact", "new words: characters"],
        ["B", f"60.0 ± {100 * statistics.stdev([0.5, 0.7]):.1f}", "50.0 ± 0.0"],
        ["A", "10.0 ± 0.0", "50.0 ± 0.0"],
    ]
    print_table({"results": results, "seconds": 90.0, "read_exactly": {"new words": 0.99}})
    shown = capsys.readouterr().out
    assert "over 2 seeds, 9 steps each" in shown
    assert "OCR itself read 99.0 % of new words" in shown
    assert "1.5 minutes in all" in shown


def _words(samples: list[dict[str, Any]]) -> set[str]:
    return {sample["source"]["word"] for sample in samples}
