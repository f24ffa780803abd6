"""Models on the stand-in for CUDA: no tensor on the wrong device, no wait for the device but those named here."""

from typing import Any

import pytest
import tiny
import tiny_moai
import torch
from cuda_stand_in import CUDA, CudaStandIn

from unimoe import UniMoeForCausalLM
from unimoe.modeling_unimoe.errors_unimoe import ModalityError
from unimoe.modeling_unimoe.modeling_unimoe_text import UniMoeExperts
from unimoe.trainers.steps.objective import training_loss
from unimoe.trainers.steps.router_bias import update_choice_biases
from unimoe.trainers.telemetry.routing_statistics import RoutingRecorder

Inputs = dict[str, torch.Tensor]
TEXTS: dict[str, dict[str, Any]] = {
    "top-k": {"router_bias_update_rate": 0.1},
    "drawn": {
        "router_pick": "sample",
        "router_jitter_noise": 0.1,
        "router_modality_loss_coef": 0.1,
        "router_divergence_loss_coef": 0.1,
        "modality_experts": {"image": [0, 1], "speech": [2]},
    },
    "groups": {**tiny.MOIIE_GROUPS, "router_bias_update_rate": 0.1, "num_null_experts": 1, "num_shared_experts": 1},
    "sigmoid": {"router_scoring": "sigmoid", "router_aux_loss_layers": "joint", "sliding_window": 8},
    "as released": {"router_divergence_loss_coef": 0.1, "router_losses_as_released": True},
    "top-p": {
        "router_type": "dynamic",
        "router_top_p": 0.7,
        "num_null_experts": 1,
        "num_shared_experts": 1,
        "expert_capacity_factor": 1.0,
    },
    "mixers": {},
}
# Numbers of placeholders and of features are compared, for an error that says how many there are.
PLACES = {"encoding_unimoe.py:place_features": 1}
# Which samples have aux and images, that no aux is padding, and how many rows of images and of text are mixed.
MIXING = {"auxiliary_unimoe.py:_mixed_samples": 2, "auxiliary_unimoe.py:mixing": 1, "modeling_unimoe_moai.py:of": 4}
# How many tokens are learned, whose logits alone go on to the loss.
LEARNED = {"objective.py:training_loss": 1}


def model_of(variant: str, attention: str = "sdpa", experts: str = "grouped_mm") -> UniMoeForCausalLM:
    model = tiny_moai.model() if variant == "mixers" else tiny.model({"router_z_loss_coef": 0.01, **TEXTS[variant]})
    model.set_attn_implementation(attention)
    model.set_experts_implementation(experts)
    model.generation_config.eos_token_id = None
    return model


def inputs_of(variant: str) -> Inputs:
    """A batch of which one sample has every medium, or aux and an image, and the other one padding."""
    if variant == "mixers":
        return tiny_moai.collate([tiny_moai.sample(0), tiny_moai.sample(1, 3)])
    whole = tiny.prompt(5, "image", 6, "video", 7, "audio", 8, 9, 10)
    ids = torch.tensor([whole, [0] * (len(whole) - 4) + [5, 6, 7, 8]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), **tiny.media(0, 1, 1, 1)}


def moved(inputs: Inputs) -> Inputs:
    return {name: value.to("cuda") for name, value in inputs.items()}


def waits_of_prompt(variant: str) -> dict[str, int]:
    return PLACES | MIXING if variant == "mixers" else PLACES


PROMPTS = [("top-k", "sdpa"), ("top-k", "eager"), ("groups", "sdpa"), ("top-p", "sdpa"), ("mixers", "eager")]


@pytest.mark.parametrize(("variant", "attention"), PROMPTS)
def test_a_prompt_with_all_media(variant: str, attention: str) -> None:
    model, inputs = model_of(variant, attention), inputs_of(variant)
    with torch.no_grad():
        expected = model(**inputs).logits
        with CudaStandIn() as cuda:
            model.to("cuda")
            assert {tensor.device for tensor in model.state_dict().values()} == {CUDA}
            inputs = moved(inputs)
            cuda.waits.clear()
            logits = model(**inputs).logits
    assert cuda.ours() == waits_of_prompt(variant)
    torch.testing.assert_close(logits.twin, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["groups", "top-p", "mixers"])
def test_generated_tokens_wait_for_nothing_of_ours(variant: str) -> None:
    model, inputs = model_of(variant), inputs_of(variant)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs, **greedy)
    with CudaStandIn() as cuda:
        model.to("cuda")
        inputs = moved(inputs)
        for options in ({}, {"cache_implementation": "static"}):
            cuda.waits.clear()
            assert torch.equal(model.generate(**inputs, **greedy, **options).twin, expected)
            assert cuda.ours() == waits_of_prompt(variant)
        # One for each modality, to know how many items every sample has: they are repeated for the beams.
        model.generate(**inputs, **greedy, num_beams=2)
        assert cuda.ours() == waits_of_prompt(variant) | {"generation_unimoe.py:repeat_media": _modalities(variant)}


def _modalities(variant: str) -> int:
    return 1 if variant == "mixers" else 4


@pytest.mark.parametrize("variant", TEXTS)
def test_a_training_step(variant: str) -> None:
    """Forward, loss, backward, clipping, AdamW, router biases, with what telemetry counts."""
    model, inputs = model_of(variant), inputs_of(variant)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    with CudaStandIn() as cuda:
        model.to("cuda").train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.01, foreach=True)
        inputs, labels = moved(inputs), labels.to("cuda")
        before = [parameter.detach().clone() for parameter in trained]
        recorder = RoutingRecorder(model, in_training_only=True)
        cuda.waits.clear()
        with recorder:
            outputs = model(**inputs, output_router_logits=True, use_cache=False)
        ids = model.model.modality_ids(inputs["input_ids"])
        groups, mask = model.model.token_groups(ids), inputs["attention_mask"]
        parts = training_loss(outputs, labels, mask, groups, ids, model.config.text_config, 0.05)
        idle = 0 if outputs.idle_branches is None else outputs.idle_branches
        (parts.total + idle).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        update_choice_biases(model)
        assert cuda.ours() == waits_of_prompt(variant) | LEARNED
        assert all(parameter.grad.device == CUDA for parameter in trained)
        assert any(not torch.equal(now, then) for now, then in zip(trained, before, strict=True))
        tokens = int(mask.sum())
        cuda.waits.clear()
        assert recorder.counts.read().tokens_NM.sum() == tokens
        assert cuda.ours() == {"routing_statistics.py:read": 1}


def test_experts_one_by_one_wait_once_for_each_layer() -> None:
    """That is the reference implementation; transformers takes it where the model is asked for "eager"."""
    model, inputs = model_of("top-p", experts="eager"), inputs_of("top-p")
    blocks = [module for module in model.modules() if isinstance(module, UniMoeExperts)]
    with CudaStandIn() as cuda, torch.no_grad():
        model.to("cuda")
        inputs = moved(inputs)
        cuda.waits.clear()
        model(**inputs)
    assert cuda.ours() == PLACES | {"quantized_experts_unimoe.py:tokens_of_experts": len(blocks)}


def test_a_tower_that_both_audio_branches_read_waits_to_know_whether_their_windows_are_the_same() -> None:
    windows = tiny.media(windows=1)["speech_features"]
    media = {"speech_features": windows, "audio_features": windows.clone()}
    model = tiny.model(audio_config=None)
    with CudaStandIn() as cuda, torch.no_grad():
        model.to("cuda")
        inputs = moved({"input_ids": torch.tensor([tiny.prompt(1, "audio", 5)]), **media})
        cuda.waits.clear()
        model(**inputs)
    assert cuda.ours() == PLACES | {"encoding_unimoe.py:_share_speech_states": 1}


def test_types_are_checked_on_the_device() -> None:
    model, inputs = model_of("groups"), inputs_of("groups")
    inputs["mm_token_type_ids"] = model.model.modality_ids(inputs["input_ids"])
    with CudaStandIn() as cuda, torch.no_grad():
        model.to("cuda")
        inputs = moved(inputs)
        cuda.waits.clear()
        model(**inputs)
        assert cuda.ours() == PLACES
        inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"] + 1
        with pytest.raises(RuntimeError, match="mm_token_type_ids differ"):
            model(**inputs)
        del inputs["mm_token_type_ids"], inputs["pixel_values"]
        with pytest.raises(ModalityError, match="4 image placeholders"):
            model(**inputs)
