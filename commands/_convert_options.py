"""What several conversions of `unimoe convert` ask for in the same way."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConversionError
from ..model_folder import read_json

if TYPE_CHECKING:
    import torch

_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add `--out`."""
    parser.add_argument("--out", required=True, type=Path, metavar="OUT", help="folder to write; must not exist")


def add_sparsity(parser: argparse.ArgumentParser) -> None:
    """Add `--top-k` and `--layers`; `parse_layers` reads the latter."""
    parser.add_argument("--top-k", type=int, default=2, metavar="K", help="experts per token (default: 2)")
    parser.add_argument(
        "--layers", default="odd", help="sparse layers, counted from 0: odd, even, all or 1,3,5 (default: odd)"
    )


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
    from ..conversion.upcycling.sparsity import ROUTING_FIELDS

    if args.routing is None:
        return {}
    fields = read_fields("--routing", args.routing)
    if unknown := sorted(set(fields) - ROUTING_FIELDS):
        raise ConversionError(f"--routing names {unknown}; it may set {', '.join(sorted(ROUTING_FIELDS))}.")
    return fields


def read_fields(option: str, text: str) -> dict[str, Any]:
    """The JSON object that an option gives, itself or in a file. Raises ConversionError when it is none."""
    if not text.lstrip().startswith("{"):
        if not Path(text).is_file():
            raise ConversionError(
                f"{option} {text!r} is neither a JSON object, such as '{{\"name\": 1}}', nor a file."
            )
        return read_json(Path(text))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConversionError(f"{option} {text!r} is not a JSON object ({error}).") from error


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Layer indices of "odd", "even", "all" or a list like "1,3,5".

    Raises:
        ConversionError: the text is none of these, or names a layer that does not exist.
    """
    ranges: dict[str, range] = {
        "odd": range(1, num_layers, 2),
        "even": range(0, num_layers, 2),
        "all": range(num_layers),
    }
    if text in ranges:
        return tuple(ranges[text])
    try:
        layers = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise ConversionError(f"--layers is {text!r}; use odd, even, all or numbers like 1,3,5.") from error
    if layers[0] < 0 or layers[-1] >= num_layers:
        raise ConversionError(f"--layers is {text!r}, but the model's layers are 0 to {num_layers - 1}.")
    return tuple(layers)
