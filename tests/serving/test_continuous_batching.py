"""Texts that are generated together, paged and packed by transformers, get the answers of ordinary generation."""

from typing import Any

import pytest
import tiny
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from unimoe.errors import UniMoeError
from unimoe.modeling_unimoe.errors_unimoe import ModalityError

pytest.importorskip("fastapi")

from unimoe.serving.continuous import TextBatching, can_batch, may_join, require_batchable

if not can_batch():
    pytest.skip("this release of transformers cannot", allow_module_level=True)

LENGTHS = (3, 41, 7, 90, 12, 1)  # longer than a step of the batch takes, and shorter
SETTINGS = GenerationConfig(
    max_new_tokens=9,
    do_sample=False,
    eos_token_id=2,
    pad_token_id=0,
    suppress_tokens=[7, 8, *tiny.PLACEHOLDERS["image"]],
)
SMALL = ContinuousBatchingConfig(page_size=16, num_blocks=40, max_batch_tokens=32)


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 90, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"num_experts": 0, "sparse_layers": []},
        {"sliding_window": 24},
        {"router_type": "dynamic", "router_top_p": 0.6, "num_null_experts": 1, "num_shared_experts": 1},
        tiny.MOIIE_GROUPS,
    ],
    ids=["sparse", "dense", "sliding window", "dynamic router", "expert groups"],
)
def test_answers_are_those_of_ordinary_generation(text: dict[str, Any]) -> None:
    model = tiny.model(text)
    alone = [
        model.generate(torch.tensor([ids]), generation_config=SETTINGS)[0, len(ids) :].tolist() for ids in texts()
    ]
    together = model.generate_batch(texts(), generation_config=SETTINGS, continuous_batching_config=SMALL)
    assert [output.error for output in together.values()] == [None] * len(LENGTHS)
    # The batch leaves the token that ends an answer in it or not, as its version of transformers likes.
    assert [without_end(output.generated_tokens) for output in together.values()] == list(map(without_end, alone))
    assert len(set(map(tuple, alone))) == len(LENGTHS)


def test_other_threads_may_use_the_model_meanwhile() -> None:
    model = tiny.model()
    config = model.config.text_config
    seen: list[bool] = []
    model.model.language_model.layers[1].register_forward_pre_hook(
        lambda *_: seen.append(hasattr(config, "is_causal"))
    )
    model.generate_batch(texts(), generation_config=SETTINGS, continuous_batching_config=SMALL)
    assert set(seen) == {False}  # else a forward without a mask would not be causal, in this moment or for good


def without_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(2)] if 2 in tokens else tokens


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
def test_placeholders_of_media_are_refused(kind: str) -> None:
    inputs = [*texts(), [3, *tiny.PLACEHOLDERS[kind], 4]]
    with pytest.raises(ModalityError, match=rf"Text {len(LENGTHS)} has a placeholder for .*generate\(\)"):
        tiny.model().generate_batch(inputs, generation_config=SETTINGS, continuous_batching_config=SMALL)


@pytest.mark.parametrize(
    ("text", "generation", "reason"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, {}, "rotary embeddings"),
        ({"router_type": "dynamic", "router_top_p": 0.6, "expert_capacity_factor": 1.0}, {}, "capacity"),
        ({}, {"repetition_penalty": 1.2}, "RepetitionPenaltyLogitsProcessor"),
    ],
)
def test_models_whose_answers_would_depend_on_the_batch(
    text: dict[str, Any], generation: dict[str, Any], reason: str
) -> None:
    model = tiny.model(text)
    model.generation_config = GenerationConfig(**generation)
    with pytest.raises(UniMoeError, match=f"{reason}.*Leave the option out"):
        require_batchable(model)


def test_an_ordinary_model_may_be_batched() -> None:
    model = tiny.model()
    model.generation_config = SETTINGS
    require_batchable(model)
    assert not TextBatching(1000).use_continuous_batching(model, None)  # a request that has not been looked at


PICTURE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}
TEXT = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}


@pytest.mark.parametrize(
    ("body", "samples", "joins"),
    [
        ({"messages": [TEXT]}, False, True),
        ({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": True}, False, True),
        ({"messages": [TEXT], "temperature": 0.0, "top_p": None}, False, True),
        ({"messages": [TEXT]}, True, True),
        ({"messages": [TEXT], "temperature": 0}, True, False),
        ({"messages": [TEXT], "temperature": 0.5}, False, False),
        ({"messages": [TEXT], "seed": 1}, False, False),
        ({"messages": [TEXT], "stop": ["."]}, False, False),
        ({"messages": [PICTURE, TEXT]}, False, False),
    ],
)
def test_who_may_join(body: dict[str, Any], samples: bool, joins: bool) -> None:
    assert may_join(body, GenerationConfig(do_sample=samples)) is joins
