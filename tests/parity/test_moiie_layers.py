"""MoIIE's sparse block, its balance loss, its S2 tower and its conversion from a dense model, each alone."""

import pytest
import torch
from balance import group_balance_losses
from golden import GoldenCase
from moiie_case import convert, converted, group_names, has_vision_mask, is_moiie, moiie_model, moiie_variant

from unimoe import UniMoeConfig, UniMoeForCausalLM, UniMoeTextConfig
from unimoe.conversion.checkpoints.key_rules import KeyMap
from unimoe.conversion.released.moiie_config import original_moiie_config, sizes_of
from unimoe.conversion.released.moiie_keys import moiie_rules
from unimoe.conversion.upcycling.sparsity import Sparsity
from unimoe.conversion.upcycling.upcycle import upcycle_model
from unimoe.errors import ConversionError

experts = pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
REQUIREMENTS = {
    "layer": pytest.mark.golden("*.hidden_states", file="layer", weights="lm_head*", where=is_moiie),
    "aux_loss": pytest.mark.golden("*.logits.*", file="aux_loss", where=is_moiie),
    "scales": pytest.mark.golden("pixel_values", "features", file="s2", weights="lm_head*", where=is_moiie),
    "conversion": pytest.mark.golden("dense.*", "converted.*", file="conversion", where=is_moiie),
}


@REQUIREMENTS["layer"]
@experts
def test_one_moiie_block(golden_case: GoldenCase, experts: str) -> None:
    check_layer(golden_case, experts)


@REQUIREMENTS["aux_loss"]
def test_moiie_balance_loss(golden_case: GoldenCase) -> None:
    check_aux_loss(golden_case)


@REQUIREMENTS["scales"]
def test_moiie_tower_at_three_scales(golden_case: GoldenCase) -> None:
    check_scales(golden_case)


@REQUIREMENTS["conversion"]
def test_moiie_upcycling_copies_what_the_original_copies(golden_case: GoldenCase) -> None:
    check_conversion(golden_case)


@torch.no_grad()
def check_layer(case: GoldenCase, experts: str = "eager") -> None:
    model = moiie_model(case, experts)
    layer = model.config.text_config.sparse_layers[0]
    block = model.model.language_model.layers[layer].mlp
    _load_block(case, block, layer)
    for name in case.names("*.hidden_states", "layer"):
        scenario = name.removesuffix(".hidden_states")
        x_BSH = case.input(name, "layer")
        groups = None
        if has_vision_mask(case):
            groups = _groups_of_ids(case, model, scenario)
        logits_TR, _, _ = block.gate(x_BSH.flatten(0, 1), None if groups is None else groups.flatten())
        case.check_if_present(f"{scenario}.output", block(x_BSH, groups), file="layer")
        _check_logits(case, scenario, logits_TR, groups, model)


def _load_block(case: GoldenCase, block: torch.nn.Module, layer: int) -> None:
    names = case.names("weights.*", "layer")
    if not names:
        return  # the block of the whole model is meant
    own = {f"model.layers.{layer}.mlp.{n.removeprefix('weights.')}": case.input(n, "layer") for n in names}
    state = converted(case.path).key_map.convert(own)
    prefix = f"model.language_model.layers.{layer}.mlp."
    missing, unexpected = block.load_state_dict(
        {name.removeprefix(prefix): value for name, value in state.items()}, strict=False
    )
    assert not unexpected
    assert set(missing) <= {"gate.weight"} if moiie_variant(case).kind == "modality" else not missing


def _groups_of_ids(case: GoldenCase, model: UniMoeForCausalLM, scenario: str) -> torch.Tensor:
    ids = case.input(f"{scenario}.token_type_ids", "layer")
    groups = model.model.token_groups((ids == 1).long())  # any other id is text
    vision = groups == group_names(model).index("vision")
    case.check_if_present(f"{scenario}.vision_token_mask", vision, file="layer")
    return groups


def _check_logits(
    case: GoldenCase,
    scenario: str,
    logits_TR: torch.Tensor,
    groups: torch.Tensor | None,
    model: UniMoeForCausalLM,
) -> None:
    case.check_if_present(f"{scenario}.router_logits", logits_TR, file="layer")
    first = 0
    for index, group in enumerate(model.config.text_config.router_groups if groups is not None else []):
        rows = logits_TR[groups.flatten() == index, first : first + len(group.experts)]
        first += len(group.experts)
        case.check_if_present(f"{scenario}.{group.name[:3]}_router_logits", rows, file="layer")


def check_aux_loss(case: GoldenCase) -> None:
    for prefix in sorted({name.split(".")[0] for name in case.names("*.logits.*", "aux_loss")}):
        logits = tuple(case.input(name, "aux_loss") for name in case.names(f"{prefix}.logits.*", "aux_loss"))
        chosen = case.config["num_experts_per_tok"]
        config = UniMoeTextConfig(
            num_experts=logits[0].shape[1], num_experts_per_tok=chosen, router_aux_loss_layers="joint"
        )
        masks = {"unmasked": None}
        if case.has(f"{prefix}.mask", file="aux_loss"):
            masks["masked"] = case.input(f"{prefix}.mask", "aux_loss").flatten()
        for kind, mask in masks.items():
            # An even load costs the original k, and ours 1.
            loss = chosen * group_balance_losses(logits, config, attention_mask_T=mask)
            case.check_if_present(f"{prefix}.loss_{kind}", loss, file="aux_loss")


@torch.no_grad()
def check_scales(case: GoldenCase) -> None:
    pixels, width = case.input("pixel_values", "s2"), case.json("vision_config")["hidden_size"]
    count = pixels.shape[-1] // case.json("vision_config")["image_size"]
    connector = converted(case.path).config.image_connector.to_dict() | {"input_size": count * width}
    connector.pop("model_type")
    config = converted(case.path).config.to_dict()
    config.pop("model_type")
    scaled = UniMoeConfig(**config | {"vision_scales": [*range(1, count + 1)], "image_connector": connector})
    model = UniMoeForCausalLM(scaled).eval()
    tower = {name: value for name, value in converted(case.path).state.items() if ".vision_tower." in name}
    missing, unexpected = model.load_state_dict(tower, strict=False)
    assert not unexpected
    assert not [name for name in missing if "vision_tower" in name]
    case.check("features", model.model.encode_image(pixels), file="s2")


def check_written_config(case: GoldenCase, sparse_layers: list[int]) -> None:
    """What the original's tool writes as config.json is read, and written again, field by field."""
    if not (case.path / "conversion_config.json").is_file():
        return
    written = case.json("conversion_config")
    weights = {
        n.removeprefix("converted."): case.input(n, "conversion") for n in case.names("converted.*", "conversion")
    }
    if sparse_layers != [*range(1, written["num_hidden_layers"], 2)]:
        with pytest.raises(ConversionError, match="which is a mistake"):
            convert(weights, written)
        return
    read = convert(weights, written)
    again = original_moiie_config(read.config, read.variant, "siglip", "pad")
    for field in set(written) - {"transformers_version"}:
        assert again[field] == pytest.approx(written[field]), field


@torch.no_grad()
def check_conversion(case: GoldenCase) -> None:
    """Upcycle the dense model as the original's tools do, and read the result in the original's names."""
    dense_weights = {
        n.removeprefix("dense."): case.input(n, "conversion") for n in case.names("dense.*", "conversion")
    }
    dense = convert(dense_weights, case.json("conversion_dense_config"))
    model = UniMoeForCausalLM(dense.config).eval()
    model.load_state_dict(dense.state)
    wanted = [name.removeprefix("converted.") for name in case.names("converted.*", "conversion")]
    # The tool for modality models writes even layers, which its model cannot load; the copies are right.
    whole = moiie_variant(case)
    sparse_layers = sorted({int(n.split(".")[2]) for n in wanted if "expert" in n})
    pools, grouped = whole.pools, whole.kind != "vanilla"
    key_map = KeyMap(
        moiie_rules(whole.kind, whole.backbone, sizes_of(dense.config.text_config), pools, "model.vision_tower.")
    )
    routers = {n.removeprefix("router."): case.input(n, "conversion") for n in case.names("router.*", "conversion")}
    rows = {int(name.split(".")[3]): value for name, value in key_map.convert(routers).items()}
    sparse = upcycle_model(
        model,
        Sparsity(
            num_experts=pools.num_experts,
            num_experts_per_tok=whole.num_experts_per_tok,
            sparse_layers=sparse_layers,
            expert_groups={"vision": [*pools.vision], "language": [*pools.language]} if grouped else None,
            modality_groups=converted(case.path).config.text_config.modality_groups,
        ),
        router_rows=rows,
    )
    check_written_config(case, sparse_layers)
    state = sparse.state_dict()
    for name in wanted:
        if not key_map.find(name)[1]:
            continue  # an expert that no router of the original reaches, and that ours lacks
        case.check(f"converted.{name}", key_map.restore(name, state.__getitem__), rtol=0, file="conversion")
    if case.has("check.input_ids", file="conversion"):
        ids = case.input("check.input_ids", "conversion")
        case.check_if_present("check.dense_logits", model(ids).logits, file="conversion")
        case.check_if_present("check.converted_logits", sparse(ids).logits, file="conversion")
