"""What arguments of several commands have in common."""

import argparse


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def seed(text: str) -> int:
    """What every random generator takes."""
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number from 0 to {(1 << 32) - 1}")
    return int(text)


def add_address(parser: argparse.ArgumentParser, port: int) -> None:
    """For commands that listen; `require_address` checks it."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=port, help="(default: %(default)s)")


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """For commands that load a model."""
    parser.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="hold the decoder's matrices, experts included, in 8 or 4 bits (needs torchao: the extra `quantize`)",
    )
