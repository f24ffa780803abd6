"""Batches from media and from cached states, and the cache itself."""

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny_media
import tiny_training
import torch

from unimoe import UniMoeForCausalLM
from unimoe.errors import DataError, MediaError
from unimoe.processing.media_policy_unimoe import MediaLimits, MediaPolicy
from unimoe.processing.processing_unimoe import VICUNA_CHAT_TEMPLATE
from unimoe.trainers.caches.encoder_cache import EncoderCache
from unimoe.trainers.data.collator import CachedCollator, RawCollator, TokenRows
from unimoe.trainers.data.conversations import ConversationDataset, Draw
from unimoe.trainers.steps.objective import columns_to_keep, training_loss

MODALITIES = ("image", "speech", "sound", "text")


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_training.processor()


@pytest.fixture(scope="module")
def model(processor: Any) -> UniMoeForCausalLM:
    text = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01, "router_divergence_loss_coef": 0.05}
    text |= {"router_modality_loss_coef": 0.2, "modality_experts": {"image": [0], "text": [1]}}
    return tiny_training.model(processor, sparse=True, **text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def dataset(folder: Path) -> ConversationDataset:
    frames = [[np.full((20, 24, 3), 40 * i + 20 * j, np.uint8) for j in range(4)] for i in range(4)]
    videos = [
        tiny_training.sample("video", i, {"type": "video", "video": clip}, "Brighter?", "yes")
        for i, clip in enumerate(frames)
    ]
    return ConversationDataset.from_samples([*tiny_training.samples(folder, 4), *videos], media_root=folder)


@pytest.fixture(scope="module")
def cache(folder: Path, model: UniMoeForCausalLM, processor: Any, dataset: ConversationDataset) -> EncoderCache:
    made = EncoderCache(folder / "cache", model, processor, batch_size=3)
    made.build(dataset.samples, progress=False)
    return made


def loss_of(model: UniMoeForCausalLM, batch: dict[str, Any], smoothing: float = 0.0, items: Any = None) -> Any:
    inputs = {name: value for name, value in batch.items() if name not in ("sample_ids", "group", "labels")}
    config = model.config.text_config
    with torch.no_grad():
        outputs = model(**inputs, output_router_logits=True)
    modalities = model.model.modality_ids(batch["input_ids"])
    return training_loss(outputs, batch["labels"], batch["attention_mask"], None, modalities, config, smoothing, items)


def test_sound_tracks_and_lists_of_frames_train_from_a_cache_too(
    model: UniMoeForCausalLM, processor: Any, tmp_path: Path
) -> None:
    (tmp_path / "clip.mp4").write_bytes(tiny_media.video(frames=4, track=True))
    for index in range(2):
        (tmp_path / f"{index}.png").write_bytes(tiny_media.encoded_picture(seed=index))
    loud = {"type": "video", "path": "clip.mp4", "sound_track": True}
    dataset = ConversationDataset.from_samples(
        [
            tiny_training.sample("video", 0, {**loud, "encoder": "sound"}, "Loud?", "yes"),
            tiny_training.sample("video", 1, loud, "Loud?", "yes"),
            tiny_training.sample("video", 2, {"type": "video", "path": "clip.mp4"}, "Loud?", "no"),
            tiny_training.sample("video", 3, {"type": "video", "video": ["0.png", "1.png"]}, "Loud?", "no"),
            tiny_training.sample("video", 4, {"type": "video", "video": ["1.png", "0.png"]}, "Loud?", "no"),
        ],
        media_root=tmp_path,
    )
    cache = EncoderCache(tmp_path / "cache", model, processor)
    assert cache.build(dataset.samples, progress=False) == 4  # one clip, its sound, two lists of frames
    raw, cached = RawCollator(processor)(dataset.samples), CachedCollator(processor, cache)(dataset.samples)
    assert torch.equal(raw["input_ids"], cached["input_ids"])
    torch.testing.assert_close(loss_of(model, raw).total, loss_of(model, cached).total, rtol=1e-5, atol=1e-5)
    (tmp_path / "1.png").write_bytes(tiny_media.encoded_picture(seed=7))
    assert EncoderCache(tmp_path / "cache", model, processor).build(dataset.samples, progress=False) == 2


def test_white_space_after_media_is_part_of_a_conversation() -> None:
    processor = tiny_media.processor(chat_template=VICUNA_CHAT_TEMPLATE)
    rows = TokenRows(processor)
    items = [{"type": "image", "path": "x.png"}, {"type": "image", "path": "x.png", "after": ""}]
    samples = [tiny_training.sample("image", 0, item, "What?", "cat") for item in items]
    separate, close = (processor.tokenizer.decode(rows.row(sample)[0]) for sample in samples)
    assert separate.replace("<image>\nWhat", "<image>What") == close != separate


@pytest.mark.parametrize("modality", [*MODALITIES, "video"])
def test_cached_states_train_as_the_media_do(
    modality: str, model: UniMoeForCausalLM, processor: Any, dataset: ConversationDataset, cache: EncoderCache
) -> None:
    samples = dataset.select([modality]).samples
    raw, cached = RawCollator(processor)(samples), CachedCollator(processor, cache)(samples)
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(raw[name], cached[name])
    assert raw["group"] == cached["group"] == modality
    assert cached["sample_ids"] == [sample["id"] for sample in samples]
    torch.testing.assert_close(loss_of(model, raw).total, loss_of(model, cached).total, rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_models_own(
    model: UniMoeForCausalLM, processor: Any, dataset: ConversationDataset, cache: EncoderCache
) -> None:
    batch = CachedCollator(processor, cache)(dataset.select(["image"]).samples)
    inputs = {name: value for name, value in batch.items() if name not in ("sample_ids", "group", "logits_to_keep")}
    assert batch["logits_to_keep"] < batch["labels"].shape[1]
    with torch.no_grad():
        expected = model(**inputs, num_items_in_batch=17)
    parts = loss_of(model, batch, items=17)
    torch.testing.assert_close(parts.total, expected.loss)
    torch.testing.assert_close(parts.cross_entropy, expected.ce_loss)
    assert set(parts.routers) == {"aux_loss", "z_loss", "modality_loss", "divergence_loss"}
    share = (batch["labels"][:, 1:] != -100).sum() / 17
    for name, loss in parts.routers.items():
        assert float(loss) > 0
        torch.testing.assert_close(loss, expected[name] * share)


def test_label_smoothing_spreads_over_the_vocabulary(
    model: UniMoeForCausalLM, processor: Any, dataset: ConversationDataset, cache: EncoderCache
) -> None:
    batch = CachedCollator(processor, cache)(dataset.select(["text"]).samples)
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    log_probabilities = logits.log_softmax(-1)[targets != -100]
    hit = -log_probabilities.gather(1, targets[targets != -100][:, None]).mean()
    expected = 0.9 * hit - 0.1 * log_probabilities.mean()
    torch.testing.assert_close(loss_of(model, batch, smoothing=0.1).cross_entropy, expected)


def test_columns_reach_the_first_answer() -> None:
    labels = torch.full((2, 24), -100)
    labels[0, 20:] = 1
    assert columns_to_keep(labels) == 8  # column 19 predicts column 20: 5 columns, in fours
    labels[1, 0] = 1
    assert columns_to_keep(labels) == 24
    assert columns_to_keep(torch.full((2, 24), -100)) == 4


def test_padding_is_on_the_left_and_constant_per_group(
    processor: Any, dataset: ConversationDataset, cache: EncoderCache
) -> None:
    collator = CachedCollator(processor, cache)
    collator.fit(dataset)
    texts = dataset.select(["text"]).samples
    lengths = [int(collator([sample])["attention_mask"].sum()) for sample in texts]
    assert len(set(lengths)) > 1
    shapes = {collator([sample])["input_ids"].shape[1] for sample in texts}
    assert len(shapes) == 1
    assert shapes.pop() % 8 == 0
    batch = collator(texts)
    assert bool((batch["attention_mask"].diff(dim=1) >= 0).all())
    padding = batch["input_ids"][batch["attention_mask"] == 0]
    assert bool((padding == processor.tokenizer.eos_token_id).all())
    first = processor.tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0] == 1])
    assert first.startswith("<|im_start|>user")
    assert bool((batch["labels"][:, -2:] != -100).any(dim=1).all())


def test_lengths_are_multiples_of_what_the_recipe_says(
    processor: Any, dataset: ConversationDataset, cache: EncoderCache
) -> None:
    texts = dataset.select(["text"])
    longest = max(len(CachedCollator(processor, cache, 1)([sample])["input_ids"][0]) for sample in texts.samples)
    collator = CachedCollator(processor, cache, 7)
    assert collator(texts.samples)["input_ids"].shape[1] == longest + -longest % 7
    collator.fit(texts)
    assert {collator([sample])["input_ids"].shape[1] for sample in texts.samples} == {longest + -longest % 7}


def test_plain_text_is_learned_whole_and_its_placeholders_stay_text(processor: Any, cache: EncoderCache) -> None:
    dataset = ConversationDataset.from_samples([{"text": "A cat <image> sings."}, {"text": "A dog."}])
    for collator in (RawCollator(processor), CachedCollator(processor, cache)):
        batch = collator(dataset.samples)
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            text, learned = ids[mask == 1], labels[mask == 1]
            # The first token has nothing before it to predict it from.
            assert int(learned[0]) == -100
            assert torch.equal(learned[1:], text[1:])
        assert not bool((batch["input_ids"] == processor.image_token_id).any())
        assert processor.tokenizer.decode(batch["input_ids"][0]).endswith("A cat <image> sings.</s>")


def test_noise_and_dropout_depend_on_the_draw_only(
    processor: Any, dataset: ConversationDataset, cache: EncoderCache
) -> None:
    images = dataset.select(["image"])
    collator = CachedCollator(processor, cache, feature_noise={"image": 0.5}, token_dropout=0.3)

    def states(*seeds: int | None) -> torch.Tensor:
        draws = [images[i] if seed is None else images[Draw(i, seed)] for i, seed in enumerate(seeds)]
        return collator(draws)["image_encoder_states"]

    torch.manual_seed(0)
    first = states(1, 2)
    torch.manual_seed(1)
    assert torch.equal(first, states(1, 2))
    assert not torch.equal(first, states(3, 4))
    plain = states(None, None)
    assert torch.equal(plain, torch.stack([cache.states(images[i])["image"][0] for i in range(2)]))
    mean, std = cache.statistics("image")
    dropped = (first == mean).all(dim=-1)
    assert 0 < int(dropped.sum()) < dropped.numel()
    ratio = ((first - plain) / std)[~dropped].std()
    assert 0.4 < float(ratio) < 0.6


def test_augmentation_may_change_states_and_answer(
    processor: Any, dataset: ConversationDataset, cache: EncoderCache
) -> None:
    def backwards(sample: Any, states: Any, rng: np.random.Generator) -> Any:
        sample = copy.deepcopy(sample)
        sample["messages"][1]["content"][0]["text"] = "no"
        return sample, {"video": [frames.flip(0) for frames in states["video"]]}

    videos = dataset.select(["video"])
    collator = CachedCollator(processor, cache, augment=backwards)
    plain, turned = collator([videos[0]]), collator([videos[Draw(0, 1)]])
    assert torch.equal(plain["video_encoder_states"].flip(1), turned["video_encoder_states"])
    assert "no" in processor.tokenizer.decode(turned["input_ids"][0])
    assert "no" not in processor.tokenizer.decode(plain["input_ids"][0])


def test_the_cache_computes_each_medium_once(
    folder: Path, model: UniMoeForCausalLM, processor: Any, dataset: ConversationDataset, tmp_path: Path
) -> None:
    # 4 pictures, 4 clips (used by speech and sound samples alike), 4 videos.
    cache = EncoderCache(tmp_path, model, processor)
    assert cache.build(dataset.select(["image", "speech"]).samples, progress=False) == 8
    assert cache.build(dataset.samples, progress=False) == 4
    again = EncoderCache(tmp_path, model, processor)
    assert again.build(dataset.samples, progress=False) == 0
    sample = dataset.select(["speech"])[0]
    for name, tensors in again.states(sample).items():
        assert torch.equal(tensors[0], cache.states(sample)[name][0])
    other = tiny_training.model(processor, seed=1)
    assert EncoderCache(tmp_path, other, processor).build(dataset.samples, progress=False) == 12
    with pytest.raises(DataError, match=r"image-0: the image .* is not in the encoder cache"):
        EncoderCache(tmp_path / "empty", model, processor).states(dataset.select(["image"])[0])


def test_a_stopped_build_goes_on(
    model: UniMoeForCausalLM, processor: Any, dataset: ConversationDataset, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("unimoe.trainers.caches.tensor_store.ITEMS_PER_SHARD", 2)
    images = dataset.select(["image"]).samples
    broken = [*images[:3], copy.deepcopy(images[3])]
    broken[3]["messages"][0]["content"][0]["path"] = str(tmp_path / "nothing.png")
    (tmp_path / "nothing.png").write_bytes(b"no picture")
    cache = EncoderCache(tmp_path / "cache", model, processor, batch_size=1)
    with pytest.raises(ValueError, match=r"nothing\.png"):
        cache.build(broken, progress=False)
    assert EncoderCache(tmp_path / "cache", model, processor).build(images, progress=False) == 2


def halved(image: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
    return image.point(lambda value: int(value * rng.uniform(0.2, 0.9))).convert("RGB")


def test_variants_differ_and_are_reproducible(
    model: UniMoeForCausalLM, processor: Any, dataset: ConversationDataset, tmp_path: Path
) -> None:
    images = dataset.select(["image"])
    states = []
    for part in ("a", "b"):
        cache = EncoderCache(tmp_path / part, model, processor, variants={"image": 3}, augment={"image": halved})
        assert cache.build(images.samples, progress=False) == 12
        states.append([cache.states(images[0], variant)["image"][0] for variant in range(4)])
    first, second = states
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[3])


def test_augmentation_sees_transparency(model: UniMoeForCausalLM, processor: Any, tmp_path: Path) -> None:
    seen: list[str] = []

    def look(image: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
        seen.append(image.mode)
        return image.convert("RGB")

    PIL.Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "icon.png")
    sample = tiny_training.sample("image", 0, {"type": "image", "path": "icon.png"}, "?", "x")
    dataset = ConversationDataset.from_samples([sample], media_root=tmp_path)
    EncoderCache(tmp_path / "cache", model, processor, augment={"image": look}).build(dataset.samples, progress=False)
    assert seen == ["RGBA"]


def test_what_a_path_names_is_opened_under_the_processors_policy(model: UniMoeForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    PIL.Image.new("RGB", (20, 20)).save(tmp_path / "big.png")
    os.mkfifo(tmp_path / "pipe.png")
    names = {"big.png": r"allowed are 1 to 10", "pipe.png": "not a regular file"}
    processor = tiny_training.processor()
    cache = EncoderCache(tmp_path / "cache", model, processor)
    for policy, reasons in (
        (MediaPolicy(limits=MediaLimits(max_file_bytes=10)), names),
        (MediaPolicy(media_root=str(tmp_path / "root")), dict.fromkeys(names, "outside of media_root")),
    ):
        processor.media_policy = policy
        for name, reason in reasons.items():
            item = {"type": "image", "path": str(tmp_path / name)}
            sample = tiny_training.sample("image", 0, item, "?", "x")
            with pytest.raises(MediaError, match=reason):
                cache.states(sample)


def test_pooled_states_connect_to_the_same_features(
    processor: Any, dataset: ConversationDataset, tmp_path: Path
) -> None:
    import tiny

    model = tiny_training.model(processor)
    config = copy.deepcopy(model.config)
    config.speech_connector = type(config.speech_connector)(**tiny.connector(num_tokens=3))
    torch.manual_seed(0)
    pooling = UniMoeForCausalLM(config).eval()
    cache = EncoderCache(tmp_path, pooling, processor)
    sample = dataset.select(["speech"])[0]
    cache.build([sample], progress=False)
    states = cache.states(sample)["speech"][0]
    assert states.shape == (1, 3, 32)
    raw = RawCollator(processor)([sample])
    with torch.no_grad():
        whole = pooling.get_audio_features(speech_features=raw["speech_features"]).pooler_output
        pooled = pooling.get_audio_features(speech_encoder_states=states).pooler_output
    torch.testing.assert_close(whole, pooled)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 1e-2), ("float16", 1e-3)])
def test_half_precision_storage(
    dtype: str,
    tolerance: float,
    model: UniMoeForCausalLM,
    processor: Any,
    dataset: ConversationDataset,
    tmp_path: Path,
) -> None:
    cache = EncoderCache(tmp_path, model, processor, dtype=dtype)
    exact = EncoderCache(tmp_path, model, processor)
    sample = dataset.select(["image"])[0]
    for made in (cache, exact):
        made.build([sample], progress=False)
    stored = cache.states(sample)["image"][0]
    assert str(stored.dtype) == f"torch.{dtype}"
    torch.testing.assert_close(stored.float(), exact.states(sample)["image"][0], rtol=tolerance, atol=tolerance)


def test_one_branch_of_an_audio_item(
    model: UniMoeForCausalLM, processor: Any, dataset: ConversationDataset, cache: EncoderCache
) -> None:
    sample = copy.deepcopy(dataset.select(["speech"])[0])
    sample["messages"][0]["content"][0]["encoder"] = "sound"
    raw, cached = RawCollator(processor)([sample]), CachedCollator(processor, cache)([sample])
    assert "speech_encoder_states" not in cached
    assert torch.equal(raw["input_ids"], cached["input_ids"])
    torch.testing.assert_close(loss_of(model, raw).total, loss_of(model, cached).total, rtol=1e-5, atol=1e-5)
