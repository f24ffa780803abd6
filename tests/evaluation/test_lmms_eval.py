"""lmms-eval itself, on a local task file with the tiny twin: the score is the one that our own evaluation gives."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny_evaluation
import tiny_media

from unimoe import cli

REPOSITORY = Path(__file__).resolve().parents[2]
TASK = """\
task: unimoe_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function local_functions.pictures
doc_to_text: !function local_functions.question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 512
process_results: !function local_functions.score
metric_list:
  - metric: letters
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """\
import PIL.Image


def pictures(doc):
    return [PIL.Image.open(doc["picture"]).convert("RGB")]


def question(doc, **kwargs):
    return doc["question"]


def score(doc, results):
    from unimoe.evaluation.metrics.option_letters import option_letters

    gold = [{"question_id": 0, "options": ("cat", "dog"), "answer": doc["answer"], "category": ""}]
    return {"letters": option_letters(gold, {0: results[0]}).score}
"""


def test_the_entry_point_is_declared() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"unimoe": "unimoe.evaluation.lmms_eval_adapter:manifest"}


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    records = json.loads((tmp_path / "data" / "mmbench" / "MMBench1.1.json").read_text(encoding="utf-8"))
    lines = []
    for record in records:
        question = record["conversations"][0]["value"].removeprefix("<image>\n")
        picture = str(tmp_path / "data" / "mmbench" / "images" / record["image"][0])
        lines.append(json.dumps({"question": question, "picture": picture, "answer": record["answer"][0]}) + "\n")
    (tmp_path / "local.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "local.yaml").write_text(TASK.format(file=tmp_path / "local.jsonl"), encoding="utf-8")
    (folder / "local_functions.py").write_text(FUNCTIONS, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def data(tmp_path: Path) -> Path:
    return tiny_evaluation.write_mmbench(tmp_path / "data", items=4)


def test_lmms_eval_gives_our_score(task_folder: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from lmms_eval import evaluator
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    from unimoe.evaluation.lmms_eval_adapter import UniMoeForLmmsEval, manifest
    from unimoe.evaluation.running import answerers

    generate = answerers._generate

    def lettered(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int) -> list[str]:
        # An untrained model never names a letter: one is made of what it said, so that the scores are not all zero.
        texts = generate(model, tokenizer, inputs, 6)
        return ["AB"[sum(text.encode()) % 2] for text in texts]

    monkeypatch.setattr(answerers, "_generate", lettered)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    assert MODEL_REGISTRY_V2.get_model_class("unimoe") is UniMoeForLmmsEval
    model = tiny_evaluation.save_multimodal(tmp_path / "model")
    results = evaluator.simple_evaluate(
        model="unimoe",
        model_args=f"pretrained={model},batch_size=3,device=cpu",
        tasks=["unimoe_local"],
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        bootstrap_iters=0,
    )
    theirs = results["results"]["unimoe_local"]["letters,none"]
    out = tmp_path / "out"
    options = ["--tasks", "mmbench", "--data", str(data), "--out", str(out), "--device", "cpu"]
    assert cli.main(["evaluate", str(model), *options]) == 0
    ours = json.loads((out / "results.json").read_text(encoding="utf-8"))["tasks"][0]
    assert theirs == ours["score"]
    said = {
        line["prediction"] for line in map(json.loads, (out / "predictions" / "mmbench.jsonl").open(encoding="utf-8"))
    }
    assert said <= {"A", "B"}
    assert theirs > 0


def test_media_of_every_kind(tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from unimoe.evaluation.lmms_eval_adapter import _cut, _medium

    sound = tiny_media.sound()
    assert _medium({"array": sound, "sampling_rate": 8000})["sampling_rate"] == 8000
    assert [_medium(path)["type"] for path in ("a.mp4", "b.WAV", "c.png")] == ["video", "audio", "image"]
    assert _medium(tiny_media.picture())["type"] == "image"
    assert _cut("one\n\ntwo", ["\n\n", "x"]) == "one"
