"""Mixers that start as copies pass on what was seen, and still start at random elsewhere."""

import pytest
import tiny_moai
import torch

from unimoe import UniMoeForCausalLM
from unimoe.quickstart.copying_start import start_as_copies


@pytest.fixture(scope="module")
def models() -> tuple[UniMoeForCausalLM, UniMoeForCausalLM]:
    """Before and after, with a rank as wide as the decoder."""
    before, after = (tiny_moai.model(rank=32, compressor_heads=4, compressor_head_dim=8) for _ in range(2))
    start_as_copies(after)
    return before, after


def found_again(out: torch.Tensor, seen: torch.Tensor) -> float:
    """Share of rows that are most like the row that they came from, [N, H] each, without what all have in common."""
    out, seen = (torch.nn.functional.normalize(x - x.mean(0), dim=-1) for x in (out, seen))
    return float(((out @ seen.T).argmax(dim=1) == torch.arange(len(out))).float().mean())


@torch.no_grad()
def test_experts_and_compressor_pass_on_what_they_read(models: tuple[UniMoeForCausalLM, UniMoeForCausalLM]) -> None:
    seen = torch.randn(12, 32, generator=torch.Generator().manual_seed(0))
    rows = torch.zeros(12, 1, 32)
    shares: dict[str, list[float]] = {"expert": [], "compressor": []}
    for model in models:
        expert = model.model.language_model.layers[0].mixer.language_experts["aux"]
        shares["expert"].append(found_again(expert(rows, seen[:, None])[:, 0], seen))
        told = torch.cat((torch.ones(12, 4, 32), seen[:, None]), dim=1)
        shares["compressor"].append(found_again(model.model.aux_compressor(told)[:, 0], seen))
    for before, after in shares.values():
        assert before < 0.5
        assert after == 1


def test_everything_else_stays(models: tuple[UniMoeForCausalLM, UniMoeForCausalLM]) -> None:
    before, after = (dict(model.named_parameters()) for model in models)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    compressor = {n for n in before if n.endswith((".latents", ".to_kv.weight", ".to_out.weight"))}
    experts = {n for n in before if "_experts.aux." in n and (".v_proj." in n or ".o_proj." in n)}
    assert changed == compressor | experts
    for name in (name for name in changed if name.endswith(".to_kv.weight")):
        keys = len(before[name]) // 2
        assert torch.equal(before[name][:keys], after[name][:keys])
