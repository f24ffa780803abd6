"""`unimoe inspect --data` and `--compare`: the figures are right, the page is whole, and bad input is told."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch

from unimoe import UniMoeForCausalLM, cli
from unimoe.errors import ConfigurationError, ConversionError, DataError
from unimoe.inspection.expert_weights import duplicates, expert_distances
from unimoe.inspection.favourites import favourite_words
from unimoe.inspection.look_inside import Request, look_inside
from unimoe.inspection.usage import Usage, chosen_samples
from unimoe.inspection.weight_changes import weight_changes
from unimoe.modeling_unimoe.routing_unimoe import UniMoeRouter
from unimoe.trainers.telemetry.routing_statistics import RoutingCounts


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_training.write_jsonl(tmp_path_factory.mktemp("data"), 4)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and an earlier one of which a router, an expert and nothing else differ; two experts of it are equal."""
    folder = tmp_path_factory.mktemp("models")
    processor = tiny_training.processor()
    model = tiny_training.model(processor, sparse=True)
    layers = model.model.language_model.layers
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            experts = getattr(layers[0].mlp.experts, name)
            experts[3] = experts[1] * (1 + 1e-5)
    save(model, processor, folder / "before")
    with torch.no_grad():
        layers[0].mlp.gate.weight.mul_(-1)
        layers[2].mlp.experts.down_proj[1].mul_(1.5)
    save(model, processor, folder / "after")
    return folder / "before", folder / "after"


def save(model: UniMoeForCausalLM, processor: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def looked(models: tuple[Path, Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("out") / "deep"
    request = Request(str(models[1]), [str(data)], compare=str(models[0]), batch_size=3, device="cpu", progress=False)
    facts, page = look_inside(request, out)
    assert json.loads((out / "inspect.json").read_text(encoding="utf-8")) == json.loads(json.dumps(facts))
    return facts, page.read_text(encoding="utf-8")


def test_loads_add_up(looked: Any) -> None:
    facts, _ = looked
    assert facts["samples"] == {"image": 4, "speech": 4, "sound": 4, "text": 4}
    assert facts["layers"] == [0, 2]
    assert set(facts["load"]) == {"text", "image", "speech", "sound"}
    assert set(facts["load_by_task"]["image"]) == {"text", "image"}
    assert facts["tokens"]["image"]["image"] == 4 * 4  # patches
    for rows in facts["load"].values():
        for row in rows:
            assert sum(row) == pytest.approx(1.0)
    for modality in ("text", "image"):
        parts = [
            (facts["tokens"][task].get(modality, 0), facts["load_by_task"][task].get(modality))
            for task in facts["tokens"]
        ]
        total = sum(count for count, _ in parts)
        mean = sum(count / total * table[0][0] for count, table in parts if table)
        assert facts["load"][modality][0][0] == pytest.approx(mean)


def test_batches_and_padding_change_nothing(
    looked: Any, models: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    request = Request(str(models[1]), [str(data)], batch_size=1, device="cpu", progress=False)
    facts, _ = look_inside(request, tmp_path)
    for name in ("tokens", "samples"):
        assert facts[name] == looked[0][name]
    for modality, rows in facts["load"].items():
        torch.testing.assert_close(torch.tensor(rows), torch.tensor(looked[0]["load"][modality]))


def test_the_difference_of_two_models(looked: Any) -> None:
    facts, _ = looked
    changed = {role["role"]: role["changed"] for role in facts["weights"]["roles"] if role["changed"]}
    assert changed == {"router": 1, "experts": 1}
    first, second = facts["weights"]["routers"]
    assert (first["layer"], first["drift"]) == (0, pytest.approx(2.0))
    assert first["row_cosines"] == pytest.approx([-1.0] * 4)
    assert (second["layer"], second["drift"]) == (2, 0.0)
    assert facts["weights"]["unmatched"] == []
    assert min(rows[0] for rows in facts["moved"].values()) > 0.2  # the worst experts are the best now
    assert set(facts["load_before"]) == set(facts["load"])


def test_equal_experts_are_found(looked: Any, models: tuple[Path, Path]) -> None:
    assert looked[0]["duplicate_experts"] == [[(1, 3)], []]
    config = UniMoeForCausalLM.from_pretrained(models[1])
    distances = expert_distances(models[1], config.config.text_config)
    experts = config.model.language_model.layers[2].mlp.experts
    flat = torch.cat((experts.gate_up_proj.flatten(1), experts.down_proj.flatten(1)), dim=1).detach()
    expected = (flat[0] - flat[1]).norm() / (flat[0].norm() + flat[1].norm()) * 2
    assert distances[1][0][1] == pytest.approx(float(expected), rel=1e-4)
    assert duplicates([[0, 2e-3], [2e-3, 0]]) == []


def test_the_page_is_whole(looked: Any) -> None:
    _, page = looked
    for text in (
        "image: image",
        "Co-activation",
        "layer 0: experts 1 and 3 have nearly equal weights",
        "What changed since",
    ):
        assert text in page, text
    assert not re.search(r"(src|href)=|url\(|http:|https:|<script", page)
    assert page.count("<table") == page.count("</table>")
    assert "nan" not in page.lower().replace("dominant", "")
    assert page.count("<div class=piece>") == 4 * 2  # a passage per task and layer


def test_words_that_an_expert_takes() -> None:
    usage = Usage(["t"], [1], RoutingCounts(1, 1, 2), [0])
    rows = {7: [100, 0], 8: [10, 90], 9: [50, 50], 10: [4, 0]}
    usage.words = {word: torch.tensor([row]).numpy() for word, row in rows.items()}
    usage.occurrences = {word: sum(row) for word, row in rows.items()}

    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return f"w{ids[0]}"

    ((first, second),) = favourite_words(usage, Tokenizer())
    assert [(word.text, word.share) for word in first] == [("w7", 1.0)]
    assert [(word.text, word.share) for word in second] == [("w8", 0.9)]


def test_a_limit_takes_as_many_of_every_task() -> None:
    samples = [
        {"id": f"{task}{i}", "task": task} for task, count in (("a", 50), ("b", 3), ("c", 40)) for i in range(count)
    ]
    chosen = chosen_samples(samples, 15)
    assert [sum(s["task"] == task for s in chosen) for task in "abc"] == [6, 3, 6]
    assert [s["id"] for s in chosen if s["task"] == "c"][:2] == ["c0", "c6"]
    assert len({s["id"] for s in chosen}) == 15
    assert chosen_samples(samples, None) == chosen_samples(samples, 99) == samples
    assert [s["task"] for s in chosen_samples(samples, 2)] in (["c", "a"], ["a", "c"], ["b", "c"], ["b", "a"])


def test_unreadable_samples_are_counted_and_listed(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    lines = data.read_text(encoding="utf-8").splitlines()
    bad = json.loads(lines[0].replace('"0.png"', '"none.png"').replace("image-0", "missing"))
    broken = json.loads(lines[0].replace('"0.png"', '"broken.png"').replace("image-0", "broken <b>"))
    (data.parent / "broken.png").write_bytes(b"no picture")
    file = data.parent / "some_bad.jsonl"
    file.write_text("\n".join([json.dumps(bad), json.dumps(broken), lines[3]]), encoding="utf-8")
    request = Request(str(models[1]), [str(file)], device="cpu", progress=False)
    facts, page = look_inside(request, tmp_path)
    assert sorted(sample["id"] for sample in facts["skipped"]) == ["broken <b>", "missing"]
    assert "broken &lt;b&gt;: " in page.read_text(encoding="utf-8")
    assert sum(facts["samples"].values()) == 1
    file.write_text(json.dumps(broken), encoding="utf-8")
    with pytest.raises(DataError, match="None of the 1 samples can be read; the first, broken <b>: MediaError"):
        look_inside(request, tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "FILE"], "--data and --compare need --out"),
        (["--out", "x"], "--data and --compare need --out"),
        (["--data", "none.jsonl", "--out", "x"], "none.jsonl"),
        (["--data", "FILE", "--out", "FILE"], "choose another --out"),
        (["--compare", "./nowhere", "--out", "x"], "'./nowhere' is no folder"),
        (["--data", "FILE", "--out", "x", "--device", "abacus"], "--device is 'abacus'"),
    ],
)
def test_garbage_is_told_in_one_line(
    models: tuple[Path, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(data) if option == "FILE" else option for option in options]
    assert cli.main(["inspect", str(models[1]), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len([line for line in error.splitlines() if line.startswith("unimoe: ")]) == 1


def test_the_command_prints_a_line_per_layer(
    models: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(models[1]), "--compare", str(models[0]), "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "0", "duplicates:", "1", "=", "3"]
    assert any("router      1 of 2 tensors differ" in line for line in lines)
    assert lines[-1] == f"The page is {tmp_path / 'inspect.html'}"
    page = (tmp_path / "inspect.html").read_text(encoding="utf-8")
    assert "Expert load per layer" not in page


def test_models_that_do_not_go_together(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    processor = tiny_training.processor()
    dense = tmp_path / "dense"
    save(tiny_training.model(processor), processor, dense)
    with pytest.raises(ConfigurationError, match="has no sparse layers"):
        look_inside(Request(str(dense), [str(data)]), tmp_path / "x")
    changes = weight_changes(dense, models[1])
    assert [name for name in changes.only_before if ".mlp.gate_proj" in name]
    assert [name for name in changes.only_after if ".mlp.experts" in name]
    facts, _ = look_inside(
        Request(str(models[1]), [str(data)], compare=str(dense), limit=4, device="cpu", progress=False), tmp_path / "y"
    )
    assert "so their loads are not compared" in facts["weights"]["unmatched"][-1]
    with pytest.raises(ConversionError):
        look_inside(Request(str(models[1]), [], compare=str(data.parent)), tmp_path / "z")


def test_dead_experts_are_told(models: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    model = UniMoeForCausalLM.from_pretrained(models[1])
    for module in model.modules():
        if isinstance(module, UniMoeRouter):
            with torch.no_grad():
                module.weight.zero_()  # ties: the same two experts get everything
    save(model, tiny_training.processor(), tmp_path / "dead")
    request = Request(str(tmp_path / "dead"), [str(data)], device="cpu", progress=False)
    facts, page = look_inside(request, tmp_path / "out")
    dead = facts["dead_experts"][1]
    assert [len(experts) for experts in facts["dead_experts"]] == [2, 2]
    assert facts["max_load_ratio"] == [2.0, 2.0]
    assert facts["entropy"]["all"] == [pytest.approx(0.5)] * 2
    assert f"layer 2: expert {dead[0]}" in page.read_text(encoding="utf-8")
