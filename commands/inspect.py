"""`unimoe inspect`: what is inside a model folder, without loading its weights; and what its experts do with data."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..model_folder import require_model
from ._argument_types import add_quantize, positive
from ._beforehand import require_file

if TYPE_CHECKING:
    from ..conversion.checkpoints.router_load import RouterLoad
    from ..inspection.model_description import ModelDescription

# From no token to at least three times an even share.
_SHADES = " ░▒▓█"


_DESCRIPTION = """\
Show what is inside a model folder. By itself the command reads configuration and headers only. With --data it runs samples
through the model and writes a page about its experts: load per layer, modality and task, entropy, dead and duplicate
experts, co-activation, words. With --compare it says what a training has changed."""
_EPILOG = """\
examples:
  unimoe inspect quickstart-out/model                                       layers, experts, parameters
  unimoe inspect quickstart-out/model --data heldout.jsonl --out inside     inside/inspect.html and inspect.json
  unimoe inspect quickstart-out/model --data heldout.jsonl --limit 60 --out inside    a quick look
  unimoe inspect stage3/model --compare stage1/model --data heldout.jsonl --out changes    before and after

Data are conversations as `unimoe train` takes them; docs/looking_inside.md explains the page."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="show what is inside a model: layers, experts, router load",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.add_argument(
        "--data", metavar="FILE", action="append", help="data file to run through it (again for several)"
    )
    parser.add_argument("--media-root", metavar="DIR", help="folder that holds the data's media")
    parser.add_argument("--compare", metavar="OTHER", help="an earlier model: say what changed since")
    parser.add_argument(
        "--out", metavar="DIR", help="where the page and the figures go; needed with --data, --compare"
    )
    parser.add_argument("--limit", metavar="N", type=positive, help="at most N samples, evenly over tasks")
    parser.add_argument("--batch-size", metavar="N", type=positive, default=8, help="samples at once (default: 8)")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    add_quantize(parser)


def run(args: argparse.Namespace) -> int:
    """Print the description of a model, or look inside it while it works."""
    looks_inside = args.data or args.compare or args.out
    if looks_inside and (not args.out or not (args.data or args.compare)):
        raise DataError("--data and --compare need --out, a folder for the page, and --out needs one of them.")
    for name in filter(None, (args.model, args.compare)):
        require_model(name)
    for file in args.data or []:
        require_file("The data file", file)
    if looks_inside:
        return _look_inside(args)
    from ..inspection.model_description import describe_model

    description = describe_model(args.model)
    print(json.dumps(description.to_dict(), indent=2) if args.json else "\n".join(describe_lines(description)))
    return 0


def _look_inside(args: argparse.Namespace) -> int:
    from ..inspection.look_inside import Request, look_inside

    request = Request(
        args.model,
        args.data or [],
        args.media_root,
        args.compare,
        args.limit,
        args.batch_size,
        args.device,
        args.quantize,
    )
    facts, page = look_inside(request, args.out)
    print(json.dumps(facts) if args.json else "\n".join(finding_lines(facts)))
    print(f"The page is {page}", file=sys.stderr if args.json else sys.stdout)
    return 0


def finding_lines(facts: dict[str, Any]) -> list[str]:
    """What was found, in a line per layer."""
    lines = []
    for index, layer in enumerate(facts["layers"]):
        parts = []
        if "load" in facts:
            entropy, ratio = facts["entropy"]["all"][index], facts["max_load_ratio"][index]
            parts += [] if entropy is None else [f"load entropy {entropy:.2f}", f"largest load {ratio:.2f} times even"]
            parts += [f"dead: {facts['dead_experts'][index]}"] if facts["dead_experts"][index] else []
        pairs = facts["duplicate_experts"][index]
        parts += [f"duplicates: {', '.join(f'{a} = {b}' for a, b in pairs)}"] if pairs else []
        if "moved" in facts:
            moved = ", ".join(
                f"{100 * rows[index]:.0f} % of {name}" for name, rows in facts["moved"].items() if rows[index]
            )
            parts += [f"choices that moved: {moved or 'none'}"]
        lines.append(f"  layer {layer:<3} {'; '.join(parts) or 'nothing to remark'}")
    for role in facts.get("weights", {}).get("roles", ()):
        lines.append(
            f"  {role['role']:<11} {role['changed']} of {role['tensors']} tensors differ, by {100 * role['relative']:.2f} %"
        )
    if facts.get("skipped"):
        lines.append(f"  {len(facts['skipped'])} samples could not be read")
    return lines


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
    if model.receipt is not None:
        lines += ["", "  receipt of the conversion", *(f"    {line}" for line in model.receipt)]
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
    if model.quantized_by is not None:
        lines.append(f"  quantised  by {model.quantized_by}: matrices of the decoder are held in fewer bits")
    return lines + [f"  PROBLEM    {problem}" for problem in weights.problems]
