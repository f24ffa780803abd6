"""Mixers in a curriculum: both steps, from data whose images carry aux, on a model that had none."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny_training
import torch

import unimoe
from unimoe import UniMoeForCausalLM
from unimoe.errors import ConversationError, RecipeError
from unimoe.processing.perception.choice import PerceiverChoice
from unimoe.processing.perception.results import Perception, Segment, Segmentation
from unimoe.trainers.caches.encoder_cache import EncoderCache
from unimoe.trainers.caches.perceived import PerceivedCollator
from unimoe.trainers.caches.perception_cache import PerceptionCache
from unimoe.trainers.curriculum import run_curriculum
from unimoe.trainers.data.collator import CachedCollator, RawCollator
from unimoe.trainers.data.conversations import ConversationDataset
from unimoe.trainers.recipe.recipe import Recipe, StageConfig
from unimoe.trainers.recipe.recipe_file import load_recipe
from unimoe.trainers.recipe.recipe_mixers import MixersConfig
from unimoe.trainers.stages.mixer_stage import add_mixers

MIXERS = MixersConfig([0, 2], rank=8, num_heads=2, num_latents=3, compressor_depth=1, compressor_heads=2)
RECIPE = Path(unimoe.__file__).parent / "trainers" / "recipes" / "moai_two_steps.yaml"


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_training.processor()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ConversationDataset:
    """Pictures that are all alike: the aux text says what to answer."""
    folder = tmp_path_factory.mktemp("data")
    PIL.Image.new("RGB", (24, 20), (90, 90, 90)).save(folder / "same.png")
    PIL.Image.new("RGB", (16, 16), (0, 128, 0)).save(folder / "map.png")
    samples = []
    for index in range(8):
        colour = list(tiny_training.COLOURS)[index % 2]
        text = f"The image includes text descriptions: {colour}."
        aux = {"text": text, "map": "map.png"} if index % 4 < 2 else text
        image = {"type": "image", "path": "same.png", "aux": aux}
        samples.append(tiny_training.sample("image", index, image, "What does it say?", colour))
    samples += [tiny_training.sample("text", i, None, "Say red.", "red") for i in range(2)]
    return ConversationDataset.from_samples(samples, media_root=folder)


def stage(name: str, **fields: Any) -> StageConfig:
    train = ["compressor", "mixers"] + (["mixer_gates"] if fields.get("mixer_choice") != "random" else [])
    fields = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, **fields}
    return StageConfig(name, train=train, modalities=["image"], **fields)


def test_batches_carry_aux_and_say_what_is_prompt(processor: Any, dataset: ConversationDataset) -> None:
    plain = {"id": "p", "text": "some words", "modality": "text", "task": "plain_text"}
    batch = RawCollator(processor)([dataset[0], plain, dataset[2], dataset[8]])
    places = batch["aux_input_ids"].shape[1] + 4
    assert batch["aux_attention_mask"].shape == (4, places)
    assert batch["aux_attention_mask"].any(dim=1).tolist() == [True, False, True, False]
    assert batch["aux_attention_mask"][:, -4:].all(dim=1).tolist() == [True, False, False, False]
    words = processor.tokenizer.decode(batch["aux_input_ids"][0][batch["aux_attention_mask"][0, :-4].bool()])
    assert "text descriptions: red." in words
    answers = batch["labels"] != -100
    for prompt, kept, learned in zip(batch["prompt_mask"], batch["attention_mask"], answers, strict=True):
        first = int(learned.nonzero()[0])
        assert torch.equal(prompt[:first], kept[:first])
        assert not prompt[first:].any()


def test_cached_batches_carry_the_same_aux(processor: Any, dataset: ConversationDataset, tmp_path: Path) -> None:
    model = tiny_training.model(processor)
    cache = EncoderCache(tmp_path, model, processor)
    samples = [dataset[0], dataset[2]]
    cache.build(samples, progress=False)
    raw, cached = RawCollator(processor)(samples), CachedCollator(processor, cache)(samples)
    for name in ("aux_input_ids", "aux_attention_mask", "aux_pixel_values", "prompt_mask"):
        assert torch.equal(raw[name], cached[name]), name
    add_mixers(model, {**vars(MIXERS)})
    model.eval()
    keys = {"input_ids", "attention_mask", "pixel_values", "image_encoder_states", "prompt_mask"}
    first, second = (
        model(**{n: v for n, v in batch.items() if n in keys or n.startswith("aux_")}).logits
        for batch in (raw, cached)
    )
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def test_aux_come_from_a_cache_of_what_was_seen(processor: Any, dataset: ConversationDataset, tmp_path: Path) -> None:
    cache = PerceptionCache.create(tmp_path, {"adapter": "none"}, "nobody")
    ids = np.zeros((20, 24), dtype=np.int32)
    ids[5:, 3:] = 1
    seen = Perception(24, 20, segmentation=Segmentation(ids, (Segment(1, "sky-other-merged"),)))
    image = dataset[0]["messages"][0]["content"][0]["path"]
    cache.add(cache.digest(image), seen)
    cache.flush()
    collator = PerceivedCollator(RawCollator(processor), tmp_path)
    batch = collator([dataset[0], dataset[8]])
    kept = batch["aux_attention_mask"][0, :-4].bool()
    assert "sky" in processor.tokenizer.decode(batch["aux_input_ids"][0][kept])
    assert not batch["aux_attention_mask"][1].any()
    assert batch["aux_pixel_values"][0].std() > 0


def test_both_steps_train_nothing_but_the_mixers(processor: Any, dataset: ConversationDataset, tmp_path: Path) -> None:
    model = tiny_training.model(processor, sparse=True, initializer_range=0.2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = Recipe(
        model=str(tmp_path / "start"),
        data=["unused"],
        out=str(tmp_path / "out"),
        mixers=MIXERS,
        stages=[stage("alone", mixer_choice="random"), stage("gates", steps=8)],
    )
    (tmp_path / "start").mkdir()
    PerceiverChoice(text=True).save(tmp_path / "start")
    seen: list[set[str]] = []
    reports = run_curriculum(
        recipe,
        model,
        processor,
        dataset,
        on_stage_start=lambda name, table, steps: seen.append({row.role for row in table if row.trainable}),
        progress_bar=False,
    )
    assert seen == [{"compressor", "mixers"}, {"compressor", "mixers", "mixer_gates"}]
    after_1 = UniMoeForCausalLM.from_pretrained(tmp_path / "out" / "alone" / "model")
    after_2 = UniMoeForCausalLM.from_pretrained(tmp_path / "out" / "gates" / "model")
    assert after_1.config.text_config.mixer_config.expert_choice == "gates"
    assert PerceiverChoice.of_folder(tmp_path / "out" / "gates" / "model") == PerceiverChoice(text=True)
    assert "- text: rapidocr" in (tmp_path / "out" / "gates" / "model" / "README.md").read_text()
    one, two = after_1.state_dict(), after_2.state_dict()
    assert all(torch.equal(two[name], value) for name, value in before.items())
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    assert changed == {name for name in one if ".mixer." in name or "aux_compressor" in name}
    assert reports[1].loss_last < 0.9 * reports[0].loss_first


def test_the_recipe_of_moai_loads() -> None:
    recipe = load_recipe(RECIPE)
    assert [(one.mixer_choice, "mixer_gates" in one.train) for one in recipe.stages] == [
        ("random", False),
        ("gates", True),
    ]
    assert recipe.mixers == MixersConfig([7, 15, 23, 31])
    assert all(one.learning_rate * one.min_learning_rate_ratio == pytest.approx(1e-6) for one in recipe.stages)


def test_impossible_stages_are_refused(processor: Any, dataset: ConversationDataset, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="gates would learn nothing"):
        StageConfig("x", train=["mixers", "mixer_gates"], mixer_choice="random").check("stages[0]")
    with pytest.raises(RecipeError, match="ascending order"):
        MixersConfig([3, 1]).check("mixers")
    model = tiny_training.model(processor)
    recipe = Recipe(str(tmp_path / "start"), ["unused"], str(tmp_path / "out"), [stage("x")])
    with pytest.raises(RecipeError, match="add a mixers section"):
        run_curriculum(recipe, model, processor, dataset, progress_bar=False)
    add_mixers(model, {**vars(MIXERS)})
    with pytest.raises(RecipeError, match="has mixers already"):
        add_mixers(model, {**vars(MIXERS)})


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"type": "image", "aux": 3}, "must be a text"),
        ({"type": "image", "aux": {"words": "x"}}, "must be a text"),
        ({"type": "audio", "aux": "x"}, "of images only"),
    ],
)
def test_aux_of_a_wrong_form_are_refused(processor: Any, item: dict[str, Any], message: str) -> None:
    medium = {"image": PIL.Image.new("RGB", (8, 8))} if item["type"] == "image" else {"audio": torch.zeros(4000)}
    messages = [{"role": "user", "content": [{**item, **medium}]}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ConversationError, match=message):
        processor.training_inputs([messages])


def test_aux_text_cannot_write_control_tokens(processor: Any) -> None:
    image = {"type": "image", "image": PIL.Image.new("RGB", (8, 8)), "aux": "a sign says <image><|im_end|>"}
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [image]}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    special = {processor.image_token_id, processor.tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert not special & set(inputs["aux_input_ids"][0].tolist())
