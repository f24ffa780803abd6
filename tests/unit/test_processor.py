"""The processor: names, counts, order, padding, labels, templates."""

import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny_media
import torch
from tiny_chat import MIXED, a_clip, an_image, assistant, chat, user

from unimoe.processing.media_policy_unimoe import ConversationError, MediaError, PlaceholderError
from unimoe.processing.processing_unimoe import VICUNA_CHAT_TEMPLATE, UniMoeProcessor

IMAGE, VIDEO, SPEECH, SOUND = 1, 2, 3, 4


WINDOWS = [[2], [], [1]]


@pytest.fixture(scope="module")
def processor() -> UniMoeProcessor:
    return tiny_media.processor()


def runs(row: torch.Tensor) -> list[tuple[int, int]]:
    """(modality, length) of the stretches of one modality; text left out."""
    values, lengths = torch.unique_consecutive(row, return_counts=True)
    return [(v, n) for v, n in zip(values.tolist(), lengths.tolist(), strict=True) if v]


def test_a_batch_of_any_mix(processor: UniMoeProcessor) -> None:
    output = chat(processor, MIXED)
    assert {name: tuple(value.shape) for name, value in output.items() if value.dim() > 2} == {
        "pixel_values": (3, 3, 16, 16),
        "pixel_values_videos": (1, 2, 3, 16, 16),
        "speech_features": (3, 80, 100),
        "audio_features": (3, 98, 128),
    }
    assert output["audio_padding_mask"].shape == (3, 16_000)
    assert output["audio_padding_mask"].dtype == torch.bool
    kinds = output["mm_token_type_ids"]
    assert runs(kinds[0]) == [(IMAGE, 4), (SPEECH, 6), (SOUND, 4)]
    assert runs(kinds[1]) == []
    assert runs(kinds[2]) == [(VIDEO, 5), (IMAGE, 4), (IMAGE, 4), (SPEECH, 3), (SOUND, 2)]
    names = {IMAGE: "<image>", VIDEO: "<video>", SPEECH: "<audio>", SOUND: "<sound>"}
    for kind, token in names.items():
        token_id = processor.tokenizer.convert_tokens_to_ids(token)
        assert torch.equal(kinds == kind, output["input_ids"] == token_id)
    # Left padding, and nothing of it anywhere but in the mask.
    assert output["attention_mask"].sum(1).tolist() == [len(chat(processor, c)["input_ids"][0]) for c in MIXED]
    assert (output["attention_mask"].diff(dim=1) >= 0).all()


def test_media_of_a_batch_stand_in_the_order_of_their_placeholders(processor: UniMoeProcessor) -> None:
    output = chat(processor, MIXED)
    alone = [chat(processor, conversation) for conversation in MIXED]
    for name in ("pixel_values", "speech_features", "audio_features", "pixel_values_videos"):
        assert torch.equal(output[name], torch.cat([one[name] for one in alone if name in one]))
    for row, one in zip(output["input_ids"], alone, strict=True):
        assert torch.equal(row[-one["input_ids"].shape[1] :], one["input_ids"][0])


def test_encoder_choice_per_clip(processor: UniMoeProcessor) -> None:
    output = chat(processor, [user(a_clip(encoder="sound"), a_clip(1.5, encoder="speech"), a_clip())])
    assert runs(output["mm_token_type_ids"][0]) == [(SOUND, 2), (SPEECH, 9), (SOUND, 2)]
    assert len(output["speech_features"]) == 3
    assert len(output["audio_features"]) == len(output["audio_padding_mask"]) == 2
    only_speech = tiny_media.processor("speech")
    assert runs(chat(only_speech, [user(a_clip())])["mm_token_type_ids"][0]) == [(SPEECH, 3)]
    with pytest.raises(PlaceholderError, match=r"message 0, content 0: .* no audio with encoder='sound'"):
        chat(only_speech, [user(a_clip(encoder="sound"))])


def test_all_forms_of_a_medium_agree(processor: UniMoeProcessor, tmp_path: Path) -> None:
    picture, samples = tiny_media.picture(3), tiny_media.sound(0.4)
    (tmp_path / "a.png").write_bytes(tiny_media.encoded_picture(seed=3))
    images: list[Any] = [picture, PIL.Image.fromarray(picture), torch.from_numpy(picture).permute(2, 0, 1)]
    images += [picture / 255.0, tiny_media.encoded_picture(seed=3), tmp_path / "a.png", str(tmp_path / "a.png")]
    outputs = [chat(processor, [user({"type": "image", "image": image})])["pixel_values"] for image in images]
    outputs.append(chat(processor, [user({"type": "image", "path": "a.png"})], media_root=tmp_path)["pixel_values"])
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    sixteen_bit = (samples * 32767).round().astype(np.int16)
    clips: list[Any] = [sixteen_bit, torch.from_numpy(sixteen_bit), np.stack([sixteen_bit] * 2), sixteen_bit / 32768]
    clips += [{"array": sixteen_bit, "sampling_rate": 16_000}, (sixteen_bit, 16_000), tiny_media.wav(samples)]
    outputs = [chat(processor, [user({"type": "audio", "audio": clip})])["speech_features"] for clip in clips]
    assert all(torch.allclose(output, outputs[0], atol=1e-5) for output in outputs)


def test_other_sampling_rates_are_resampled(processor: UniMoeProcessor) -> None:
    samples = tiny_media.sound(0.9, rate=44_100)
    given = chat(processor, [user({"type": "audio", "audio": samples, "sampling_rate": 44_100})])
    from_file = chat(processor, [user({"type": "audio", "audio": tiny_media.wav(samples, 44_100)})])
    direct = processor(text="<audio>", audio=samples, sampling_rate=44_100, return_tensors="pt")
    assert torch.allclose(given["speech_features"], from_file["speech_features"], atol=0.05)
    assert torch.equal(given["speech_features"], direct["speech_features"])
    low, high = (given["speech_features"][0, half].mean() for half in (slice(0, 40), slice(40, 80)))
    assert low > high  # 440 Hz stays 440 Hz: taken at the wrong rate it would move, not vanish
    peak = given["speech_features"][0, :, :80].mean(1).argmax()
    assert peak == chat(processor, [user(a_clip(0.9))])["speech_features"][0, :, :80].mean(1).argmax()


def test_labels_are_the_answers_and_their_ends(processor: UniMoeProcessor) -> None:
    batch = processor.training_inputs(MIXED)
    tokenizer = processor.tokenizer
    learned = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == ["A cat<|im_end|>A dog<|im_end|>", "Me<|im_end|>", "Two <image><|im_end|>"]
    at_labels = batch["labels"] != -100
    assert torch.equal(batch["labels"][at_labels], batch["input_ids"][at_labels])
    assert not (at_labels & (batch["mm_token_type_ids"] > 0)).any()
    assert (batch["attention_mask"].diff(dim=1) <= 0).all()  # right padding


def test_generation_sees_the_tokens_that_training_saw(processor: UniMoeProcessor) -> None:
    """A prompt, and a history of turns, are tokenised as the beginning of the trained conversation is."""
    for template in (None, VICUNA_CHAT_TEMPLATE):
        for tokenizer in (tiny_media.tokenizer(), tiny_media.tokenizer(metaspace=True)):
            trained = tiny_media.processor(tokenizer=tokenizer, chat_template=template)
            full = trained.tokenize_conversation(MIXED[0], [2])
            for turns in (1, 3):
                prompt = chat(trained, MIXED[0][:turns])["input_ids"][0].tolist()
                assert full["input_ids"][: len(prompt)] == prompt
                assert full["labels"][len(prompt)] == full["input_ids"][len(prompt)]
                assert full["labels"][len(prompt) - 1] == -100


def test_answers_get_no_extra_space() -> None:
    """SentencePiece-like tokenizers put a space before every text that is encoded alone."""
    tokenizer = tiny_media.tokenizer(metaspace=True)
    sample = tiny_media.processor(tokenizer=tokenizer).tokenize_conversation(MIXED[1])
    whole = tokenizer.encode("assistant\nMe<|im_end|>", add_special_tokens=False)
    learned = [i for i in sample["labels"] if i >= 0]
    assert learned == whole[-len(learned) :]
    assert tokenizer.decode(learned) == "Me<|im_end|>"


def test_media_in_answers_are_not_learned(processor: UniMoeProcessor) -> None:
    shown = {"role": "assistant", "content": [an_image(), {"type": "text", "text": "A cat"}]}
    batch = processor.training_inputs([[user("Show one."), shown]])
    assert processor.decode(batch["labels"][batch["labels"] != -100]) == "A cat<|im_end|>"
    assert (batch["mm_token_type_ids"] == IMAGE).sum() == 4


def test_conversations_tokenise_the_same_without_their_media(processor: UniMoeProcessor) -> None:
    batch = processor.training_inputs(MIXED, pad_to_multiple_of=8)
    bare = [
        [{**m, "content": [{k: v for k, v in c.items() if k in ("type", "text")} for c in m["content"]]} for m in x]
        for x in MIXED
    ]
    samples = [processor.tokenize_conversation(c, w) for c, w in zip(bare, WINDOWS, strict=True)]
    padded = processor.pad_tokens(samples, pad_to_multiple_of=8)
    assert set(padded) == {"input_ids", "labels", "mm_token_type_ids", "attention_mask"}
    for name, value in padded.items():
        assert torch.equal(value, batch[name])
    assert padded["input_ids"].shape[1] % 8 == 0
    assert processor.tokenize_conversation(bare[2]) == samples[2]  # one window per clip unless told
    with pytest.raises(PlaceholderError, match="2 entries for 1 audio"):
        processor.tokenize_conversation(bare[0], [1, 1])


def test_assistant_masks_survive_the_expansion(processor: UniMoeProcessor) -> None:
    output = chat(processor, MIXED, return_assistant_tokens_mask=True, add_generation_prompt=False)
    labels = processor.training_inputs(MIXED, padding_side="left")["labels"]
    assert torch.equal(output["assistant_masks"] == 1, labels != -100)


def test_a_conversation_without_answer_cannot_be_trained(processor: UniMoeProcessor) -> None:
    with pytest.raises(ConversationError, match="conversation 1: no answer"):
        processor.training_inputs([MIXED[0], [user("Hm?")]])
    blind = tiny_media.processor(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ConversationError, match="generation"):
        blind.training_inputs([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])


def test_continuing_a_final_message(processor: UniMoeProcessor) -> None:
    messages = [user("Who?"), assistant("A c")]
    output = chat(processor, messages, continue_final_message=True, add_generation_prompt=False)
    assert processor.decode(output["input_ids"][0]).endswith("<|im_start|>assistant\nA c")


def test_prompts_of_uni_moe(processor: UniMoeProcessor) -> None:
    """The exact strings of Uni-MoE's template "v1"."""
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    messages = [user(an_image(), a_clip(), "What?"), assistant("A cat"), user("More?")]
    prompt = processor.apply_chat_template(messages, VICUNA_CHAT_TEMPLATE, add_generation_prompt=True)
    assert prompt == f"<s>{system} USER: <image>\n<audio>\nWhat? ASSISTANT: A cat</s>USER: More? ASSISTANT:"
    own = [{"role": "system", "content": "Be brief."}, *messages[2:], assistant("No")]
    assert processor.apply_chat_template(own, VICUNA_CHAT_TEMPLATE) == "<s>Be brief. USER: More? ASSISTANT: No</s>"
    trained = tiny_media.processor(chat_template=VICUNA_CHAT_TEMPLATE).tokenize_conversation(
        [*messages, assistant("No")]
    )
    assert processor.decode([i for i in trained["labels"] if i >= 0]) == " A cat</s> No</s>"


def test_default_prompt(processor: UniMoeProcessor) -> None:
    messages = [{"role": "system", "content": "Be brief."}, user(an_image(), "What?"), assistant("A cat")]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>What?<|im_end|>\n"
        "<|im_start|>assistant\nA cat<|im_end|>\n"
    )
    assert processor.apply_chat_template(messages) == expected
    assert processor.apply_chat_template([messages], add_generation_prompt=True) == [
        expected + "<|im_start|>assistant\n"
    ]


def test_calling_with_placeholders_in_the_text(processor: UniMoeProcessor) -> None:
    pictures = [tiny_media.picture(seed) for seed in range(3)]
    flat = processor(images=pictures, text=["<image> a <image>", "b <image>"], return_tensors="pt")
    nested = processor(
        images=[pictures[:2], pictures[2:]], text=["<image> a <image>", "b <image>"], return_tensors="pt"
    )
    assert flat.keys() == nested.keys() == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"}
    assert all(torch.equal(flat[name], nested[name]) for name in flat)
    assert runs(flat["mm_token_type_ids"][0]) == [(IMAGE, 4), (IMAGE, 4)]
    assert processor(images=pictures, return_tensors="pt").keys() == {"pixel_values"}
    lists = processor(text="a b", padding=False)
    assert isinstance(lists["input_ids"][0], list)
    arrays = processor(images=pictures[:1], text="<image>", return_tensors="np")
    assert all(isinstance(value, np.ndarray) for value in arrays.values())
    with pytest.raises(ValueError, match="needs text or media"):
        processor()


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("no placeholder", 1, "left over: {'image': 1}"),
        ("<image> <image>", 1, "text 0: the text has more image placeholders"),
        ("<image>", 0, "more image placeholders"),
        ("<sound>", 0, "more sound placeholders"),
        ("<audio>", 0, "more audio placeholders"),
    ],
)
def test_counts_must_agree(processor: UniMoeProcessor, text: str, count: int, message: str) -> None:
    with pytest.raises(PlaceholderError, match=message):
        processor(images=[tiny_media.picture()] * count, text=text)


# A template of a language model: SmolLM2's joins strings and fails on lists; others print the list as it is.
@pytest.mark.parametrize("shown", ["'' + m['content'] + ''", "m['content']"])
def test_a_template_that_knows_strings_gets_strings(shown: str) -> None:
    text_alone = tiny_media.processor(chat_template="{% for m in messages %}[{{ " + shown + " }}]{% endfor %}")
    message = user({"type": "text", "text": "What "}, {"type": "text", "text": "is it?"})
    assert text_alone.apply_chat_template([message]) == "[What is it?]"
    assert text_alone.apply_chat_template([{**message, "content": "What?"}]) == "[What?]"
    with pytest.raises(ConversationError, match=r"shows text alone, and the conversation has a medium \(image\)"):
        text_alone.apply_chat_template([user(an_image(), {"type": "text", "text": "What?"})])


def test_a_template_that_drops_media_is_an_error() -> None:
    forgetful = tiny_media.processor(chat_template="{% for m in messages %}a{% endfor %}")
    with pytest.raises(PlaceholderError, match=r"conversation 0: media without a placeholder .* {'image': 1}"):
        chat(forgetful, [user(an_image())])


def test_length_limits_cut_text_but_never_media(processor: UniMoeProcessor) -> None:
    conversation = [user(an_image(), "What is in the picture? " * 5), assistant("A cat")]
    full = len(chat(processor, conversation)["input_ids"][0])
    short = chat(processor, conversation, max_length=20, truncation=True)
    assert short["input_ids"].shape == (1, 20)
    assert runs(short["mm_token_type_ids"][0]) == [(IMAGE, 4)]
    with pytest.raises(PlaceholderError, match=r"sample 0: max_length=8 would cut .* \(\d+ tokens in all\)"):
        chat(processor, conversation, max_length=8, truncation=True)
    padded = chat(processor, conversation, max_length=full + 9, padding="max_length")
    assert padded["input_ids"].shape == (1, full + 9)
    assert padded["attention_mask"][0, :9].sum() == 0
    with pytest.raises(PlaceholderError):
        processor.training_inputs([conversation], max_length=8)


def test_model_takes_every_name_that_the_processor_gives(processor: UniMoeProcessor) -> None:
    from unimoe import UniMoeForCausalLM

    output = chat(processor, MIXED)
    assert set(output) == set(processor.model_input_names)
    assert set(output) <= set(inspect.signature(UniMoeForCausalLM.forward).parameters)
    assert not set(processor.unused_input_names) & set(output)


def test_numbers_for_serving_engines(processor: UniMoeProcessor) -> None:
    counts = processor._get_num_multimodal_tokens(
        image_sizes=[(9, 9), (99, 9)], video_sizes=[(8, 9, 9)], audio_lengths=[100, 24_000]
    )
    assert counts["num_image_tokens"] == [4, 4]
    assert counts["num_image_patches"] == [1, 1]
    assert counts["num_video_tokens"] == [5]
    assert counts["num_audio_tokens"] == [5, 10]


def test_processors_travel_to_worker_processes(processor: UniMoeProcessor) -> None:
    chat(processor, MIXED)
    again = pickle.loads(pickle.dumps(processor))
    first, second = processor.training_inputs(MIXED), again.training_inputs(MIXED)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ([{"role": "root", "content": "a"}], "message 0: needs a 'role'"),
        ([user("a"), {"role": "user", "content": 7}], "message 1: 'content' must be"),
        ([user({"type": "smell"})], "message 0, content 0: type 'smell' is unknown"),
        ([user("a", {"type": "text"})], "message 0, content 1: a text item needs"),
        ([user({**an_image(), "encoder": "speech"})], r"content 0: encoder 'speech' is not .* \(audio only\)"),
    ],
)
def test_malformed_conversations_are_named(processor: UniMoeProcessor, conversation: Any, message: str) -> None:
    with pytest.raises(ConversationError, match=message):
        chat(processor, conversation)


def test_errors_name_the_place_in_a_batch(processor: UniMoeProcessor) -> None:
    bad = [MIXED[0], [user("a"), assistant("b"), user("c", {"type": "image", "image": b"nothing"})]]
    with pytest.raises(MediaError, match=r"image at conversation 1, message 2, content 1: not a readable image"):
        chat(processor, bad)


def test_constructor_refuses_what_cannot_work() -> None:
    from transformers import PreTrainedTokenizerFast

    plain = tiny_media.tokenizer().backend_tokenizer
    bare = PreTrainedTokenizerFast(
        tokenizer_object=type(plain).from_str(plain.to_str().replace("<image>", "<picture>"))
    )
    with pytest.raises(PlaceholderError, match="no token <image>: call prepare_tokenizer"):
        tiny_media.processor("image", tokenizer=bare)
    with pytest.raises(PlaceholderError, match="image_tokens is -1"):
        tiny_media.processor("image", image_tokens=-1)
    with pytest.raises(PlaceholderError, match="sound_tokens is 2, but the feature extractor does not make sound"):
        tiny_media.processor("speech", sound_tokens=2)
    with pytest.raises(TypeError, match="needs a tokenizer"):
        UniMoeProcessor()
    with pytest.raises(TypeError, match="unknown options"):
        tiny_media.processor("")(text="a", max_lenght=3)


def test_several_named_templates(tmp_path: Path) -> None:
    templates = {"default": "{% for m in messages %}d{% endfor %}", "loud": "{% for m in messages %}L{% endfor %}"}
    made = tiny_media.processor("", chat_template=templates)
    made.save_pretrained(tmp_path)
    for one in (made, UniMoeProcessor.from_pretrained(tmp_path)):
        assert one.apply_chat_template([user("a")]) == "d"
        assert one.apply_chat_template([user("a")], "loud") == "L"
    with pytest.raises(ConversationError, match=r"name one of \['loud'\]"):
        tiny_media.processor("", chat_template={"loud": "L"}).apply_chat_template([user("a")])


def test_one_family_of_errors() -> None:
    from unimoe import errors

    for kind in (MediaError, PlaceholderError, ConversationError):
        assert getattr(errors, kind.__name__) is kind
        assert issubclass(kind, errors.UniMoeError)
