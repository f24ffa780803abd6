"""runs/moiie_*: the recipes say what the authors' scripts say, and run on a tiny twin from captions to the sparse model."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import recipe_checks
import tiny
import tiny_media
import tiny_training
import torch
from transformers import SiglipVisionConfig

from unimoe import UniMoeForCausalLM
from unimoe.conversion.dense.prepared_tokenizers import prepare_bunny_tokenizer
from unimoe.conversion.released.bunny_processor import build_bunny_processor
from unimoe.conversion.upcycling.group_presets import group_preset
from unimoe.errors import RecipeError
from unimoe.processing.chat_templates_unimoe import bunny_chat_templates
from unimoe.processing.processing_unimoe import UniMoeProcessor
from unimoe.trainers import curriculum
from unimoe.trainers.curriculum import run_curriculum
from unimoe.trainers.data.collator import RawCollator
from unimoe.trainers.recipe.recipe import Recipe
from unimoe.trainers.recipe.recipe_file import load_recipe

RUNS = Path(__file__).parents[2] / "runs"
BACKBONES = {"phi3": "<|endoftext|>", "llama3": "<|end_of_text|>"}
RECIPES = [(backbone, name) for backbone in BACKBONES for name in ("all", "moe_only")]
# Of the authors' scripts: thousands of samples, samples per step, rate.
STAGES = {"projector": (2000, 256, 5e-4), "sparse": (2000, 128, 2e-5), "moe_only": (2000, 128, 2e-5)}


def recipe_file(backbone: str, name: str) -> Path:
    return RUNS / f"moiie_{backbone}" / f"{name}.yaml"


@pytest.mark.parametrize(("backbone", "name"), RECIPES)
def test_the_values_are_the_authors(backbone: str, name: str) -> None:
    recipe = load_recipe(recipe_file(backbone, name))
    assert (recipe.seed, recipe.precision) == (234, "bfloat16")
    for stage in recipe.stages:
        thousands, batch, rate = STAGES[stage.name]
        assert stage.batch_size * stage.gradient_accumulation_steps == batch
        assert stage.steps == math.ceil(thousands * 1000 / batch)
        assert stage.warmup_steps == math.ceil(0.03 * stage.steps)
        assert (stage.learning_rate, stage.schedule, stage.weight_decay) == (rate, "cosine", 0.0)
    projector, second = recipe.stages
    assert (projector.train, projector.chat_template, projector.image_aspect_ratio) == (
        ["connectors"],
        "plain",
        "square",
    )
    assert (second.kind, second.name) == ("moe", {"all": "sparse"}.get(name, name))
    assert (second.image_aspect_ratio, second.router_aux_loss_coef) == ("pad", 2 * 0.001)
    everything = {"connectors", "router", "experts", "ffn", "attention", "norms", "embeddings", "head"}
    assert set(second.train) == (everything if name == "all" else {"router", "experts", "ffn"})
    assert (recipe.moe.num_experts, recipe.moe.num_experts_per_tok) == (4, 2)
    assert (recipe.moe.expert_groups, recipe.moe.modality_groups) == group_preset("moiie", 4)
    assert recipe.moe.sparse_layers == list(range(1, 32, 2))


def test_the_recipes_of_a_folder_differ_in_what_the_second_stage_trains() -> None:
    for backbone in BACKBONES:
        first, second = (load_recipe(recipe_file(backbone, name)) for name in ("all", "moe_only"))
        assert first.stages[1].train != second.stages[1].train
        for recipe in (first, second):
            recipe.stages[1] = replace(recipe.stages[1], name="second", train=["router"])
        assert first == second


@pytest.mark.parametrize(("backbone", "name"), RECIPES)
def test_every_value_names_its_source(backbone: str, name: str) -> None:
    assert recipe_checks.lines_without_source(recipe_file(backbone, name)) == []


def test_the_smoke_run_of_the_readme_is_a_recipe_that_loads() -> None:
    text = (RUNS / "moiie_phi3" / "README.md").read_text(encoding="utf-8")
    overrides = re.findall(r"--set (\S+)", text.partition("## A smoke run")[2].partition("\n## ")[0])
    recipe = load_recipe(recipe_file("phi3", "all"), [one.replace("$PWD", "/") for one in overrides])
    assert len(overrides) == 13
    assert [(stage.steps, stage.batch_size, stage.data, stage.modalities) for stage in recipe.stages] == [
        (2, 2, None, ["image"])
    ] * 2


# ---- the recipes on a tiny twin


def write_data(folder: Path) -> None:
    """Captions; and questions about one picture, about two and about none. In LLaVA's form."""
    for index, colour in enumerate(tiny_training.COLOURS.values()):
        PIL.Image.new("RGB", (12 + 4 * index, 20), colour).save(folder / f"{index}.png")
    captions, questions = [], []
    for index, name in enumerate(tiny_training.COLOURS):
        picture = f"{index}.png"
        captions.append(record("<image>\nDescribe it.", f"A {name} square.", image=picture))
        questions.append(record("<image>\nWhat is it?", name, image=picture))
        questions.append(record("Look at this <image> now.", name, image=picture))
        questions.append(record("First <image>, second <image>?", f"{name} and red", image=[picture, "0.png"]))
        questions.append(record(f"Say {name}.", name, "Again.", name))
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "questions.json").write_text(json.dumps(questions))


def record(*texts: str, **keys: Any) -> dict[str, Any]:
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)], **keys}


@pytest.fixture(scope="module", params=BACKBONES)
def start(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A backbone's name, and a folder with data and a dense model that has a SigLIP tower."""
    folder = tmp_path_factory.mktemp(f"moiie-{request.param}")
    write_data(folder)
    tokenizer = tiny_media.tokenizer()
    tokenizer.add_tokens([BACKBONES[request.param]], special_tokens=True)
    version = {"llama3": "llama"}.get(request.param, request.param)
    prepare_bunny_tokenizer(tokenizer, version)
    vision = SiglipVisionConfig(
        image_size=8, patch_size=4, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    absent = ("speech_config", "audio_config", "speech_connector", "sound_connector", "video_connector")
    absent += ("video_token_id", "audio_token_id", "sound_token_id")
    text = {
        "num_experts": 0,
        "sparse_layers": [],
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = tiny.config(
        {**text, "initializer_range": 0.08},
        vision_config=vision,
        image_connector=tiny.connector(input_size=32),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        **dict.fromkeys(absent),
    )
    processor = build_bunny_processor(config, tokenizer, version)
    processor.chat_template = bunny_chat_templates(version, tokenizer)
    torch.manual_seed(0)
    UniMoeForCausalLM(config).save_pretrained(folder / "start")
    processor.save_pretrained(folder / "start")
    return request.param, folder


def tiny_recipe(name: str, backbone: str, folder: Path, out: Path) -> Recipe:
    """A recipe with the sizes of the tiny twin; roles, routing, templates and the shape of pictures stay."""
    file = recipe_file(backbone, name)
    sizes: dict[str, Any] = {
        "model": folder / "start",
        "data": [str(folder / "questions.json")],
        "media_root": "null",
        "out": out,
        "moe.sparse_layers": [1],
        "projector.data": [str(folder / "captions.json")],
    }
    for stage in load_recipe(file).stages:
        small = {"steps": 3, "warmup_steps": 0, "batch_size": 2, "gradient_accumulation_steps": 1, "log_every": 1}
        sizes |= {f"{stage.name}.{field}": value for field, value in small.items()}
    return load_recipe(file, [f"{field}={value}" for field, value in sizes.items()])


class Watcher(RawCollator):
    """Notes what each stage trains with."""

    seen: list[tuple[str, str, set[str]]] = []

    def __init__(self, processor: Any, *options: Any) -> None:
        super().__init__(processor, *options)
        self.texts: set[str] = set()
        self.seen.append((processor.chat_template, processor.image_aspect_ratio, self.texts))

    def __call__(self, samples: Any) -> dict[str, Any]:
        batch = super().__call__(samples)
        self.texts.update(self.processor.tokenizer.batch_decode(batch["input_ids"]))
        return batch


@pytest.mark.parametrize("name", ["all", "moe_only"])
def test_a_recipe_runs_on_a_tiny_twin(
    name: str, start: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, folder = start
    monkeypatch.setattr(curriculum, "RawCollator", Watcher)
    monkeypatch.setattr(Watcher, "seen", [])
    trained: dict[str, set[str]] = {}

    def look(stage: str, rows: Any, steps: int) -> None:
        trained[stage] = {row.role for row in rows if row.trainable}

    reports = run_curriculum(tiny_recipe(name, backbone, folder, tmp_path), on_stage_start=look, progress_bar=False)
    assert all(report.steps == 3 and math.isfinite(report.loss_last) for report in reports)
    projector, sparse = (Path(report.model) for report in reports)
    assert recipe_checks.changed(folder / "start", projector) == {"connector"}

    captions, questions = Watcher.seen
    assert captions[1:2] + questions[1:2] == ("square", "pad")
    assert all("USER" not in text and " square.\n" in text for text in captions[2])
    assert all("USER: " in text and BACKBONES[backbone] in text for text in questions[2])

    everything = {"connectors", "router", "experts", "ffn", "attention", "norms", "embeddings", "head"}
    assert list(trained.values()) == [{"connectors"}, everything if name == "all" else {"router", "experts", "ffn"}]
    model = UniMoeForCausalLM.from_pretrained(sparse)
    routing = model.config.text_config
    assert (routing.sparse_layers, routing.router_aux_loss_layers) == ([1], "joint")
    assert routing.expert_groups == {"vision": [0, 1, 2], "language": [1, 2, 3]}
    experts = model.model.language_model.layers[1].mlp.experts.down_proj
    start_ffn = UniMoeForCausalLM.from_pretrained(projector).model.language_model.layers[1].mlp.down_proj.weight
    assert all(not torch.equal(expert, start_ffn) for expert in experts)
    moved = recipe_checks.changed(projector, sparse_without_moe(sparse, projector, tmp_path))
    unmoved = {"tower"} if name == "all" else {"tower", "connector", "self_attn", "norm", "embed_tokens", "lm_head"}
    assert not moved & unmoved
    assert "mlp." in moved
    processor = UniMoeProcessor.from_pretrained(sparse)
    assert processor.image_aspect_ratio == "pad"
    assert set(processor.chat_template) == {"default", "plain"}


def sparse_without_moe(sparse: Path, dense: Path, scratch: Path) -> Path:
    """The dense model with everything of a sparse one but its sparse layers, which have nothing to compare with."""
    model = UniMoeForCausalLM.from_pretrained(dense)
    state = UniMoeForCausalLM.from_pretrained(sparse).state_dict()
    model.load_state_dict({name: state.get(name, tensor) for name, tensor in model.state_dict().items()})
    model.save_pretrained(scratch / "compared")
    return scratch / "compared"


# ---- what a stage may say about the processor


def test_a_template_that_the_processor_lacks_is_named(start: tuple[str, Path], tmp_path: Path) -> None:
    backbone, folder = start
    recipe = tiny_recipe("all", backbone, folder, tmp_path)
    recipe.stages[0].chat_template = "caption"
    with pytest.raises(RecipeError, match=r"chat_template 'caption', but .* those named \['default', 'plain'\]"):
        run_curriculum(recipe, progress_bar=False)


def test_a_shape_of_its_own_does_not_go_with_a_cache(start: tuple[str, Path], tmp_path: Path) -> None:
    backbone, folder = start
    recipe = tiny_recipe("all", backbone, folder, tmp_path)
    recipe.cache = str(tmp_path / "cache")
    with pytest.raises(RecipeError, match="image_aspect_ratio of its own, but the cache"):
        run_curriculum(recipe, progress_bar=False)


def test_routing_of_the_sparse_model_is_checked_before_anything_runs(start: tuple[str, Path]) -> None:
    for text, message in (
        ("{router_magic: 1}", r"moe\.routing names \['router_magic'\]; it may set .*router_aux_loss_layers"),
        ("{router_jitter_noise: 1}", r"routing names \['router_jitter_noise'\]"),
        ("3", "moe.routing is 3"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe(recipe_file(start[0], "all"), [f"moe.routing={text}"])
