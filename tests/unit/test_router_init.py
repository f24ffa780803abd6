"""Gate rows from hidden states: clusters are found, prompts reach their experts, and the common part is left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from unimoe.conversion.upcycling.prompted_rows import read_prompts
from unimoe.conversion.upcycling.router_init import (
    data_router_rows,
    expert_rows_from_clusters,
    ffn_inputs,
    rows_of_experts,
)
from unimoe.conversion.upcycling.sparsity import Sparsity, sparse_text_config
from unimoe.errors import ConversionError

DENSE = tiny.text_config(num_experts=0, sparse_layers=None)


def sparsity(**fields: Any) -> Sparsity:
    return Sparsity(**{"num_experts": 4, "num_experts_per_tok": 2, "sparse_layers": (0, 2), **fields})


def bunches(count: int, each: int = 50, hidden: int = DENSE.hidden_size) -> tuple[torch.Tensor, torch.Tensor]:
    """States around `count` directions, on top of a large common one; and which each belongs to."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(count, hidden, generator=generator) * 3
    owner = torch.arange(count).repeat_interleave(each)
    common = 30 * torch.randn(hidden, generator=generator)
    return common + centres[owner] + 0.3 * torch.randn(len(owner), hidden, generator=generator), owner


def test_every_cluster_has_an_expert_of_its_own() -> None:
    states, owner = bunches(4)
    rows = expert_rows_from_clusters(states, 4, seed=0)
    logits = states @ rows.T
    chosen = logits.argmax(-1)
    assert len({tuple(sorted(set(chosen[owner == bunch].tolist()))) for bunch in range(4)}) == 4
    assert all(len(set(chosen[owner == bunch].tolist())) == 1 for bunch in range(4))
    assert abs(float(logits.std()) - 1) < 1e-4
    assert float((states.mean(0) @ rows.T).abs().max()) < 1e-3


def test_rows_go_to_their_experts_in_every_group() -> None:
    choice = sparsity(router_init="cluster", routing={"num_shared_experts": 1}, **tiny.MOIIE_GROUPS)
    config = sparse_text_config(DENSE, choice)
    found = torch.arange(4.0)[:, None].expand(4, config.hidden_size)
    rows = rows_of_experts(found, config, choice, layer=0)
    assert rows.shape[0] == config.num_gate_rows == 7
    # Groups in the order of their names: language with experts 1 to 3, then vision with 0 to 2.
    assert rows[:6, 0].tolist() == [1, 2, 3, 0, 1, 2]
    assert rows[6].std() > 0


def test_parts_of_a_copy_get_the_row_of_their_cluster() -> None:
    choice = sparsity(num_experts=8, num_experts_per_tok=4, granularity=2, router_init="cluster")
    config = sparse_text_config(DENSE, choice)
    rows = rows_of_experts(torch.arange(4.0)[:, None].expand(4, config.hidden_size), config, choice, layer=0)
    assert rows[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_tokens_of_an_experts_prompts_prefer_it() -> None:
    states, owner = bunches(4)
    choice = sparsity(router_init="prompts")
    config = sparse_text_config(DENSE, choice)
    texts = {0: [states[owner == bunch] for bunch in (2, 0, 3, 1)]}
    rows = data_router_rows(texts, [2, 0, 3, 1], config, choice)[0]
    assert torch.equal((states @ rows.T).argmax(-1), owner)


def test_the_states_are_the_inputs_of_the_ffns_without_the_first_token() -> None:
    model = tiny.model({"num_experts": 0, "sparse_layers": None})
    ids = torch.tensor([[5, 6, 7, 8]])
    seen = {}
    for layer in (0, 2):
        mlp = model.model.language_model.layers[layer].mlp
        mlp.register_forward_pre_hook(lambda _module, inputs, layer=layer: seen.__setitem__(layer, inputs[0]))
    states = ffn_inputs(model, (0, 2), [ids])
    for layer in (0, 2):
        assert torch.equal(states[layer][0], seen[layer][0, 1:])
    assert not torch.equal(states[0][0], states[2][0])


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ConversionError, match="3 tokens, too few for 4 clusters"):
        expert_rows_from_clusters(torch.randn(3, 8), 4, seed=0)


def test_prompts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    groups = {str(index): [f"text {index}", f"more {index}"] for index in range(4)}
    path.write_text(json.dumps(groups))
    prompts = read_prompts(path, sparsity(router_init="prompts"))
    assert prompts.owners == (0, 0, 1, 1, 2, 2, 3, 3)
    assert prompts.texts[2] == "text 1"
    assert read_prompts(path, sparsity(router_init="cluster")).owners is None
    path.write_text("one\n\ntwo\n")
    assert read_prompts(path, sparsity(router_init="cluster")).texts == ("one", "two")
    assert len(read_prompts(None, sparsity(router_init="cluster")).texts) > 20


@pytest.mark.parametrize(
    ("content", "router_init", "message"),
    [
        (None, "prompts", "needs --prompts FILE"),
        ("{", "prompts", "is not JSON"),
        ("one", "prompts", "is not JSON"),
        ('{"0": ["a"], "1": ["b"]}', "prompts", "keys 0, 1, 2, 3"),
        ('{"0": ["a"], "1": ["b"], "2": [], "3": ["c"]}', "prompts", "'2' needs a list of texts"),
        ("\n", "cluster", "is empty"),
    ],
)
def test_bad_prompts_are_refused(content: str | None, router_init: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConversionError, match=message):
        read_prompts(None if content is None else path, sparsity(router_init=router_init))
    with pytest.raises(ConversionError, match="cannot be read"):
        read_prompts(tmp_path / "nothing", sparsity(router_init="cluster"))
