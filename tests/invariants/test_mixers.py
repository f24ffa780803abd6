"""Mixers and partial LoRA on a sparse model: batches, generation, training steps, saving."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_moai
import torch
from tiny_moai import collate, sample, text_sample

from unimoe import UniMoeForCausalLM
from unimoe.errors import ConfigurationError, ModalityError, UniMoeError
from unimoe.modeling_unimoe.configuration_unimoe_moai import UniMoeMixerConfig

ATOL = 2e-5
SAMPLES = [sample(1, aux_tokens=5), sample(2, aux_tokens=9, text=4), sample(3, aux_tokens=3, has_map=False)]
STEP_1 = {"expert_choice": "random"}


@pytest.fixture(scope="module")
def mixed() -> UniMoeForCausalLM:
    """A model that tests may not change."""
    return tiny_moai.model()


@torch.no_grad()
def logits(model: UniMoeForCausalLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits


def labels_of(inputs: dict[str, torch.Tensor], answer: int = 2) -> torch.Tensor:
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -answer:] = inputs["input_ids"][:, -answer:]
    return labels


def gradients(model: UniMoeForCausalLM, inputs: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor | None]:
    model.train().zero_grad()
    torch.manual_seed(seed)
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_a_batch_of_different_aux_gives_the_logits_of_its_samples(mixed: UniMoeForCausalLM) -> None:
    samples = [*SAMPLES, text_sample(), sample(4, aux_tokens=0)]
    batched = logits(mixed, collate(samples))
    for row, one in zip(batched, samples, strict=True):
        alone = logits(mixed, one)[0]
        torch.testing.assert_close(row[-len(alone) :], alone, atol=ATOL, rtol=0)


def test_padding_of_aux_reaches_the_answer_only_as_released() -> None:
    model = tiny_moai.model(compress_aux_padding=True)
    batched = logits(model, collate(SAMPLES[:2]))
    assert (batched[0, -1] - logits(model, SAMPLES[0])[0, -1]).abs().max() > 1e-3


def test_samples_without_aux_are_the_plain_decoder(mixed: UniMoeForCausalLM) -> None:
    plain = tiny_moai.model()
    for layer in plain.model.language_model.layers:
        layer.mixer = None
    one = sample(1)
    without = {name: value for name, value in one.items() if not name.startswith("aux_")}
    assert torch.equal(logits(mixed, without), logits(plain, without))
    assert (logits(mixed, one) - logits(plain, without)).abs().max() > 1e-2


def test_partial_lora_acts_on_images_only_and_starts_at_zero() -> None:
    text, image = text_sample(), sample(1, aux_tokens=0)
    model, fresh = tiny_moai.model(), tiny.model({**tiny.MOIIE_GROUPS, "plora_config": tiny_moai.PLORA})
    plain = tiny.model(dict(tiny.MOIIE_GROUPS))
    state = {n: v for n, v in model.state_dict().items() if n in plain.state_dict()}
    plain.load_state_dict(state)
    fresh.load_state_dict(state, strict=False)
    assert torch.equal(logits(model, text), logits(plain, text))
    assert torch.equal(logits(fresh, image), logits(plain, image))
    assert (logits(model, image) - logits(plain, image)).abs().max() > 1e-2


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_with_and_without_cache_and_in_batches(mixed: UniMoeForCausalLM, beams: int) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    batch = collate(SAMPLES)
    answers = mixed.generate(**batch, **options)
    assert torch.equal(mixed.generate(**batch, use_cache=False, **options), answers)
    for row, one in zip(answers, SAMPLES, strict=True):
        assert torch.equal(mixed.generate(**one, **options)[0, -5:], row[-5:])


def test_generated_tokens_are_no_part_of_the_prompt(mixed: UniMoeForCausalLM) -> None:
    """A forward pass of the whole, with the prompt marked, gives the logits of decoding."""
    one = sample(1)
    length = one["input_ids"].shape[1]
    answer = mixed.generate(**one, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    whole = {**one, "input_ids": answer.sequences, "attention_mask": torch.ones_like(answer.sequences)}
    prompt_mask = (torch.arange(answer.sequences.shape[1]) < length)[None]
    found = logits(mixed, {**whole, "prompt_mask": prompt_mask})[:, length - 1 : -1]
    torch.testing.assert_close(found, torch.stack(answer.logits, dim=1), atol=ATOL, rtol=0)
    assert (logits(mixed, whole)[:, length - 1] - answer.logits[0]).abs().max() > 1e-3


def test_answers_do_not_leak_in_training(mixed: UniMoeForCausalLM) -> None:
    one, other = sample(1), sample(1)
    other["input_ids"] = other["input_ids"].clone()
    other["input_ids"][0, -1] += 1
    labels = labels_of(one)
    with torch.no_grad():
        first, second = mixed(**one, labels=labels).logits, mixed(**other, labels=labels).logits
    assert torch.equal(first[:, :-1], second[:, :-1])


def test_aux_features_stand_in_for_text_and_map(mixed: UniMoeForCausalLM) -> None:
    batch = collate(SAMPLES)
    aux = {name: batch.pop(name) for name in [*batch] if name.startswith("aux_")}
    expected = logits(mixed, {**batch, **aux})
    features, mask = mixed.model.get_aux_features(**aux)
    given = {**batch, "aux_features": features, "aux_attention_mask": mask}
    assert torch.equal(logits(mixed, given), expected)
    states = mixed.model.encode_image(aux.pop("aux_pixel_values"))
    assert torch.equal(logits(mixed, {**batch, **aux, "aux_encoder_states": states}), expected)


@pytest.mark.parametrize("mixer", [{}, STEP_1])
@pytest.mark.parametrize(
    "samples", [SAMPLES, [sample(4, aux_tokens=0)], [text_sample()]], ids=["aux", "image", "text"]
)
def test_everything_that_trains_has_a_gradient_in_every_step(samples: list[Any], mixer: dict[str, str]) -> None:
    model = tiny_moai.model(**mixer)
    batch = collate(samples) if len(samples) > 1 else samples[0]
    found = gradients(model, batch)
    assert [name for name, gradient in found.items() if gradient is None] == []
    moai = {n: g for n, g in found.items() if ".mixer." in n or ".aux_compressor." in n}
    if len(samples) == 1:
        assert not any(gradient.any() for gradient in moai.values())
    elif not mixer:
        assert all(gradient.any() for gradient in moai.values())


def test_step_1_draws_one_expert_per_mixer_and_side_again_for_the_same_seed() -> None:
    model = tiny_moai.model(**STEP_1)
    batch = collate(SAMPLES)
    drawn = set()
    for seed in range(6):
        found = gradients(model, batch, seed)
        used = {n.split(".q_proj.")[0] for n, g in found.items() if ".mixer." in n and ".q_proj.up" in n and g.any()}
        assert len(used) == 4  # two mixers, two sides
        assert not any(g.any() for n, g in found.items() if "_gate." in n)
        again = gradients(model, batch, seed)
        assert all(torch.equal(found[name], again[name]) for name in found)
        drawn.add(frozenset(used))
    assert len(drawn) > 1
    model.eval()
    assert torch.equal(logits(model, batch), logits(tiny_moai.model(), batch))


def test_a_forced_choice_is_that_expert_alone(mixed: UniMoeForCausalLM) -> None:
    one = sample(1)
    choices = [[0, 2], [1, 0]]
    seen: dict[str, torch.Tensor] = {}
    names = ("aux", "other", "own")
    hooks = []
    for (image, language), layer in zip(choices, (0, 2), strict=True):
        mixer = mixed.model.language_model.layers[layer].mixer
        for side, number in (("image", image), ("language", language)):
            for name, expert in getattr(mixer, f"{side}_experts").items():
                key = f"{layer} {side} {name == names[number]}"
                hooks.append(expert.register_forward_hook(lambda *_, key=key: seen.update({key: _[2]})))
    logits(mixed, {**one, "expert_choice": torch.tensor(choices)})
    for hook in hooks:
        hook.remove()
    assert sorted(seen) == sorted(f"{layer} {side} True" for layer in (0, 2) for side in ("image", "language"))


@pytest.mark.parametrize("mixer", [{}, STEP_1])
def test_gradient_checkpointing_sees_the_same_experts(mixer: dict[str, str]) -> None:
    model = tiny_moai.model({"plora_config": {**tiny_moai.PLORA, "dropout": 0.0}}, **mixer)
    batch = collate(SAMPLES)
    expected = {name: g.clone() for name, g in gradients(model, batch).items() if g is not None}
    model.gradient_checkpointing_enable()
    found = gradients(model, batch)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_reentrant_checkpointing_is_refused_where_mixers_train(mixed: UniMoeForCausalLM) -> None:
    model, one = tiny_moai.model(), sample(1)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigurationError, match=r'enable\({"use_reentrant": False}\)'):
        gradients(model, one)
    assert torch.equal(logits(model.eval(), one), logits(mixed, one))
    gradients(model, {name: value for name, value in one.items() if not name.startswith("aux_")})


def test_a_sparse_model_with_mixers_trains_saves_and_comes_back(tmp_path: Path) -> None:
    model = tiny_moai.model()
    batch = collate(SAMPLES)
    trained = [p for n, p in model.named_parameters() if ".mixer." in n or ".aux_compressor." in n]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model.train()(**batch, labels=labels_of(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    model.eval().save_pretrained(tmp_path)
    again = UniMoeForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.text_config.mixer_config.layers == [0, 2]
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_gates_have_the_precision_that_is_asked_for() -> None:
    """In half precision weights are rounded, so they differ, and by little."""
    batch = collate(SAMPLES)
    exact = logits(tiny_moai.model(), batch)
    for precision, bound in (("float16", 0.02), ("bfloat16", 0.2)):
        rounded = logits(tiny_moai.model(gate_precision=precision), batch)
        assert 0 < (rounded - exact).abs().max() < bound
        assert torch.equal(logits(tiny_moai.model(gate_training_precision=precision), batch), exact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"aux_attention_mask": torch.ones(1, 3)}, r"aux_attention_mask has shape \[1, 3\]"),
        ({"prompt_mask": torch.ones(1, 3)}, r"prompt_mask has shape \[1, 3\]"),
        ({"expert_choice": torch.tensor([[0, 3], [0, 0]])}, "numbers from 0 to 2"),
        ({"aux_features": torch.zeros(1, 3, 32)}, "one or the other"),
        ({"aux_input_ids": torch.ones(2, 5, dtype=torch.long)}, "one of each per sample"),
    ],
)
def test_what_does_not_fit_is_refused(mixed: UniMoeForCausalLM, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UniMoeError, match=message):
        mixed(**{**sample(1), **change})


def test_aux_in_the_wrong_place_are_refused(mixed: UniMoeForCausalLM) -> None:
    one = sample(1)
    aux = {name: value for name, value in one.items() if name.startswith("aux_")}
    with pytest.raises(ModalityError, match="Sample 0 has aux but no image"):
        mixed(**text_sample(), **aux)
    with pytest.raises(ModalityError, match="has no mixers"):
        tiny.model()(**one)
    cache = mixed(**text_sample(), use_cache=True).past_key_values
    with pytest.raises(UniMoeError, match="whole prompt at once"):
        mixed(**{**one, "attention_mask": None}, past_key_values=cache)
    with pytest.raises((UniMoeError, ValueError), match="prefill_chunk_size"):
        mixed.generate(**one, max_new_tokens=2, prefill_chunk_size=3)


def test_a_prompt_that_is_not_read_whole_is_refused_with_its_reason(mixed: UniMoeForCausalLM) -> None:
    one = sample(1)
    length = one["input_ids"].shape[1]
    cache = mixed(**one, use_cache=True).past_key_values
    more = {name: torch.cat((one[name], one[name][:, :3]), dim=1) for name in ("input_ids", "attention_mask")}
    with pytest.raises(UniMoeError, match=f"hold {length} tokens already, so 3 .*: leave past_key_values out"):
        mixed.generate(**{**one, **more}, past_key_values=cache, max_new_tokens=2)
    encoded = {**one, "image_encoder_states": mixed.model.encode_image(one["pixel_values"]), "pixel_values": None}
    with pytest.raises(UniMoeError, match=f"Only 3 of the prompt's {length} tokens .*: leave prefill_chunk_size out"):
        mixed.generate(**encoded, max_new_tokens=2, prefill_chunk_size=3)
    for mask in (torch.ones(1, length + 1), torch.ones(length)):
        with pytest.raises(UniMoeError, match=r"prompt_mask has shape .*, the text \[1, 10\]"):
            mixed.generate(**one, prompt_mask=mask, max_new_tokens=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": None}, "ascending order"),
        ({"layers": [2, 1]}, "ascending order"),
        ({"layers": [3]}, "must be between 0 and 2"),
        ({"num_heads": 5}, "multiple of it"),
        ({"rank": 0}, "must be between 1"),
    ],
)
def test_impossible_configurations_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tiny.text_config(mixer_config={**tiny_moai.MIXER, **fields})


def test_the_defaults_are_those_of_the_released_model() -> None:
    config = UniMoeMixerConfig(layers=[7, 15, 23, 31])
    assert (config.rank, config.num_heads, config.num_latents, config.compressor_depth) == (64, 4, 64, 4)
    assert (config.compressor_heads, config.compressor_head_dim) == (4, 64)
