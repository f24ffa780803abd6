"""What routing by groups adds: balance and z-loss per group, run ends as text, jitter for experts, S2 scales."""

from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from balance import group_balance_losses

from unimoe.conversion.upcycling.group_presets import group_preset
from unimoe.errors import ConfigurationError, ModalityError
from unimoe.modeling_unimoe.configuration_unimoe_text import MODALITIES
from unimoe.modeling_unimoe.losses_unimoe import balance_terms, router_z_loss
from unimoe.modeling_unimoe.modeling_unimoe_text import UniMoeTextModel
from unimoe.modeling_unimoe.routing_unimoe import UniMoeRouter

TOKENS = 30


def random_logits(rows: int, layers: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(TOKENS, rows, generator=generator) for _ in range(layers))


def groups_of_tokens() -> torch.Tensor:
    return torch.arange(TOKENS) % 2


# --- losses ----------------------------------------------------------------------------------------------------------


def test_every_group_is_balanced_as_a_model_of_its_own() -> None:
    config, logits, groups = tiny.text_config(**tiny.MOIIE_GROUPS), random_logits(6), groups_of_tokens()
    alone = tiny.text_config(num_experts=3)
    got = group_balance_losses(logits, config, groups)
    for index in range(2):
        own = tuple(layer[groups == index, 3 * index : 3 * index + 3] for layer in logits)
        torch.testing.assert_close(got[index], group_balance_losses(own, alone)[0])


def test_joint_layers_balance_the_sum_of_all_layers() -> None:
    """Two layers that collapse onto different experts are even together, and only together."""
    first = torch.tensor([[9.0, 9.0, 0.0, 0.0]] * TOKENS)
    logits = (first, first.flip(1))
    each, joint = (tiny.text_config(router_aux_loss_layers=kind) for kind in ("each", "joint"))
    torch.testing.assert_close(group_balance_losses(logits, joint), torch.ones(1))
    assert float(group_balance_losses(logits, each)) > 1.9
    mask = torch.arange(TOKENS) % 3 > 0
    logits = random_logits(4)
    together = group_balance_losses((torch.cat(logits),), each, attention_mask_T=mask.repeat(2))
    torch.testing.assert_close(group_balance_losses(logits, joint, attention_mask_T=mask), together)


def test_groups_have_coefficients_of_their_own() -> None:
    coefs = {"router_aux_loss_coef": 0.5, "router_group_aux_loss_coefs": {"vision": 0.1}}
    config = tiny.text_config(**tiny.MOIIE_GROUPS, **coefs)
    assert config.aux_loss_coefs == [0.5, 0.1]  # language first: groups are sorted by name
    logits, groups = random_logits(6), groups_of_tokens()[None]
    terms = balance_terms(logits, config, torch.zeros_like(groups), groups, None)
    language, vision = group_balance_losses(logits, config, groups.flatten())
    torch.testing.assert_close(terms.weighted, 0.5 * language + 0.1 * vision)
    torch.testing.assert_close(terms.losses["aux_loss"], language + vision)


def test_z_loss_looks_at_a_tokens_own_rows() -> None:
    config = tiny.text_config(**tiny.MOIIE_GROUPS, num_null_experts=1, num_shared_experts=1)
    logits, groups = random_logits(9), groups_of_tokens()
    expected = []
    for layer in logits:
        for token in range(TOKENS):
            first = 4 * int(groups[token])
            own = torch.cat((layer[token, first : first + 4], layer[token, 8:]))
            expected.append(own.logsumexp(0) ** 2)
    got = router_z_loss(logits, None, config, groups)
    torch.testing.assert_close(got, torch.stack(expected).mean())


# --- routing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_scores_of_zero_do_not_open_other_groups(index: int) -> None:
    """One logit so large that the others' probabilities vanish: the second choice still is one of the group's."""
    experts, modalities = group_preset("separate", 4)
    gate = UniMoeRouter(tiny.text_config(expert_groups=experts, modality_groups=modalities)).eval()
    gate.weight.data.zero_()
    gate.weight.data[2 * index + 1, 0] = 1000.0
    x = torch.zeros(1, tiny.HIDDEN)
    x[0, 0] = 1.0
    _, weights, experts = gate(x, torch.tensor([index]))
    assert set(experts[0].tolist()) <= set(gate.groups[index].experts)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0]]))


def test_experts_of_a_group_without_a_choice_are_used_as_they_are() -> None:
    experts, modalities = group_preset("modality", 2)
    config = tiny.text_config(
        num_experts=2,
        num_experts_per_tok=1,
        expert_groups=experts,
        modality_groups=modalities,
        sparse_layers=[0],
        num_hidden_layers=1,
    )
    block = UniMoeTextModel(config).layers[0].mlp
    x, groups = torch.randn(1, 12, tiny.HIDDEN), (torch.arange(12) % 2)[None]
    y = block(x, groups)
    for index, group in enumerate(config.router_groups):
        gate_up, down = block.experts.gate_up_proj[group.experts[0]], block.experts.down_proj[group.experts[0]]
        gate, up = F.linear(x[0, groups[0] == index], gate_up).chunk(2, dim=-1)
        torch.testing.assert_close(y[0, groups[0] == index], F.linear(F.silu(gate) * up, down))
    y.square().sum().backward()
    assert not block.gate.weight.grad.any()  # not None: every rank has it


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_a_batch_without_a_modality_gives_zero_gradients(experts: str) -> None:
    model = tiny.model(text={**tiny.MOIIE_GROUPS, "router_z_loss_coef": 0.1})
    model.set_experts_implementation(experts)
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    for layer in (model.model.language_model.layers[i].mlp for i in (0, 2)):
        vision_rows, vision_expert = layer.gate.weight.grad[3:], layer.experts.gate_up_proj.grad[0]
        assert not vision_rows.any()
        assert not vision_expert.any()
        assert layer.gate.weight.grad[:3].any()
        assert torch.isfinite(layer.gate.weight.grad).all()


def test_one_pass_over_the_experts_serves_all_groups() -> None:
    model = tiny.model(text={**tiny.MOIIE_GROUPS, "sparse_layers": [0]})
    calls: list[torch.Tensor] = []
    experts = model.model.language_model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: calls.append(args[1]))
    model(input_ids=torch.tensor([tiny.prompt(*range(5, 25), "image", "image")]), **tiny.media(images=2))
    assert len(calls) == 1
    assert set(calls[0].flatten().tolist()) == {0, 1, 2, 3}  # ids of the layer's experts, whatever the group


def test_five_groups_learn_from_their_own_tokens_only() -> None:
    experts, modalities = group_preset("five", 10)
    text = {"num_experts": 10, "expert_groups": experts, "modality_groups": modalities, "router_aux_loss_coef": 0.0}
    model = tiny.model(text=text)
    decoder, config = model.model.language_model, model.config.text_config
    for modality_id, modality in enumerate(MODALITIES):
        model.zero_grad()
        embeds = torch.randn(1, 60, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))
        ids = torch.full((1, 60), modality_id)
        decoder(inputs_embeds=embeds, mm_token_type_ids=ids).last_hidden_state.square().sum().backward()
        group = config.router_groups[config.group_of_modality[modality_id]]
        assert group.modalities == (modality,)
        for layer in config.sparse_layers:
            mlp = decoder.layers[layer].mlp
            assert {e for e in range(10) if mlp.experts.down_proj.grad[e].any()} == set(group.experts)
            rows = {int(r) for r in mlp.gate.weight.grad.any(dim=1).nonzero()}
            assert rows == set(torch.where(mlp.gate.row_group_R == config.group_of_modality[modality_id])[0].tolist())


def test_the_last_feature_of_a_run_may_go_as_text() -> None:
    model = tiny.model(text=tiny.MOIIE_GROUPS, route_run_end_as_text=True)
    ids = torch.tensor([tiny.prompt(5, "image", "image", 6, "image"), tiny.prompt(5, "image", "video", *[7] * 5)])
    routed = model.model.routing_ids(model.model.modality_ids(ids))
    image, video = 1, 2
    assert routed[0].tolist() == [0, *[image] * 7, 0, 0, *[image] * 3, 0]
    assert routed[1].tolist() == [0, *[image] * 3, 0, *[video] * 3, 0, *[0] * 5]
    whole = torch.full((1, 3), image)  # a run that ends where the row ends
    assert model.model.routing_ids(whole).tolist() == [[image, image, 0]]
    plain = tiny.model(text=tiny.MOIIE_GROUPS)
    assert torch.equal(plain.model.routing_ids(model.model.modality_ids(ids)), model.model.modality_ids(ids))
    # The features themselves still belong to images, for the losses and for placing them.
    inputs = {"input_ids": ids[:1], **tiny.media(images=3)}
    assert (model.model(**inputs).mm_token_type_ids == image).sum() == 12
    assert not torch.equal(model(**inputs).logits, plain(**inputs).logits)
    labels = ids[:1].clone()
    output = model(**inputs, labels=labels, output_router_logits=True)
    groups = model.model.token_groups(model.model.modality_ids(ids[:1])).flatten()
    expected = group_balance_losses(output.router_logits, model.config.text_config, groups)
    torch.testing.assert_close(output.group_aux_losses, expected)


def test_jitter_may_reach_the_experts() -> None:
    """The block is linear in the scale of an expert's input where its activation is, so noise shows there."""
    torch.manual_seed(0)
    x = torch.randn(1, 5, tiny.HIDDEN)
    outputs = {}
    for reaches in (False, True):
        text: dict[str, Any] = {
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 1,
            "sparse_layers": [0],
        }
        config = tiny.text_config(**text, router_jitter_noise=0.3, router_jitter_reaches_experts=reaches)
        torch.manual_seed(0)
        block = UniMoeTextModel(config).layers[0].mlp
        assert torch.equal(block.eval()(x), block(x))
        outputs[reaches] = (block.eval()(x), block.train()(x), block.train()(x))
    quiet, noisy, again = outputs[False]
    assert torch.equal(quiet, noisy)  # one expert of weight 1: the router's noise changes nothing
    quiet, noisy, again = outputs[True]
    assert not torch.allclose(quiet, noisy)
    assert not torch.allclose(noisy, again)
    # Router and experts read the same noisy states.
    read: dict[str, torch.Tensor] = {}
    block.gate.register_forward_hook(lambda gate, args, output: read.update(logits=output[0]))
    block.experts.register_forward_pre_hook(lambda _, args: read.update(states=args[0]))
    block(x)
    torch.testing.assert_close(read["logits"], read["states"] @ block.gate.weight.T)


# --- scales ----------------------------------------------------------------------------------------------------------


def test_scales_encode_tiles_and_put_them_side_by_side() -> None:
    """Three scales, tile by tile with plain loops."""
    model = tiny.model(vision_scales=[1, 2, 3], image_connector=tiny.connector(input_size=96))
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    states = model.model.encode_image(pixels)
    assert states.shape == (2, 4, 96)
    tower = model.model.vision_tower
    for picture in range(2):
        for index, scale in enumerate((1, 2, 3)):
            resized = F.interpolate(pixels[picture : picture + 1], size=(16 * scale,) * 2, mode="bicubic")
            whole = torch.zeros(32, 2 * scale, 2 * scale)
            for row in range(scale):
                for column in range(scale):
                    tile = resized[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
                    patches = tower(tile, output_hidden_states=True).hidden_states[-2][0, 1:]
                    whole[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patches.T.view(32, 2, 2)
            area = whole.view(32, 2, scale, 2, scale).mean(dim=(2, 4))
            torch.testing.assert_close(
                states[picture, :, 32 * index : 32 * index + 32].T.view(32, 2, 2), area, atol=1e-5, rtol=1e-5
            )
    features = model.model.get_image_features(pixels).pooler_output
    assert features.shape == (2, 4, tiny.HIDDEN)


def test_a_tower_that_trains_learns_at_all_scales() -> None:
    model = tiny.model(vision_scales=[1, 2], image_connector=tiny.connector(input_size=64), freeze_towers=False)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model.model.encode_image(pixels)[..., 32:].square().sum().backward()
    embedding = next(p for n, p in model.model.vision_tower.named_parameters() if n.endswith("patch_embedding.weight"))
    assert embedding.grad.any()


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"vision_scales": []}, "ascending"),
        ({"vision_scales": [2, 1]}, "ascending"),
        ({"vision_scales": [1, 99]}, "vision_scales"),
        ({"vision_scales": [1, 2]}, "it must be 64"),
        ({"vision_scales": [1, 2], "vision_config": None, "image_connector": None}, "vision_scales"),
    ],
)
def test_impossible_scales_are_refused(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigurationError, match=word):
        tiny.config(**fields)


def test_scales_need_a_map_of_patches() -> None:
    model = tiny.model(
        vision_scales=[1, 2],
        image_connector=tiny.connector(input_size=64),
        vision_feature_select_strategy="full",
    )
    with pytest.raises(ConfigurationError, match="square map"):
        model.model.encode_image(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ModalityError):
        model.model.encode_image(torch.zeros(1, 2, 32, 32))
