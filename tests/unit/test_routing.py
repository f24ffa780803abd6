"""The router against independent arithmetic: which experts, with what weights, and who learns from whom."""

from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F

from unimoe import UniMoeTextConfig
from unimoe.modeling_unimoe.configuration_unimoe_text import MODALITIES
from unimoe.modeling_unimoe.modeling_unimoe_text import UniMoeSparseBlock, UniMoeTextModel
from unimoe.modeling_unimoe.routing_unimoe import UniMoeRouter

TOKENS = 40


def router(seed: int = 0, **text: Any) -> UniMoeRouter:
    gate = UniMoeRouter(tiny.text_config(**text))
    generator = torch.Generator().manual_seed(seed)
    gate.weight.data = torch.randn(gate.weight.shape, generator=generator)
    return gate.eval()


def block(seed: int = 0, **text: Any) -> UniMoeSparseBlock:
    config = tiny.text_config(num_hidden_layers=1, sparse_layers=[0], **text)
    torch.manual_seed(seed)
    return UniMoeTextModel(config).layers[0].mlp


def hidden(seed: int = 1, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(tokens, tiny.HIDDEN, generator=torch.Generator().manual_seed(seed))


def groups_of_tokens() -> torch.Tensor:
    return torch.arange(TOKENS) % 2


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("normalize", [True, False])
def test_one_group_is_plain_top_k(top_k: int, normalize: bool) -> None:
    gate = router(num_experts_per_tok=top_k, norm_topk_prob=normalize)
    x = hidden()
    logits, weights, experts = gate(x)
    torch.testing.assert_close(logits, x @ gate.weight.T)
    for token in range(TOKENS):
        scores = torch.exp(logits[token]) / torch.exp(logits[token]).sum()
        best = sorted(range(4), key=lambda e: -scores[e].item())[:top_k]
        assert experts[token].tolist() == best
        expected = scores[best] / scores[best].sum() if normalize else scores[best]
        torch.testing.assert_close(weights[token], expected)


def test_one_expert_that_counts_whole_gives_the_gate_no_gradient() -> None:
    gate = router(num_experts_per_tok=1)
    _, weights_T1, _ = gate(hidden())
    assert (weights_T1 == 1).all()
    (weights_T1 * torch.randn(TOKENS, 1)).sum().backward()
    assert gate.weight.grad is not None
    assert not gate.weight.grad.any()


def test_sigmoid_scores() -> None:
    gate = router(router_scoring="sigmoid", norm_topk_prob=False)
    logits, weights, experts = gate(hidden())
    torch.testing.assert_close(weights, torch.sigmoid(logits).gather(1, experts))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_groups_choose_among_their_own_experts_with_their_own_gate(scoring: str) -> None:
    gate = router(router_scoring=scoring, **tiny.MOIIE_GROUPS)
    x, token_group = hidden(), groups_of_tokens()
    logits, weights, experts = gate(x, token_group)
    assert logits.shape == (TOKENS, 6)
    first_row = 0
    for index, group in enumerate(gate.groups):
        alone = router(router_scoring=scoring, num_experts=3)
        alone.weight.data = gate.weight[first_row : first_row + 3]
        first_row += 3
        mine = token_group == index
        _, expected_weights, rows = alone(x[mine])
        torch.testing.assert_close(weights[mine], expected_weights)
        assert torch.equal(experts[mine], torch.tensor(group.experts)[rows])
        assert set(experts[mine].unique().tolist()) == set(group.experts)


def test_weights_sum_to_one_and_stay_in_the_dtype_of_the_states() -> None:
    gate = router(**tiny.MOIIE_GROUPS).to(torch.bfloat16)
    logits, weights, experts = gate(hidden().bfloat16(), groups_of_tokens())
    assert (logits.dtype, weights.dtype, experts.dtype) == (torch.bfloat16, torch.bfloat16, torch.int64)
    torch.testing.assert_close(weights.float().sum(-1), torch.ones(TOKENS), atol=8e-3, rtol=0)


def test_every_modality_goes_to_its_group() -> None:
    config = tiny.text_config(**tiny.MOIIE_GROUPS)
    names = [config.router_groups[index].name for index in config.group_of_modality]
    assert dict(zip(MODALITIES, names, strict=True)) == tiny.MOIIE_GROUPS["modality_groups"]


def test_the_order_in_which_groups_are_written_does_not_matter() -> None:
    """A saved configuration comes back with its groups sorted by name; gate rows must still mean the same."""
    groups = tiny.MOIIE_GROUPS["expert_groups"]
    reverse = {**tiny.MOIIE_GROUPS, "expert_groups": dict(reversed(list(groups.items())))}
    one, other = tiny.text_config(**tiny.MOIIE_GROUPS), tiny.text_config(**reverse)
    assert one.router_groups == other.router_groups
    assert one.group_of_modality == other.group_of_modality


def test_jitter_only_in_training() -> None:
    gate = router(router_jitter_noise=0.3)
    x = hidden()
    assert torch.equal(gate(x)[0], gate(x)[0])
    gate.train()
    torch.manual_seed(0)
    noisy, again = gate(x)[0], gate(x)[0]
    assert not torch.allclose(noisy, again)
    assert router(router_jitter_noise=0.0).train()(x)[0].equal(x @ router().weight.T)


@pytest.mark.parametrize("groups", [{}, tiny.MOIIE_GROUPS], ids=["one group", "two groups"])
def test_sparse_block_is_the_weighted_sum_of_its_experts(groups: dict[str, Any]) -> None:
    layer, x = block(**groups), hidden()
    token_group = groups_of_tokens() if groups else None
    _, weights, experts = layer.gate(x, token_group)
    expected = torch.zeros_like(x)
    for token in range(TOKENS):
        for weight, expert in zip(weights[token], experts[token], strict=True):
            gate, up = (layer.experts.gate_up_proj[expert] @ x[token]).chunk(2)
            expected[token] += weight * (layer.experts.down_proj[expert] @ (F.silu(gate) * up))
    got = layer(x[None], None if token_group is None else token_group[None])[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("modality", MODALITIES)
def test_gradients_reach_only_the_experts_and_gate_of_the_group(modality: str) -> None:
    config = tiny.text_config(**tiny.MOIIE_GROUPS)
    layer = block(**tiny.MOIIE_GROUPS)
    index = config.group_of_modality[MODALITIES.index(modality)]
    layer(hidden()[None], torch.full((1, TOKENS), index)).square().sum().backward()
    learned = {e for e in range(4) if layer.experts.down_proj.grad[e].any()}
    assert learned == {e for e in range(4) if layer.experts.gate_up_proj.grad[e].any()}
    assert learned == set(config.router_groups[index].experts)
    rows = {r for r in range(6) if layer.gate.weight.grad[r].any()}
    assert rows == set(range(3 * index, 3 * index + 3))


def test_the_model_routes_by_the_modality_of_each_token() -> None:
    """Images and videos never touch the language-only expert, text and audio never the vision-only one."""
    model = tiny.model(text={**tiny.MOIIE_GROUPS, "sparse_layers": [0]})
    seen: dict[str, set[int]] = {}

    ids = tiny.prompt(*range(5, 30), "image", "video", "audio", "image", "image")
    # By what the tokens are, not by what the router was told that they are.
    pictures = [model.config.image_token_id, model.config.video_token_id]
    is_vision = torch.isin(torch.tensor(ids), torch.tensor(pictures))
    assert 0 < int(is_vision.sum()) < len(ids)

    def record(gate: UniMoeRouter, args: tuple, output: tuple) -> None:
        for name, tokens in (("vision", is_vision), ("language", ~is_vision)):
            seen[name] = set(output[2][tokens].unique().tolist())

    model.model.language_model.layers[0].mlp.gate.register_forward_hook(record)
    model(input_ids=torch.tensor([ids]), **tiny.media(images=3, videos=1, windows=1))
    assert seen["vision"] <= {0, 1, 2}
    assert seen["language"] <= {1, 2, 3}
    assert 0 in seen["vision"]
    assert 3 in seen["language"]


def test_eager_experts_skip_the_empty_slot() -> None:
    layer, x = block(), hidden(tokens=3)
    _, weights, experts = layer.gate(x)
    layer.experts.config = tiny.text_config()
    nobody = torch.full_like(experts, layer.experts.num_experts)
    forward = type(layer.experts).forward
    eager = getattr(forward, "__wrapped__", forward)
    assert not eager(layer.experts, x, nobody, weights).any()


def test_row_tables_are_rebuilt_when_a_model_is_loaded(tmp_path: Any) -> None:
    model = UniMoeTextModel(tiny.text_config(**tiny.MOIIE_GROUPS))
    model.save_pretrained(tmp_path)
    loaded = UniMoeTextModel.from_pretrained(tmp_path)
    gate, expected = loaded.layers[0].mlp.gate, model.layers[0].mlp.gate
    assert torch.equal(gate.row_group_R, expected.row_group_R)
    assert torch.equal(gate.row_expert_R, expected.row_expert_R)
    assert gate.row_group_R.tolist() == [0, 0, 0, 1, 1, 1]


def test_dense_decoder_has_no_router() -> None:
    model = UniMoeTextModel(
        UniMoeTextConfig(**{**tiny.text_config().to_dict(), "num_experts": 0, "sparse_layers": []})
    )
    assert not any(isinstance(module, UniMoeRouter) for module in model.modules())
