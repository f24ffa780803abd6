"""What callers get wrong, and pipelines that make their own batches."""

from pathlib import Path
from typing import Any

import hub_checks
import numpy as np
import PIL.Image
import pytest
import tiny_media
import tiny_training
import torch
from transformers import pipeline

from unimoe.errors import ConversationError, MediaError, OptionError, PlaceholderError
from unimoe.processing.feature_extraction_unimoe import UniMoeFeatureExtractor
from unimoe.processing.processing_unimoe import UniMoeProcessor


@pytest.fixture(scope="module")
def processor() -> UniMoeProcessor:
    return tiny_media.processor()


def chat(processor: UniMoeProcessor, *content: Any, **options: Any) -> Any:
    messages = [{"role": "user", "content": list(content)}]
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **options)


# --- one list of media per text --------------------------------------------------------------------------------------


def test_media_stay_with_their_text(processor: UniMoeProcessor) -> None:
    a, b = tiny_media.picture(0), tiny_media.picture(1)
    texts = ["<image>", "<image>"]
    with pytest.raises(PlaceholderError, match=r"text 0: media without a placeholder .* \{'image': 1\}"):
        processor(images=[[a, b], []], text=texts)
    with pytest.raises(PlaceholderError, match="text 1: the text has more image placeholders"):
        processor(images=[[a], None], text=texts)
    with pytest.raises(PlaceholderError, match="image: 1 lists of media for 2 texts"):
        processor(images=[[a, b]], text=texts)
    clip = tiny_media.sound(0.2)
    with pytest.raises(PlaceholderError, match=r"text 0: .* left over"):
        processor(audio=[[clip, clip], []], text=["<audio>", "<audio>"])


def test_lists_that_are_one_medium_are_no_lists_per_text(processor: UniMoeProcessor) -> None:
    frames = [PIL.Image.fromarray(tiny_media.picture(seed)) for seed in range(2)]
    for videos in ([frames, frames], [[frames, frames], []], [[frames], [frames]]):
        texts = ["<video><video>", ""] if videos[1] == [] else ["<video>", "<video>"]
        assert processor(videos=videos, text=texts, return_tensors="pt")["pixel_values_videos"].shape[0] == 2
    assert len(processor(videos=[frames, frames], text="<video><video>", return_tensors="pt")["input_ids"]) == 1
    clips = [[0.1] * 400, [0.2] * 400]
    assert len(processor(audio=clips, text="<audio><audio>", return_tensors="pt")["speech_features"]) == 2


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0, "truncation": True}, "max_length is 0; use a whole number from 1 on"),
        ({"max_length": -1}, "max_length is -1"),
        ({"max_length": 2.5}, "max_length is 2.5"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0"),
        ({"padding": "foo"}, "padding is 'foo'; use True, False or one of"),
        ({"text_kwargs": {"padding": "foo"}}, "padding is 'foo'"),
    ],
)
def test_impossible_options_are_named(processor: UniMoeProcessor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        processor(text="a", **options)
    with pytest.raises(OptionError, match=message):
        chat(processor, {"type": "text", "text": "a"}, processor_kwargs=options)


def test_options_that_are_none_are_absent(processor: UniMoeProcessor) -> None:
    options = {"text_kwargs": {"max_length": None, "padding": None}, "padding": None}
    assert processor(text=["a", "b c"], return_tensors="pt", **options)["input_ids"].shape[0] == 2


def test_empty_batches_are_refused(processor: UniMoeProcessor) -> None:
    with pytest.raises(OptionError, match="text is an empty list"):
        processor(text=[])
    with pytest.raises(ConversationError, match="one conversation at least"):
        processor.training_inputs([])
    answered = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(OptionError, match="max_length is 0"):
        processor.training_inputs([answered], max_length=0)


@pytest.mark.parametrize(("text", "kind"), [(5, "int"), (b"a", "bytes"), ({"a": 1}, "dict")])
def test_text_must_be_text(processor: UniMoeProcessor, text: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=f"text is a {kind}, not a string or a list of strings"):
        processor(text=text)


def test_zero_is_no_absent_value(processor: UniMoeProcessor) -> None:
    clip, frames = tiny_media.sound(0.2), [tiny_media.picture()]
    with pytest.raises(MediaError, match="audio at message 0, content 0: its sampling rate is 0 Hz"):
        chat(processor, {"type": "audio", "audio": clip, "sampling_rate": 0}, sampling_rate=16_000)
    with pytest.raises(MediaError, match="sampling rate is 0 Hz"):
        processor(text="<audio>", audio=clip, sampling_rate=0)
    with pytest.raises(MediaError, match="sampling rate is 0 Hz"):
        UniMoeFeatureExtractor().fetch_audio(clip, sampling_rate=0)
    with pytest.raises(MediaError, match="num_frames is 0"):
        chat(processor, {"type": "video", "video": frames}, videos_kwargs={"num_frames": 0})
    with pytest.raises(MediaError, match="num_frames is 0"):
        processor.video_processor(np.stack(frames), num_frames=0)


# --- messages --------------------------------------------------------------------------------------------------------


def test_half_characters_are_named(processor: UniMoeProcessor) -> None:
    good = {"role": "user", "content": "a"}
    for bad in (
        {"role": "user", "content": "x\ud800"},
        {"role": "user", "content": [{"type": "text", "text": "\udfffx"}]},
        {"role": "user", "content": "a", "name": ["\ud83d"]},
    ):
        for tokenize in (True, False):
            with pytest.raises(ConversationError, match=r"message 1: the text holds a lone surrogate, '\\ud"):
                processor.apply_chat_template([good, bad], tokenize=tokenize)
    with pytest.raises(ConversationError, match="text 1: the text holds a lone surrogate"):
        processor(text=["a", "\ud800"])
    whole = processor(text="\U0001f600", padding=False)["input_ids"][0]
    assert processor.tokenizer.decode(whole) == "\U0001f600"


def test_media_that_cannot_be_read_are_named(processor: UniMoeProcessor, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for file, reason in (("text.png", "not a readable image"), ("none.png", "there is no such file")):
        place = rf"image at message 0, content 0, '.*{file}': {reason}"
        for item in ({"path": str(tmp_path / file)}, {"image": tmp_path / file}):
            with pytest.raises(MediaError, match=place):
                chat(processor, {"type": "image", **item})
    with pytest.raises(MediaError, match=r"video at message 0, content 0, 'none\.mp4': there is no such file"):
        chat(processor, {"type": "video", "path": "none.mp4"})
    with pytest.raises(MediaError, match="image at message 0, content 0: URLs are refused"):
        chat(processor, {"type": "image", "url": "https://user:secret@example.com/x.png"})


def test_items_without_their_medium_name_the_keys(processor: UniMoeProcessor) -> None:
    with pytest.raises(
        MediaError, match=r"image at message 0, content 0: .* under \('image', 'path', 'url', 'base64'\)"
    ):
        chat(processor, {"type": "image", "file": "x.png"})
    with pytest.raises(MediaError, match=r"under \('audio', 'path'"):
        chat(processor, {"type": "audio"})
    # Without tokenising, prompts may be made for media that come later.
    prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    assert "<image>" in prompt


@pytest.mark.parametrize("key", ["path", "url", "base64"])
def test_media_given_twice_are_refused(processor: UniMoeProcessor, key: str) -> None:
    with pytest.raises(ConversationError, match=rf"content 0: .* 2 times, under \['image', '{key}'\]"):
        chat(processor, {"type": "image", "image": tiny_media.picture(), key: "x.png"})
    assert "pixel_values" in chat(processor, {"type": "image", "image": tiny_media.picture(), key: None})


def test_messages_need_a_content(processor: UniMoeProcessor) -> None:
    with pytest.raises(ConversationError, match=r"message 0: needs a 'role', .* and a 'content'"):
        processor.apply_chat_template([{"role": "user"}])
    assert processor.apply_chat_template([{"role": "assistant", "tool_calls": [{"name": "f"}]}])


# --- batches of pipelines --------------------------------------------------------------------------------------------


def test_pipelines_answer_batches_as_they_answer_single_chats(tmp_path: Path) -> None:
    made = tiny_training.processor()
    made.tokenizer.pad_token = made.tokenizer.unk_token
    model = tiny_training.model(made, sparse=True)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [i for i in model.config.placeholder_ids.values() if i is not None]
    for folder in (model, made):
        folder.save_pretrained(tmp_path)
    seer = pipeline("image-text-to-text", model=str(tmp_path))
    chats = [hub_checks.chat({"type": "image", "image": hub_checks.picture()}) for _ in range(2)]
    chats[1][0]["content"].append({"type": "text", "text": " Look at the left half of it, please."})
    options: dict[str, Any] = {"max_new_tokens": 4, "return_full_text": False}
    together = [answer[0]["generated_text"] for answer in seer(text=chats, batch_size=2, **options)]
    alone = [seer(text=one, **options)[0]["generated_text"] for one in chats]
    assert together == alone
    assert alone[0] != alone[1]


def test_sides_of_padding_agree_whatever_was_saved() -> None:
    made = UniMoeFeatureExtractor(**{**UniMoeFeatureExtractor().to_dict(), "padding_side": "right"})
    assert made.padding_side is None
    right = tiny_media.tokenizer()
    right.padding_side = "right"
    assert tiny_media.processor(tokenizer=right).tokenizer.padding_side == "left"
    assert torch.is_tensor(made(tiny_media.sound(0.2), return_tensors="pt")["speech_features"])
