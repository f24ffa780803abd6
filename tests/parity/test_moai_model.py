"""MoAI's whole model against golden data: towers, aux, mixers, layers, logits, answers."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import GoldenCase
from moai_case import Batch, batch_of, batches, has_raw_aux, is_moai, moai_batch, moai_model
from planted import require_noticed
from transformers import GenerationConfig
from unimoe_case import record

from unimoe.conversion.released.moai_keys import EXPERTS, GATES

# Tolerances of the golden data: after gates in half precision, and with gates in float32.
AFTER_GATES, FULL_GATES = 1e-3, 1e-4
WHOLE: dict[str, Any] = {
    "weights": ("output.weight", "vision_proj.*", "moai_compressor.*"),
    "where": lambda case: is_moai(case) and bool(batches(case)),
}
REQUIREMENTS = {
    "forward": pytest.mark.golden(**WHOLE),
    "full_gates": pytest.mark.golden("*/logits_fp32gate_last*", **WHOLE),
    "greedy": pytest.mark.golden("*/greedy*/sequences", **WHOLE),
    "beams": pytest.mark.golden("*/beam*/sequences", **WHOLE),
}


@REQUIREMENTS["forward"]
def test_moai_batches(golden_case: GoldenCase) -> None:
    check_forward(golden_case)


@REQUIREMENTS["full_gates"]
def test_moai_logits_with_gates_in_float32(golden_case: GoldenCase) -> None:
    check_full_gates(golden_case)


@REQUIREMENTS["greedy"]
def test_moai_greedy_answers_with_and_without_cache(golden_case: GoldenCase) -> None:
    check_greedy(golden_case)


@REQUIREMENTS["beams"]
def test_moai_beams(golden_case: GoldenCase) -> None:
    check_beams(golden_case)


@torch.no_grad()
def check_forward(case: GoldenCase) -> None:
    for name in batches(case):
        check_batch(case, name, moai_model(case))


@torch.no_grad()
def check_batch(case: GoldenCase, name: str, model: Any) -> None:
    batch = moai_batch(case, name)
    decoder, mixer_config = model.model.language_model, model.config.text_config.mixer_config
    compressor, states = record(model.model.aux_compressor), [record(layer) for layer in decoder.layers]
    mixers = {i: record(decoder.layers[i].mixer) for i in mixer_config.layers}
    sides = {**EXPERTS, **GATES}
    inside = {
        (i, theirs): record(decoder.layers[i].mixer.get_submodule(ours))
        for i in mixer_config.layers
        for theirs, ours in sides.items()
    }
    merged: list[torch.Tensor] = []
    decoder.register_forward_pre_hook(lambda _, args, kwargs: merged.append(kwargs["inputs_embeds"]), with_kwargs=True)
    logits = model(**batch.inputs).logits

    check_inputs(case, name, model, batch, merged[0])
    case.check_if_present(f"{name}/compressor", compressor["output"])
    first = min(mixer_config.layers)
    for layer, state in enumerate(states):
        tolerance = AFTER_GATES if layer >= first else 1e-5
        check_rows(case, f"{name}/layer{layer}/output", state["output"], batch, rtol=tolerance)
    for layer, mixer in mixers.items():
        before = 1e-5 if layer == first else AFTER_GATES
        check_rows(case, f"{name}/layer{layer}/mixer_in", mixer["input"], batch, rtol=before)
        check_rows(case, f"{name}/layer{layer}/mixer_out", mixer["output"], batch, rtol=AFTER_GATES)
        for theirs in sides:
            output = inside[layer, theirs]["output"]
            check_side(case, f"{name}/layer{layer}/moai_{theirs}", output, theirs, batch, before)
            if theirs in GATES:
                weights = decoder.layers[layer].mixer.gate_weights(output).float()
                gates = f"{name}/layer{layer}/gate_{theirs.removeprefix('GA_')}"
                check_side(case, gates, weights, theirs, batch, AFTER_GATES)
    check_rows(case, f"{name}/final_norm", decoder.norm(states[-1]["output"]), batch, rtol=AFTER_GATES)
    check_rows(case, f"{name}/logits", logits, batch, rtol=AFTER_GATES)
    check_last(case, f"{name}/logits_last*", logits, AFTER_GATES)


def check_inputs(case: GoldenCase, name: str, model: Any, batch: Batch, merged: torch.Tensor) -> None:
    inputs = batch.inputs
    case.check_if_present(f"{name}/vit_patches", model.model.encode_image(inputs["pixel_values"]))
    case.check_if_present(f"{name}/vision_proj", model.get_image_features(inputs["pixel_values"]).pooler_output)
    aux = {key: value for key, value in inputs.items() if key.startswith("aux_")}
    case.check_if_present(f"{name}/aux_embeds", model.model.get_aux_features(**aux)[0])
    mask = inputs["attention_mask"]
    case.check_if_present(f"{name}/merged_attention_mask", mask)
    positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 1)
    case.check_if_present(f"{name}/merged_position_ids_unused", positions)
    check_rows(case, f"{name}/merged_embeds", merged, batch)
    assert torch.equal(model.model.modality_ids(inputs["input_ids"]) == 1, batch.image_mask)
    assert torch.equal((inputs["prompt_mask"] == 1) & ~batch.image_mask, batch.language_mask)


def check_rows(case: GoldenCase, name: str, actual: torch.Tensor, batch: Batch, **options: Any) -> None:
    """Compare [B, S, ...] where there is no padding: nothing reads what stands there."""
    if case.has(name):
        golden = case._load(name, "io")
        case.check(name, torch.where(batch.attended[..., None], actual, golden), **options)


def check_last(case: GoldenCase, pattern: str, logits: torch.Tensor, rtol: float) -> None:
    for name in case.names(pattern):
        case.check(name, logits[:, -case._load(name, "io").shape[1] :], rtol=rtol)


def check_side(case: GoldenCase, name: str, rows: torch.Tensor, theirs: str, batch: Batch, rtol: float) -> None:
    """Compare [M, N, ...] of one side, sample by sample, without the padding between samples."""
    mask = batch.image_mask if re.search("_img(_|$)", theirs) and "CA_lang" not in theirs else batch.language_mask
    for sample, count in enumerate(mask.sum(dim=1).tolist()):
        suffix = f"/sample{sample}" if len(mask) > 1 else ""
        case.check_if_present(name + suffix, rows[sample, :count], rtol=rtol)


@torch.no_grad()
def check_full_gates(case: GoldenCase) -> None:
    model = moai_model(case, gate_precision="float32")
    for name in batches(case):
        logits = model(**moai_batch(case, name).inputs).logits
        check_last(case, f"{name}/logits_fp32gate_last*", logits, FULL_GATES)


def check_greedy(case: GoldenCase) -> None:
    for sequences in answers(case, "*/greedy*/sequences"):
        for use_cache in (True, False):
            answer = generate(case, sequences, use_cache=use_cache)
            logits = torch.stack(answer.logits, dim=1)
            stored = sequences.replace("/sequences", "/step_logits")
            if case.has(stored):
                case.check(stored, logits[:, : case._load(stored, "io").shape[1]], rtol=AFTER_GATES)
            if use_cache:
                check_margin(case, sequences, logits)


def check_beams(case: GoldenCase) -> None:
    for sequences in answers(case, "*/beam*/sequences"):
        generate(case, sequences, num_beams=int(re.search(r"beam(\d+)", sequences)[1]))


def answers(case: GoldenCase, pattern: str) -> list[str]:
    return [name for name in case.names(pattern) if batch_of(name) in batches(case)]


@torch.no_grad()
def generate(case: GoldenCase, sequences: str, **options: Any) -> Any:
    """Answer as long as the golden one, and compare tokens: those after an end are -100 in the original."""
    name, run, _ = sequences.split("/")
    model, batch, given = moai_model(case), moai_batch(case, name), case.input(f"{name}/input_ids")
    length = case._load(sequences, "io").shape[1] - given.shape[1]
    end = case.config["original_config"]["eos_token_id"]
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=end,
        pad_token_id=end,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    answer = model.generate(**batch.inputs)
    new = answer.sequences[:, batch.inputs["input_ids"].shape[1] :]
    ended = (new == end).cumsum(dim=1) - (new == end).long() > 0
    new = new.masked_fill(ended, -100)
    case.check(sequences, torch.cat((given, new), dim=1))
    wanted = case.fields(name).get(f"{run}_new_ids")
    if wanted is not None:
        found = [[token for token in row if token != -100] for row in new.tolist()]
        assert found == [[token for token in row if token != -100] for row in wanted]
        case._record("compared", "cases", f"{name}.{run}_new_ids")
    return answer


def check_margin(case: GoldenCase, sequences: str, logits: torch.Tensor) -> None:
    name, run, _ = sequences.split("/")
    wanted = case.fields(name).get(f"{run}_min_top2_margin")
    if wanted is not None:
        best = logits.topk(2).values
        assert abs(float((best[..., 0] - best[..., 1]).min()) - wanted) < 1e-2
        case._record("compared", "cases", f"{name}.{run}_min_top2_margin")


@REQUIREMENTS["forward"]
@torch.no_grad()
def test_moai_answers_depend_on_aux_as_much_as_the_original(golden_case: GoldenCase) -> None:
    model = moai_model(golden_case)
    for name in batches(golden_case):
        wanted = golden_case.fields(name).get("sensitivity_last_logits_when_aux_zero")
        if wanted is None:
            continue
        inputs = moai_batch(golden_case, name).inputs
        logits = model(**inputs).logits
        features, mask = model.model.get_aux_features(
            **{key: inputs.pop(key) for key in [*inputs] if key.startswith("aux_")}
        )
        blind = model(**inputs, aux_features=torch.zeros_like(features), aux_attention_mask=mask).logits
        assert abs(float((logits - blind)[:, -1].abs().max()) - wanted) < 1e-2 * wanted
        golden_case._record("compared", "cases", f"{name}.sensitivity_last_logits_when_aux_zero")
        golden_case.comparisons += 1


@pytest.mark.parametrize(
    ("check", "pattern"),
    [
        ("forward", "*/vit_patches"),
        ("forward", "*/aux_embeds"),
        ("forward", "*/compressor"),
        ("forward", "*/layer*/moai_CA_lang_aux"),
        ("forward", "*/layer*/moai_GA_img/sample*"),
        ("forward", "*/layer*/gate_lang"),
        ("forward", "*/final_norm"),
        ("forward", "*/logits_last*"),
        ("full_gates", "*/logits_fp32gate_last*"),
        ("greedy", "*/greedy*/sequences"),
        ("greedy", "*/greedy*/step_logits"),
        ("beams", "*/beam*/sequences"),
    ],
)
def test_one_changed_value_of_moai_is_noticed(check: str, pattern: str, tmp_path: Path) -> None:
    def fits(case: GoldenCase, name: str) -> bool:
        is_result = has_raw_aux(case, batch_of(name)) or not name.endswith("/aux_embeds")
        return batch_of(name) in batches(case) and is_result

    options: dict[str, Any] = {"size": 1e-1, "index": lambda _: -1, "fits": fits}
    require_noticed(globals()[f"check_{check}"], REQUIREMENTS[check], pattern, tmp_path / "moai", **options)
