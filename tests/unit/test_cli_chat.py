"""`unimoe chat` streams, remembers and works in a pipe."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_media

from unimoe import UniMoeForCausalLM, cli
from unimoe.commands import chat
from unimoe.conversion.checkpoints.router_load import RouterLoad
from unimoe.errors import UniMoeError
from unimoe.serving.answering import Reply, load_answerer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that can be shown everything; it talks nonsense."""
    path = tmp_path_factory.mktemp("model")
    processor = tiny_media.processor(video_tokens=4)
    tokenizer = processor.tokenizer
    ids = {
        "image_token_id": processor.image_token_id,
        "video_token_id": processor.video_token_id,
        "audio_token_id": processor.audio_token_id,
        "sound_token_id": processor.sound_token_id,
    }
    speech = tiny.speech_config()
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    model = tiny.model(text={**text, "max_position_embeddings": 2048}, speech_config=speech, **ids)
    model.generation_config.suppress_tokens = list(ids.values())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    processor.save_pretrained(path)
    (path / "cat.png").write_bytes(tiny_media.encoded_picture())
    (path / "meow.wav").write_bytes(tiny_media.wav(tiny_media.sound()))
    (path / "cat.mp4").write_bytes(tiny_media.video())
    (path / "loud.mp4").write_bytes(tiny_media.video(track=True))
    return path


def run_chat(folder: Path, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert cli.main(["chat", str(folder), "--max-new-tokens", "8", *args]) == 0
    return capsys.readouterr().out


def expected_answer(folder: Path, messages: list[dict[str, Any]]) -> str:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = UniMoeForCausalLM.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answer = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.lstrip()  # chat begins with a word


def test_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = {"role": "user", "content": [{"type": "text", "text": "Who sings?"}]}
    assert run_chat(folder, capsys, "--once", "Who sings?") == expected_answer(folder, [question]) + "\n"


@pytest.mark.parametrize(
    ("option", "file", "item"),
    [
        ("--image", "cat.png", {"type": "image"}),
        ("--audio", "meow.wav", {"type": "audio"}),
        ("--video", "cat.mp4", {"type": "video"}),
        ("--video-with-sound", "loud.mp4", {"type": "video", "sound_track": True}),
    ],
)
def test_media_go_with_the_first_message(
    folder: Path, capsys: pytest.CaptureFixture[str], option: str, file: str, item: dict[str, Any]
) -> None:
    path = str(folder / file)
    content = [{**item, "path": path}, {"type": "text", "text": "What is it?"}]
    answer = run_chat(folder, capsys, option, path, "--once", "What is it?")
    assert answer == expected_answer(folder, [{"role": "user", "content": content}]) + "\n"


def test_a_pipe_gets_one_answer_per_line_and_nothing_else(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = f"Hello\n\n/image {folder / 'cat.png'}\nWhat is it?\n/quit\nnever read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    hello = {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
    first = expected_answer(folder, [hello])
    picture = [{"type": "image", "path": str(folder / "cat.png")}, {"type": "text", "text": "What is it?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": first.strip()}]}
    second = expected_answer(folder, [hello, answer, {"role": "user", "content": picture}])
    assert run_chat(folder, capsys) == f"{first}\n{second}\n"


def test_a_pipe_goes_on_after_a_bad_line_and_says_which(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = f"/image {folder / 'meow.wav'}\nWhat is it?\n/image nofile\nHello\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    hello = expected_answer(folder, [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}])
    capsys.readouterr()
    assert cli.main(["chat", str(folder), "--max-new-tokens", "8"]) == 1
    shown = capsys.readouterr()
    assert shown.out == hello + "\n"
    before, ready, refused, dropped, missing = shown.err.splitlines()
    assert before == f"Opening {folder} ..."
    assert ready.startswith("Ready after")
    assert refused.startswith("unimoe: line 2: image at")
    assert dropped.startswith(f"Dropped with the message: {folder / 'meow.wav'}.")
    assert missing == "unimoe: line 3: There is no file 'nofile'."


def test_bad_options_and_folders(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "llama")
    cases = [
        ([str(tmp_path / "nothing"), "--once", "Hi"], "nothing"),
        ([str(tmp_path / "llama"), "--once", "Hi"], "'llama' model"),
        ([str(folder), "--once", "Hi", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        ([str(folder), "--once", "Hi", "--temperature", "-1"], "--temperature is -1.0"),
        ([str(folder), "--once", "Hi", "--top-p", "0.9"], "goes with a --temperature"),
        ([str(folder), "--once", "Hi", "--top-p", "1.5", "--temperature", "1"], "--top-p is 1.5"),
        ([str(folder), "--once", "Hi", "--device", "nonsense"], "--device is 'nonsense'"),
        ([str(folder), "--once", "Hi", "--device", "meta"], "--device is 'meta'"),
        ([str(folder), "--once", "Hi", "--device", ""], "--device is ''"),
        ([str(folder), "--once", "Hi", "--image", str(folder / "meow.wav")], "image"),
        ([str(folder), "--once", "Hi", "--image", str(folder / "missing.png")], "There is no file"),
        ([str(folder), "--once", "Hi", "--image", "https://example.com/cat.png"], "There is no file"),
    ]
    for args, said in cases:
        assert cli.main(["chat", *args]) == 2, args
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("unimoe: ")
        assert said in error


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("model.safetensors", _truncate, "truncated"),
        ("model.safetensors", Path.unlink, "no model.safetensors"),
        ("tokenizer.json", Path.unlink, "no tokenizer.json"),
        ("tokenizer.json", lambda path: path.write_text("[1]"), "tokenizer.json does not hold a JSON object"),
        ("tokenizer.json", lambda path: path.write_text("{}"), "tokenizer.json has no model"),
        ("tokenizer_config.json", lambda path: path.write_text("[1]"), "tokenizer_config.json does not hold"),
        ("tokenizer_config.json", lambda path: path.write_bytes(b"\xff"), "tokenizer_config.json cannot be read"),
        ("generation_config.json", lambda path: path.write_text("[1]"), "generation_config.json does not hold"),
        ("config.json", lambda path: path.write_text("[1]"), "config.json does not hold a JSON object"),
        ("config.json", Path.unlink, "no config.json"),
    ],
)
def test_damaged_folders_are_explained_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: Any, said: str
) -> None:
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    damage(damaged / file)
    assert cli.main(["chat", str(damaged), "--once", "Hi"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("unimoe: ")
    assert said in error


def test_bytes_that_are_no_text_are_replaced(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Caf\xe9\n"), encoding="utf-8"))
    answer = expected_answer(folder, [{"role": "user", "content": [{"type": "text", "text": "Caf\ufffd"}]}])
    assert run_chat(folder, capsys) == answer + "\n"
    assert run_chat(folder, capsys, "--once", "Caf\udce9") == answer + "\n"


def test_without_standard_input_a_message_is_asked_for(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["chat", str(folder)]) == 2
    assert "--once" in capsys.readouterr().err


LOAD = RouterLoad([0, 2], ["0", "1"], {"image": [[1.0, 0.0], [0.5, 0.5]]})


class Script:
    """Answers in place of a model and records what it was asked."""

    def __init__(self, *answers: str | BaseException) -> None:
        self.answers, self.asked = list(answers), []

    def __call__(self, messages: list[dict[str, Any]], show: Any) -> Reply:
        self.asked.append(messages)
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        for word in answer.split():
            show(word + " ")
        return Reply(answer, 3, len(answer.split()), 0.5, LOAD)


def texts(messages: list[dict[str, Any]]) -> list[str]:
    return [item["text"] for message in messages for item in message["content"] if item["type"] == "text"]


def test_the_conversation_is_remembered_until_reset() -> None:
    script = Script("a", "b", "c")
    conversation = chat.Conversation(script)
    for line in ("one", "two", "/reset", "three"):
        chat.handle_line(conversation, line)
    assert [texts(messages) for messages in script.asked] == [["one"], ["one", "a", "two"], ["three"]]


def test_attached_media_go_with_one_message_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cat.png", "my file.wav", "clip.mp4"):
        (tmp_path / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    script = Script("a", "b")
    conversation = chat.Conversation(script)
    for line in ("/image ~/cat.png", "/audio 'my file.wav'", "/video-with-sound clip.mp4"):
        chat.handle_line(conversation, line)
    with pytest.raises(UniMoeError, match=r"no file 'dog\.png'"):
        chat.handle_line(conversation, "/image dog.png")
    [waiting] = conversation.attachments()
    assert all(name in waiting for name in ("Attached to the next message", "cat.png", "my file.wav", "clip.mp4"))
    for line in ("one", "two"):
        chat.handle_line(conversation, line)
    media = [[i["path"] for i in m["content"] if i["type"] != "text"] for m in script.asked[1] if m["role"] == "user"]
    assert media == [[str(tmp_path / "cat.png"), "my file.wav", "clip.mp4"], []]
    assert script.asked[1][0]["content"][2] == {"type": "video", "sound_track": True, "path": "clip.mp4"}


def test_answers_begin_with_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(messages: list[dict[str, Any]], show: Any) -> Reply:
        for piece in (" ", " cat", " and", " dog"):
            show(piece)
        return Reply("  cat and dog", 3, 4, 0.5, LOAD)

    chat.Conversation(answer).say("What is it?")
    assert capsys.readouterr().out == "cat and dog\n"


def test_a_refused_message_is_not_remembered() -> None:
    script = Script(UniMoeError("image: broken"), "b")
    conversation = chat.Conversation(script)
    conversation.attach("image", "broken.png")
    with pytest.raises(UniMoeError, match="broken"):
        conversation.say("one")
    conversation.say("two")
    assert texts(script.asked[1]) == ["two"]
    assert script.asked[1][0]["content"][0]["type"] == "text"


def test_a_person_sees_mistakes_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["/picture x", "/image", "one", "two", "three", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    script = Script(UniMoeError("image: broken"), KeyboardInterrupt(), "done")
    conversation = chat.Conversation(script)
    conversation.attach("image", "cat.png")
    chat.talk(conversation)
    shown = capsys.readouterr()
    assert shown.err.count("Dropped with the message: cat.png") == 1
    assert "/picture is no command" in shown.err
    assert "/image needs a file" in shown.err
    assert "image: broken" in shown.err
    assert "(stopped)" in shown.out
    assert "done" in shown.out


def test_end_of_input_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    chat.talk(chat.Conversation(Script()))


def test_pieces_are_shown_while_the_answer_is_made(folder: Path) -> None:
    answer = load_answerer(str(folder), "cpu", {"max_new_tokens": 12, "do_sample": False})
    pieces: list[str] = []
    question = {"role": "user", "content": [{"type": "text", "text": "A b c"}]}
    reply = answer([question], pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == reply.text
    assert 1 <= reply.new_tokens <= 12


def test_json_holds_the_answer_and_its_experts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(folder / "cat.png")
    facts = json.loads(run_chat(folder, capsys, "--image", picture, "--once", "What is it?", "--json"))
    content = [{"type": "image", "path": picture}, {"type": "text", "text": "What is it?"}]
    assert facts["text"] == expected_answer(folder, [{"role": "user", "content": content}]).strip()
    assert facts["media"] == content[:1]
    assert set(facts["load"]["modalities"]) == {"image", "text"}
    for layers in facts["load"]["modalities"].values():
        assert [sum(shares) for shares in layers] == pytest.approx([1.0] * len(facts["load"]["layers"]))


def test_the_system_message_stays(capsys: pytest.CaptureFixture[str]) -> None:
    script = Script("a", "b", "c")
    conversation = chat.Conversation(script, system="Be brief.")
    for line in ("one", "two", "/reset", "three"):
        chat.handle_line(conversation, line)
    assert [texts(messages) for messages in script.asked] == [
        ["Be brief.", "one"],
        ["Be brief.", "one", "a", "two"],
        ["Be brief.", "three"],
    ]


def test_experts_of_the_last_answer_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = chat.Conversation(Script("a"))
    with pytest.raises(UniMoeError, match="no answer in this conversation"):
        chat.handle_line(conversation, "/experts")
    for line in ("one", "/experts", "/reset"):
        chat.handle_line(conversation, line)
    shown = capsys.readouterr().out
    with pytest.raises(UniMoeError, match="no answer in this conversation"):
        chat.handle_line(conversation, "/experts")
    assert "image" in shown
    assert "100" in shown


def test_sampling_depends_on_the_seed_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--once", "A b c", "--temperature", "1.5", "--top-p", "0.95", "--seed")
    answers = [run_chat(folder, capsys, *options, seed) for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]
