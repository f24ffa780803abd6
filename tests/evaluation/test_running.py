"""Runs: batches, processes, crashes, resuming, failures; through the command line with tiny models."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_evaluation
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from unimoe import cli
from unimoe.errors import DataError, UniMoeError
from unimoe.evaluation.results import read_results
from unimoe.evaluation.running import answerers, runner
from unimoe.evaluation.running.batches import BatchAnswerer
from unimoe.evaluation.running.predictions import PredictionStore
from unimoe.evaluation.running.requests import Request
from unimoe.evaluation.tasks.catalogue import find_tasks
from unimoe.quickstart import evaluate as quickstart
from unimoe.trainers.caches.encoder_cache import EncoderCache


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_evaluation.save_multimodal(tmp_path_factory.mktemp("multimodal"))


@pytest.fixture(scope="module")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_evaluation.save_text_only(tmp_path_factory.mktemp("text"))


def evaluate(model: Path, tasks: str, data: Path, out: Path, *options: str) -> int:
    return cli.main(
        ["evaluate", str(model), "--tasks", tasks, "--data", str(data), "--out", str(out), "--device", "cpu", *options]
    )


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Answers of four tokens; the list grows by the size of every batch that is generated."""
    sizes: list[int] = []
    generate = answerers._generate

    def counted(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int) -> list[str]:
        sizes.append(len(inputs["input_ids"]))
        return generate(model, tokenizer, inputs, 4)

    monkeypatch.setattr(answerers, "_generate", counted)
    monkeypatch.setattr(runner, "open_answerer", loaded_once)
    return sizes


loaded_once = functools.cache(answerers.open_answerer)


def test_predictions_are_the_models_own(multimodal: Path, short_answers: list[int], tmp_path: Path) -> None:
    data = tiny_evaluation.write_mmbench(tmp_path / "data")
    assert evaluate(multimodal, "mmbench", data, tmp_path / "out", "--batch-size", "4") == 0
    assert short_answers == [4, 2]
    model = AutoModelForCausalLM.from_pretrained(multimodal).eval()
    processor = AutoProcessor.from_pretrained(multimodal)
    predictions = lines(tmp_path / "out" / "predictions" / "mmbench.jsonl")
    assert [p["id"] for p in predictions] == [f"m{i}" for i in range(6)]
    for number, prediction in enumerate(predictions):
        picture = data / "mmbench" / "images" / f"{number // 2}.png"
        question = (
            f"Which is number {number}?\nOptions:\nA.cat\nB.dog\nAnswer the question using a single word or phrase."
        )
        content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        assert prediction["prompt"] == processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert prediction["prediction"] == processor.tokenizer.decode(output, skip_special_tokens=True).strip()


def test_a_run_writes_everything(multimodal: Path, short_answers: list[int], tmp_path: Path, capsys: Any) -> None:
    data = tiny_evaluation.write_mmbench(tmp_path / "data", broken=(1,), missing=(4,))
    out = tmp_path / "out"
    assert evaluate(multimodal, "mmbench,starter_text", data, out, "--limit", "6") == 0
    screen = capsys.readouterr().out
    assert "mmbench: 1 items lack media, e.g. missing4.png. Pictures: MMBench's" in screen
    assert "mmbench: 1 items could not be answered, e.g. m1: " in screen
    result, text = read_results(out)
    assert (result["n"], result["failed"], result["clusters"]) == (4, 2, 3)
    assert (text["n"], text["modality"]) == (6, "text")
    assert result["chance"] == 50.0
    assert result["low"] <= result["score"] <= result["high"]
    errors = {p["id"]: p["error"] for p in lines(out / "predictions" / "mmbench.jsonl") if "error" in p}
    assert set(errors) == {"m1", "m4"}
    assert errors["m4"] == "missing: missing4.png"
    assert f"{data / 'mmbench' / 'images' / 'broken1.png'}" in errors["m1"]
    assert len(lines(out / "scores" / "mmbench.jsonl")) == 4
    for name in ("report.md", "report.html", "plots/image.svg", "plots/text.svg", "plots/gain_over_chance.svg"):
        assert (out / name).stat().st_size > 500, name
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "| mmbench | image |" in report
    few = "Fewer than 30 independent items: mmbench (3), starter_text (6). The interval of so few"
    assert all(few in place for place in (screen, report, (out / "report.html").read_text(encoding="utf-8")))
    assert "arXiv:2405.11273" in report
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://", "http").split("<body>")[0]


def test_a_killed_run_goes_on(multimodal: Path, short_answers: list[int], tmp_path: Path) -> None:
    data, out = tiny_evaluation.write_mmbench(tmp_path / "data"), tmp_path / "out"
    assert evaluate(multimodal, "mmbench", data, out) == 0
    whole = (out / "predictions" / "mmbench.jsonl").read_bytes()
    kept = whole.split(b"\n")[:4]
    # As a kill leaves it: a part with three whole lines and a torn one, nothing joined.
    (out / "predictions" / "mmbench.jsonl").unlink()
    (out / "predictions" / "mmbench.part-00000.jsonl").write_bytes(b"\n".join(kept[:3]) + b"\n" + kept[3][:-9])
    del short_answers[:]
    assert evaluate(multimodal, "mmbench", data, out) == cli.EXIT_ERROR  # not without --resume
    assert evaluate(multimodal, "mmbench", data, out, "--resume") == 0
    assert sum(short_answers) == 3
    assert (out / "predictions" / "mmbench.jsonl").read_bytes() == whole
    del short_answers[:]
    assert evaluate(multimodal, "mmbench", data, out, "--resume") == 0
    assert not short_answers


def test_failed_items_are_tried_again(multimodal: Path, short_answers: list[int], tmp_path: Path) -> None:
    data, out = tiny_evaluation.write_mmbench(tmp_path / "data", broken=(1,)), tmp_path / "out"
    evaluate(multimodal, "mmbench", data, out)
    assert read_results(out)[0]["failed"] == 1
    images = data / "mmbench" / "images"
    (images / "broken1.png").write_bytes((images / "0.png").read_bytes())
    del short_answers[:]
    evaluate(multimodal, "mmbench", data, out, "--resume")
    assert short_answers == [1]
    assert read_results(out)[0]["failed"] == 0


@pytest.mark.parametrize("options", [("--limit", "2"), ("--prompts", "moai"), ("--max-new-tokens", "3")])
def test_another_run_is_not_resumed(
    options: tuple[str, ...], multimodal: Path, short_answers: list[int], tmp_path: Path, capsys: Any
) -> None:
    data, out = tiny_evaluation.write_mmbench(tmp_path / "data"), tmp_path / "out"
    evaluate(multimodal, "mmbench", data, out)
    assert evaluate(multimodal, "mmbench", data, out, "--resume", *options) == cli.EXIT_ERROR
    assert "holds another run" in capsys.readouterr().err


def test_more_tasks_join_a_run(multimodal: Path, short_answers: list[int], tmp_path: Path) -> None:
    data, out = tiny_evaluation.write_mmbench(tmp_path / "data"), tmp_path / "out"
    evaluate(multimodal, "mmbench", data, out, "--limit", "4")
    evaluate(multimodal, "starter_text", data, out, "--limit", "4", "--resume")
    assert [row["name"] for row in read_results(out)] == ["mmbench", "starter_text"]
    assert evaluate(multimodal, "mmbench", data, out, "--limit", "4", "--resume") == 0


def test_answers_are_those_of_the_quickstarts_own_table(
    multimodal: Path, short_answers: list[int], tmp_path: Path
) -> None:
    tasks = find_tasks(["starter_image", "starter_speech", "starter_text"])
    planned = runner.plan_run(tasks, tmp_path, tmp_path / "out", runner.Options("m", limit=2))
    samples = [item.record for plan in planned for item in plan.items]
    model = loaded_once(str(multimodal), torch.device("cpu")).model
    processor = AutoProcessor.from_pretrained(multimodal)
    cache = EncoderCache(tmp_path / "cache", model, processor, dtype="float32")
    cache.build(samples)
    expected = {a.sample["id"]: a for a in quickstart.answer_samples(model, processor, cache, samples)}
    names = ",".join(task.name for task in tasks)
    assert evaluate(multimodal, names, tmp_path, tmp_path / "out", "--limit", "2", "--max-new-tokens", "4") == 0
    for plan in planned:
        for prediction in lines(tmp_path / "out" / "predictions" / f"{plan.task.name}.jsonl"):
            whole = expected[prediction["id"]].text
            assert whole.startswith(prediction["prediction"])
            assert prediction["prediction"] or not whole


class OneOfTwo:
    """A process of two that run after each other."""

    device, count = "cpu", 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def wait(self) -> None:
        pass


def test_two_processes_share_the_items(multimodal: Path, short_answers: list[int], tmp_path: Path) -> None:
    data = tiny_evaluation.write_mmbench(tmp_path / "data", items=5)
    texts = []
    for out, ranks in ((tmp_path / "one", [OneOfTwo(0)]), (tmp_path / "two", [OneOfTwo(0), OneOfTwo(1)])):
        options = runner.Options(str(multimodal))
        planned = runner.plan_run(find_tasks(["mmbench"]), data, out, options)
        for processes in ranks:
            processes.count = len(ranks)
            runner.answer_all(planned, options, out, processes)  # type: ignore[arg-type]
        parts = sorted((out / "predictions").glob("*.part-*"))
        assert [len(lines(part)) for part in parts] == ([5] if len(ranks) == 1 else [3, 2])
        joined = PredictionStore(out / "predictions", "mmbench").join([item.id for item in planned[0].items])
        texts.append({key: record["prediction"] for key, record in joined.items()})
        assert not list((out / "predictions").glob("*.part-*"))
    assert texts[0] == texts[1]


def test_text_tasks_work_on_any_language_model(text_only: Path, short_answers: list[int], tmp_path: Path) -> None:
    data, out = tiny_evaluation.write_scienceqa(tmp_path / "data"), tmp_path / "out"
    assert evaluate(text_only, "scienceqa_text", data, out) == 0
    first = lines(out / "predictions" / "scienceqa_text.jsonl")[0]
    expected = "Which 0?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly.\nAnswer:"
    assert first["prompt"] == expected
    assert read_results(out)[0]["n"] == 5


def test_the_likeliest_letter(text_only: Path, short_answers: list[int], tmp_path: Path) -> None:
    data, out = tiny_evaluation.write_scienceqa(tmp_path / "data", items=6), tmp_path / "out"
    assert evaluate(text_only, "scienceqa_text", data, out, "--likeliest-letter", "--batch-size", "4") == 0
    assert not short_answers  # nothing was generated
    answerer = loaded_once(str(text_only), torch.device("cpu"))
    letters = answerer.tokenizer.encode("AB", add_special_tokens=False)
    for prediction in lines(out / "predictions" / "scienceqa_text.jsonl"):
        ids = answerer.tokenizer(prediction["prompt"], return_tensors="pt")["input_ids"]
        logits = answerer.model(ids).logits[0, -1]
        assert prediction["prediction"] == "AB"[int(logits[letters].argmax())]
    assert evaluate(text_only, "scienceqa_text", data, out, "--resume") == cli.EXIT_ERROR


def test_a_model_without_eyes_gets_no_pictures(text_only: Path, tmp_path: Path, capsys: Any) -> None:
    data = tiny_evaluation.write_mmbench(tmp_path / "data")
    assert evaluate(text_only, "mmbench", data, tmp_path / "out") == cli.EXIT_ERROR
    assert "takes no image, which mmbench is about" in capsys.readouterr().err


def test_the_plan_loads_no_model(tmp_path: Path, capsys: Any) -> None:
    data = tiny_evaluation.write_mmbench(tmp_path / "data")
    assert evaluate(tmp_path / "no-model", "mmbench", data, tmp_path / "out", "--plan") == 0
    assert "mmbench  dev    6" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_without_a_single_picture_nothing_starts(tmp_path: Path, capsys: Any) -> None:
    data = tiny_evaluation.write_mmbench(tmp_path / "data", missing=tuple(range(6)))
    (tmp_path / "no-model").mkdir()
    (tmp_path / "no-model" / "config.json").write_text("{}")
    assert evaluate(tmp_path / "no-model", "mmbench", data, tmp_path / "out") == cli.EXIT_ERROR
    assert "none of 6 items has its media, e.g. missing0.png; put them in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "mmbench"), "MODEL is missing"),
        (("m", "--tasks", "x", "--out", "o", "--limit", "0"), "--limit is 0"),
        (("m", "--tasks", "x", "--out", "o", "--batch-size", "many"), "--batch-size is 'many'"),
        (("m", "--tasks", "x", "--out", "o", "--judge", "http://h"), "--judge needs --judge-model"),
        (("--compare", "a", "b"), "is a the --out of an evaluation"),
    ],
)
def test_mistakes_are_named(
    options: tuple[str, ...], message: str, capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", *options]) == cli.EXIT_ERROR
    assert message in capsys.readouterr().err


class Scripted:
    """Answers with the question's own text; runs out of memory above a size, and refuses some questions."""

    kinds = frozenset({"image"})

    def __init__(self, fits: int = 1000, refused: Sequence[str] = ()) -> None:
        self.fits, self.refused, self.sizes = fits, set(refused), []

    def prompts(self, requests: Sequence[Request]) -> list[str]:
        return [request.text for request in requests]

    def prepare(self, requests: Sequence[Request]) -> list[str]:
        for request in requests:
            if request.text in self.refused:
                raise UniMoeError(f"{request.text} is refused")
        return self.prompts(requests)

    def generate(self, inputs: list[str], max_new_tokens: int) -> list[str]:
        if len(inputs) > self.fits:
            raise torch.OutOfMemoryError("no memory")
        self.sizes.append(len(inputs))
        return inputs


def run_scripted(answerer: Scripted, batch_size: int | None, texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    got: list[dict[str, Any]] = []
    BatchAnswerer(answerer, batch_size).run([Request(text, text) for text in texts], 4, got.extend)
    return {record["id"]: record for record in got}


def test_batches_shrink_until_they_fit() -> None:
    answerer = Scripted(fits=3)
    found = run_scripted(answerer, None, [f"q{i}" for i in range(9)])
    assert answerer.sizes == [2, 2, 2, 2, 1]
    assert {key: record["prediction"] for key, record in found.items()} == {f"q{i}": f"q{i}" for i in range(9)}


def test_a_batch_size_that_was_asked_for_stays() -> None:
    with pytest.raises(UniMoeError, match="batches of 4: give a smaller --batch-size"):
        run_scripted(Scripted(fits=3), 4, [f"q{i}" for i in range(9)])


def test_one_that_never_fits_fails_alone() -> None:
    assert run_scripted(Scripted(fits=0), 1, ["a"])["a"]["error"] == "out of memory"


def test_one_bad_item_does_not_spoil_its_batch() -> None:
    found = run_scripted(Scripted(refused=["b"]), 4, ["a", "b", "c"])
    assert found["b"]["error"] == "UniMoeError: b is refused"
    assert [found[key]["prediction"] for key in "ac"] == ["a", "c"]


def test_a_bug_in_generation_is_no_failed_item() -> None:
    class Broken(Scripted):
        def generate(self, inputs: list[str], max_new_tokens: int) -> list[str]:
            raise ValueError("bug")

    with pytest.raises(ValueError, match="bug"):
        run_scripted(Broken(), 4, ["a", "b"])


def test_damage_in_the_middle_of_a_file_is_told(tmp_path: Path) -> None:
    store = PredictionStore(tmp_path, "t")
    store.append([{"id": 1, "prediction": "a"}])
    file = tmp_path / "t.part-00000.jsonl"
    file.write_bytes(b'{"id": \n' + file.read_bytes())
    with pytest.raises(DataError, match=r"t.part-00000.jsonl, line 1 is damaged"):
        store.read()


def test_a_torn_line_at_any_byte_is_dropped(tmp_path: Path) -> None:
    records = [{"id": i, "prediction": "grün" * i} for i in range(3)]
    store = PredictionStore(tmp_path, "t")
    store.append(records)
    file = tmp_path / "t.part-00000.jsonl"
    whole = file.read_bytes()
    for cut in range(len(whole)):
        file.write_bytes(whole[:cut])
        complete = whole[:cut].count(b"\n")
        assert list(store.read().values()) == records[:complete]
        store.append([records[2]])
        assert list(store.read()) == (sorted({*range(complete), 2}))


@pytest.mark.parametrize(
    "line",
    [
        '{"id": 1, "prediction": null}',
        '{"id": 1, "prediction": 5}',
        '{"id": 1, "prediction": "\\ud800"}',
        '{"id": 1, "error": "e", "prediction": null}',
        '{"id": 1}',
        '{"id": [1], "prediction": "a"}',
        '{"id": null, "prediction": "a"}',
        '{"prediction": "a"}',
        "5",
    ],
)
def test_what_is_no_prediction_is_told(line: str, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"id": 0, "prediction": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"t\.jsonl, line 2 is damaged .*remove the line"):
        PredictionStore(tmp_path, "t").read()


@pytest.mark.parametrize("end", [b'{"id": 2, "pred\n', b"\0\0\0\n", b"\n", b"\xff\n", b"\0\0"])
def test_nothing_is_written_behind_a_damaged_last_line(end: bytes, tmp_path: Path) -> None:
    store = PredictionStore(tmp_path, "t")
    records = [{"id": i, "prediction": "a"} for i in range(3)]
    store.append(records[:1])
    file = tmp_path / "t.part-00000.jsonl"
    file.write_bytes(file.read_bytes() + end)
    assert list(store.read()) == [0]
    store.append(records[1:])
    assert list(store.join([0, 1, 2]).values()) == records


def test_half_a_surrogate_pair_is_a_failed_item(text_only: Path, short_answers: list[int], tmp_path: Path) -> None:
    requests = [Request(0, "Which?"), Request(1, "Which \ud83d?")]
    store = PredictionStore(tmp_path, "t")
    BatchAnswerer(loaded_once(str(text_only), torch.device("cpu")), 2).run(requests, 4, store.append)
    found = store.join([0, 1])
    assert "half of a surrogate pair" in found[1]["error"]
    assert found[1]["prompt"] == "Which \ud83d?"
    assert "prediction" in found[0]
    assert store.read() == found
    assert (tmp_path / "t.jsonl").read_text(encoding="utf-8").count("\\ud83d") == 1
