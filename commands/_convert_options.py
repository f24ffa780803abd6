"""What several conversions of `unimoe convert` ask for in the same way."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def add_dtype(parser: argparse.ArgumentParser, source: str) -> None:
    """Add `--dtype`; `source` is the option or argument whose dtype is the default."""
    parser.add_argument("--dtype", choices=tuple(_DTYPES), help=f"store weights so (default: as in {source})")


def chosen_dtype(args: argparse.Namespace) -> "torch.dtype | None":
    """What `--dtype` asks for; None keeps the source's."""
    import torch

    return None if args.dtype is None else getattr(torch, _DTYPES[args.dtype])
