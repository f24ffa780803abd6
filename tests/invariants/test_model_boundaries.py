"""What the model refuses, warns of and makes of batches without anything to learn."""

import logging
from typing import Any

import pytest
import tiny
import torch
import twins
from twins import collate

from unimoe import UniMoeForCausalLM
from unimoe.errors import ModalityError, UniMoeError
from unimoe.modeling_unimoe.token_types_unimoe import require_agreeing_types, require_known_types


@pytest.fixture(scope="module")
def model() -> UniMoeForCausalLM:
    return twins.build("everything")


def sample(name: str) -> twins.Sample:
    return next(s for s in twins.samples("everything") if s.name == name)


# --- placeholders without media --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "needed"), [("image", "4 image .* pixel_values or image_encoder_states"), ("video", "4 video")]
)
def test_placeholders_without_media_are_refused(model: UniMoeForCausalLM, name: str, needed: str) -> None:
    inputs = {k: v for k, v in sample(name).inputs().items() if "pixel" not in k}
    with pytest.raises(ModalityError, match=f"{needed}.*"):
        model(**inputs)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        with pytest.raises(ModalityError, match=needed):
            model.generate(**inputs, max_new_tokens=2, **options)


def test_each_branch_of_audio_needs_its_features(model: UniMoeForCausalLM) -> None:
    for left_out, modality in (("speech_features", "6 speech"), ("audio_features", "4 sound")):
        inputs = {k: v for k, v in sample("audio of two windows").inputs().items() if k != left_out}
        with pytest.raises(ModalityError, match=f"{modality} placeholders but no .*{left_out}"):
            model(**inputs)


def test_placeholders_on_a_cache_need_nothing(model: UniMoeForCausalLM) -> None:
    """A token that a model without suppressed placeholders made, and drafts of speculative decoding."""
    first = model(**sample("image").inputs(), use_cache=True)
    for ids in ([[tiny.IMAGE]], [[7, tiny.IMAGE]]):
        assert model(input_ids=torch.tensor(ids), past_key_values=first.past_key_values).logits.isfinite().all()


def test_embeddings_may_hold_their_media_already(model: UniMoeForCausalLM) -> None:
    ids = torch.tensor([sample("image").ids])
    embeds = model.get_input_embeddings()(ids)
    types = model.model.modality_ids(ids)
    assert model(inputs_embeds=embeds, mm_token_type_ids=types).logits.isfinite().all()


def test_placeholders_of_a_batch_are_counted_at_once(
    model: UniMoeForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every `tolist` waits for the device: one per forward pass, and none per generated token."""
    counts: list[int] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: counts.append(self.numel()) or tolist(self))
    model.model(**collate(twins.samples("everything")))
    assert counts.count(4) == 1
    counts.clear()
    first = model.model(**sample("image").inputs(), use_cache=True)
    counts.clear()
    model.model(input_ids=torch.tensor([[7]]), past_key_values=first.past_key_values)
    assert 4 not in counts


def test_looking_for_placeholders_breaks_no_graph(model: UniMoeForCausalLM) -> None:
    assert torch._dynamo.explain(model.model)(input_ids=torch.tensor([[5, 6, 7]])).graph_break_count == 0
    torch._dynamo.reset()


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_token_types_must_fit_the_text(model: UniMoeForCausalLM) -> None:
    ids = torch.tensor([[5, 6, 7]])
    for text in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ModalityError, match=r"mm_token_type_ids has shape \[1, 2\], the text \[1, 3\]"):
            model(**text, mm_token_type_ids=torch.zeros(1, 2, dtype=torch.long))


def test_token_types_that_disagree_with_the_ids_are_refused(model: UniMoeForCausalLM) -> None:
    inputs = sample("image").inputs()
    types = model.model.modality_ids(inputs["input_ids"])
    place = int((types == 1).nonzero()[0, 1])
    types[0, place] = 2
    said = (
        rf"mm_token_type_ids say 2 at row 0, position {place}, where input_ids .* modality 1 \(image\): .* leave them"
    )
    for run in (model, lambda **given: model.generate(**given, max_new_tokens=1)):
        with pytest.raises(ModalityError, match=said):
            run(**inputs, mm_token_type_ids=types)


@pytest.mark.parametrize("asked", [require_known_types, lambda types: require_agreeing_types(types, types)])
def test_token_types_on_a_device_are_checked_there(monkeypatch: pytest.MonkeyPatch, asked: Any) -> None:
    """Nothing can be read of a tensor without data, as nothing should be of one on a GPU."""
    said: list[str] = []
    monkeypatch.setattr(torch, "_assert_async", lambda right, message: said.append(message))
    asked(torch.zeros(1, 2, dtype=torch.long, device="meta"))
    assert len(said) == 1
    assert said[0].startswith("mm_token_type_ids ")


def test_token_types_that_are_no_modality_are_refused(model: UniMoeForCausalLM) -> None:
    embeds = torch.zeros(1, 2, tiny.HIDDEN)
    for wrong in (5, -1):
        with pytest.raises(ModalityError, match=r"values from -?\d to \d; there are 0 text, 1 image, .* 4 sound"):
            model(inputs_embeds=embeds, mm_token_type_ids=torch.tensor([[0, wrong]]))


def test_an_empty_text_is_refused(model: UniMoeForCausalLM) -> None:
    for shape in ((1, 0), (0, 3)):
        with pytest.raises(UniMoeError, match=rf"text is empty: its shape is \[{shape[0]}, {shape[1]}\]"):
            model(input_ids=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize(
    "media",
    [
        {"pixel_values": torch.zeros(1, 1, 16, 16)},
        {"pixel_values": torch.zeros(3, 16, 16)},
        {"pixel_values_videos": torch.zeros(1, 2, 1, 16, 16)},
    ],
)
def test_pixels_without_three_channels_are_refused(model: UniMoeForCausalLM, media: dict[str, Any]) -> None:
    with pytest.raises(ModalityError, match=r"have shape .*; give \[n, 3, height, width\]"):
        model(input_ids=torch.tensor([[5]]), **media)


# --- nothing to learn ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("items", [None, 0, 5])
def test_nothing_to_learn_costs_nothing(items: int | None) -> None:
    made = twins.build("everything")
    inputs = sample("image").inputs()
    counted = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    output = made(**inputs, labels=torch.full_like(inputs["input_ids"], -100), **counted)
    assert output.loss.item() == output.ce_loss.item() == 0
    output.loss.backward()
    assert made.lm_head.weight.grad is not None
    assert all(p.grad.eq(0).all() for p in made.parameters() if p.grad is not None)


# --- long contexts ---------------------------------------------------------------------------------------------------


@pytest.fixture
def warnings_of() -> Any:
    """Messages that the model's logger wrote; transformers' loggers do not reach pytest's own."""
    seen: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    logger, handler = logging.getLogger("unimoe.modeling_unimoe.generation_unimoe"), Keep()
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


def test_contexts_beyond_the_positions_are_warned_of_once(warnings_of: list[str]) -> None:
    made = tiny.model(text={"max_position_embeddings": 8})
    made.generation_config.eos_token_id = None
    made.generate(torch.full((1, 4), 5), max_new_tokens=4)
    assert warnings_of == []
    for _ in range(2):
        made.generate(torch.full((1, 10), 5), max_new_tokens=3)
    (message,) = warnings_of
    assert "10 tokens" in message
    assert "the 8 of max_position_embeddings" in message


def test_contexts_that_grow_too_long_are_warned_of(warnings_of: list[str]) -> None:
    made = tiny.model(text={"max_position_embeddings": 8})
    made.generation_config.eos_token_id = None
    made.generate(torch.full((1, 7), 5), max_new_tokens=4)
    assert ["9 tokens" in message for message in warnings_of] == [True]
