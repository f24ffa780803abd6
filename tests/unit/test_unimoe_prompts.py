"""The processor makes Uni-MoE's prompts: six combinations of inputs, sound tracks, long speech, its token ids and labels."""

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_media
from tiny_chat import chat as encode

from unimoe.errors import ConversationError, MediaError, PlaceholderError
from unimoe.processing import original_chat_unimoe
from unimoe.processing.processing_unimoe import VICUNA_CHAT_TEMPLATE, UniMoeProcessor

SYSTEM = (
    "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. "
)
TEXT, IMAGE, VIDEO, SPEECH, SOUND = range(5)
IMAGE_ITEM = {"type": "image", "image": tiny_media.picture()}
AUDIO_ITEM = {"type": "audio", "audio": tiny_media.sound(0.4)}
FRAMES_ITEM = {"type": "video", "video": np.stack([tiny_media.picture(seed) for seed in range(3)])}
QUESTION = {"type": "text", "text": "What is it?"}
# Tokens of one medium of `tiny_media.processor`, as (modality, how many).
RUNS = {
    "image": [(IMAGE, 4)],
    "audio": [(SPEECH, 3), (SOUND, 2)],
    "video": [(VIDEO, 5)],
    "track": [
        (SPEECH, 6),
        (SOUND, 4),
    ],  # of `tiny_media.video`: one second, and a second window for what the codec pads
}


def processor_with(tokenization: str = "plain", **overrides: Any) -> UniMoeProcessor:
    return tiny_media.processor(chat_template=VICUNA_CHAT_TEMPLATE, tokenization=tokenization, **overrides)


@pytest.fixture(scope="module")
def processor() -> UniMoeProcessor:
    return processor_with()


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def media_runs(row: Any) -> list[tuple[int, int]]:
    """(modality, length) of every stretch of media tokens in a row of `mm_token_type_ids`."""
    values = row.tolist()
    borders = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    return [(values[a], b - a) for a, b in itertools.pairwise(borders) if values[a] != TEXT]


@pytest.mark.parametrize(
    ("items", "placeholders"),
    [
        ([], ""),
        ([IMAGE_ITEM], "<image>\n"),
        ([AUDIO_ITEM], "<audio>\n"),
        ([FRAMES_ITEM], "<video>\n"),
        ([IMAGE_ITEM, AUDIO_ITEM], "<image>\n<audio>\n"),
        ([{"type": "video", "sound_track": True}], "<audio>\n<video>\n"),
    ],
    ids=["text", "image", "audio", "video", "image+audio", "video with its sound"],
)
def test_the_six_combinations(processor: UniMoeProcessor, items: list[Any], placeholders: str) -> None:
    clip = tiny_media.video(frames=5, track=True) if items and items[0].get("sound_track") else None
    given = [{**item, "video": clip} if item.get("sound_track") else item for item in items]
    question = user(*given, QUESTION)
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    assert prompt == SYSTEM + f"USER: {placeholders}What is it? ASSISTANT:"
    batch = encode(processor, question)
    kinds = ["track", "video"] if clip else [item["type"] for item in items]
    assert media_runs(batch["mm_token_type_ids"][0]) == [run for kind in kinds for run in RUNS[kind]]
    assert ("pixel_values" in batch) == ("image" in kinds)
    assert ("pixel_values_videos" in batch) == ("video" in kinds)
    assert ("speech_features" in batch) == bool({"audio", "track"} & set(kinds))


def test_the_sound_track_is_the_videos_own(processor: UniMoeProcessor, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(tiny_media.video(frames=5, track=True))
    batch = encode(
        processor, user({"type": "video", "path": "clip.mp4", "sound_track": True}), media_root=str(tmp_path)
    )
    apart = user({"type": "audio", "path": "clip.mp4"}, {"type": "video", "path": "clip.mp4"})
    expected = encode(processor, apart, media_root=str(tmp_path))
    for name in ("input_ids", "speech_features", "audio_features", "pixel_values_videos"):
        assert batch[name].equal(expected[name]), name
    assert batch["speech_features"].std() > 0
    everywhere = encode(
        processor, user({"type": "video", "path": str(tmp_path / "clip.mp4")}), load_audio_from_video=True
    )
    assert everywhere["speech_features"].equal(expected["speech_features"])
    silent = user({"type": "video", "video": tiny_media.video(frames=5)}, FRAMES_ITEM)
    batch = encode(processor, silent, load_audio_from_video=True)
    assert batch["input_ids"].equal(encode(processor, silent)["input_ids"])
    speech_only = user({"type": "video", "path": str(tmp_path / "clip.mp4"), "sound_track": True, "encoder": "speech"})
    assert media_runs(encode(processor, speech_only)["mm_token_type_ids"][0]) == [(SPEECH, 6), (VIDEO, 5)]


@pytest.mark.parametrize(("container", "codec"), [("avi", "mpeg4"), ("matroska", "libx264"), ("mpegts", "libx264")])
def test_sound_tracks_of_other_containers(processor: UniMoeProcessor, container: str, codec: str) -> None:
    clip = tiny_media.video(frames=5, container=container, codec=codec, track=True)
    batch = encode(processor, user({"type": "video", "video": clip, "sound_track": True}))
    assert media_runs(batch["mm_token_type_ids"][0]) == RUNS["track"] + RUNS["video"]


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        ({"type": "image", "image": b"", "sound_track": True}, ConversationError, "videos only"),
        ({"type": "video", "video": b"", "sound_track": "yes"}, ConversationError, "sound_track is 'yes'"),
        ({**FRAMES_ITEM, "sound_track": True}, MediaError, "content 0: frames have no sound track"),
        ({"type": "image", "image": b"", "after": "<image>"}, ConversationError, "must be white space"),
        ({"type": "image", "image": b"", "after": "\n" * 9}, ConversationError, "must be white space"),
    ],
)
def test_impossible_items(processor: UniMoeProcessor, item: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        encode(processor, user(item))


def test_a_silent_video_has_no_sound_track(processor: UniMoeProcessor) -> None:
    silent = {"type": "video", "video": tiny_media.video(frames=5), "sound_track": True}
    with pytest.raises(
        MediaError, match=r"message 0, content 0, sound track: the file has no sound track; .*leave sound_track"
    ) as caught:
        encode(processor, user(silent))
    assert caught.value.kind == "audio"


def test_long_speech_is_many_windows(processor: UniMoeProcessor) -> None:
    long = {"type": "audio", "audio": tiny_media.sound(24.5)}  # windows of 1 s here, of 30 s in Uni-MoE
    batch = encode(processor, user(long, AUDIO_ITEM, QUESTION))
    assert media_runs(batch["mm_token_type_ids"][0]) == [(SPEECH, 75), (SOUND, 50), (SPEECH, 3), (SOUND, 2)]
    assert batch["speech_features"].shape[0] == batch["audio_features"].shape[0] == 26


def test_batches_of_several_media_per_message(processor: UniMoeProcessor) -> None:
    mixed = user(IMAGE_ITEM, IMAGE_ITEM, FRAMES_ITEM, QUESTION)
    answered = [*user(AUDIO_ITEM, QUESTION), {"role": "assistant", "content": "A cat"}, *user(AUDIO_ITEM)]
    batch = encode(processor, [mixed, user(QUESTION), answered])
    rows = [media_runs(row) for row in batch["mm_token_type_ids"]]
    assert rows == [[(IMAGE, 4), (IMAGE, 4), (VIDEO, 5)], [], 2 * RUNS["audio"]]
    assert len(batch["pixel_values"]) == 2
    assert len(batch["pixel_values_videos"]) == 1
    assert len(batch["speech_features"]) == 2


# ---- token ids and labels


def spaced(tokenization: str) -> UniMoeProcessor:
    return processor_with(tokenization, tokenizer=tiny_media.tokenizer(metaspace=True))


def conversation(answer: str = "A cat.", question: str = "What?") -> list[dict[str, Any]]:
    image = {"type": "image", "image": tiny_media.picture(), "after": ""}
    text = {"type": "text", "text": "\n" + question}
    return [*user(image, text), {"role": "assistant", "content": answer}]


def labelled(processor: UniMoeProcessor, messages: list[dict[str, Any]]) -> tuple[list[str], str]:
    """All tokens without media, and the text that is learned."""
    tokens = processor.tokenize_conversation(messages)
    learned = [token for token in tokens["labels"] if token != -100]
    shown = [i for i, kind in zip(tokens["input_ids"], tokens["mm_token_type_ids"], strict=True) if kind == TEXT]
    return processor.tokenizer.convert_ids_to_tokens(shown), processor.tokenizer.decode(learned)


def test_a_space_follows_control_tokens_as_in_released_checkpoints() -> None:
    plain, spaced_out, original = (spaced(name) for name in ("plain", "spaced", "original"))
    several = [*conversation(), *user(QUESTION), {"role": "assistant", "content": "A dog."}]
    for messages in (conversation(), several):
        assert labelled(spaced_out, messages) == labelled(original, messages)
        assert labelled(plain, messages)[1] == labelled(spaced_out, messages)[1]
    tokens, _ = labelled(spaced_out, several)
    without, _ = labelled(plain, several)
    assert (tokens[tokens.index("</s>") + 1], without[without.index("</s>") + 1][0]) == ("▁USER", "U")


@pytest.fixture
def warnings() -> Any:
    texts: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    handler = Keep(logging.WARNING)
    original_chat_unimoe.logger.addHandler(handler)
    yield texts
    original_chat_unimoe.logger.removeHandler(handler)


@pytest.mark.parametrize(
    "messages",
    [
        conversation(answer="A cat.</s> A dog."),
        conversation(answer="Say ASSISTANT: hello"),
        conversation(question="Is </s> a token?"),
    ],
    ids=["an end in the answer", "two answers in a round", "an end in the question"],
)
def test_what_does_not_add_up_is_given_up_by_the_original_only(messages: Any, warnings: list[str]) -> None:
    tokens = spaced("original").tokenize_conversation(messages)
    assert set(tokens["labels"]) == {-100}
    assert len(warnings) == 1
    assert "mismatch" in warnings[0]
    _, learned = labelled(spaced("spaced"), messages)
    assert learned.removesuffix("</s>").strip() == messages[1]["content"]
    assert len(warnings) == 1


def test_the_originals_prompt_of_a_question_warns_of_nothing(warnings: list[str]) -> None:
    processor = spaced("original")
    ids = encode(processor, conversation()[:1])["input_ids"][0].tolist()
    assert warnings == []
    assert ids == encode(spaced("spaced"), conversation()[:1])["input_ids"][0].tolist()


def test_placeholders_in_texts_stay_text_by_all_rules() -> None:
    for name in original_chat_unimoe.TOKENIZATIONS:
        processor = spaced(name)
        batch = processor.training_inputs([conversation(question="What is <image> or <video>?")])
        assert media_runs(batch["mm_token_type_ids"][0]) == [(IMAGE, 4)]
        assert "<video>" in processor.tokenizer.decode(batch["input_ids"][0])


def test_the_rules_are_saved_and_checked(tmp_path: Path) -> None:
    spaced("spaced").save_pretrained(tmp_path)
    assert UniMoeProcessor.from_pretrained(tmp_path).tokenization == "spaced"
    with pytest.raises(PlaceholderError, match="tokenization is 'odd'"):
        processor_with("odd")
