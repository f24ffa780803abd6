"""`unimoe <command>`: finds the commands in `commands/`, parses, runs, and turns errors into one line and an exit code."""

import argparse
import logging
import os
import pkgutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

from . import __version__, commands
from .errors import UniMoeError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

# The order on the help screen; commands that are not listed follow in alphabetical order.
_ORDER = ("quickstart", "train", "check_data", "convert", "chat", "demo", "perceive", "inspect")

_DESCRIPTION = "Makes a multimodal Mixture of Experts of a dense language model and encoders."
_EXAMPLES = """\
examples:
  unimoe quickstart                     a small model from parts, in minutes
  unimoe chat quickstart-out/model      talk to it; COMMAND --help says more
"""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Lists the commands with their help on the same line, without a heading line of their own."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        # argparse forgets the indentation of sub-commands when it measures the first column.
        self._action_max_length = 14

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        return text.partition("\n")[2] if isinstance(action, argparse._SubParsersAction) else text


def build_parser() -> argparse.ArgumentParser:
    """The parser with every module of `unimoe.commands`.

    Each offers add_parser(subparsers), and run(args) unless commands below its own bring theirs.
    """
    parser = argparse.ArgumentParser(
        prog="unimoe", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=HelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"unimoe {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in _command_names():
        module = import_module(f"{commands.__name__}.{name}")
        known = set(subparsers.choices)
        module.add_parser(subparsers)
        for added in set(subparsers.choices) - known:
            subparser = subparsers.choices[added]
            if subparser.get_default("run") is None and hasattr(module, "run"):
                subparser.set_defaults(run=module.run)
    _add_debug_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0, 2 for errors that the user can mend, 130 after Ctrl-C.

    Errors outside the UniMoeError family are bugs and keep their traceback, as every error does with --debug.
    """
    args = build_parser().parse_args(argv)
    _hush_imports()
    try:
        with _cleanup_when_stopped():
            return args.run(args) or 0
    except UniMoeError as error:
        if args.debug:
            traceback.print_exc()
        else:
            print(f"unimoe: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("\nunimoe: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (`unimoe ... | head`); Python's flush at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _hush_imports() -> None:
    """What libraries say of kernels that they lack, when others import them and nobody has asked for them."""
    # Wherever torchao is installed transformers imports it.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # And peft imports bitsandbytes, whose other warnings stay.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_about_more_than_kernels)


def _is_about_more_than_kernels(record: logging.LogRecord) -> bool:
    return "kernels-community" not in str(record.msg)


@contextmanager
def _cleanup_when_stopped() -> Iterator[None]:
    """SIGTERM and SIGHUP, which end a process at once, end it as exceptions: what is half written is removed."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # Others' handlers stay, and so does nohup.
    ours = [number for number in signals if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    for number in ours:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _command_names() -> list[str]:
    names = {module.name for module in pkgutil.iter_modules(commands.__path__) if not module.name.startswith("_")}
    return [name for name in _ORDER if name in names] + sorted(names - set(_ORDER))


def _add_debug_option(parser: argparse.ArgumentParser, default: object = False) -> None:
    """Accept --debug at every level of sub-commands, before or after their names."""
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in set(action.choices.values()):
                _add_debug_option(subparser, default=argparse.SUPPRESS)


if __name__ == "__main__":
    sys.exit(main())
