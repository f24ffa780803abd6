"""Both of MoAI's training steps against golden data: losses, logits at the answer, gradients."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import GoldenCase, GoldenMismatchError
from moai_case import batches, converted, is_moai, moai_batch, moai_model
from planted import require_noticed

REQUIREMENTS = {
    "training": pytest.mark.golden("*/labels_merged", "*/lang_mask_*", weights="output.weight", where=is_moai),
}
# Tolerances of the golden data, by how the gates are computed.
TOLERANCES = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 2e-3}
_RUN = re.compile(r"(eval|step1|step2)(?:_dice([0-9_]+))?(_fp32gate)?")


@REQUIREMENTS["training"]
def test_moai_training_steps(golden_case: GoldenCase) -> None:
    check_training(golden_case)


def check_training(case: GoldenCase) -> None:
    for stored in case.names("*/labels_merged"):
        name = stored.removesuffix("/labels_merged")
        check_answer(case, name)
        for answers in masks_of(case, name):
            for run in sorted({key.split("/")[2] for key in case.names(f"{name}/{answers}/*/loss")}):
                check_run(case, name, answers, run)


def masks_of(case: GoldenCase, name: str) -> list[str]:
    """Which masks of the language a batch holds, with all other inputs of the model."""
    masks = [masks.removeprefix(f"{name}/") for masks in case.names(f"{name}/lang_mask_*")]
    return [mask.removeprefix("lang_mask_") for mask in masks if name in batches(case, mask)]


def check_answer(case: GoldenCase, name: str) -> None:
    """What the cases say of the answer is what the labels say."""
    learned = (case.input(f"{name}/labels_merged")[0] != -100).nonzero()[:, 0]
    fields = case.fields(name)
    for field, found in (("answer_start_merged", int(learned[0])), ("answer_len", len(learned))):
        if field in fields:
            assert found == fields[field]
            case._record("compared", "cases", f"{name}.{field}")


def check_run(case: GoldenCase, name: str, answers: str, run: str) -> None:
    """One forward and, in training, one backward pass."""
    step, dice, full_gates = _RUN.fullmatch(run).groups()
    precision = "float32" if full_gates or dice else {"eval": "float16", "step2": "bfloat16"}[step]
    model = moai_model(case, gate_precision=precision, gate_training_precision=precision)
    mixer = model.config.text_config.mixer_config
    model.train(step != "eval")
    batch, labels = moai_batch(case, name, f"lang_mask_{answers}"), case.input(f"{name}/labels_merged")
    if dice is not None:
        drawn = [[int(digit) for digit in pair] for pair in dice.split("_")]
        batch.inputs["expert_choice"] = torch.tensor([drawn[i % len(drawn)] for i in range(len(mixer.layers))])
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("mixer." in parameter_name or "aux_compressor" in parameter_name)
    output = model(**batch.inputs, labels=labels)
    tolerance, prefix = TOLERANCES[precision], f"{name}/{answers}/{run}/"
    case.check(prefix + "loss", output.loss[None], rtol=tolerance)
    first = int((labels[0] != -100).nonzero()[0]) - 1
    count = case._load(prefix + "logits_answer", "io").shape[1] if case.has(prefix + "logits_answer") else 0
    case.check_if_present(prefix + "logits_answer", output.logits[:, first : first + count], rtol=tolerance)
    if case.names(prefix + "grad/*") or run in _norms(case, name):
        output.loss.backward()
        check_gradients(case, name, prefix, run, model, tolerance)


def check_gradients(case: GoldenCase, name: str, prefix: str, run: str, model: Any, tolerance: float) -> None:
    key_map = converted(case.path).key_map
    gradients = {parameter_name: parameter.grad for parameter_name, parameter in model.named_parameters()}
    for stored in case.names(prefix + "grad/*"):
        original = stored.removeprefix(prefix + "grad/")
        # Rounded gates change single values by more than their share of the loss.
        loose = 10 * tolerance if tolerance > TOLERANCES["float32"] else tolerance
        case.check(stored, key_map.restore(original, gradients.__getitem__), rtol=loose, scale="largest")
    norms = _norms(case, name).get(run, {})
    for original, norm in norms.items():
        own = float(key_map.restore(original, gradients.__getitem__).norm())
        # An expert that was not drawn has no gradient in the original; ours is there, and zero.
        if not abs(own - (norm or 0.0)) <= 10 * tolerance * (norm or 0.0) + 1e-6:
            raise GoldenMismatchError(f"{case.name}: norm of the gradient of {original} in {run}: {own} for {norm}")
    if norms:
        case._record("compared", "cases", f"{name}.grad_norms")


def _norms(case: GoldenCase, name: str) -> dict[str, dict[str, float | None]]:
    return case.fields(name).get("grad_norms") or {}


@pytest.mark.parametrize("pattern", ["*/step1_dice*/loss", "*/step2/loss", "*/step2/logits_answer", "*/step*/grad/*"])
def test_one_changed_value_of_moai_training_is_noticed(pattern: str, tmp_path: Path) -> None:
    def fits(case: GoldenCase, name: str) -> bool:
        batch, answers, run = name.split("/")[:3]
        has_run = case.has(f"{batch}/labels_merged", f"{batch}/{answers}/{run}/loss")
        return has_run and answers in masks_of(case, batch)

    require_noticed(check_training, REQUIREMENTS["training"], pattern, tmp_path / "moai", size=1e-1, fits=fits)
