"""Our decoder against transformers' own LLaMA, Mistral, Qwen2 and Qwen3, fed with the very same weights.

The names of the weights agree, so this compares arithmetic alone; conversion has tests of its own.
"""

from typing import Any

import pytest
import tiny_llama
import torch
from tiny_llama import DYNAMIC, LINEAR, LLAMA3, LONGROPE, YARN
from transformers import (
    AutoModel,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from unimoe import UniMoeTextConfig, UniMoeTextModel

SIZES: dict[str, Any] = {
    **tiny_llama.SIZES,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DENSE = {"num_experts": 0, "sparse_layers": []}
PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
# Name -> their configuration class, fields common to both, fields of theirs, fields of ours.
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"rope_parameters": PLAIN}, {}, {}),
    "llama biased": (LlamaConfig, {"attention_bias": True}, {}, {"attention_output_bias": True}),
    "llama own head size": (LlamaConfig, {"head_dim": 16}, {}, {}),
    "llama linear rope": (LlamaConfig, {"rope_parameters": LINEAR}, {}, {}),
    "llama dynamic rope": (LlamaConfig, {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}, {}, {}),
    "llama-3 rope": (LlamaConfig, {"rope_parameters": LLAMA3}, {}, {}),
    "llama yarn": (LlamaConfig, {"rope_parameters": YARN}, {}, {}),
    "llama yarn own attention": (LlamaConfig, {"rope_parameters": {**YARN, "attention_factor": 0.7}}, {}, {}),
    "llama longrope": (LlamaConfig, {"rope_parameters": LONGROPE}, {}, {}),
    "mistral yarn window": (MistralConfig, {"rope_parameters": YARN, "sliding_window": 8}, {}, {}),
    "mistral": (MistralConfig, {"sliding_window": None}, {}, {}),
    "mistral window": (MistralConfig, {"sliding_window": 8}, {}, {}),
    "qwen2": (Qwen2Config, {}, {}, {"attention_bias": True}),
    "qwen2 window": (
        Qwen2Config,
        {"sliding_window": 8},
        {"use_sliding_window": True, "max_window_layers": 0},
        {"attention_bias": True},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 16}, {}, {"use_qk_norm": True}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, UniMoeTextModel]:
    """Their model and ours with the same weights, none of them at its initial ones or zeros."""
    config_class, common, theirs_only, ours_only = FAMILIES[request.param]
    fields = {**SIZES, **common}
    torch.manual_seed(0)
    theirs = AutoModel.from_config(config_class(**fields, **theirs_only)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    ours = UniMoeTextModel(UniMoeTextConfig(**fields, **DENSE, **ours_only)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def ids(batch: int = 2, length: int = 40) -> torch.Tensor:
    """Longer than the sliding windows and than the original contexts of the scaled RoPEs."""
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(1))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
def test_states_agree(pair: Any) -> None:
    theirs, ours = pair
    expected = theirs(ids(), output_hidden_states=True)
    got = ours(ids(), output_hidden_states=True)
    close(got.last_hidden_state, expected.last_hidden_state)
    assert len(got.hidden_states) == len(expected.hidden_states)
    for mine, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        close(mine, other)


@torch.no_grad()
@pytest.mark.parametrize("offset", [0, 15, 60, 30_000, 1_000_000])
def test_long_positions_agree(pair: Any, offset: int) -> None:
    """100 tokens: more than any window, than scaled RoPEs call short (16) and than the models were made for (64)."""
    theirs, ours = pair
    inputs = {"input_ids": ids(1, 100), "position_ids": torch.arange(100)[None] + offset}
    expected = theirs(**inputs).last_hidden_state
    close(ours(**inputs).last_hidden_state, expected)


@torch.no_grad()
def test_scaled_ropes_are_told_apart_by_far_positions() -> None:
    """So that what agrees above is not agreement on positions at which every RoPE is the same."""
    states = []
    for rope in (PLAIN, LINEAR, DYNAMIC, YARN, LLAMA3, LONGROPE):
        torch.manual_seed(0)
        ours = UniMoeTextModel(UniMoeTextConfig(**SIZES, **DENSE, rope_parameters=rope)).eval()
        states.append(ours(ids(1, 100)).last_hidden_state)
    for index, one in enumerate(states):
        for other in states[:index]:
            assert (one - other).abs().max() > 1e-3


@torch.no_grad()
def test_left_padding_agrees(pair: Any) -> None:
    theirs, ours = pair
    tokens, mask = ids(), torch.ones(2, 40, dtype=torch.long)
    mask[0, :13] = 0
    tokens[0, :13] = 0
    # Positions count from the first real token, as in generation.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    real = mask.bool()
    close(ours(**inputs).last_hidden_state[real], theirs(**inputs).last_hidden_state[real])


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(30, 1, 1, 1), (1, 20, 12), (70, 1, 29)], ids=str)
def test_caches_agree(pair: Any, chunks: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    theirs, ours = pair
    caches = [DynamicCache(config=theirs.config), DynamicCache(config=ours.config)]
    tokens, start = ids(length=max(40, sum(chunks))), 0
    for size in chunks:
        piece = tokens[:, start : start + size]
        expected, got = (
            model(piece, past_key_values=cache, use_cache=True).last_hidden_state
            for model, cache in zip((theirs, ours), caches, strict=True)
        )
        close(got, expected)
        start += size
    if not {"dynamic", "longrope"} & set(request.node.callspec.params["pair"].split()):
        # These RoPEs rescale with the length, so keys that are cached keep the angles of a shorter text.
        close(got, ours(tokens[:, :start]).last_hidden_state[:, -chunks[-1] :])


def test_gradients_agree(pair: Any) -> None:
    gradients = []
    for model in pair:
        model.zero_grad()
        model(ids(1, 20)).last_hidden_state.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-5, rtol=1e-4, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_backends_agree(pair: Any, implementation: str) -> None:
    theirs, ours = pair
    expected = theirs(ids()).last_hidden_state
    before = ours.config._attn_implementation
    ours.set_attn_implementation(implementation)
    close(ours(ids()).last_hidden_state, expected)
    ours.set_attn_implementation(before)
