"""Uni-MoE's 8-expert variant against golden data: DeepSpeed's gate, pairs inside MLPs, three losses, the whole model.

The original draws every token's second expert, in evaluation too. The golden tensors are without that, but for those
of "noise" cases, which hold the noise. Ours takes the best expert unless it is told to draw.

The random weights of these cases blow states up to hundreds. Computed from the same weights in float64, some logits
already differ from the golden ones by more than 1e-5 of their root mean square: the rounding of the original itself. So
what comes after a whole block is held against 1e-5 of the largest value.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from balance import load_balancing_loss
from decoder_inputs import zero_beyond
from golden import GoldenCase, GoldenMismatchError
from planted import require_noticed
from unimoe_case import (
    batch_gradients,
    check_greedy,
    check_text,
    check_whole_model,
    original_batch,
    record,
    sparse_layers,
    unimoe_model,
)

from unimoe import UniMoeForCausalLM
from unimoe.modeling_unimoe.configuration_unimoe_text import MODALITIES

experts = pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])

EIGHT = {"weights": ("model.embed_tokens.weight", "model.layers.*.mlp.deepspeed_moe.gate.wg.weight")}
BATCH = ("batch.input_ids", "batch.labels")
REQUIREMENTS = {
    "lora_mlp": pytest.mark.golden("lora_mlp.input", "lora_mlp.output_layer*", **EIGHT),
    "block": pytest.mark.golden("moe_alone*.input", "moe_alone*.output", **EIGHT),
    "forward": pytest.mark.golden(BATCH[0], **EIGHT),
    "noisy_forward": pytest.mark.golden(BATCH[0], "full_noise.*.gumbel_noise", **EIGHT),
    "losses": pytest.mark.golden(*BATCH, "loss.*", **EIGHT),
    "ranges": pytest.mark.golden(BATCH[0], "ranges.*", **EIGHT),
    "gradients": pytest.mark.golden(*BATCH, "grad.*", **EIGHT),
    "text": pytest.mark.golden("text.input_ids", "text.logits", **EIGHT),
    "greedy": pytest.mark.golden(BATCH[0], "gen.*.output_ids*", **EIGHT),
    "batch_of_four": pytest.mark.golden("batch4.input_ids", "batch4.logits_*", **EIGHT),
}
# The term that the original's flag switches on -> our coefficient and our name of the term.
TERMS = {
    "aux_balance": ("router_aux_loss_coef", "aux_loss"),
    "aux_multimodal": ("router_modality_loss_coef", "modality_loss"),
    "aux_kl": ("router_divergence_loss_coef", "divergence_loss"),
}
ALONE = dict.fromkeys((coefficient for coefficient, _ in TERMS.values()), 0.0) | {"router_losses_as_released": True}
AFTER_BLOCKS: dict[str, Any] = {"scale": "largest"}
RANGES = {"text": "text", "image": "image", "video": "video", "audio": "speech"}


@REQUIREMENTS["lora_mlp"]
@experts
def test_an_mlp_with_low_rank_pairs(golden_case: GoldenCase, experts: str) -> None:
    check_lora_mlp(golden_case, experts)


@REQUIREMENTS["block"]
@experts
def test_one_block_of_experts(golden_case: GoldenCase, experts: str) -> None:
    check_block(golden_case, experts)


@REQUIREMENTS["forward"]
@experts
def test_a_batch_of_all_media(golden_case: GoldenCase, experts: str) -> None:
    check_forward(golden_case, experts)


@REQUIREMENTS["noisy_forward"]
def test_a_batch_whose_second_experts_are_drawn(golden_case: GoldenCase) -> None:
    check_noisy_forward(golden_case)


@REQUIREMENTS["losses"]
def test_losses(golden_case: GoldenCase) -> None:
    check_losses(golden_case)


@REQUIREMENTS["ranges"]
def test_where_each_modality_is(golden_case: GoldenCase) -> None:
    check_ranges(golden_case)
    golden_case.comparisons += 1  # of masks made of the ranges


@REQUIREMENTS["gradients"]
@experts
def test_gradients(golden_case: GoldenCase, experts: str) -> None:
    check_gradients(golden_case, experts)


@REQUIREMENTS["text"]
def test_text_alone(golden_case: GoldenCase) -> None:
    check_text(golden_case, **AFTER_BLOCKS)


@REQUIREMENTS["greedy"]
def test_greedy_answers_with_and_without_cache(golden_case: GoldenCase) -> None:
    check_greedy(golden_case)


@REQUIREMENTS["batch_of_four"]
def test_a_batch_of_four_is_right_here_and_wrong_there(golden_case: GoldenCase) -> None:
    check_batch_of_four(golden_case)


@pytest.mark.parametrize(
    ("check", "pattern"),
    [
        ("lora_mlp", "lora_mlp.output_layer*"),
        ("block", "moe_alone.output"),
        ("block", "moe_alone.*.combine_weight_per_expert"),
        ("block", "moe_alone.*.exp_counts"),
        ("block", "moe_alone.l_aux"),
        ("block", "moe_alone_noise.output"),
        ("block", "moe_alone_noise.*.router_logits_returned"),
        ("block", "moe_alone_noise.*.combine_weight_per_expert"),
        ("forward", "full.*.router_logits_clean"),
        ("forward", "full.*.moe_in_flat"),
        ("forward", "full.*.moe_out"),
        ("forward", "full.*.l_aux"),
        ("forward", "full.layer*.hidden_out"),
        ("forward", "full.logits"),
        ("forward", "full.loss"),
        ("forward", "merged.inputs_embeds"),
        ("noisy_forward", "full_noise.*.combine_weight_per_expert"),
        ("noisy_forward", "full_noise.logits"),
        ("losses", "loss.aux_balance"),
        ("losses", "loss.aux_multimodal"),
        ("losses", "loss.aux_kl"),
        ("losses", "loss.aux_all"),
        ("losses", "loss.*.moe_loss_field"),
        ("ranges", "ranges.audio.?"),
        ("ranges", "ranges.text.?"),
        ("gradients", "grad.*_lora_A.weight"),
        ("gradients", "grad.*_lora_B.weight"),
        ("gradients", "grad.*.gate.wg.weight"),
        ("text", "text.logits"),
        ("greedy", "gen.*.output_ids"),
        ("batch_of_four", "batch4.logits_singles"),
        ("batch_of_four", "batch4.logits_original_batch4"),
    ],
)
def test_one_changed_golden_value_is_noticed(check: str, pattern: str, tmp_path: Path) -> None:
    labels = BATCH[1:] if BATCH[0] in REQUIREMENTS[check].args else ()
    require_noticed(globals()[f"check_{check}"], REQUIREMENTS[check], pattern, tmp_path, *labels)


@torch.no_grad()
def check_lora_mlp(case: GoldenCase, experts: str = "eager") -> None:
    model, _ = unimoe_model(case, experts)
    x_BSH = case.input("lora_mlp.input")
    for name in case.names("lora_mlp.output_layer*"):
        match = re.fullmatch(r"lora_mlp\.output_layer(\d+)(?:_expert(\d+))?", name)
        assert match is not None, f"{name} names no layer"
        mlp = model.model.language_model.layers[int(match[1])].mlp
        if match[2] is None:
            case.check(name, mlp(x_BSH))
            continue
        x_TH = x_BSH.flatten(0, 1)
        index_T1 = torch.full((len(x_TH), 1), int(match[2]))
        case.check(name, mlp.experts(x_TH, index_T1, torch.ones(len(x_TH), 1)).view_as(x_BSH))


@torch.no_grad()
def check_block(case: GoldenCase, experts: str = "eager") -> None:
    for name in ("moe_alone", "moe_alone_noise"):
        if not case.has(f"{name}.input"):
            continue
        noisy = bool(case.names(f"{name}.*gumbel_noise"))
        model, _ = unimoe_model(case, experts, **ALONE, **({"router_pick": "sample_always"} if noisy else {}))
        layer = block_layer(case, name, model)
        block = model.model.language_model.layers[layer].mlp
        inject_noise(case, name, model)
        router = record(block.gate)
        case.check_if_present(f"{name}.output", block(case.input(f"{name}.input")))
        check_router(case, model, f"{name}.layer{layer}", router)
        case.check_if_present(f"{name}.l_aux", layer_loss(router, model))


def check_forward(case: GoldenCase, experts: str = "eager") -> None:
    check_run(case, "full", unimoe_model(case, experts, **ALONE)[0])


def check_noisy_forward(case: GoldenCase) -> None:
    check_run(case, "full_noise", unimoe_model(case, router_pick="sample_always", **ALONE)[0])


def check_run(case: GoldenCase, name: str, model: UniMoeForCausalLM) -> None:
    inject_noise(case, name, model)
    take_four_rows_as_the_original(model)
    check_whole_model(case, name, model, partial(check_router, case, model), **AFTER_BLOCKS)


def check_router(case: GoldenCase, model: UniMoeForCausalLM, name: str, router: dict[str, Any]) -> None:
    """What the gate of one layer saw and decided."""
    logits_TE, weights_TK, index_TK = router["output"]
    noise_TE = case.input(f"{name}.gumbel_noise") if case.has(f"{name}.gumbel_noise") else 0
    case.check_if_present(f"{name}.moe_in_flat", router["input"], **AFTER_BLOCKS)
    case.check_if_present(f"{name}.router_logits_clean", logits_TE, **AFTER_BLOCKS)
    # The original adds the noise in place and hands on what it made.
    case.check_if_present(f"{name}.router_logits_returned", logits_TE + noise_TE, **AFTER_BLOCKS)
    combined_TE = torch.zeros_like(logits_TE).scatter(1, index_TK, weights_TK)
    case.check_if_present(f"{name}.combine_weight_per_expert", combined_TE)
    case.check_if_present(f"{name}.exp_counts", torch.bincount(index_TK.flatten(), minlength=logits_TE.shape[1]))
    case.check_if_present(f"{name}.l_aux", layer_loss(router, model))


def layer_loss(router: dict[str, Any], model: UniMoeForCausalLM) -> torch.Tensor:
    return load_balancing_loss((router["output"][0],), model.config.text_config)


def block_layer(case: GoldenCase, name: str, model: UniMoeForCausalLM) -> int:
    """Which layer's block was run alone."""
    named = {int(match[1]) for n in case.names(f"{name}.layer*") if (match := re.search(r"\.layer(\d+)\.", n))}
    return min(named, default=sparse_layers(model)[0])


def take_four_rows_as_the_original(model: UniMoeForCausalLM) -> None:
    """In batches of four, give every row what a dense MLP makes of the first.

    The original takes the four rows that a dense MLP returns for the four values that a sparse one returns, and goes on
    with the first of them. Nobody wants that: it is here, for golden batches of four, and not behind a switch.
    """
    for layer, module in enumerate(model.model.language_model.layers):
        if layer not in sparse_layers(model):
            module.mlp.register_forward_hook(
                lambda _module, _args, output: output[:1].expand_as(output) if len(output) == 4 else output
            )


def inject_noise(case: GoldenCase, name: str, model: UniMoeForCausalLM) -> None:
    """Let every gate draw the noise that the original drew."""
    for layer in sparse_layers(model):
        stored = f"{name}.layer{layer}.gumbel_noise"
        if case.has(stored):
            noise = case.input(stored)
            model.model.language_model.layers[layer].mlp.gate.choice_noise = lambda _, noise=noise: noise


@torch.no_grad()
def check_losses(case: GoldenCase) -> None:
    for name in case.names("loss.*"):
        run = re.sub(r"\.moe_loss_field$", "", name)
        active = [*TERMS] if run == "loss.aux_all" else [run.removeprefix("loss.")]
        given = {TERMS[term][0]: float(case.config[f"{term}_loss_coef"]) for term in active}
        model, _ = unimoe_model(case, **{**ALONE, **given})
        take_four_rows_as_the_original(model)
        batch = original_batch(case, model)
        zero_beyond(model, batch.lengths)
        output = model(**batch.inputs, labels=batch.labels, output_router_logits=True)
        if name == run:
            case.check(name, output.loss)
            continue
        # The field holds the weighted balance term, whatever else is on; without it, what the last layer left there.
        last = load_balancing_loss(output.router_logits[-1:], model.config.text_config)
        case.check(name, given["router_aux_loss_coef"] * output.aux_loss if "aux_balance" in active else last)


def check_ranges(case: GoldenCase) -> None:
    """The original's token ranges are where our modality ids say; text goes on over padding, and one beyond the end."""
    model, _ = unimoe_model(case)
    ids = model.model.modality_ids(original_batch(case, model).inputs["input_ids"])
    for name in case.names("ranges.*.*"):
        _, modality, row = name.split(".")
        wanted = ids[int(row)] == MODALITIES.index(RANGES[modality])
        ranges = case.input(name).tolist()
        last = max((end for _, end in ranges), default=0)
        # A row that ends in text goes one beyond the end; what the original writes after a medium is its own affair.
        beyond = bool(wanted[-1]) or last > len(wanted) if modality == "text" else False
        places = [place for start, end in ranges for place in range(start, end)]
        expected = [*wanted.nonzero().flatten().tolist(), *[len(wanted)] * beyond]
        if places != expected:
            raise GoldenMismatchError(f"{name}: {ranges} are not the places of {modality}, {expected}")


def check_gradients(case: GoldenCase, experts: str = "eager") -> None:
    model, key_map = unimoe_model(case, experts, **ALONE)
    take_four_rows_as_the_original(model)
    gradient_of = batch_gradients(case, model)
    scale = case.config["lora_alpha"] / case.config["lora_r"]
    for name in case.names("grad.*"):
        original = name.removeprefix("grad.")
        match = re.fullmatch(r"(.+_proj)_lora_([AB])\.weight", original)
        gradient = gradient_of(key_map.place(f"{match[1]}.weight" if match else original))
        if match:  # merged, a pair is W + scale * B A
            other = case.weights[f"{match[1]}_lora_{'B' if match[2] == 'A' else 'A'}.weight"]
            gradient = scale * (other.T @ gradient if match[2] == "A" else gradient @ other.T)
        case.check(name, gradient, **AFTER_BLOCKS)


@torch.no_grad()
def check_batch_of_four(case: GoldenCase) -> None:
    ids = case.input("batch4.input_ids")
    model, _ = unimoe_model(case)
    case.check_if_present("batch4.logits_singles", model(input_ids=ids).logits, **AFTER_BLOCKS)
    case.check_if_present(
        "batch4.logits_singles", torch.cat([model(input_ids=row[None]).logits for row in ids]), **AFTER_BLOCKS
    )
    take_four_rows_as_the_original(model)
    case.check_if_present("batch4.logits_original_batch4", model(input_ids=ids).logits, **AFTER_BLOCKS)
