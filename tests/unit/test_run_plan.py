"""What `--plan` says before anything is trained, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_training

from unimoe import UniMoeForCausalLM
from unimoe.cli import main
from unimoe.conversion.checkpoints.meta_model import meta_model
from unimoe.errors import DataError, RecipeError, UniMoeError
from unimoe.trainers.curriculum import run_curriculum
from unimoe.trainers.parallel.settings import Parallel
from unimoe.trainers.planning.memory_plan import Degrees, degrees_of
from unimoe.trainers.planning.plan_data import look_at
from unimoe.trainers.planning.plan_model import assembled_config
from unimoe.trainers.planning.plan_text import format_duration, format_size
from unimoe.trainers.planning.run_plan import plan_run
from unimoe.trainers.recipe.recipe import Recipe, StageConfig
from unimoe.trainers.recipe.recipe_data import DataEntry
from unimoe.trainers.recipe.recipe_file import save_recipe
from unimoe.trainers.recipe.recipe_mixers import MixersConfig
from unimoe.trainers.recipe.recipe_parts import ExpertConfig, LoraSettings, MoeConfig
from unimoe.trainers.stages.assembly import assemble

PER_MODALITY = 6


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    processor = tiny_training.processor()
    tiny_training.write_jsonl(folder, PER_MODALITY)
    tiny_training.model(processor).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


def recipe(start: Path, *stages: StageConfig, **fields: Any) -> Recipe:
    made = {"model": str(start / "model"), "data": [str(start / "train.jsonl")], "out": str(start / "out")}
    return Recipe(**{**made, "stages": list(stages), "moe": MoeConfig(sparse_layers=[0, 2]), **fields})


CONNECTORS = StageConfig("connectors", modalities=["image", "speech"], steps=10, batch_size=4)
EXPERTS = StageConfig(
    "experts",
    "experts",
    ["ffn", "connectors"],
    experts=[ExpertConfig("image", ["image"]), ExpertConfig("text", ["text"])],
)
MIXTURE = StageConfig("mixture", "moe", ["router"], lora=LoraSettings(rank=4), packing=True, max_length=100)


def test_ranks_that_cannot_share_out_the_model_are_refused(start: Path) -> None:
    with pytest.raises(RecipeError, match=r"parallel\.tensor is 3.*a divisor of num_attention_heads \(4\)"):
        plan_run(recipe(start, CONNECTORS, parallel=Parallel(tensor=3)))


def test_the_plan_counts_what_the_stages_train(start: Path, tmp_path: Path) -> None:
    plan = plan_run(recipe(start, CONNECTORS, EXPERTS, MIXTURE))
    trained = {stage.model.name: stage.model.sizes.trained for stage in plan.stages}
    assert list(trained) == ["connectors", "experts/image", "mixture"]
    run = recipe(
        start, StageConfig("connectors", modalities=["image", "speech"], steps=1, batch_size=4), out=str(tmp_path)
    )
    (report,) = run_curriculum(run, progress_bar=False)
    assert trained["connectors"] == report.trainable_parameters
    assert plan.stages[1].model.sizes.set_aside == trained["experts/image"]
    mixture = plan.stages[2].model
    assert len(mixture.config.text_config.sparse_layers) == 2
    assert mixture.sizes.adapted_experts == mixture.sizes.experts.total > 0
    assert {row.role for row in mixture.table if row.trainable} == {"router", "experts", "attention"}


def test_the_planned_sparse_model_is_the_assembled_one(start: Path) -> None:
    moe = MoeConfig(sparse_layers=[0, 2], num_experts=4, router_init="normal", routing={"num_shared_experts": 1})
    dense = UniMoeForCausalLM.from_pretrained(start / "model")
    made = assemble(dense, moe, [], seed=0)
    planned = meta_model(assembled_config(dense.config, recipe(start, moe=moe)))
    assert {n: p.shape for n, p in planned.named_parameters()} == {n: p.shape for n, p in made.named_parameters()}


def test_mixers_that_a_recipe_adds_are_planned(start: Path) -> None:
    step = StageConfig("experts first", train=["compressor", "mixers"], modalities=["image"], mixer_choice="random")
    added = MixersConfig(layers=[1], rank=4, num_heads=2, num_latents=4, compressor_depth=1)
    (stage,) = plan_run(recipe(start, step, mixers=added)).stages
    assert {row.role for row in stage.model.table if row.trainable} == {"compressor", "mixers"}
    with pytest.raises(RecipeError, match="add a mixers section"):
        plan_run(recipe(start, step))


def test_tokens_samples_and_passes(start: Path) -> None:
    (stage,) = plan_run(recipe(start, CONNECTORS)).stages
    assert {group.names[0]: group.share for group in stage.groups} == {"image": 0.5, "speech": 0.5}
    mean = sum(group.tokens for group in stage.groups) / 2
    assert stage.batches is not None
    assert stage.batches.samples_per_step == 4
    assert stage.batches.tokens_per_step == pytest.approx(4 * mean)
    assert stage.batches.passes == pytest.approx(10 * 4 / (2 * PER_MODALITY))
    assert stage.seconds is None
    weighted = StageConfig(
        "a", modalities=["image", "speech"], modality_weights={"image": 3, "speech": 1}, batch_size=4
    )
    (stage,) = plan_run(recipe(start, weighted), tokens_per_second=100).stages
    image, speech = (next(g.tokens for g in stage.groups if g.names[0] == name) for name in ("image", "speech"))
    assert stage.batches is not None
    assert stage.batches.tokens_per_step == pytest.approx(4 * (0.75 * image + 0.25 * speech))
    assert stage.seconds == pytest.approx(1000 * stage.batches.tokens_per_step / 100)


def test_weights_of_data_sets_are_shares(start: Path) -> None:
    data = [
        DataEntry(str(start / "train.jsonl"), weight=3),
        DataEntry(str(start / "train.jsonl"), weight=1, max_samples=4, streaming=True),
    ]
    (stage,) = plan_run(recipe(start, StageConfig("a"), data=data)).stages
    # The first four samples are one of each.
    assert {group.names[0]: group.share for group in stage.groups} == pytest.approx(
        dict.fromkeys(("image", "speech", "sound", "text"), 0.25)
    )


def test_packed_rows_are_full(start: Path) -> None:
    text = StageConfig("a", train=["ffn"], modalities=["text"], batch_size=2, packing=True, max_length=100)
    (stage,) = plan_run(recipe(start, text)).stages
    (group,) = stage.groups
    assert stage.batches is not None
    assert stage.batches.row_length == 100
    assert stage.batches.samples_per_step == 2 * (100 // int(group.tokens))
    short = StageConfig("a", train=["ffn"], modalities=["image"], max_length=12)
    (stage,) = plan_run(recipe(start, short)).stages
    assert stage.batches is None
    assert "a medium is never cut" in stage.groups[0].faults[0]


def test_ranks_share_what_zero_and_experts_split(start: Path) -> None:
    whole, split = (
        plan_run(recipe(start, EXPERTS, StageConfig("m", "moe", ["experts"])), degrees).stages[1].batches
        for degrees in (Degrees(), Degrees(data=2, expert=2, zero=1))
    )
    assert whole is not None
    assert split is not None
    assert split.memory.bytes_of["gradients"] == whole.memory.bytes_of["gradients"] / 2
    assert split.memory.bytes_of["weights"] < whole.memory.bytes_of["weights"]
    assert split.tokens_per_step == 2 * whole.tokens_per_step
    assert degrees_of(Parallel(data=4, zero=3)) == Degrees(data=4, zero=3)


def test_an_earlier_start_tells_the_speed(start: Path, tmp_path: Path) -> None:
    (tmp_path / "connectors").mkdir()
    (tmp_path / "connectors" / "losses.jsonl").write_text('{"step": 4, "seconds": 2.0}\n{"step":', encoding="utf-8")
    (stage,) = plan_run(recipe(start, CONNECTORS, out=str(tmp_path)), tokens_per_second=1).stages
    assert stage.seconds == pytest.approx(10 * 0.5)
    assert "measured" in (stage.speed or "")


def test_large_files_are_looked_at_in_many_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file sorted by modality: its head alone would be all text."""
    file = tmp_path / "sorted.jsonl"
    answer = [{"role": "user", "content": "Say it. " * 20}, {"role": "assistant", "content": "It."}]
    records = [{"modality": name, "messages": answer} for name in ("text", "image", "speech") for _ in range(4000)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    monkeypatch.setattr("unimoe.trainers.planning.plan_data._WHOLE", 1000)
    header = look_at(DataEntry(str(file)), None, "speech")
    assert header is not None
    assert not header.exact
    assert header.count == pytest.approx(12_000, rel=0.01)
    found = [sample["modality"] for sample in header.samples]
    assert len(found) < 1000
    assert all(found.count(name) > len(found) / 4 for name in ("text", "image", "speech"))


REFUSED = [
    (StageConfig("a", train=["router"]), r"role 'router' is to be trained but this model has no such parameters"),
    (StageConfig("a", train=["ffn"], lora=LoraSettings(targets=["experts"])), r"'experts' but the model has none"),
    (StageConfig("a", chat_template="other"), r"chat_template 'other'"),
    (StageConfig("a", router_modality_loss_coef=0.1), r"names no experts"),
    (StageConfig("a", modalities=["smell"]), r"no samples of smell"),
    (
        StageConfig("a", "experts", ["ffn", "attention"], experts=[ExpertConfig("text", ["text"])]),
        r"trains \['attention'\]; here it can train",
    ),
]


@pytest.mark.parametrize(("stage", "message"), REFUSED)
def test_what_configurations_forbid_is_refused(start: Path, stage: StageConfig, message: str) -> None:
    with pytest.raises(UniMoeError, match=message):
        plan_run(recipe(start, stage))


def test_impossible_sparse_models_are_refused(start: Path) -> None:
    moe = MoeConfig(sparse_layers=[0, 7], num_experts=4, router_init="normal")
    with pytest.raises(RecipeError, match=r"has layers 0 to 2"):
        plan_run(recipe(start, StageConfig("a", "moe", ["router"]), moe=moe))
    (start / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read"):
        plan_run(recipe(start, CONNECTORS, data=[str(start / "cut.parquet")]))


def test_the_command_prints_the_whole_plan(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: Any, **__: Any) -> Any:
        raise AssertionError("the plan loads weights")

    monkeypatch.setattr(UniMoeForCausalLM, "from_pretrained", nothing)
    save_recipe(recipe(start, CONNECTORS, EXPERTS, MIXTURE), tmp_path / "recipe.yaml")
    assert main(["train", str(tmp_path / "recipe.yaml"), "--plan"]) == 0
    printed = capsys.readouterr().out
    for text in (
        f"train.jsonl: {4 * PER_MODALITY} samples",
        "connectors: trains connectors; 10 steps of 4 samples",
        "of its runs experts/image trains most:",
        "tokens: about ",
        "memory: about ",
        "8 rows of 100 tokens (text)",
        "time: unknown, because no speed was measured",
        "for the time: start the training, stop it with Ctrl-C when a stage has shown a loss",
    ):
        assert text in printed, text
    assert not (start / "out").exists()
    assert main(["train", str(tmp_path / "recipe.yaml"), "--plan", "--tokens-per-second", "1000"]) == 0
    assert "for the time:" not in capsys.readouterr().out


def test_sizes_and_durations_are_told_in_units_that_fit() -> None:
    assert [format_size(n) for n in (12, 3_400_000, 27.4e9, 3.2e15)] == ["12 B", "3.4 MB", "27.4 GB", "3,200 TB"]
    assert [format_duration(s) for s in (90, 600, 9000, 200_000)] == ["90 s", "10.0 min", "2.5 h", "2.3 days"]
