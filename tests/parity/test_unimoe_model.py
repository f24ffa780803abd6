"""Uni-MoE's whole model against golden data: experts, routing, merging, logits, loss, gradients, greedy answers."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import GoldenCase
from planted import require_noticed
from unimoe_case import batch_gradients, check_greedy, check_text, check_whole_model, record, unimoe_model

experts = pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])


def is_plain(case: GoldenCase) -> bool:
    """The variants without DeepSpeed's layout."""
    return "moe_type" not in case.config and not case.names("*.deepspeed_moe.*", "weights")


PLAIN = {"weights": ("model.embed_tokens.weight", "model.layers.*.mlp.experts.*"), "where": is_plain}
BATCH = ("batch.input_ids", "batch.labels")
REQUIREMENTS = {
    "moe_alone": pytest.mark.golden("moe_alone.input", **PLAIN),
    "forward": pytest.mark.golden(BATCH[0], **PLAIN),
    "gradients": pytest.mark.golden(*BATCH, "grad.*", **PLAIN),
    "text": pytest.mark.golden("text.input_ids", "text.logits", **PLAIN),
    "video": pytest.mark.golden("batch.videos", "batch.video_mask", "video.pooled_tokens", **PLAIN),
    "greedy": pytest.mark.golden(BATCH[0], "gen.*.output_ids*", **PLAIN),
}


@REQUIREMENTS["moe_alone"]
@experts
def test_one_block_of_experts(golden_case: GoldenCase, experts: str) -> None:
    check_moe_alone(golden_case, experts)


@REQUIREMENTS["forward"]
@experts
def test_a_batch_of_all_media(golden_case: GoldenCase, experts: str) -> None:
    check_forward(golden_case, experts)


@REQUIREMENTS["gradients"]
@experts
def test_gradients(golden_case: GoldenCase, experts: str) -> None:
    check_gradients(golden_case, experts)


@REQUIREMENTS["text"]
def test_text_alone(golden_case: GoldenCase) -> None:
    check_text(golden_case)


@REQUIREMENTS["video"]
def test_video_features(golden_case: GoldenCase) -> None:
    check_video(golden_case)


@REQUIREMENTS["greedy"]
def test_greedy_answers_with_and_without_cache(golden_case: GoldenCase) -> None:
    check_greedy(golden_case)


@pytest.mark.parametrize(
    ("check", "tensor"),
    [
        ("moe_alone", "moe_alone.output"),
        ("moe_alone", "moe_alone.topk_idx"),
        ("forward", "merged.inputs_embeds"),
        ("forward", "merged.attention_mask"),
        ("forward", "merged.labels"),
        ("forward", "full.layer0.router_logits"),
        ("forward", "full.layer0.topk_idx"),
        ("forward", "full.layer0.topk_weight"),
        ("forward", "full.layer0.moe_out"),
        ("forward", "full.layer0.hidden_out"),
        ("forward", "full.logits"),
        ("forward", "full.loss"),
        ("gradients", "grad.model.layers.0.mlp.gate.weight"),
        ("gradients", "grad.model.layers.0.mlp.experts.0.gate_proj.weight"),
        ("text", "text.logits"),
        ("video", "video.pooled_tokens"),
        ("greedy", "gen.text.output_ids"),
    ],
)
def test_one_changed_golden_value_is_noticed(check: str, tensor: str, tmp_path: Path) -> None:
    labels = BATCH[1:] if BATCH[0] in REQUIREMENTS[check].args else ()
    require_noticed(globals()[f"check_{check}"], REQUIREMENTS[check], tensor, tmp_path, *labels)


@torch.no_grad()
def check_moe_alone(case: GoldenCase, experts: str = "eager") -> None:
    model, _ = unimoe_model(case, experts)
    layer = model.config.text_config.sparse_layers[0]
    block = model.model.language_model.layers[layer].mlp
    seen = record(block.gate)
    case.check_if_present("moe_alone.output", block(case.input("moe_alone.input")))
    check_router(case, "moe_alone", seen)


def check_forward(case: GoldenCase, experts: str = "eager") -> None:
    model, _ = unimoe_model(case, experts)
    check_whole_model(case, "full", model, partial(check_router, case))


def check_gradients(case: GoldenCase, experts: str = "eager") -> None:
    model, key_map = unimoe_model(case, experts)
    gradient_of = batch_gradients(case, model)
    for name in case.names("grad.*"):
        case.check(name, gradient_of(key_map.place(name.removeprefix("grad."))), scale="largest")


@torch.no_grad()
def check_video(case: GoldenCase) -> None:
    model, _ = unimoe_model(case)
    videos = case.input("batch.videos")[case.input("batch.video_mask")][:1]
    case.check("video.pooled_tokens", model.get_video_features(videos).pooler_output[0])


def check_router(case: GoldenCase, name: str, router: dict[str, Any]) -> None:
    logits, weights, index = router["output"]
    case.check_if_present(f"{name}.router_logits", logits)
    case.check_if_present(f"{name}.topk_weight", weights)
    case.check_if_present(f"{name}.topk_idx", index)
