"""MoIIE's whole model against golden data: merging, routing, states, logits, losses, gradients, greedy answers."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_moiie_layers as layers
import torch
from decoder_inputs import zero_beyond
from golden import GoldenCase, GoldenMismatchError, changeable_copy, discover, leave_for_lack_of_data
from moiie_case import (
    IMAGE,
    converted,
    expand_images,
    group_names,
    has_vision_mask,
    is_moiie,
    moiie_batch,
    moiie_model,
)
from safetensors.torch import load_file, save_file
from test_moiie_layers import experts
from transformers import GenerationConfig
from unimoe_case import record

from unimoe.modeling_unimoe.losses_unimoe import balance_terms

WHOLE: dict[str, Any] = {"weights": ("lm_head*", "model.mm_projector*"), "where": is_moiie}
REQUIREMENTS = {
    **layers.REQUIREMENTS,
    "forward": pytest.mark.golden(
        "*.in.input_ids", "*.in.attention_mask", "*.in.labels", "*.in.pixel_values", **WHOLE
    ),
    "gradients": pytest.mark.golden(
        "*", file="grads_caseB", weights=WHOLE["weights"], where=lambda c: is_moiie(c) and c.has("caseB.in.input_ids")
    ),
    "generation": pytest.mark.golden("input_ids", "pixel_values", file="generate", **WHOLE),
}


@REQUIREMENTS["forward"]
@experts
def test_moiie_batches(golden_case: GoldenCase, experts: str) -> None:
    check_forward(golden_case, experts)


@REQUIREMENTS["gradients"]
@experts
def test_moiie_gradients(golden_case: GoldenCase, experts: str) -> None:
    check_gradients(golden_case, experts)


@REQUIREMENTS["generation"]
def test_moiie_greedy_answers_with_and_without_cache(golden_case: GoldenCase) -> None:
    check_generation(golden_case)


@torch.no_grad()
def check_forward(case: GoldenCase, experts: str = "eager") -> None:
    for name in sorted({name.split(".")[0] for name in case.names("*.in.input_ids")}):
        check_batch(case, name, experts)


@torch.no_grad()
def check_batch(case: GoldenCase, name: str, experts: str = "eager") -> None:
    model = moiie_model(case, experts)
    batch = moiie_batch(case, name, model)
    decoder = model.model.language_model
    embeddings = zero_beyond(model, batch.lengths)
    blocks = [record(layer.mlp) for layer in decoder.layers]
    states = [record(layer) for layer in decoder.layers]
    routers = {i: record(decoder.layers[i].mlp.gate) for i in model.config.text_config.sparse_layers}
    output = model(**batch.inputs, labels=batch.labels, output_router_logits=True)

    out = f"{name}.out."
    pixels = case.input(f"{name}.in.pixel_values")
    case.check_if_present(out + "vision_features", model.model.encode_image(pixels))
    case.check_if_present(out + "image_features", model.get_image_features(pixels).pooler_output)
    case.check_if_present(out + "merged_embeds", embeddings[0])
    case.check_if_present(out + "merged_attention_mask", batch.inputs["attention_mask"].bool())
    case.check_if_present(out + "merged_labels", batch.labels)
    case.check_if_present(out + "hidden_states.0", embeddings[0])
    for layer, (block, state) in enumerate(zip(blocks, states, strict=True)):
        case.check_if_present(f"{out}layer{layer}.mlp_input", block["input"])
        case.check_if_present(f"{out}layer{layer}.mlp_output", block["output"])
        last = layer == len(states) - 1
        case.check_if_present(
            f"{out}hidden_states.{layer + 1}", decoder.norm(state["output"]) if last else state["output"]
        )
    case.check_if_present(out + "logits", output.logits)
    case.check_if_present(out + "logits_last8", output.logits[:, -8:])
    check_routing(case, out, model, batch.inputs["input_ids"], routers)
    check_losses(case, out, model, batch.inputs, output)


def check_routing(
    case: GoldenCase, out: str, model: Any, input_ids: torch.Tensor, routers: dict[int, dict[str, Any]]
) -> None:
    """Logits, choices and weights, per group where the original has groups."""
    modality_ids = model.model.modality_ids(input_ids)
    groups = model.model.token_groups(modality_ids)
    if has_vision_mask(case):
        given = case.input(out.replace(".out.", ".in.") + "token_type_ids")
        assert torch.equal(given == 1, modality_ids == 1)
        case.check_if_present(out + "vision_token_mask", groups == group_names(model).index("vision"))
    for layer, router in routers.items():
        logits, weights, index = router["output"]
        case.check_if_present(f"{out}router_logits.layer{layer}", logits)
        case.check_if_present(f"{out}routing_weights.layer{layer}", weights)
        case.check_if_present(f"{out}selected_expert.layer{layer}", index)
        first = 0
        for number, group in enumerate(model.config.text_config.router_groups if groups is not None else []):
            own, short = groups.flatten() == number, group.name[:3]
            rows = logits[own, first : first + len(group.experts)]
            first += len(group.experts)
            case.check_if_present(f"{out}{short}_router_logits.layer{layer}", rows)
            case.check_if_present(f"{out}{short}_routing_weights.layer{layer}", weights[own])
            case.check_if_present(f"{out}{short}_selected_expert.layer{layer}", index[own])
            case.check_if_present(f"{out}{short}_selected_local.layer{layer}", index[own] - group.experts[0])


def check_losses(case: GoldenCase, out: str, model: Any, inputs: dict[str, torch.Tensor], output: Any) -> None:
    case.check_if_present(out + "lm_loss", output.ce_loss[None])
    case.check_if_present(out + "total_loss", output.loss[None])
    if output.aux_loss is None:
        return
    # An even load costs the original k, and ours 1.
    chosen = model.config.text_config.num_experts_per_tok
    case.check_if_present(out + "aux_loss", chosen * output.aux_loss[None])
    modality_ids = model.model.modality_ids(inputs["input_ids"])
    terms = balance_terms(
        output.router_logits,
        model.config.text_config,
        modality_ids,
        model.model.token_groups(modality_ids),
        inputs["attention_mask"],
    )
    for group, loss in zip(group_names(model), terms.aux_loss_G, strict=True):
        case.check_if_present(f"{out}aux_loss_{group[:3]}", chosen * loss[None])
    torch.testing.assert_close(output.group_aux_losses, terms.aux_loss_G)


def check_gradients(case: GoldenCase, experts: str = "eager") -> None:
    model = moiie_model(case, experts, freeze_towers=False, text={"router_jitter_noise": 0.0}).train()
    batch = moiie_batch(case, "caseB", model)
    zero_beyond(model, batch.lengths)
    model(**batch.inputs, labels=batch.labels).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    key_map = converted(case.path).key_map
    for name in case.names("*", "grads_caseB"):
        case.check(name, key_map.restore(name, gradients.__getitem__), file="grads_caseB", scale="largest")
    norms = case.json("grad_norms_caseB") if (case.path / "grad_norms_caseB.json").is_file() else {}
    largest = max((norm for norm in norms.values() if norm is not None), default=0.0)
    reached = {name for name in case.weights if key_map.find(name)[1]}
    assert not norms or set(norms) >= reached
    assert not any(norm for name, norm in norms.items() if name not in reached)
    for name, norm in ((name, norm) for name, norm in norms.items() if name in reached):
        parts = [gradients[place.target] for place in key_map.places(name)]
        if norm is None:
            assert all(part is None or not part.any() for part in parts), f"{name} has a gradient"
            continue
        own = float(key_map.restore(name, gradients.__getitem__).norm())
        # The largest norm is the scale: biases of keys have none but rounding errors.
        if not abs(own - norm) <= 1e-5 * norm + 1e-6 * largest:
            raise GoldenMismatchError(f"{case.name}: norm of the gradient of {name}: {own} instead of {norm}")


@torch.no_grad()
def check_generation(case: GoldenCase) -> None:
    given = case.input("input_ids", "generate")
    model = moiie_model(case)
    row, _ = expand_images(given[0].tolist(), given[0].tolist(), model)
    inputs = {"input_ids": torch.tensor([row]), "pixel_values": case.input("pixel_values", "generate")}
    if case.has("token_type_ids", file="generate"):
        ids = case.input("token_type_ids", "generate")
        assert torch.equal(ids == 1, model.model.modality_ids(inputs["input_ids"]) == 1)
    shapes = [case.input(n, "generate").shape for n in ("new_tokens", "step_logits") if case.has(n, file="generate")]
    count = shapes[0][1] if shapes else 16
    for use_cache in (True, False):
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=count,
            use_cache=use_cache,
            pad_token_id=0,
            bos_token_id=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answer = model.generate(**inputs)
        new = answer.sequences[:, len(row) :]
        case.check_if_present("new_tokens", new, file="generate")
        case.check_if_present("step_logits", torch.stack(answer.logits, dim=1), file="generate")
        returned = torch.cat((given.masked_fill(given == IMAGE, 0), new), dim=1)
        case.check_if_present("returned_sequence", returned, file="generate")
    inputs["input_ids"] = torch.cat((inputs["input_ids"], new[:, :-1]), dim=1)
    logits = model(**inputs, logits_to_keep=count).logits
    case.check_if_present("teacher_forced_logits", logits, file="generate")


@pytest.mark.parametrize(
    ("check", "file", "tensor"),
    [
        ("layer", "layer", "mixed.output"),
        ("layer", "layer", "two_runs.vision_token_mask"),
        ("layer", "layer", "two_runs.vis_router_logits"),
        ("aux_loss", "aux_loss", "p.loss_masked"),
        ("scales", "s2", "features"),
        ("conversion", "conversion", "converted.model.norm.weight"),
        ("conversion", "conversion", "check.converted_logits"),
        ("forward", "io", "caseA.out.vision_features"),
        ("forward", "io", "caseA.out.merged_embeds"),
        ("forward", "io", "caseB.out.merged_labels"),
        ("forward", "io", "caseC.out.vision_token_mask"),
        ("forward", "io", "caseA.out.hidden_states.4"),
        ("forward", "io", "caseA.out.layer1.mlp_output"),
        ("forward", "io", "caseD.out.vis_selected_local.layer1"),
        ("forward", "io", "caseD.out.lan_routing_weights.layer1"),
        ("forward", "io", "caseE.out.aux_loss_lan"),
        ("forward", "io", "caseC.out.aux_loss_vis"),
        ("forward", "io", "caseE.out.total_loss"),
        ("forward", "io", "caseD.out.logits_last8"),
        ("gradients", "grads_caseB", "model.layers.1.mlp.gate_vis.weight"),
        ("generation", "generate", "step_logits"),
        ("generation", "generate", "new_tokens"),
    ],
)
def test_one_changed_value_of_moiie_is_noticed(check: str, file: str, tensor: str, tmp_path: Path) -> None:
    requirements = REQUIREMENTS[check]
    cases = discover(tensor, *requirements.args, **{**requirements.kwargs, "file": file})
    if not cases:
        leave_for_lack_of_data()
    copy = changeable_copy(cases[0].path, tmp_path / cases[0].path.name)
    stored = load_file(copy / f"{file}.safetensors")
    changed = stored[tensor].clone().flatten()
    index = int(torch.randint(changed.numel(), (), generator=torch.Generator().manual_seed(len(tensor))))
    if changed.is_floating_point():
        changed[index] += 1e-3 * changed.abs().max()
    else:
        changed[index] = ~changed[index] if changed.dtype == torch.bool else changed[index] + 1
    stored[tensor] = changed.view_as(stored[tensor])
    save_file(stored, copy / f"{file}.safetensors")
    run: Callable[[GoldenCase], None] = globals().get(f"check_{check}") or getattr(layers, f"check_{check}")
    with pytest.raises(GoldenMismatchError, match=re.escape(tensor)):
        run(GoldenCase(copy, ledger=None))
