"""`unimoe chat`: talk to a model, show it pictures and videos, play it sounds."""

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import UniMoeError
from ..model_folder import require_model
from ._argument_types import add_quantize, seed
from ._beforehand import opening
from ._perception_options import add_perception_options, models_for_answers
from .inspect import router_load_lines

if TYPE_CHECKING:
    from ..serving.answering import Answerer, Reply
    from ..serving.media_needs import Needs

# Of a pipe: some lines could not be answered, or done.
EXIT_LINES = 1

_COMMANDS = """\
  /image FILE, /audio FILE, /video FILE   attach to the next message (again for several); a video's sound track is heard
  /speech FILE, /sound FILE               audio for one branch alone: what is said, or what sounds; half the tokens
  /silent-video FILE                      a video without its sound track
  /video-with-sound FILE                  a video that must have one
  /experts                                which experts the last answer used, by modality
  /reset                                  forget the conversation
  /help                                   these lines
  /quit                                   leave (so does the end of the input)"""
_EPILOG = f"""\
while chatting:
{_COMMANDS}

Of recordings and videos over 30 s it is said beforehand how many tokens and how much memory the answer will take.

examples:
  unimoe chat quickstart-out/model
  unimoe chat quickstart-out/model --image cat.png --once "What is in the picture?"
  unimoe chat quickstart-out/model --audio word.ogg --once "What word is spoken?" --json
  unimoe chat moai --image sign.png --text rapidocr --once "What does the sign say?"    (a model with mixers)
  echo "Hello!" | unimoe chat quickstart-out/model     (lines that fail are reported; exit code 1 if there were any)
"""
# What can be attached, by the name of its option and command, as items of a message's content.
_MEDIA: dict[str, dict[str, Any]] = {
    "image": {"type": "image"},
    "audio": {"type": "audio"},
    "speech": {"type": "audio", "encoder": "speech"},
    "sound": {"type": "audio", "encoder": "sound"},
    "video": {"type": "video"},
    "silent-video": {"type": "video", "sound_track": False},
    "video-with-sound": {"type": "video", "sound_track": True},
}
_OPTIONS = {
    "speech": "audio for the speech branch alone",
    "sound": "audio for the sound branch alone",
    "video": "video for the first message, with its sound track if it has one",
    "silent-video": "video without its sound track",
    "video-with-sound": "video that must have a sound track",
}
# Answers a conversation; hands over the text piece by piece while it appears.
Answer = Callable[[list[dict[str, Any]], Callable[[str], None]], "Reply"]
# Says what the answer to a conversation will take.
Plan = Callable[[list[dict[str, Any]]], "Needs"]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model",
        description="Talk to a model. Answers appear word by word; the whole conversation is remembered.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a unimoe model")
    for kind in _MEDIA:
        parser.add_argument(
            f"--{kind}",
            metavar="FILE",
            action="append",
            default=[],
            help=_OPTIONS.get(kind, f"{kind.replace('-', ' ')} for the first message (again for several)"),
        )
    parser.add_argument("--once", metavar="TEXT", help="answer this one message and stop")
    parser.add_argument("--json", action="store_true", help="print every answer as a JSON object, with its experts")
    parser.add_argument("--system", metavar="TEXT", help="a system message that every conversation begins with")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: always the likeliest word (default); 1: sample"
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest words that make up P")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the sampling (default: 0)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    add_quantize(parser)
    looks = add_perception_options(
        parser, "what looks at images for a model with mixers (default: what its folder names)"
    )
    looks.add_argument("--no-perception", action="store_true", help="nothing: answer from the images alone")


def run(args: argparse.Namespace) -> int:
    """Answer one message, the lines of a pipe, or a person."""
    options = generation_options(args)
    attached = [(kind, existing_file(file)) for kind in _MEDIA for file in getattr(args, kind.replace("-", "_"))]
    if args.once is None and sys.stdin is None:
        raise UniMoeError("There is no standard input to read messages from: give one with --once TEXT.")
    require_model(args.model)
    _accept_any_bytes()
    with opening(args.model):
        answerer = _open(args, options)
    conversation = Conversation(
        answerer, None if args.system is None else _plain_text(args.system), args.json, answerer.needs
    )
    for kind, file in attached:
        conversation.attach(kind, file)
    if args.once is not None:
        conversation.say(_plain_text(args.once))
    elif sys.stdin.isatty():
        talk(conversation)
    else:
        return read_lines(conversation, sys.stdin)
    return 0


def _open(args: argparse.Namespace, options: dict[str, Any]) -> "Answerer":
    import torch

    from ..serving.answering import load_answerer
    from ..serving.freed_memory import give_back_freed_memory
    from ..serving.sight import let_perceive

    perception = models_for_answers(args)
    torch.manual_seed(args.seed)
    give_back_freed_memory()
    answerer = load_answerer(args.model, args.device, options, args.quantize)
    note = let_perceive(args.model, answerer.model, answerer.processor, perception, args.no_perception)
    if note is not None:
        print(f"unimoe: {note}", file=sys.stderr)
    return answerer


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    if args.max_new_tokens < 1:
        raise UniMoeError(f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1.")
    if not (math.isfinite(args.temperature) and args.temperature >= 0):
        raise UniMoeError(f"--temperature is {args.temperature}; it must be 0 or a positive number.")
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        options["temperature"] = args.temperature
    if args.top_p is not None:
        if not 0 < args.top_p <= 1 or not args.temperature:
            raise UniMoeError(
                f"--top-p is {args.top_p} with --temperature {args.temperature}; it must be above 0 and up to 1, and "
                "goes with a --temperature above 0."
            )
        options["top_p"] = args.top_p
    return options


class Conversation:
    """The messages so far and the media that wait for the next one.

    Args:
        system: a message that every conversation begins with.
        as_json: answers are printed as JSON objects, whole.
        plan: what it says of long media is shown before the answer is begun.
    """

    def __init__(
        self, answer: Answer, system: str | None = None, as_json: bool = False, plan: Plan | None = None
    ) -> None:
        self._answer, self._as_json, self._plan = answer, as_json, plan
        self._start = [] if system is None else [_message("system", [], system)]
        self.reset()

    def attach(self, kind: str, file: str) -> None:
        """A medium of the next message; `kind` is one of `_MEDIA`."""
        self.waiting.append({**_MEDIA[kind], "path": file})

    def reset(self) -> None:
        self.messages: list[dict[str, Any]] = list(self._start)
        self.waiting: list[dict[str, Any]] = []
        self._dropped: list[dict[str, Any]] = []
        self.last: Reply | None = None

    def say(self, text: str) -> None:
        """Print the answer to a message as it comes.

        After an error or Ctrl-C the message counts as not said, and what was attached to it is dropped.
        """
        question = _message("user", self.waiting, text)
        media, self.waiting = self.waiting, []
        self._dropped = media
        self._announce([*self.messages, question])
        reply = self._answer(
            [*self.messages, question], _keep_silent if self._as_json else _from_the_first_word(_show)
        )
        if self._as_json:
            facts = {"question": text, "media": media, **asdict(reply), "text": reply.text.strip()}
            print(json.dumps(facts, ensure_ascii=False), end="")
        elif not reply.text.strip():
            print("(empty answer)", end="")
        print(flush=True)
        self.messages += [question, _message("assistant", [], reply.text.strip())]
        self.last, self._dropped = reply, []

    def attachments(self) -> list[str]:
        """For a person after a mistake: what was dropped with the message, which is said once, and what still waits."""
        dropped, self._dropped = self._dropped, []
        lines = [f"Dropped with the message: {_paths(dropped)}. Attach again what is still wanted."] if dropped else []
        return lines + ([f"Attached to the next message: {_paths(self.waiting)}."] if self.waiting else [])

    def _announce(self, messages: list[dict[str, Any]]) -> None:
        """On the standard error, so that answers stay alone on the standard output."""
        needs = None if self._plan is None or not messages[-1]["content"][:-1] else self._plan(messages)
        if needs is not None and needs.is_worth_a_line:
            needs.require_room()
            print(needs, file=sys.stderr, flush=True)

    def experts(self) -> str:
        """Which experts the last answer used."""
        if self.last is None:
            raise UniMoeError(
                "There is no answer in this conversation whose experts could be shown: say something first."
            )
        if self.last.load is None:
            return "This model is dense: it has no experts."
        return "\n".join(router_load_lines(self.last.load))


def talk(conversation: Conversation) -> None:
    """A person at the keyboard: mistakes are reported and the conversation goes on; Ctrl-C stops an answer."""
    with suppress(ImportError):
        import readline  # noqa: F401 (gives input() its line editing)
    print("Type a message; /image FILE, /audio FILE and /video FILE attach; /help shows all commands, /quit leaves.")
    going_on = True
    while going_on:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        try:
            going_on = handle_line(conversation, line)
        except UniMoeError as error:
            _report(f"unimoe: {error}", *conversation.attachments())
        except KeyboardInterrupt:
            print("\n(stopped)")
            _report(*conversation.attachments())


def read_lines(conversation: Conversation, lines: Iterable[str]) -> int:
    """The lines of a pipe, as `talk` takes a person's: a mistake is reported with its line. Returns the exit code."""
    code = 0
    for number, line in enumerate(lines, 1):
        try:
            if not handle_line(conversation, line.strip()):
                break
        except UniMoeError as error:
            code = EXIT_LINES
            _report(f"unimoe: line {number}: {error}", *conversation.attachments())
    return code


def handle_line(conversation: Conversation, line: str) -> bool:
    """Do what one line says; False when it says to leave.

    Raises:
        UniMoeError: the command is unknown, or a medium cannot be used.
    """
    command, _, argument = line.partition(" ")
    if command == "/quit":
        return False
    if command == "/reset":
        conversation.reset()
    elif command == "/help":
        print(_COMMANDS)
    elif command == "/experts":
        print(conversation.experts())
    elif command.removeprefix("/") in _MEDIA and command.startswith("/"):
        if not argument.strip():
            raise UniMoeError(f"{command} needs a file: {command} FILE.")
        # In quotes, as terminals write the name of a file that is dropped into them.
        conversation.attach(command.removeprefix("/"), existing_file(argument.strip().strip("'\"")))
    elif command.startswith("/"):
        raise UniMoeError(
            f"{command} is no command; there are {', '.join(f'/{kind}' for kind in _MEDIA)}, /experts, /reset, /help "
            "and /quit."
        )
    elif line:
        conversation.say(line)
    return True


def existing_file(name: str) -> str:
    """The file's path, with the home folder in place of ~. Raises UniMoeError where there is none."""
    file = os.path.expanduser(name)
    if not os.path.isfile(file):
        raise UniMoeError(f"There is no file {file!r}.")
    return file


def _report(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr, flush=True)


def _paths(items: list[dict[str, Any]]) -> str:
    return ", ".join(item["path"] for item in items)


def _accept_any_bytes() -> None:
    """Bytes that are no text become the replacement character, and text that the terminal lacks a question mark."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _plain_text(argument: str) -> str:
    """An argument of the command line without the halves of characters by which Python keeps bytes that are no text."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _message(role: str, media: list[dict[str, Any]], text: str) -> dict[str, Any]:
    return {"role": role, "content": [*media, {"type": "text", "text": text}]}


def _keep_silent(piece: str) -> None:
    """For answers that are printed whole."""


def _from_the_first_word(show: Callable[[str], None]) -> Callable[[str], None]:
    """After `ASSISTANT:` of Uni-MoE's template models begin with a space."""
    has_begun = False

    def show_rest(piece: str) -> None:
        nonlocal has_begun
        piece = piece if has_begun else piece.lstrip()
        has_begun = has_begun or bool(piece)
        show(piece)

    return show_rest


def _show(piece: str) -> None:
    print(piece, end="", flush=True)
