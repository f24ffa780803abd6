"""`unimoe chat`: talk to a model, show it pictures and videos, play it sounds."""

import argparse
import io
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, UniMoeError
from ..hub_access import MODEL_FILES

if TYPE_CHECKING:
    import torch

_EPILOG = """\
while chatting:
  /image FILE, /audio FILE, /video FILE   attach to the next message (again for several)
  /video-with-sound FILE                  attach a video whose sound track is heard too
  /reset                                  forget the conversation
  /quit                                   leave (so does the end of the input)

examples:
  unimoe chat quickstart-out/model
  unimoe chat quickstart-out/model --image cat.png --once "What is in the picture?"
  echo "Hello!" | unimoe chat quickstart-out/model
"""
# What can be attached, by the name of its option and command, as items of a message's content.
_MEDIA: dict[str, dict[str, Any]] = {
    "image": {"type": "image"},
    "audio": {"type": "audio"},
    "video": {"type": "video"},
    "video-with-sound": {"type": "video", "sound_track": True},
}
# JSON files that must be objects where they exist.
_JSON_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Answers a conversation; hands over the text piece by piece while it appears, and returns all of it.
Answer = Callable[[list[dict[str, Any]], Callable[[str], None]], str]


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
            help=f"{kind.replace('-', ' ')} for the first message (again for several)",
        )
    parser.add_argument("--once", metavar="TEXT", help="answer this one message and stop")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: always the likeliest word (default); 1: sample"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")


def run(args: argparse.Namespace) -> int:
    """Answer one message, the lines of a pipe, or a person."""
    if args.max_new_tokens < 1:
        raise UniMoeError(f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1.")
    if not 0 <= args.temperature < float("inf"):
        raise UniMoeError(f"--temperature is {args.temperature}; it must be 0 or a positive number.")
    _accept_any_bytes()
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        options["temperature"] = args.temperature
    conversation = Conversation(load_answerer(args.model, args.device, options))
    for kind in _MEDIA:
        for file in getattr(args, kind.replace("-", "_")):
            conversation.attach(kind, file)
    if args.once is not None:
        conversation.say(_plain_text(args.once))
    elif sys.stdin is None:
        raise UniMoeError("There is no standard input to read messages from: give one with --once TEXT.")
    elif sys.stdin.isatty():
        talk(conversation)
    else:
        for line in sys.stdin:
            if not handle_line(conversation, line.strip()):
                break
    return 0


class Conversation:
    """The messages so far and the media that wait for the next one."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.messages: list[dict[str, Any]] = []
        self.waiting: list[dict[str, Any]] = []

    def attach(self, kind: str, file: str) -> None:
        """A medium of the next message; `kind` is one of `_MEDIA`."""
        self.waiting.append({**_MEDIA[kind], "path": file})

    def reset(self) -> None:
        self.messages, self.waiting = [], []

    def say(self, text: str) -> None:
        """Print the answer to a message as it comes. After an error or Ctrl-C the message counts as not said."""
        question = {"role": "user", "content": [*self.waiting, {"type": "text", "text": text}]}
        self.waiting = []
        answer = self._answer([*self.messages, question], _show)
        print(flush=True)
        self.messages += [question, {"role": "assistant", "content": [{"type": "text", "text": answer.strip()}]}]


def talk(conversation: Conversation) -> None:
    """A person at the keyboard: mistakes are reported and the conversation goes on; Ctrl-C stops an answer."""
    with suppress(ImportError):
        import readline  # noqa: F401 (gives input() its line editing)
    print(f"Type a message; {', '.join(f'/{kind} FILE' for kind in _MEDIA)} attach; /reset, /quit.")
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
            print(f"unimoe: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n(stopped)")


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
    elif command.removeprefix("/") in _MEDIA and command.startswith("/"):
        if not argument.strip():
            raise UniMoeError(f"{command} needs a file: {command} FILE.")
        conversation.attach(command.removeprefix("/"), argument.strip())
    elif command.startswith("/"):
        raise UniMoeError(
            f"{command} is no command; there are {', '.join(f'/{kind}' for kind in _MEDIA)}, /reset and /quit."
        )
    elif line:
        conversation.say(line)
    return True


def load_answerer(name: str, device: str | None, options: dict[str, Any]) -> Answer:
    """Load a model and its processor; the result generates with the given options. Errors are those of `open_model`."""
    from transformers import TextStreamer

    processor, model = open_model(name, device)

    class Pieces(TextStreamer):
        """Hands finished words to `show`."""

        def __init__(self, show: Callable[[str], None]) -> None:
            super().__init__(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.show = show

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.show(text)

    def answer(messages: list[dict[str, Any]], show: Callable[[str], None]) -> str:
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        output = model.generate(**inputs, **options, streamer=Pieces(show))
        return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def open_model(name: str, device: str | None) -> tuple[Any, Any]:
    """The processor and the model of a folder or Hub id, ready to be used on a device (None: cuda, if there is one).

    Raises:
        ConversionError: there is no such folder or Hub repository, it holds another kind of model, or a file of it is
            missing or damaged.
        CheckpointError: its tokenizer is missing, or its files do not go together.
        UniMoeError: the device is not there.
    """
    from ..conversion.dense.sources import resolve_folder
    from ..progress_bars import transformers_bars

    place = _usable_device(device)
    with transformers_bars(shown=False):
        folder = resolve_folder(name, MODEL_FILES)
        _check_files(folder)
        return _load(folder, place)


def _usable_device(name: str | None) -> "torch.device":
    """The device of that name once it has computed something; cuda or cpu for None."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).add(1).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:  # which one depends on the kind of device
        reason = str(error).partition("\n")[0]
        raise UniMoeError(
            f"--device is {name!r}, which cannot be used here ({reason}): use cpu, or leave the option out."
        ) from error
    return device


def _check_files(folder: Path) -> None:
    """What transformers would answer with a traceback: files that are missing, truncated or not what they should be."""
    from ..conversion.checkpoints.checkpoint_reader import Checkpoint, read_json
    from ..conversion.dense.sources import read_our_config

    read_our_config(folder)
    Checkpoint(folder)
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} has no {_TOKENIZER_FILES[0]}: if it was converted, convert again with the tokenizer's files beside "
            "the original config.json; else save the processor into it (processor.save_pretrained)."
        )
    contents = {file: read_json(folder / file) for file in _JSON_FILES if (folder / file).is_file()}
    if not isinstance(contents.get("tokenizer.json", {"model": {}}).get("model"), dict):
        raise CheckpointError(f"{folder / 'tokenizer.json'} has no model of a tokenizer in it: fetch the file again.")


def _load(folder: Path, device: "torch.device") -> tuple[Any, Any]:
    """Processor and model. What transformers raises here means that the files do not go together, or do not fit in."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"The processor in {folder} cannot be loaded ({error}): save it again, with its tokenizer."
        ) from error
    try:
        return processor, AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to(device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"The model in {folder} cannot be loaded on {device}: {error}") from error


def _accept_any_bytes() -> None:
    """Bytes that are no text become the replacement character, and text that the terminal lacks a question mark."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _plain_text(argument: str) -> str:
    """An argument of the command line without the halves of characters by which Python keeps bytes that are no text."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _show(piece: str) -> None:
    print(piece, end="", flush=True)
