"""What vLLM's backend for transformers' models asks of a model and its processor, asked here without vLLM.

Every test does what one part of that backend does: it makes the model without its head on the meta device, hands in
embeddings in which it has placed the features of the pictures itself, in one row for all requests, with attention of its
own, and finds the places of pictures from the types and the counts that the processor gives. See docs/serving.md.
"""

import io
import itertools
import re
from operator import attrgetter
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny
import tiny_media
import tiny_training
import torch
from transformers import AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from unimoe import UniMoeForCausalLM, UniMoeModel
from unimoe.modeling_unimoe.errors_unimoe import ModalityError
from unimoe.processing.media_policy_unimoe import DEFAULT_POLICY, MediaError
from unimoe.processing.media_unimoe import load_image

ENGINE = "engine_stand_in"
SIZES = [(1, 1), (9, 500), (16, 16), (333, 20), (1000, 1000)]  # height, width
EXPERTS = {"use_qk_norm": True, "num_shared_experts": 1, "moe_intermediate_size": 24}


class Engine:
    """Attention as an engine does it: packed texts, no mask, one instance per layer of the decoder."""

    def __init__(self, lengths: list[int], layers: int) -> None:
        self.lengths, self.calls = lengths, [0] * layers

    def instances(self) -> dict[int, Any]:
        return dict.fromkeys(range(len(self.calls)), self)


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        attention_instances: dict[int, Engine] | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        assert attention_mask is None
        assert attention_instances is not None
        engine = attention_instances[module.layer_idx]
        engine.calls[module.layer_idx] += 1
        outputs = []
        for q, k, v in zip(*(states.split(engine.lengths, dim=2) for states in (query, key, value)), strict=True):
            outputs.append(
                torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=scaling, enable_gqa=True
                )
            )
        return torch.cat(outputs, dim=2).transpose(1, 2).flatten(2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, ENGINE, attend)


def engine_model(reference: UniMoeForCausalLM) -> UniMoeModel:
    """The model without head as the backend makes it: empty weights, real buffers; then with the reference's weights."""
    config = type(reference.config).from_dict(reference.config.to_dict())
    config.text_config._attn_implementation = ENGINE
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        model = AutoModel.from_config(config)
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
    assert isinstance(model, UniMoeModel)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    missing, unexpected = model.load_state_dict(reference.model.state_dict(), strict=False, assign=True)
    assert not missing
    assert not unexpected
    return model.eval()


def hidden_of(model: UniMoeModel, embeds: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, Engine]:
    """Last hidden states [S, H] of packed embeddings [S, H], called as the backend calls."""
    engine = Engine(lengths, model.config.text_config.num_hidden_layers)
    positions = torch.cat([torch.arange(length) for length in lengths])
    outputs = model(
        input_ids=None,
        inputs_embeds=embeds[None],
        use_cache=False,
        position_ids=positions[None],
        attention_instances=engine.instances(),
        return_dict=False,
    )
    return outputs[0][0], engine


@pytest.mark.parametrize("model_class", [UniMoeModel, UniMoeForCausalLM])
def test_models_say_that_they_let_engines_attend(model_class: Any) -> None:
    assert model_class.is_backend_compatible()


@torch.no_grad()
def test_packed_requests_with_pictures_give_the_models_own_states() -> None:
    reference = tiny.model(EXPERTS)
    model = engine_model(reference)
    prompts = [tiny.prompt(5, "image", 6, "image", 7), tiny.prompt(8, 9), tiny.prompt("image", 10, 11)]
    pixels = tiny.media(images=3)["pixel_values"]
    own = [
        reference.model(torch.tensor([ids]), pixel_values=pixels[own] if len(own) else None).last_hidden_state[0]
        for ids, own in zip(prompts, ([0, 1], [], [2]), strict=True)
    ]
    ids = torch.tensor(list(itertools.chain(*prompts)))
    embeds = model.get_input_embeddings()(ids)
    features = model.get_image_features(pixels)
    assert isinstance(features, dict)  # the backend tells a ModelOutput from a tensor so
    # One patch per picture is promised (num_image_patches); the backend divides the rows evenly by it.
    embeds[ids == model.config.image_token_id] = features.pooler_output.view(-1, features.pooler_output.shape[-1])
    states, engine = hidden_of(model, embeds, list(map(len, prompts)))
    torch.testing.assert_close(states, torch.cat(own))
    assert engine.calls == [1] * len(engine.calls)  # the decoder's layers, and no tower's


@torch.no_grad()
def test_texts_alone_may_come_as_ids() -> None:
    reference = tiny.model()
    model = engine_model(reference)
    ids = torch.tensor([[5, 6, 7, 8]])
    engine = Engine([4], 3)
    positions = torch.arange(4)[None]
    outputs = model(
        ids, position_ids=positions, use_cache=False, attention_instances=engine.instances(), return_dict=False
    )
    torch.testing.assert_close(outputs[0], reference.model(ids).last_hidden_state)


@pytest.mark.parametrize(
    ("text", "need"),
    [
        (tiny.MOIIE_GROUPS, "expert groups"),
        ({"plora_config": {"rank": 4}}, "partial LoRA"),
    ],
)
def test_models_that_must_know_what_a_position_is_refuse(text: dict[str, Any], need: str) -> None:
    model = engine_model(tiny.model(text))
    with pytest.raises(ModalityError, match=f"{need}.*mm_token_type_ids"):
        hidden_of(model, torch.zeros(3, tiny.HIDDEN), [3])


def test_plans_fit_the_model() -> None:
    model = UniMoeModel(tiny.config({**EXPERTS, "plora_config": {"rank": 4}}))
    modules = dict(model.named_modules())
    names = [*modules, *dict(model.named_parameters())]
    for pattern in model.tp_plan:
        assert any(re.match(pattern, name) for name in names), pattern
    styles = {
        name: next((style for pattern, style in model.tp_plan.items() if re.match(pattern, name)), None)
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear)
        and re.search(r"language_model.*(_proj|plora\.[qkv]_b|plora\.o_a)$", name)
    }
    assert set(styles.values()) == {"colwise", "rowwise"}
    stages = [attrgetter(name)(model) for name in model._pp_plan]
    assert model.supports_pp_plan
    assert [isinstance(stage, torch.nn.ModuleList) for stage in stages] == [False, True, False]
    assert stages[1] is model.language_model.layers


def test_experts_are_where_and_what_the_backend_replaces() -> None:
    model = tiny.model(EXPERTS)
    blocks = [layer.mlp for layer in model.model.language_model.layers if hasattr(layer.mlp, "experts")]
    assert len(blocks) == 2
    seen: list[tuple[Any, ...]] = []

    class Fused(torch.nn.Module):
        def forward(self, hidden_states: Any, topk_ids: Any, topk_weights: Any, **_: Any) -> torch.Tensor:
            seen.append((hidden_states, topk_ids, topk_weights))
            return torch.zeros_like(hidden_states)

    config = model.config.get_text_config()
    for block in blocks:
        assert block.experts.gate_up_proj.shape == (config.num_experts, 2 * config.moe_intermediate_size, tiny.HIDDEN)
        block.experts = Fused()
    model(torch.tensor([[5, 6, 7]]))
    for hidden, ids, weights in seen:
        assert hidden.shape == (3, tiny.HIDDEN)
        assert ids.shape == weights.shape == (3, config.num_experts_per_tok)
        assert ids.min() >= 0
        assert ids.max() < config.num_experts
    assert len(seen) == 2


def test_every_placeholder_has_a_row_in_the_embedding_table() -> None:
    processor = tiny_training.processor()
    rows = tiny_training.model(processor, sparse=True).get_input_embeddings().num_embeddings
    assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids(processor.image_token) < rows


@pytest.mark.parametrize("aspect", ["square", "pad"])
@torch.no_grad()
def test_counts_are_what_the_processor_writes_and_the_model_gives(aspect: str) -> None:
    processor = tiny_media.processor(video_tokens=4, image_aspect_ratio=aspect)
    model = tiny_training.model(processor)
    pictures = [PIL.Image.new("RGB", (width, height), "red") for height, width in SIZES]
    text = " and ".join(processor.image_token for _ in pictures)
    output = processor(text=text, images=pictures, return_mm_token_type_ids=True, return_tensors="pt")
    counts = processor._get_num_multimodal_tokens(image_sizes=SIZES)
    positions = torch.where(output["mm_token_type_ids"] == 1)[1]
    for chunk in torch.split(positions, counts["num_image_tokens"]):
        assert (chunk.diff() == 1).all()
        assert (output["input_ids"][0, chunk] == processor.image_token_id).all()
    assert int((positions.diff() > 1).sum()) == len(SIZES) - 1
    features = model.get_image_features(output["pixel_values"]).pooler_output
    assert list(features.shape[:2]) == [len(SIZES), counts["num_image_tokens"][0]]
    assert counts["num_image_patches"] == [1] * len(output["pixel_values"])
    assert set(output) - {"input_ids", "attention_mask", "mm_token_type_ids"} == {"pixel_values"}


@pytest.mark.parametrize(
    ("fields", "image", "video"),
    [
        ({}, 4, 4),
        ({"vision_token_grid": 1}, 1, 1),
        ({"video_pooling": "none"}, 4, 8),
        ({"image_connector": tiny.connector("qformer")}, 2, 2),
    ],
    ids=["patches", "grid", "frames apart", "queries"],
)
@torch.no_grad()
def test_counts_hold_for_other_connectors_and_videos(fields: dict[str, Any], image: int, video: int) -> None:
    processor = tiny_media.processor(image_tokens=image, video_tokens=video)
    model = tiny.model(seed=0, **fields)
    clips = [np.zeros((frames, 12, 20, 3), np.uint8) for frames in (2, 7)]
    output = processor(
        text="<image> <video> <video>", images=[tiny_media.picture()], videos=clips, return_tensors="pt"
    )
    counts = processor._get_num_multimodal_tokens(image_sizes=[(20, 24)], video_sizes=[(2, 12, 20), (7, 12, 20)])
    assert counts["num_image_tokens"] == [int((output["mm_token_type_ids"] == 1).sum())]
    assert sum(counts["num_video_tokens"]) == int((output["mm_token_type_ids"] == 2).sum())
    assert model.get_image_features(output["pixel_values"]).pooler_output.shape[:2] == (1, image)
    assert model.get_video_features(output["pixel_values_videos"]).pooler_output.shape[:2] == (2, video)


@torch.no_grad()
def test_counts_hold_for_audio_of_any_length() -> None:
    processor = tiny_training.processor()
    model = tiny_training.model(processor)
    lengths = [1, 8_000, 16_000, 16_001, 70_000]
    output = processor(text="<audio>" * len(lengths), audio=[np.zeros(n, np.float32) for n in lengths])
    counts = processor._get_num_multimodal_tokens(audio_lengths=lengths)["num_audio_tokens"]
    types = np.array(output["mm_token_type_ids"][0])
    starts = [*np.flatnonzero((types == 3) & (np.roll(types, 1) != 3)), len(types)]  # a clip's speech comes first
    assert [int(np.isin(types[a:b], (3, 4)).sum()) for a, b in itertools.pairwise(starts)] == counts
    sounds_per_window = processor.sound_tokens
    assert counts == [n * (processor.speech_tokens + sounds_per_window) for n in (1, 1, 1, 2, 5)]
    windows = torch.as_tensor(np.asarray(output["speech_features"]))
    assert model.get_audio_features(speech_features=windows).pooler_output.shape[:2] == (10, processor.speech_tokens)
    sounds = torch.as_tensor(np.asarray(output["audio_features"]))
    assert model.get_audio_features(audio_features=sounds).pooler_output.shape[:2] == (10, sounds_per_window)


def test_the_picture_with_which_the_backend_measures_itself_is_taken() -> None:
    assert load_image(PIL.Image.new("RGB", (10_000, 10_000)), DEFAULT_POLICY).size == (10_000, 10_000)
    with pytest.raises(MediaError, match="allowed are"):
        load_image(PIL.Image.new("L", (10_001, 10_000)), DEFAULT_POLICY)
    file = io.BytesIO()
    PIL.Image.new("L", (10_000, 5_001)).save(file, "PNG")
    with pytest.raises(MediaError, match="allowed are"):
        load_image(file.getvalue(), DEFAULT_POLICY)
