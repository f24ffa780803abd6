"""`unimoe convert layouts`: the same sparse model with its experts fused, one by one, or in files by rank."""

import argparse
from pathlib import Path

from ..model_folder import require_ours
from ._convert_options import add_out

_EPILOG = """\
examples:
  unimoe convert layouts ./sparse --to per-expert --out ./sparse-experts
  unimoe convert layouts ./sparse --ep 4 --out ./sparse-ep4      rank r opens its own experts' files only
  unimoe convert layouts ./sparse-ep4 --to fused --out ./sparse  and back, bit-equal

Every layout loads with from_pretrained. For expert parallelism:
  from unimoe.conversion.checkpoints.expert_shards import load_expert_parallel
  model = load_expert_parallel("./sparse-ep4", DistributedConfig(tp_size=4, ep_size=4))
"""


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the conversion to those of `unimoe convert`."""
    parser = kinds.add_parser(
        "layouts",
        help="lay out the experts of a sparse model otherwise: fused, one by one, or by rank",
        description="Write a sparse model of ours with its experts in other files; no value changes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="folder of a sparse model, in any of the layouts")
    add_out(parser)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--to", choices=("fused", "per-expert"), help="all experts of a layer together, or one by one")
    how.add_argument("--ep", type=int, metavar="N", help="one by one, with files of their own for each of N ranks")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan, write, print what was written."""
    require_ours(args.model)
    from ..conversion.checkpoints.layouts import plan_layout, run_layout

    plan = plan_layout(args.model, args.to or "per-expert", args.ep)
    print("Plan", *plan.lines(), sep="\n  ", flush=True)
    print("Wrote", *run_layout(plan, args.out), sep="\n  ")
    print(f"Saved in {args.out}.")
    return 0
