"""What must hold for every twin, whatever its weights: batching, backends, saving, training."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import twins
from tiny_towers import image_inputs, mobile_net, tower_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)
from twins import Sample, collate, logits

from unimoe import UniMoeForCausalLM, UniMoeModel

ATOL = 2e-5


def labels_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = inputs["input_ids"]
    return ids.masked_fill((inputs["attention_mask"] == 0) | (ids >= tiny.IMAGE), -100)


def gradients(model: UniMoeForCausalLM, inputs: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- batches ---------------------------------------------------------------------------------------------------------


def test_left_padded_batch_gives_the_logits_of_its_samples(twin: Any) -> None:
    model, samples = twin
    batched = logits(model, collate(samples))
    for row, sample in zip(batched, samples, strict=True):
        torch.testing.assert_close(row[-len(sample.ids) :], logits(model, sample.inputs())[0], atol=ATOL, rtol=0)


def test_order_of_samples_does_not_matter(twin: Any) -> None:
    model, samples = twin
    forward, backward = logits(model, collate(samples)), logits(model, collate(samples[::-1]))
    torch.testing.assert_close(forward, backward.flip(0), atol=ATOL, rtol=0)


def test_each_medium_reaches_its_own_sample(full_model: UniMoeForCausalLM) -> None:
    """Swapping two samples' pixels changes exactly these two rows."""
    samples = twins.samples("everything")
    inputs = collate(samples)
    before = logits(full_model, inputs)
    inputs["pixel_values"] = inputs["pixel_values"][[1, 0, 2, 3]]
    changed = (logits(full_model, inputs) - before).abs().amax(dim=(1, 2)) > 1e-3
    assert [s.name for s, c in zip(samples, changed, strict=True) if c] == ["image", "two images"]


def test_text_does_not_see_media_after_it(twin: Any) -> None:
    model, samples = twin
    text = samples[0]
    for sample in samples:
        longer = Sample("text first", text.ids + sample.ids, sample.media)
        torch.testing.assert_close(
            logits(model, longer.inputs())[:, : len(text.ids)], logits(model, text.inputs()), atol=ATOL, rtol=0
        )


def test_token_types_from_the_processor_change_nothing(twin: Any) -> None:
    model, samples = twin
    inputs = collate(samples)
    types = model.model.modality_ids(inputs["input_ids"])
    assert torch.equal(logits(model, inputs), logits(model, {**inputs, "mm_token_type_ids": types}))


def test_embeddings_in_place_of_ids(twin: Any) -> None:
    model, samples = twin
    inputs = collate(samples)
    expected = logits(model, inputs)
    types = model.model.modality_ids(inputs["input_ids"])
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    given = logits(model, {**inputs, "inputs_embeds": embeds, "mm_token_type_ids": types})
    torch.testing.assert_close(given, expected, atol=ATOL, rtol=0)


# --- backends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_backends_agree(twin: Any, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = twin
    inputs = collate(samples)
    monkeypatch.setattr(model.model.language_model.config, "_experts_implementation", "eager")
    expected = logits(model, inputs)
    model.set_experts_implementation(implementation)
    assert model.model.language_model.config._experts_implementation == implementation
    torch.testing.assert_close(logits(model, inputs), expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_chosen_experts_backend_is_the_one_that_runs(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for at loading or later, on the multimodal class and on the bare decoder."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    called = []
    for name in ("batched_mm", "grouped_mm"):
        function = ALL_EXPERTS_FUNCTIONS[name]

        def recorded(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> torch.Tensor:
            called.append(name)
            return function(*args, **kwargs)

        monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, name, recorded)
    config = tiny.config()
    chosen_later = tiny.model()
    chosen_later.set_experts_implementation(implementation)
    chosen_first = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    text_model = AutoModel.from_config(config.text_config, experts_implementation=implementation)
    for model in (chosen_later, chosen_first, text_model):
        called.clear()
        model(input_ids=torch.tensor([[5, 6, 7]]))
        assert set(called) == ({implementation} if implementation != "eager" else set()), type(model).__name__


def test_attention_backends_agree(twin: Any) -> None:
    model, samples = twin
    inputs = collate(samples)
    expected = logits(model, inputs)
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    assert other.model.language_model.config._attn_implementation == "eager"
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits(other, inputs)[mask], expected[mask], atol=ATOL, rtol=0)


def test_bfloat16_is_close_to_float32(twin: Any) -> None:
    model, samples = twin
    inputs = collate(samples)
    mask = inputs["attention_mask"].bool()
    half = copy.deepcopy(model).to(torch.bfloat16)
    result = logits(half, inputs)
    assert result.dtype == torch.bfloat16
    agreement = torch.cosine_similarity(result[mask].float().flatten(), logits(model, inputs)[mask].flatten(), dim=0)
    # Routers flip now and then between near-equal experts, so numbers differ but the direction may not.
    assert agreement > 0.95


# --- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 2])], ids=["last", "last three", "chosen"])
def test_logits_to_keep(full_model: UniMoeForCausalLM, keep: int | torch.Tensor) -> None:
    inputs = collate(twins.samples("everything"))
    everything = logits(full_model, inputs)
    expected = everything[:, -keep:] if isinstance(keep, int) else everything[:, keep]
    kept = logits(full_model, {**inputs, "logits_to_keep": keep})
    torch.testing.assert_close(kept, expected, atol=ATOL, rtol=0)


def test_router_logits_have_one_row_per_token(twin: Any) -> None:
    model, samples = twin
    inputs = collate(samples)
    config = model.config.text_config
    rows = config.num_gate_rows
    output = model(**inputs, output_router_logits=True)
    assert [tuple(layer.shape) for layer in output.router_logits] == [
        (inputs["input_ids"].numel(), rows) for _ in config.sparse_layers
    ]
    assert model(**inputs).router_logits is None


def test_hidden_states_and_attentions(full_model: UniMoeForCausalLM) -> None:
    model = copy.deepcopy(full_model)
    model.set_attn_implementation("eager")
    inputs = collate(twins.samples("everything"))
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    shape, layers = inputs["input_ids"].shape, model.config.text_config.num_hidden_layers
    assert [tuple(h.shape) for h in output.hidden_states] == [(*shape, tiny.HIDDEN)] * (layers + 1)
    assert [tuple(a.shape) for a in output.attentions] == [(shape[0], 4, shape[1], shape[1])] * layers
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


# --- saving ----------------------------------------------------------------------------------------------------------


def test_saving_and_loading_changes_nothing(twin: Any, tmp_path: Path) -> None:
    model, samples = twin
    model.save_pretrained(tmp_path)
    loaded, report = UniMoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    inputs = collate(samples)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_auto_classes_load_it(full_model: UniMoeForCausalLM, auto: Any, tmp_path: Path) -> None:
    full_model.save_pretrained(tmp_path)
    assert type(auto.from_pretrained(tmp_path)) is UniMoeForCausalLM
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is UniMoeModel
    inputs = collate(twins.samples("everything"))
    expected = full_model.model(**inputs).last_hidden_state
    assert torch.equal(base(**inputs).last_hidden_state, expected)


def test_tied_weights_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = tiny.model(text={"tie_word_embeddings": True})
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (safe_open is no dict)
    loaded = UniMoeForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    inputs = collate(twins.samples("everything"))
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("name", twins.TWINS)
def test_every_missing_weight_is_initialised(name: str) -> None:
    """A weight that a checkpoint lacks comes up as in a fresh model, never as uninitialised memory."""
    fresh = twins.TWINS[name]()
    torch.manual_seed(1)
    loaded = UniMoeForCausalLM.from_pretrained(None, config=fresh.config, state_dict={})
    buffers = dict(loaded.named_buffers())
    for key, expected in fresh.named_buffers():
        assert torch.equal(buffers[key], expected), key
    parameters = dict(loaded.named_parameters())
    for key, expected in fresh.named_parameters():
        got = parameters[key]
        if (expected == expected.flatten()[0]).all():
            assert torch.equal(got, expected), key
        else:
            assert 0.25 < got.std() / expected.std() < 4, key
            assert abs(got.mean() - expected.mean()) < expected.std(), key


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings(tied: bool, tmp_path: Path) -> None:
    model = tiny.model(text={"tie_word_embeddings": tied})
    inputs = collate(twins.samples("everything"))
    before = logits(model, inputs)
    model.resize_token_embeddings(tiny.VOCAB_SIZE + 8)
    after = logits(model, inputs)
    assert after.shape[-1] == model.config.text_config.vocab_size == tiny.VOCAB_SIZE + 8
    torch.testing.assert_close(after[..., : tiny.VOCAB_SIZE], before, atol=ATOL, rtol=0)
    assert torch.isfinite(model(**inputs, labels=labels_of(inputs)).loss)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(UniMoeForCausalLM.from_pretrained(tmp_path), inputs), after)


# --- training --------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_gradients(twin: Any) -> None:
    model, samples = copy.deepcopy(twin[0]).train(), twin[1]
    inputs = collate(samples)
    expected = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.model.language_model.layers)
    got = gradients(model, inputs)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_every_weight_but_the_towers_learns(twin: Any) -> None:
    model, samples = copy.deepcopy(twin[0]).train(), twin[1]
    got = gradients(model, collate(samples))
    idle = {name for name, p in model.named_parameters() if name not in got or not got[name].any()}
    towers = {name for name, _ in model.named_parameters() if "_tower." in name}
    assert idle == towers


def test_frozen_towers_stay_in_eval_mode_and_learn_nothing() -> None:
    model = tower_model(mobile_net(), vision_feature_layer=-1).train()
    assert model.training
    assert model.model.image_connector.training
    tower = model.model.vision_tower
    assert not any(module.training for module in tower.modules())
    before = copy.deepcopy(tower.state_dict())
    gradients(model, image_inputs(model))
    assert all(p.grad is None for p in tower.parameters())
    for name, tensor in tower.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_frozen_towers_are_frozen_after_loading(tmp_path: Path) -> None:
    model = tower_model(mobile_net(), vision_feature_layer=-1)
    model.save_pretrained(tmp_path)
    for auto in (AutoModelForCausalLM, AutoModel):
        loaded = auto.from_pretrained(tmp_path).train()
        tower = loaded.base_model.vision_tower
        assert not any(p.requires_grad for p in tower.parameters())
        assert not any(module.training for module in tower.modules())


def test_trainable_towers_learn() -> None:
    model = tower_model(mobile_net(), vision_feature_layer=-1, freeze_towers=False).train()
    tower = model.model.vision_tower
    assert all(module.training for module in tower.modules())
    means = {name: b.clone() for name, b in tower.named_buffers() if name.endswith("running_mean")}
    got = gradients(model, image_inputs(model))
    assert any(name.startswith("model.vision_tower.") and g.any() for name, g in got.items())
    assert any(not torch.equal(b, means[name]) for name, b in tower.named_buffers() if name in means)
