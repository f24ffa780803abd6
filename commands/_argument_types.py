"""What arguments of several commands have in common."""

import argparse


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def add_quantize(parser: argparse.ArgumentParser) -> None:
    """For commands that load a model."""
    parser.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="hold the decoder's matrices, experts included, in 8 or 4 bits (needs torchao: the extra `quantize`)",
    )
