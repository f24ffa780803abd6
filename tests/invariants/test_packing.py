"""Texts that share a row train as texts that have rows of their own: loss, balance losses and every gradient."""

from typing import Any

import pytest
import tiny_training
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from unimoe.trainers.data.collator import RawCollator, RowRules
from unimoe.trainers.data.packing import fill_rows
from unimoe.trainers.steps.objective import training_loss
from unimoe.trainers.steps.trainable import set_trainable

LOSSES: dict[str, Any] = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "top-k": LOSSES | {"router_modality_loss_coef": 0.3, "modality_experts": {"image": [0], "text": [1]}},
    "sliding window": LOSSES | {"sliding_window": 5},
    "dynamic": LOSSES
    | {"router_type": "dynamic", "router_top_p": 0.5, "num_null_experts": 1, "num_shared_experts": 1},
    "groups": LOSSES
    | {
        "expert_groups": {"seen": [0, 1, 2], "told": [1, 2, 3]},
        "modality_groups": {"image": "seen", "video": "seen", "text": "told", "speech": "told", "sound": "told"},
    },
}
MAX_LENGTH = 160


def text_by_text(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' flash attention does with several texts in a row: one attention per piece, of [N, heads, D]."""
    assert attention_mask is None
    assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    assert cu_seq_lens_q.dtype == torch.int32
    assert max_length_q == max_length_k == int(cu_seq_lens_q.diff().max())
    batch, heads, length, size = query.shape
    laid = [x.transpose(1, 2).reshape(batch * length, -1, size) for x in (query, key, value)]
    out = torch.empty_like(laid[0])
    for start, end in zip(cu_seq_lens_q[:-1].tolist(), cu_seq_lens_q[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in laid)
        k, v = (x.repeat_interleave(heads // len(x), dim=0) for x in (k, v))
        kept = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        if sliding_window is not None:
            kept = kept.triu(1 - sliding_window)
        scores = (q @ k.transpose(1, 2) * scaling).masked_fill(~kept, float("-inf"))
        out[start:end] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out.view(batch, length, heads, size), None


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    AttentionInterface.register("text_by_text", text_by_text)
    AttentionMaskInterface.register("text_by_text", flash_attention_mask)


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny_training.processor()


def texts() -> list[dict[str, Any]]:
    samples = []
    for index in range(7):
        sample = tiny_training.sample(
            "text", index, None, "Say red." + " Look." * (index % 4), "blue green"[: 4 + index]
        )
        sample["messages"] *= 1 + index % 2
        samples.append(sample)
    return [*samples, {"id": "plain", "text": "red blue green white", "modality": "text", "task": "text"}]


def step(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses and gradients of a batch."""
    model.zero_grad()
    labels = batch["labels"]
    inputs = {name: v for name, v in batch.items() if name not in ("labels", "sample_ids", "group")}
    outputs = model(**inputs, output_router_logits=True, use_cache=False)
    modalities = model.model.modality_ids(batch["input_ids"])
    config = model.config.text_config
    parts = training_loss(
        outputs, labels, batch["attention_mask"], model.model.token_groups(modalities), modalities, config
    )
    parts.total.backward()
    losses = {"total": parts.total.detach(), "ce": parts.cross_entropy, **parts.routers}
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp(min=1e-12))


@pytest.mark.parametrize(("case", "attention"), [*((c, "eager") for c in CASES), ("top-k", "sdpa"), ("sliding window", "sdpa"),
                         ("top-k", "text_by_text"), ("sliding window", "text_by_text")])  # fmt: skip
def test_packed_texts_train_as_unpacked(processor: Any, case: str, attention: str) -> None:
    model = tiny_training.model(processor, sparse=True, **CASES[case]).train()
    set_trainable(model, ["router", "experts", "attention", "ffn", "norms", "embeddings"])
    packed = RawCollator(processor, rules=RowRules(max_length=MAX_LENGTH, packing=True))(texts())
    plain = RawCollator(processor)(texts())
    assert packed["input_ids"].shape[0] < plain["input_ids"].shape[0]
    assert packed["attention_mask"].sum() == plain["attention_mask"].sum()
    assert (packed["attention_mask"] == 0).any()
    expected_losses, expected = step(model, plain)
    model.model.language_model.set_attn_implementation(attention)
    losses, gradients = step(model, packed)
    for name, loss in expected_losses.items():
        assert float(loss) > 0
        assert abs(float(losses[name]) / float(loss) - 1) <= 1e-6, name
    assert gradients.keys() == expected.keys()
    assert {
        name: gap(gradients[name], expected[name]) for name in expected if gap(gradients[name], expected[name]) > 1e-6
    } == {}


def test_rows_are_filled_and_never_too_long() -> None:
    lengths = [5, 30, 12, 48, 1, 17, 60, 30]
    rows = fill_rows(lengths, 48)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(sum(lengths[n] for n in row) <= 48 or row == [6] for row in rows)
    assert len(rows) == 4  # 203 tokens cannot have fewer
