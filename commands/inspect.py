"""`unimoe inspect`: what is inside a model folder, without loading its weights."""

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..conversion.checkpoints.description import ModelDescription, RouterLoad

# From no token to at least three times an even share.
_SHADES = " ░▒▓█"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show what is inside a model: layers, experts, router load",
        description="Show what is inside a model folder. Weights are not loaded.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the description of a model."""
    from ..conversion.checkpoints.description import describe_model

    description = describe_model(args.model)
    print(json.dumps(description.to_dict(), indent=2) if args.json else "\n".join(describe_lines(description)))
    return 0


def describe_lines(model: "ModelDescription") -> list[str]:
    """The description for a reader."""
    lines = [
        f"{model.name}",
        f"  takes      {', '.join(model.modalities)}",
        *(f"  tower      {name}: {line}" for name, line in model.towers.items()),
        *(f"  connector  {name}: {line}" for name, line in model.connectors.items()),
        f"  layers     {_pattern(model)}",
        *_expert_lines(model),
        *_weight_lines(model),
        "",
        f"  {'parameters':<12}{'total':>16}{'active/token':>16}",
        *(f"  {role:<12}{count.total:>16,}{count.active:>16,}" for role, count in model.parameters.items()),
        f"  {'all':<12}{model.total.total:>16,}{model.total.active:>16,}",
    ]
    return lines + ([] if model.router_load is None else ["", *router_load_lines(model.router_load)])


def router_load_lines(load: "RouterLoad") -> list[str]:
    """A heat map: one table per modality, a row per sparse layer, a column per expert, cells in percent."""
    widths = [max(len(expert), 5) for expert in load.experts]
    lines = ["  router load (percent of a modality's tokens, shade against an even share)"]
    for modality, table in load.modalities.items():
        names = " ".join(f"{expert:>{width}}" for expert, width in zip(load.experts, widths, strict=True))
        lines.append(f"  {modality:<11} {names}")
        for layer, row in zip(load.layers, table, strict=True):
            total = sum(row) or 1.0
            cells = [_cell(share / total, len(row), width) for share, width in zip(row, widths, strict=True)]
            lines.append(f"    layer {layer:<3} " + " ".join(cells))
    return lines


def _cell(share: float, num_experts: int, width: int) -> str:
    shade = _SHADES[min(round(share * num_experts / 3 * (len(_SHADES) - 1)), len(_SHADES) - 1)]
    return f"{shade}{100 * share:.0f}".rjust(width) if shade == " " else f"{shade}{100 * share:>3.0f}".rjust(width)


def _pattern(model: "ModelDescription") -> str:
    """E.g. "6: ·S·S·S (3 sparse S, the rest dense ·)"."""
    marks = "".join("S" if layer in model.sparse_layers else "·" for layer in range(model.num_layers))
    return f"{model.num_layers}: {marks} ({len(model.sparse_layers)} sparse S, the rest dense ·)"


def _expert_lines(model: "ModelDescription") -> list[str]:
    if not model.sparse_layers:
        return ["  experts    none, the decoder is dense"]
    routing = ", ".join(f"{name} {value}" for name, value in model.routing.items())
    groups = [
        f"  group      {name}: {', '.join(group['modalities'])} -> experts {group['experts']}"
        for name, group in model.groups.items()
        if len(model.groups) > 1
    ]
    most = "at most " if model.routing.get("top_p") else ""
    experts = f"  experts    {model.num_experts} per sparse layer, {most}{model.max_choices_per_token} per token"
    if model.num_null_experts:
        experts += f"; {model.num_null_experts} null (chosen, but empty)"
    if model.num_shared_experts:
        experts += f"; {model.num_shared_experts} shared (used by every token)"
    return [experts, *groups, f"  router     {routing}"]


def _weight_lines(model: "ModelDescription") -> list[str]:
    weights = model.weights
    if weights is None:
        return ["  weights    none in this folder"]
    dtypes = ", ".join(f"{name} ({count:,} values)" for name, count in weights.dtypes.items())
    lines = [f"  weights    {weights.num_bytes / 1e6:,.1f} MB in {weights.files} file(s): {dtypes}"]
    return lines + [f"  PROBLEM    {problem}" for problem in weights.problems]
