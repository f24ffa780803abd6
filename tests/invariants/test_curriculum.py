"""A whole curriculum on a tiny twin: it learns, it assembles what it says, and stopping it changes nothing."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_training
import torch
from safetensors.torch import load_file
from tiny_curriculum import EXPERTS, SPARSE_LAYERS, recipe

from unimoe import UniMoeForCausalLM
from unimoe.conversion.publishing.hub import code_files
from unimoe.errors import CheckpointError, DataError, RecipeError
from unimoe.trainers import curriculum
from unimoe.trainers.curriculum import load_start_model, run_curriculum
from unimoe.trainers.data.collator import RawCollator
from unimoe.trainers.data.conversations import ConversationDataset
from unimoe.trainers.recipe.recipe import StageConfig
from unimoe.trainers.recipe.recipe_file import load_recipe, save_recipe
from unimoe.trainers.recipe.recipe_parts import ExpertConfig, MoeConfig
from unimoe.trainers.saving.folder_lock import exclusive
from unimoe.trainers.stages.assembly import assemble, connector_owners, router_rows_from_means
from unimoe.trainers.stages.stage import Progress, StageReport


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and with a dense model that knows nothing."""
    return tiny_training.write_start(tmp_path_factory.mktemp("start"), 4)


def accuracy(model: UniMoeForCausalLM, processor: Any, dataset: ConversationDataset) -> float:
    """Share of samples whose whole answer is what greedy decoding gives."""
    batch = RawCollator(processor)(dataset.samples)
    labels = batch["labels"]
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "sample_ids", "group", "logits_to_keep")}
    with torch.no_grad():
        best = model(**inputs).logits[:, :-1].argmax(-1)
    right = (best == labels[:, 1:]) | (labels[:, 1:] == -100)
    return float(right.all(dim=1).float().mean())


@pytest.fixture(scope="module")
def finished(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("finished")

    def evaluate(report: Any, model: UniMoeForCausalLM, processor: Any) -> dict[str, float]:
        data = ConversationDataset([start / "train.jsonl"])
        return {name: accuracy(model, processor, data.select([name])) for name in ("image", "speech", "sound", "text")}

    made = recipe(start, out)
    return made, run_curriculum(made, on_stage_end=evaluate, progress_bar=False)


def test_the_curriculum_learns(finished: Any) -> None:
    _, (language, connectors, _, mixture) = finished
    assert language.evaluation["text"] == 1.0
    assert language.evaluation["image"] < 0.5
    assert connectors.evaluation["image"] >= 0.75
    for name in ("image", "speech", "sound", "text"):
        assert mixture.evaluation[name] >= 0.75, name
    assert mixture.loss_last < 0.8
    assert language.loss_last < 0.1 * language.loss_first


def test_the_model_of_a_stage_is_a_whole_bundle(finished: Any) -> None:
    made, _ = finished
    folder = Path(made.out) / "mixture" / "model"
    assert {path.name for path in folder.iterdir()} >= {path.name for path in code_files()}
    for file in ("config.json", "processor_config.json"):
        assert json.loads((folder / file).read_text())["auto_map"]
    assert "3 experts, 2 per token" in (folder / "README.md").read_text()


def test_reports_count_what_trains(finished: Any) -> None:
    made, (_, connectors, experts, mixture) = finished
    dense = load_start_model(made.model, made)

    def count(*parts: str) -> int:
        return sum(p.numel() for n, p in dense.named_parameters() if any(part in n for part in parts))

    assert connectors.trainable_parameters == count("_connector.")
    ffn = count("language_model.layers.0.mlp.", "language_model.layers.2.mlp.")
    assert [run.trainable_parameters for run in experts.runs] == [
        ffn + count("image_connector"),
        ffn + count("speech_connector", "sound_connector"),
        ffn,
    ]
    saved = json.loads((Path(made.out) / "mixture" / "stage.json").read_text())
    assert saved["trainable_parameters"] == mixture.trainable_parameters
    assert saved["evaluation"] == mixture.evaluation
    lines = (Path(made.out) / "mixture" / "losses.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == mixture.steps == 60
    assert set(last["groups"]) <= {"image", "speech", "sound", "text"}
    assert not (Path(made.out) / "mixture" / "checkpoints").exists()


def test_each_stage_changes_what_it_trains_and_nothing_else(finished: Any) -> None:
    made, (language, connectors, _, mixture) = finished
    folders = [made.model, language.model, connectors.model, mixture.model]
    states = [load_start_model(folder, made).state_dict() for folder in folders]

    def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
        return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}

    assert all("_tower" not in n and "_connector" not in n for n in changed(states[0], states[1]))
    assert all("_connector." in name for name in changed(states[1], states[2]))
    in_mixture = changed(states[2], states[3])
    assert all("_connector." in name or "self_attn." in name for name in in_mixture)
    assert any("self_attn.q_proj" in name for name in in_mixture)


def test_assembly_takes_every_tensor_from_its_run(finished: Any) -> None:
    made, (_, connectors, _, _) = finished
    dense = load_start_model(connectors.model, made)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    folders = [Path(made.out) / "experts" / expert.name for expert in EXPERTS]
    sparse = assemble(dense, made.moe, folders, seed=0).state_dict()
    for index, folder in enumerate(folders):
        expert = load_file(folder / "expert.safetensors")
        for layer in SPARSE_LAYERS:
            gate_up = sparse[f"model.language_model.layers.{layer}.mlp.experts.gate_up_proj"][index]
            assert torch.equal(gate_up[:48], expert[f"layers.{layer}.mlp.gate_proj.weight"])
            assert torch.equal(gate_up[48:], expert[f"layers.{layer}.mlp.up_proj.weight"])
            down = sparse[f"model.language_model.layers.{layer}.mlp.experts.down_proj"][index]
            assert torch.equal(down, expert[f"layers.{layer}.mlp.down_proj.weight"])
            assert not torch.equal(down, before[f"model.language_model.layers.{layer}.mlp.down_proj.weight"])
        assert "layers.1.mlp.up_proj.weight" not in expert
    trained = {"image": ["image_connector"], "audio": ["speech_connector", "sound_connector"], "text": []}
    for expert, names in trained.items():
        tensors = load_file(Path(made.out) / "experts" / expert / "connectors.safetensors")
        assert {name.partition(".")[0] for name in tensors} == set(names)
        for name, tensor in tensors.items():
            assert torch.equal(sparse[f"model.{name}"], tensor)
    assert torch.equal(
        sparse["model.language_model.layers.1.mlp.up_proj.weight"],
        before["model.language_model.layers.1.mlp.up_proj.weight"],
    )


def test_every_expert_starts_from_the_same_dense_model(start: Path, tmp_path: Path) -> None:
    made = recipe(start, tmp_path, factor=0.1)
    twins = [ExpertConfig("first", ["text"], steps=2), ExpertConfig("second", ["text"], steps=2)]
    made.stages = [dataclasses.replace(made.stages[2], experts=twins, train=["ffn"])]
    run_curriculum(made, progress_bar=False)
    first, second = (load_file(tmp_path / "experts" / name / "expert.safetensors") for name in ("first", "second"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_router_rows_prefer_the_experts_own_modality() -> None:
    generator = torch.Generator().manual_seed(0)
    means = [{"layers.2": torch.randn(16, generator=generator)} for _ in range(3)]
    rows = router_rows_from_means(means, scale=2.5)[2]
    centre = torch.stack([mean["layers.2"] for mean in means]).mean(0)
    for index, mean in enumerate(means):
        logits = rows @ (mean["layers.2"] - centre)
        assert float(logits[index]) == pytest.approx(2.5, rel=1e-4)
        assert int(logits.argmax()) == index
    same = router_rows_from_means([means[0], means[0]], scale=1.0)[2]
    assert torch.equal(same, torch.zeros(2, 16))


def test_connectors_belong_to_the_expert_of_their_own_modality(start: Path) -> None:
    model = UniMoeForCausalLM.from_pretrained(start / "model")
    assert connector_owners(model, [("a", ["video"]), ("b", ["image"]), ("c", ["speech", "sound"])]) == {
        "image_connector": "b",
        "speech_connector": "c",
        "sound_connector": "c",
    }
    # No expert of images: the one of videos trains the connector that videos share with them.
    assert connector_owners(model, [("a", ["text"]), ("b", ["video", "text"])]) == {"image_connector": "b"}


class StopError(Exception):
    """Stands for a kill: nothing catches it."""


def test_a_stopped_curriculum_ends_in_the_same_model(start: Path, tmp_path: Path) -> None:
    whole = recipe(start, tmp_path / "whole", factor=0.1)
    expected = run_curriculum(whole, progress_bar=False)
    parts = recipe(start, tmp_path / "parts", factor=0.1)
    reports, evaluated = None, set()

    def stop_once(report: StageReport, model: UniMoeForCausalLM, processor: Any) -> None:
        if report.name not in evaluated:
            evaluated.add(report.name)
            raise StopError

    for attempt in range(60):
        countdown = 2 + attempt % 4

        def stop(progress: Progress) -> None:
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                raise StopError

        try:
            reports = run_curriculum(parts, on_progress=stop, on_stage_end=stop_once, progress_bar=False)
            break
        except StopError:
            continue
    assert reports is not None, "the curriculum never ended"
    assert attempt > 6
    for before, after in zip(expected, reports, strict=True):
        assert (before.loss_first, before.loss_last) == (after.loss_first, after.loss_last)
    for run in ("language", "connectors", "experts/audio", "mixture"):
        files = [tmp_path / part / run / "losses.jsonl" for part in ("whole", "parts")]
        logs = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
        for name in ("step", "ce_loss", "groups"):
            assert [record[name] for record in logs[0]] == [record[name] for record in logs[1]]
    models = [UniMoeForCausalLM.from_pretrained(r[-1].model).state_dict() for r in (expected, reports)]
    assert [name for name, tensor in models[0].items() if not torch.equal(tensor, models[1][name])] == []


def test_a_killed_process_goes_on(start: Path, tmp_path: Path) -> None:
    made = recipe(start, tmp_path / "out", factor=0.1)
    made.stages = made.stages[:1]
    save_recipe(made, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == made
    # The process ends itself, without cleaning up.
    script = (
        "import os, sys; from unimoe.trainers.curriculum import run_curriculum; from unimoe.trainers.recipe.recipe_file import load_recipe\n"
        "run_curriculum(load_recipe(sys.argv[1]), progress_bar=False,\n"
        "    on_progress=lambda p: os._exit(9) if p.step == 4 else None)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "recipe.yaml")], capture_output=True, check=False
    )
    assert run.returncode == 9, run.stderr.decode()[-2000:]
    seen: list[int] = []
    run_curriculum(made, on_progress=lambda p: seen.append(p.step), progress_bar=False)
    assert seen == [4, 5]
    assert (tmp_path / "out" / "language" / "DONE").is_file()


def test_finished_stages_are_not_run_again(finished: Any) -> None:
    made, reports = finished
    leftover = Path(made.out) / "language" / "checkpoints"  # a killed process had only begun to clear
    (leftover / "checkpoint-1").mkdir(parents=True)
    again = run_curriculum(made, on_progress=lambda p: pytest.fail(f"{p.stage} was run again"), progress_bar=False)
    assert again == reports
    assert not leftover.exists()


def test_finished_runs_of_an_unfinished_stage_are_not_run_again(finished: Any, tmp_path: Path) -> None:
    made, reports = finished
    made = dataclasses.replace(made, out=str(shutil.copytree(made.out, tmp_path / "out")))
    for mark in ("DONE", "stage.json"):
        (Path(made.out) / "experts" / mark).unlink()
    leftover = Path(made.out) / "experts" / "audio" / "checkpoints"
    (leftover / "checkpoint-1").mkdir(parents=True)
    again = run_curriculum(made, on_progress=lambda p: pytest.fail(f"{p.stage} was run again"), progress_bar=False)
    assert again[2].steps == reports[2].steps
    assert [run.name for run in again[2].runs] == [run.name for run in reports[2].runs]
    assert not leftover.exists()


def test_other_settings_are_refused(finished: Any) -> None:
    made, _ = finished
    changed = dataclasses.replace(made, stages=[dataclasses.replace(made.stages[0], steps=51), *made.stages[1:]])
    with pytest.raises(
        RecipeError, match=r"'language' in .* was started with stage.steps = 50, the recipe now says 51"
    ):
        run_curriculum(changed, progress_bar=False)
    harmless = dataclasses.replace(made, stages=[dataclasses.replace(made.stages[0], save_every=7), *made.stages[1:]])
    run_curriculum(harmless, progress_bar=False)
    assert load_recipe(Path(made.out) / "recipe.yaml") == harmless


def test_fields_that_a_stage_did_not_know_had_their_defaults(finished: Any) -> None:
    made, reports = finished
    file = Path(made.out) / "language" / "settings.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    del settings["stage"]["packing"]
    file.write_text(json.dumps(settings), encoding="utf-8")
    assert run_curriculum(made, progress_bar=False) == reports


def test_finished_stages_may_be_moved(start: Path, tmp_path: Path) -> None:
    made = recipe(start, tmp_path / "here", factor=0.02)
    made.stages = made.stages[:2]
    run_curriculum(dataclasses.replace(made, stages=made.stages[:1]), progress_bar=False)
    (tmp_path / "here").rename(tmp_path / "there")
    made.out = str(tmp_path / "there")
    reports = run_curriculum(made, progress_bar=False)
    assert reports[1].model == str(tmp_path / "there" / "connectors" / "model")


def test_two_processes_do_not_share_a_folder(start: Path, tmp_path: Path) -> None:
    with exclusive(tmp_path), pytest.raises(CheckpointError, match=r"Another process .*is training in"):
        run_curriculum(recipe(start, tmp_path), progress_bar=False)


def test_a_time_limit_cuts_the_steps_once(start: Path, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        raise StopError

    made = recipe(start, tmp_path)
    made.stages = [dataclasses.replace(made.stages[0], steps=100_000, save_every=20, time_limit_seconds=1.5)]
    with pytest.raises(StopError):
        run_curriculum(made, on_progress=stop, progress_bar=False)
    plan = json.loads((tmp_path / "language" / "plan.json").read_text())
    assert 0 < plan["measured_seconds_per_step"] < 1
    (report,) = run_curriculum(made, progress_bar=False)
    assert report.steps == plan["steps"] < 100_000
    assert report.seconds < 10


def test_copies_of_the_dense_ffn_without_an_experts_stage(start: Path, tmp_path: Path) -> None:
    stage = StageConfig("mixture", "moe", ["router", "connectors"], steps=1, batch_size=4, save_every=0)
    made = recipe(
        start,
        tmp_path,
        stages=[stage],
        cache=None,
        moe=MoeConfig(sparse_layers=[1], num_experts=2, router_init="zeros", router_jitter_noise=0.01),
    )
    (report,) = run_curriculum(made, progress_bar=False)
    model = load_start_model(report.model, made)
    experts = model.model.language_model.layers[1].mlp.experts
    assert torch.equal(experts.gate_up_proj[0], experts.gate_up_proj[1])
    assert model.config.text_config.router_jitter_noise == 0.01


def test_the_recipes_multiple_reaches_cached_batches(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = set()

    class Spy(curriculum.CachedCollator):
        def __call__(self, samples: Any) -> Any:
            batch = super().__call__(samples)
            widths.add(batch["input_ids"].shape[1])
            return batch

    monkeypatch.setattr(curriculum, "CachedCollator", Spy)
    made = recipe(start, tmp_path, pad_to_multiple_of=50)
    made.stages = [dataclasses.replace(made.stages[0], steps=1)]
    run_curriculum(made, progress_bar=False)
    assert widths == {50}


@pytest.mark.parametrize("name", ["feature_noise", "token_dropout"])
@pytest.mark.parametrize("value", [0.1, {"image": 0.1}])
def test_noise_on_cached_states_without_a_cache_is_refused(start: Path, tmp_path: Path, name: str, value: Any) -> None:
    made = recipe(start, tmp_path, cache=None)
    made.stages = [dataclasses.replace(made.stages[0], **{name: value})]
    with pytest.raises(RecipeError, match=rf"stage 'language' has {name} = .* no cache: set cache .* or leave {name}"):
        run_curriculum(made, progress_bar=False)


def test_impossible_stages_say_so(start: Path, tmp_path: Path) -> None:
    made = recipe(start, tmp_path / "a", moe=MoeConfig(sparse_layers=[3]))
    made.stages = [dataclasses.replace(made.stages[2], steps=1)]
    with pytest.raises(RecipeError, match=r"moe.sparse_layers is \[3\]; this model has layers 0 to 2"):
        run_curriculum(made, progress_bar=False)
    made = recipe(start, tmp_path / "b")
    made.stages = [dataclasses.replace(made.stages[2], train=["ffn", "attention"])]
    with pytest.raises(
        RecipeError, match=r"of kind 'experts' trains \['attention'\]; here it can train \['aligners', "
    ):
        run_curriculum(made, progress_bar=False)
    made = recipe(start, tmp_path / "c")
    made.stages = [dataclasses.replace(made.stages[1], modalities=["video"])]
    with pytest.raises(DataError, match=r"modality or task \['video'\]"):
        run_curriculum(made, progress_bar=False)
