"""Greedy tokens do not depend on the batch, the cache or the backend; samples keep their media when they multiply."""

import copy
from typing import Any

import pytest
import tiny
import torch
import twins
from twins import collate

from unimoe import UniMoeForCausalLM

NEW_TOKENS = 6


def generate(model: UniMoeForCausalLM, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """New tokens only, greedy unless the options say otherwise."""
    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def test_left_padded_batch_gives_the_tokens_of_its_samples(twin: Any) -> None:
    model, samples = twin
    batched = generate(model, collate(samples))
    single = torch.cat([generate(model, sample.inputs()) for sample in samples])
    assert batched.tolist() == single.tolist()
    assert len({tuple(row) for row in batched.tolist()}) > 1


def test_tokens_follow_from_full_forward_passes(twin: Any) -> None:
    """Generation with its cache equals reading the whole text again for every token."""
    model, samples = twin
    for sample in samples:
        tokens, ids = [], list(sample.ids)
        for _ in range(NEW_TOKENS):
            logits = model(input_ids=torch.tensor([ids]), **sample.media).logits[0, -1]
            logits[model.generation_config.suppress_tokens] = -torch.inf
            tokens.append(int(logits.argmax()))
            ids.append(tokens[-1])
        assert generate(model, sample.inputs())[0].tolist() == tokens, sample.name


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["none", "static"])
def test_caches_agree(twin: Any, options: dict[str, Any]) -> None:
    model, samples = twin
    inputs = collate(samples)
    assert torch.equal(generate(model, inputs, **options), generate(model, inputs))


def test_experts_backends_agree(twin: Any) -> None:
    model, samples = copy.deepcopy(twin[0]), twin[1]
    inputs = collate(samples)
    tokens = {}
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        tokens[implementation] = generate(model, inputs).tolist()
    assert tokens["eager"] == tokens["batched_mm"] == tokens["grouped_mm"]


@pytest.mark.parametrize("beams", [1, 3])
def test_several_sequences_of_a_sample_share_its_media(twin: Any, beams: int) -> None:
    """Expanding a batch must keep every sample's images, videos and windows with it."""
    model, samples = twin
    inputs = collate(samples)
    ids, expanded = model._expand_inputs_for_generation(expand_size=beams, **inputs)
    expected = model(**inputs).logits.repeat_interleave(beams, dim=0)
    torch.testing.assert_close(model(input_ids=ids, **expanded).logits, expected, atol=2e-5, rtol=0)


def test_beams_of_a_batch_are_those_of_its_samples(twin: Any) -> None:
    model, samples = twin
    options = {"num_beams": 3, "num_return_sequences": 2}
    batched = generate(model, collate(samples), **options)
    single = torch.cat([generate(model, sample.inputs(), **options) for sample in samples])
    assert batched.shape == (2 * len(samples), NEW_TOKENS)
    assert batched.tolist() == single.tolist()


def test_sampled_sequences_come_from_their_own_sample(full_model: UniMoeForCausalLM) -> None:
    """With a temperature near zero every sampled sequence is the greedy one of its sample."""
    samples = twins.samples("everything")
    inputs = collate(samples)
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 1e-4, "top_k": 0, "num_return_sequences": 3}
    sampled = generate(full_model, inputs, **options)
    assert sampled.tolist() == generate(full_model, inputs).repeat_interleave(3, dim=0).tolist()


def test_media_of_a_whole_batch_can_be_missing(full_model: UniMoeForCausalLM) -> None:
    texts = [s for s in twins.samples("everything") if not s.media]
    images = [s for s in twins.samples("everything") if "image" in s.name]
    for samples in (texts, images):
        assert generate(full_model, collate(samples)).shape == (len(samples), NEW_TOKENS)


def test_bfloat16_generates() -> None:
    model = twins.build("everything").to(torch.bfloat16)
    inputs = collate(twins.samples("everything"))
    tokens = generate(model, inputs)
    assert tokens.shape == (len(inputs["input_ids"]), NEW_TOKENS)
    assert int(tokens.max()) < tiny.IMAGE


def test_towers_run_once_per_generation(full_model: UniMoeForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("encode_image", "encode_video", "encode_speech", "encode_sound"):
        encode = getattr(full_model.model, name)
        monkeypatch.setattr(
            full_model.model,
            name,
            lambda *args, name=name, encode=encode, **kwargs: calls.append(name) or encode(*args, **kwargs),
        )
    sample = next(s for s in twins.samples("everything") if s.name == "everything")
    generate(full_model, sample.inputs())
    # Videos go through encode_image too.
    assert sorted(calls) == ["encode_image", "encode_image", "encode_sound", "encode_speech", "encode_video"]


def test_speculative_decoding_with_itself_changes_nothing(full_model: UniMoeForCausalLM) -> None:
    sample = twins.samples("everything")[1]
    assistant = twins.build("everything")
    assert torch.equal(
        generate(full_model, sample.inputs(), assistant_model=assistant), generate(full_model, sample.inputs())
    )


def test_a_conversation_continues_from_its_cache(full_model: UniMoeForCausalLM) -> None:
    """A second turn with the cache of the first equals reading both turns at once."""
    sample = next(s for s in twins.samples("everything") if s.name == "two images")
    turn = torch.tensor([[31, 32, 33]])
    first = full_model(**sample.inputs(), use_cache=True)
    ids = torch.cat([torch.tensor([sample.ids]), turn], dim=1)
    expected = full_model(input_ids=ids, **sample.media).logits[:, -3:]
    given = full_model(input_ids=turn, past_key_values=first.past_key_values).logits
    torch.testing.assert_close(given, expected, atol=2e-5, rtol=0)


def test_a_cache_outgrown_by_longrope_is_computed_anew_with_its_media() -> None:
    """The short factors' keys do not go with the long ones' queries: beyond the border the cache must not be used on."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    model = tiny.model({"rope_parameters": {**rope, "original_max_position_embeddings": 9}})
    inputs = {"input_ids": torch.tensor([tiny.prompt(5, "image", 7)]), **tiny.media(images=1)}
    options = {"max_new_tokens": 8, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    model.generation_config.suppress_tokens = [tiny.IMAGE, tiny.VIDEO, tiny.AUDIO, tiny.SOUND]
    cached = model.generate(**inputs, **options).logits
    anew = model.generate(**inputs, **options, use_cache=False).logits
    torch.testing.assert_close(torch.stack(cached), torch.stack(anew), atol=1e-5, rtol=0)
