"""`unimoe convert`: a dense checkpoint becomes a sparse one, a released model one of ours; with a receipt."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConversionError
from . import _convert_assemble, _convert_moiie, _convert_unimoe

_EPILOG = """\
examples:
  unimoe convert upcycle HuggingFaceTB/SmolLM2-135M-Instruct --out smollm2-moe --layers odd
  unimoe convert upcycle ./dense --out ./sparse --experts 6 --layers 1,3,5 --groups groups.json

groups (JSON, or a file that holds it): experts and modalities of each routing group; they may share experts
  {"vision":   {"experts": [0, 1, 2], "modalities": ["image", "video"]},
   "language": {"experts": [1, 2, 3], "modalities": ["text", "speech", "sound"]}}
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("convert", help="dense checkpoints and released models become ours")
    kinds = parser.add_subparsers(title="conversions", metavar="CONVERSION", required=True)
    upcycle = kinds.add_parser(
        "upcycle",
        help="copy the FFNs of a dense model into experts",
        description="Write a sparse model that computes what the dense SOURCE computes, and prove it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    upcycle.add_argument(
        "source", metavar="SOURCE", help="folder or Hub id: a LLaMA-family model, or a dense one of ours"
    )
    upcycle.add_argument("--out", required=True, type=Path, metavar="OUT", help="folder to write; must not exist")
    upcycle.add_argument("--experts", type=int, default=4, metavar="E", help="experts per sparse layer (default: 4)")
    upcycle.add_argument("--top-k", type=int, default=2, metavar="K", help="experts per token (default: 2)")
    upcycle.add_argument(
        "--layers", default="odd", help="sparse layers, counted from 0: odd, even, all or 1,3,5 (default: odd)"
    )
    upcycle.add_argument("--groups", metavar="JSON", help="routing groups; without: one group of all experts")
    upcycle.add_argument(
        "--router-init",
        choices=ROUTER_INITS,
        default="normal",
        help="normal: random rows, spreads the tokens; zeros: all tokens start on the same experts, "
        "equal to SOURCE to the last bit (default: normal)",
    )
    upcycle.add_argument("--dtype", choices=("fp32", "bf16"), help="store weights so (default: as in SOURCE)")
    upcycle.add_argument("--seed", type=int, default=0, help="of the router's rows (default: 0)")
    _convert_assemble.add_parser(kinds)
    _convert_unimoe.add_parser(kinds)
    _convert_moiie.add_parser(kinds)


ROUTER_INITS = ("normal", "zeros")


def run(args: argparse.Namespace) -> int:
    """Print the plan, convert, print the receipt."""
    import torch

    from ..conversion.sources import open_source
    from ..conversion.stream_upcycle import plan_upcycle, run_upcycle
    from ..conversion.upcycle import Sparsity

    source = open_source(args.source)
    expert_groups, modality_groups = parse_groups(args.groups)
    sparsity = Sparsity(
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        sparse_layers=parse_layers(args.layers, source.config.text_config.num_hidden_layers),
        expert_groups=expert_groups,
        modality_groups=modality_groups,
        router_init=args.router_init,
        seed=args.seed,
    )
    dtype = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    plan = plan_upcycle(source, sparsity, dtype)
    print("Plan", *plan.lines(), sep="\n  ", flush=True)
    receipt = run_upcycle(plan, args.out)
    print("Receipt", *receipt.lines(), sep="\n  ")
    print(f"Saved in {args.out} (with receipt.json).")
    return 0


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


def parse_groups(text: str | None) -> tuple[dict[str, list[int]] | None, dict[str, str] | None]:
    """`expert_groups` and `modality_groups` of the configuration, from JSON or a file that holds it.

    Raises:
        ConversionError: it is not JSON, or a group lacks its experts or modalities.
    """
    if text is None:
        return None, None
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConversionError(f"--groups {text!r} is neither JSON nor a file to read ({error}).") from error
    try:
        groups = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConversionError(f"--groups is not JSON ({error}).") from error
    if not isinstance(groups, dict) or not groups:
        raise ConversionError('--groups must be an object {"name": {"experts": [...], "modalities": [...]}, ...}.')
    for name, group in groups.items():
        for field, is_item in (("experts", _is_int), ("modalities", _is_text)):
            if not isinstance(group, dict) or not _is_list_of(group.get(field), is_item):
                raise ConversionError(f"--groups: {name!r} needs a list {field!r}.")
    expert_groups = {name: group["experts"] for name, group in groups.items()}
    return expert_groups, {modality: name for name, group in groups.items() for modality in group["modalities"]}


def _is_list_of(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(is_item(item) for item in value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
