"""What several conversions of `unimoe convert` ask for in the same way."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConversionError

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


def add_routing(parser: argparse.ArgumentParser) -> None:
    """Add `--routing`."""
    parser.add_argument(
        "--routing",
        metavar="JSON",
        help="further fields of the decoder's routing, or a file with them: "
        '\'{"router_type": "dynamic", "router_top_p": 0.7}\' gives every token as many experts as it takes (DCMoE); '
        "all fields are in modeling_unimoe/configuration_unimoe_text.py",
    )


def chosen_routing(args: argparse.Namespace) -> dict[str, Any]:
    """What `--routing` asks for. Raises ConversionError for fields that are not the routing's."""
    from ..conversion.sparsity import ROUTING_FIELDS

    if args.routing is None:
        return {}
    fields = read_fields("--routing", args.routing)
    if unknown := sorted(set(fields) - ROUTING_FIELDS):
        raise ConversionError(f"--routing names {unknown}; it may set {', '.join(sorted(ROUTING_FIELDS))}.")
    return fields


def read_fields(option: str, text: str) -> dict[str, Any]:
    """The JSON object that an option gives, itself or in a file. Raises ConversionError when it is none."""
    from ..conversion.io import read_json

    if not text.lstrip().startswith("{"):
        return read_json(Path(text))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConversionError(f"{option} {text!r} is not a JSON object ({error}).") from error
