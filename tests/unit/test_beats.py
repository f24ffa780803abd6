"""The BEATs encoder against a literal transcription of its formulas, and its behaviour as a transformers model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from unimoe.modeling_unimoe.configuration_unimoe_beats import UniMoeBeatsConfig
from unimoe.modeling_unimoe.errors_unimoe import ConfigurationError, UniMoeError
from unimoe.modeling_unimoe.modeling_unimoe_beats import (
    UniMoeBeatsModel,
    reduce_padding_mask,
    relative_position_buckets,
)

FRAMES = 98


def tiny(attention: str = "sdpa", seed: int = 0, **overrides: Any) -> UniMoeBeatsModel:
    fields: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "embed_dim": 16,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "num_buckets": 32,
        "max_distance": 64,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    config = UniMoeBeatsConfig(**{**fields, **overrides})
    model = UniMoeBeatsModel._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [3, 98, 128] and a padding mask [3, 16000] with 0, 45 and 20 percent padding."""
    features = torch.randn(3, FRAMES, 128, generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([16_000, 8800, 12_800])
    return features, torch.arange(16_000) >= lengths[:, None]


def reference(model: UniMoeBeatsModel, features: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """The encoder, step by step from the description of the original, one clip and one head at a time."""
    config, weights = model.config, model.state_dict()

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    outputs = []
    for row in range(len(features)):
        patches = functional.conv2d(features[row][None, None], weights["patch_embedding.weight"], stride=16)
        x = norm(patches[0].flatten(1).t(), "layer_norm")
        x = linear(x, "post_extract_proj") if config.embed_dim != config.hidden_size else x
        tokens = len(x)
        padded = torch.zeros(tokens, dtype=torch.bool)
        if padding is not None:
            flags = padding[row]
            for length in (FRAMES, tokens):
                flags = flags[: len(flags) // length * length].view(length, -1).all(dim=-1)
            padded = flags
        x = torch.where(padded[:, None], 0.0, x)
        kernel = config.num_conv_pos_embeddings
        positions = functional.conv1d(
            x.t(),
            weights["encoder.pos_conv.weight"],
            weights["encoder.pos_conv.bias"],
            padding=kernel // 2,
            groups=config.num_conv_pos_embedding_groups,
        )
        x = x + functional.gelu(positions[:, :-1] if kernel % 2 == 0 else positions).t()
        x = x if config.layer_norm_first else norm(x, "encoder.layer_norm")
        alpha = (2 * config.num_hidden_layers) ** 0.25 if config.deep_norm else 1.0
        for index in range(config.num_hidden_layers):
            layer = f"encoder.layers.{index}"
            if config.layer_norm_first:
                x = x + reference_attention(model, layer, norm(x, f"{layer}.self_attn_layer_norm"), padded)
                inner = functional.gelu(linear(norm(x, f"{layer}.final_layer_norm"), f"{layer}.fc1"))
                x = x + linear(inner, f"{layer}.fc2")
            else:
                attended = reference_attention(model, layer, x, padded)
                x = norm(alpha * x + attended, f"{layer}.self_attn_layer_norm")
                inner = functional.gelu(linear(x, f"{layer}.fc1"))
                x = norm(alpha * x + linear(inner, f"{layer}.fc2"), f"{layer}.final_layer_norm")
        outputs.append(norm(x, "encoder.layer_norm") if config.layer_norm_first else x)
    return torch.stack(outputs)


def reference_attention(model: UniMoeBeatsModel, layer: str, x: torch.Tensor, padded: torch.Tensor) -> torch.Tensor:
    config, weights = model.config, model.state_dict()
    heads, tokens = config.num_attention_heads, len(x)
    size = config.hidden_size // heads
    q, k, v = (
        functional.linear(
            x, weights[f"{layer}.self_attn.{name}_proj.weight"], weights[f"{layer}.self_attn.{name}_proj.bias"]
        ).split(size, dim=-1)
        for name in "qkv"
    )
    columns = []
    for head in range(heads):
        scores = (q[head] * size**-0.5 / 32) @ k[head].t()
        scores = (scores - scores.max(dim=-1, keepdim=True).values) * 32
        scores = scores.masked_fill(padded[None, :], -math.inf)
        if config.relative_position_embedding:
            table = weights["encoder.relative_attention_bias.weight"][:, head]
            bias = torch.tensor(
                [
                    [table[reference_bucket(j - i, config.num_buckets, config.max_distance)] for j in range(tokens)]
                    for i in range(tokens)
                ]
            )
            if config.gru_rel_pos:
                gates = functional.linear(
                    q[head],
                    weights[f"{layer}.self_attn.grep_linear.weight"],
                    weights[f"{layer}.self_attn.grep_linear.bias"],
                )
                a, b = torch.sigmoid(gates.view(tokens, 2, 4).sum(dim=-1)).unbind(dim=-1)
                bias = (a * (b * weights[f"{layer}.self_attn.grep_a"][0, head, 0, 0] - 1) + 2)[:, None] * bias
            scores = scores + bias
        columns.append(scores.softmax(dim=-1) @ v[head])
    name = f"{layer}.self_attn.out_proj"
    return functional.linear(torch.cat(columns, dim=-1), weights[f"{name}.weight"], weights[f"{name}.bias"])


def reference_bucket(offset: int, num_buckets: int, max_distance: int) -> int:
    half = num_buckets // 2
    exact, distance = half // 2, abs(offset)
    bucket = distance
    if distance >= exact:
        bucket = exact + int(math.log(distance / exact) / math.log(max_distance / exact) * (half - exact))
    return min(bucket, half - 1) + (half if offset > 0 else 0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"layer_norm_first": True, "deep_norm": False},
        {"embed_dim": 32, "num_conv_pos_embeddings": 7},
        {"gru_rel_pos": False},
        {"relative_position_embedding": False, "deep_norm": False},
        {"num_hidden_layers": 3, "num_attention_heads": 2},
    ],
)
@torch.no_grad()
def test_the_encoder_follows_the_formulas(attention: str, padded: bool, overrides: dict[str, Any]) -> None:
    model = tiny(attention, **overrides)
    features, padding = batch()
    expected = reference(model, features, padding if padded else None)
    actual = model(features, padding if padded else None).last_hidden_state
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_buckets_follow_the_formula_and_saturate() -> None:
    for num_buckets, max_distance in ((32, 64), (320, 800), (4, 2)):
        offsets = torch.arange(-1700, 1700)
        buckets = relative_position_buckets(offsets, num_buckets, max_distance)
        assert buckets.tolist() == [reference_bucket(int(i), num_buckets, max_distance) for i in offsets]
        assert buckets.min() == 0
        assert buckets.max() == num_buckets - 1


def test_padding_masks_shrink_by_whole_groups() -> None:
    mask = torch.tensor([[False, True, True, True, True, True, False, True]])
    assert reduce_padding_mask(mask, 4).tolist() == [[False, True, True, False]]
    # 8 % 3 = 2 flags are dropped from the end.
    assert reduce_padding_mask(mask, 3).tolist() == [[False, True, True]]
    with pytest.raises(UniMoeError, match="8 positions cannot be reduced to 9"):
        reduce_padding_mask(mask, 9)


@torch.no_grad()
def test_released_clips_give_1496_tokens() -> None:
    assert UniMoeBeatsConfig().num_tokens(2998) == 1496
    model = tiny(num_hidden_layers=1)
    assert model(torch.zeros(1, 50, 128)).last_hidden_state.shape == (1, model.config.num_tokens(50), 32)


@torch.no_grad()
def test_padded_samples_do_not_reach_the_other_tokens() -> None:
    model = tiny()
    features, padding = batch()
    output = model(features, padding)
    # Row 1 is padding from frame 54 on; by the mask's rule of two frames per token, tokens from 27 on are. Frames from
    # 64 on feed tokens from 32 on.
    changed = features.clone()
    changed[1, 64:] = 9.0
    kept = ~output.padding_mask[1]
    assert kept.sum() == 27
    assert torch.equal(model(changed, padding).last_hidden_state[1, kept], output.last_hidden_state[1, kept])


@torch.no_grad()
def test_a_clip_of_padding_alone_stays_finite() -> None:
    features, padding = batch()
    padding[1] = True
    for attention in ("eager", "sdpa"):
        assert tiny(attention)(features, padding).last_hidden_state.isfinite().all()


@torch.no_grad()
def test_bfloat16_runs_and_stays_near_float32() -> None:
    model = tiny(initializer_range=0.05)
    features, padding = batch()
    expected = model(features, padding).last_hidden_state
    actual = model.bfloat16()(features, padding).last_hidden_state
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_gradients_reach_every_parameter_also_with_checkpointing() -> None:
    features, padding = batch()
    gradients = []
    for checkpointing in (False, True):
        model = tiny(hidden_dropout=0.0, attention_dropout=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()(features, padding).last_hidden_state.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients[0].items() if "k_proj.bias" not in name)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4, msg=name)


@torch.no_grad()
def test_dropout_acts_in_training_only() -> None:
    features, _ = batch()
    model = tiny()
    assert torch.equal(model(features).last_hidden_state, model(features).last_hidden_state)
    model.train()
    assert not torch.equal(model(features).last_hidden_state, model(features).last_hidden_state)


@torch.no_grad()
def test_saved_models_load_bit_equal(tmp_path: Path) -> None:
    model = tiny()
    features, padding = batch()
    model.save_pretrained(tmp_path)
    loaded = UniMoeBeatsModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(features, padding).last_hidden_state, model(features, padding).last_hidden_state)
    assert sum("relative_attention_bias" in name for name in model.state_dict()) == 1


def test_gates_that_a_checkpoint_lacks_start_at_one(tmp_path: Path) -> None:
    model = tiny()
    weights = {name: value for name, value in model.state_dict().items() if not name.endswith("grep_a")}
    model.save_pretrained(tmp_path, state_dict=weights)
    for layer in UniMoeBeatsModel.from_pretrained(tmp_path).encoder.layers:
        assert torch.equal(layer.self_attn.grep_a, torch.ones(1, 4, 1, 1))


@torch.no_grad()
def test_outputs_follow_the_transformers_convention() -> None:
    model = tiny("eager", layer_norm_first=True)
    features, padding = batch()
    output = model(features, padding, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert output.attentions[0].shape == (3, 4, 48, 48)
    assert (output.attentions[0].transpose(-1, -2)[1, :, output.padding_mask[1]] == 0).all()
    assert model(features).padding_mask is None


@pytest.mark.parametrize(
    ("features", "padding", "message"),
    [
        (torch.zeros(1, 98, 80), None, r"\(1, 98, 80\)"),
        (torch.zeros(1, 8, 128), None, "at least 16 frames"),
        (torch.zeros(98, 128), None, r"\(98, 128\)"),
        (torch.zeros(1, 98, 128), torch.zeros(2, 16_000, dtype=torch.bool), r"\(2, 16000\)"),
        (torch.zeros(1, 98, 128), torch.zeros(1, 90, dtype=torch.bool), "90 positions"),
    ],
)
def test_wrong_shapes_are_named(features: torch.Tensor, padding: torch.Tensor | None, message: str) -> None:
    with pytest.raises(UniMoeError, match=message):
        tiny()(features, padding)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 7),
        ("num_conv_pos_embedding_groups", 5),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("hidden_size", 10**9),
        ("num_buckets", 3),
        ("max_distance", 80),
        ("num_mel_bins", 15),
        ("num_mel_bins", 400),
        ("hidden_dropout", 1.5),
        ("layer_norm_eps", 0.0),
    ],
)
def test_impossible_configurations_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"UniMoeBeatsConfig.{field} is {value}"):
        UniMoeBeatsConfig(**{field: value})


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="hidden_act is 'glu9000'"):
        tiny(hidden_act="glu9000")


def test_released_settings_translate_to_the_defaults() -> None:
    released = {
        "input_patch_size": 16,
        "deep_norm": True,
        "relative_position_embedding": True,
        "gru_rel_pos": True,
        "max_distance": 800,
        "finetuned_model": False,
        "encoder_layerdrop": 0.05,
    }
    assert UniMoeBeatsConfig.from_original(released).to_dict() == UniMoeBeatsConfig().to_dict()
    # Absent fields take the original code's defaults, not ours.
    assert UniMoeBeatsConfig.from_original({"input_patch_size": 16, "deep_norm": True}).max_distance == 1280
    with pytest.raises(ConfigurationError, match="input_patch_size -1"):
        UniMoeBeatsConfig.from_original({})
