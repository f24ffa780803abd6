"""The routers' losses about modalities against plain loops, and the draws of the top-k router."""

import math

import pytest
import tiny
import torch
import twins
from balance import load_balancing_loss

from unimoe.modeling_unimoe.modality_losses_unimoe import divergence_loss, modality_loss
from unimoe.modeling_unimoe.routing_unimoe import UniMoeRouter

TEXT, IMAGE, VIDEO, SPEECH = 0, 1, 2, 3
EXPERTS = {"image": [0, 2], "speech": [1], "video": [3]}
MODALITIES = torch.tensor([[0, 1, 1, 3, 3, 0, 0], [0, 2, 2, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]])


def logits(layers: int = 2, experts: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(2 * torch.randn(MODALITIES.numel(), experts, generator=generator) for _ in range(layers))


def shares(layer: torch.Tensor) -> list[list[list[float]]]:
    return layer.softmax(-1).view(*MODALITIES.shape, -1).tolist()


def test_the_modality_loss_is_the_probability_of_foreign_experts() -> None:
    config = tiny.text_config(modality_experts=EXPERTS)
    own = {IMAGE: [0, 2], SPEECH: [1], VIDEO: [3]}
    total = 0.0
    for layer in logits():
        for b, row in enumerate(shares(layer)):
            for s, share in enumerate(row):
                modality = int(MODALITIES[b, s])
                if MASK[b, s] and modality in own:
                    total += 1 - sum(share[e] for e in own[modality])
    expected = total / int(MASK.sum()) / 2
    assert float(modality_loss(logits(), config, MODALITIES, MASK)) == pytest.approx(expected, rel=1e-5)


def test_the_released_modality_loss_sums_distances_from_ones_and_zeros() -> None:
    config = tiny.text_config(modality_experts=EXPERTS, router_losses_as_released=True)
    own = {IMAGE: [0, 2], SPEECH: [1], VIDEO: [3]}
    total = 0.0
    for layer in logits():
        for b, row in enumerate(shares(layer)):
            for s, share in enumerate(row):
                if int(MODALITIES[b, s]) in own:
                    wanted = [float(e in own[int(MODALITIES[b, s])]) for e in range(4)]
                    distances = [abs(p - w) for p, w in zip(share, wanted, strict=True)]
                    total += sum(distances) / 4 / MODALITIES.shape[1]
    assert float(modality_loss(logits(), config, MODALITIES, MASK)) == pytest.approx(total, rel=1e-5)


def mean_share(row: list[list[float]], places: list[int]) -> list[float]:
    return [sum(row[s][e] for s in places) / len(places) for e in range(len(row[0]))]


def divergence(second: list[float], first: list[float]) -> float:
    return sum(q * math.log(q / p) for q, p in zip(second, first, strict=True))


def test_the_divergence_compares_all_modalities_of_a_sample() -> None:
    losses = []
    for layer in logits():
        for b, row in enumerate(shares(layer)):
            means = []
            for modality in (TEXT, IMAGE, VIDEO, SPEECH):
                places = [s for s in range(7) if MODALITIES[b, s] == modality and MASK[b, s]]
                means += [mean_share(row, places)] if places else []
            pairs = [divergence(y, x) for i, x in enumerate(means) for j, y in enumerate(means) if i != j]
            losses += [1 - sum(pairs) / len(pairs)] if pairs else []
    assert len(losses) == 4  # the third sample is text only
    result = divergence_loss(logits(), tiny.text_config(), MODALITIES, MASK)
    assert float(result) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_released_divergence_measures_five_pairs_after_a_second_softmax() -> None:
    ordered = [(IMAGE, SPEECH), (IMAGE, TEXT), (SPEECH, TEXT), (SPEECH, VIDEO), (VIDEO, TEXT)]
    sharp = tuple(4 * layer for layer in logits())  # the larger the divergence, the more its direction matters
    total = 0.0
    for layer in sharp:
        for b, row in enumerate(shares(layer)):
            places = {m: [s for s in range(7) if MODALITIES[b, s] == m] for m in (TEXT, IMAGE, VIDEO, SPEECH)}
            means = {
                m: torch.tensor(mean_share(row, found)).softmax(-1).tolist() for m, found in places.items() if found
            }
            pairs = [divergence(means[y], means[x]) / 4 for x, y in ordered if x in means and y in means]
            total += 1 - sum(pairs) / len(pairs) if pairs else 0
    result = divergence_loss(sharp, tiny.text_config(router_losses_as_released=True), MODALITIES, MASK)
    assert float(result) == pytest.approx(total, rel=1e-6)


def test_equal_use_of_experts_costs_one_and_text_alone_nothing() -> None:
    same = (torch.zeros(MODALITIES.numel(), 4),)
    assert float(divergence_loss(same, tiny.text_config(), MODALITIES, MASK)) == pytest.approx(1.0)
    assert float(divergence_loss(logits(), tiny.text_config(), torch.zeros_like(MODALITIES), MASK)) == 0


def test_only_first_choices_count_when_so_configured() -> None:
    scores = torch.tensor([[3.0, 2.0, 0.0, 0.0], [3.0, 0.0, 2.0, 0.0]])
    probability = scores.softmax(-1).mean(0)
    config = tiny.text_config(router_aux_loss_counts="first")
    torch.testing.assert_close(load_balancing_loss((scores,), config), 4 * probability[0])


@pytest.mark.parametrize("name", ["everything", "dynamic"])
def test_padding_changes_neither_loss(name: str) -> None:
    model = twins.build(name)
    config = model.config.text_config
    config.modality_experts = {"image": [0], "text": [1]}
    config.router_modality_loss_coef = config.router_divergence_loss_coef = 0.5
    inputs = twins.samples(name)[2].inputs()
    pad = torch.zeros(1, 7, dtype=torch.long)
    padded = {key: torch.cat([pad, inputs[key]], dim=1) for key in ("input_ids", "attention_mask")}
    plain = model(**inputs, labels=inputs["input_ids"])
    with_padding = model(**{**inputs, **padded}, labels=padded["input_ids"])
    for part in ("modality_loss", "divergence_loss"):
        torch.testing.assert_close(with_padding[part], plain[part], atol=1e-5, rtol=1e-5)
    expected = plain.ce_loss + config.router_aux_loss_coef * plain.aux_loss + config.router_z_loss_coef * plain.z_loss
    torch.testing.assert_close(plain.loss, expected + 0.5 * plain.modality_loss + 0.5 * plain.divergence_loss)


@pytest.mark.parametrize(("pick", "training"), [("max", True), ("sample", False)])
def test_nothing_is_drawn_unless_asked_for(pick: str, training: bool) -> None:
    gate = router(router_pick=pick).train(training)
    assert torch.equal(gate(torch.ones(50, 32))[2], gate(torch.ones(50, 32))[2])


@pytest.mark.parametrize(("pick", "training"), [("sample", True), ("sample_always", False)])
def test_choices_after_the_first_are_drawn_with_their_probabilities(pick: str, training: bool) -> None:
    torch.manual_seed(0)
    gate = router(router_pick=pick).train(training)
    tokens = torch.ones(20_000, 32)
    logits_TR, weights_TK, index_TK = gate(tokens)
    probability = logits_TR[0].softmax(-1)
    best = int(probability.argmax())
    assert (index_TK[:, 0] == best).all()
    rest = probability.clone()
    rest[best] = 0
    drawn = torch.bincount(index_TK[:, 1], minlength=4) / len(tokens)
    torch.testing.assert_close(drawn, rest / rest.sum(), atol=0.02, rtol=0)
    # Weights are those of the probabilities without noise.
    chosen = probability[index_TK]
    torch.testing.assert_close(weights_TK, chosen / chosen.sum(-1, keepdim=True))


def test_draws_stay_within_the_group_of_a_token() -> None:
    gate = router(router_pick="sample_always", **tiny.MOIIE_GROUPS)
    group_T = torch.arange(200) % 2
    _, _, index_TK = gate(torch.randn(200, 32), group_T)
    for index, group in enumerate(gate.groups):
        assert set(index_TK[group_T == index].flatten().tolist()) <= set(group.experts)
    assert (index_TK[:, 0] != index_TK[:, 1]).all()


def test_logits_in_float32_whatever_the_dtype() -> None:
    gate = router(router_in_float32=True).to(torch.bfloat16)
    logits_TR, weights_TK, _ = gate(torch.ones(3, 32, dtype=torch.bfloat16))
    assert (logits_TR.dtype, weights_TK.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(logits_TR[0], gate.weight.float().sum(-1))


def router(**text: object) -> UniMoeRouter:
    config = tiny.text_config(**text)
    gate = UniMoeRouter(config)
    generator = torch.Generator().manual_seed(1)
    gate.weight.data = 0.2 * torch.randn(config.num_gate_rows, config.hidden_size, generator=generator)
    return gate
