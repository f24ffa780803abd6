"""What `unimoe chat` shows beside answers: help, empty answers, names of experts."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_parts import save_model

from unimoe.commands import chat
from unimoe.conversion.checkpoints.expert_names import numbered
from unimoe.errors import UniMoeError
from unimoe.inspection.model_description import describe_model
from unimoe.serving.answering import Reply, load_answerer


def silent(messages: list[dict[str, Any]], show: Any) -> Reply:
    show(" \n")
    return Reply(" \n", 3, 1, 0.5, None)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    chat.handle_line(chat.Conversation(silent), "/help")
    shown = capsys.readouterr().out
    commands = [*(f"/{kind} FILE" for kind in chat._MEDIA), "/experts", "/reset", "/help", "/quit"]
    assert [command for command in commands if command not in shown] == []


def test_an_empty_answer_is_seen_by_people_and_left_to_programs(capsys: pytest.CaptureFixture[str]) -> None:
    chat.Conversation(silent).say("Hi")
    assert capsys.readouterr().out.endswith("(empty answer)\n")
    chat.Conversation(silent, as_json=True).say("Hi")
    assert json.loads(capsys.readouterr().out)["text"] == ""


def test_experts_have_the_names_of_the_models_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path)
    layers = describe_model(str(tmp_path)).sparse_layers
    load = {"layers": layers, "modalities": {"text": [[0.25] * 4] * len(layers)}}
    (tmp_path / "router_load.json").write_text(json.dumps({**load, "experts": ["sees", "hears", "reads", "adds"]}))
    conversation = chat.Conversation(load_answerer(str(tmp_path), "cpu", {"max_new_tokens": 2}))
    conversation.say("Hi")
    chat.handle_line(conversation, "/experts")
    assert "0 sees 1 hears 2 reads" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "router_load.json").write_text(json.dumps({**load, "experts": ["one"]}))
    with pytest.raises(UniMoeError, match="is no table of 4 experts"):
        load_answerer(str(tmp_path), "cpu", {})


def test_names_that_are_numbers_are_not_said_twice() -> None:
    assert numbered(2, ["0", "1"]) == numbered(2, []) == numbered(2, ["a"]) == ["0", "1"]
    assert numbered(2, ["a", "b"]) == ["0 a", "1 b"]
