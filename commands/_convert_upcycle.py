"""`unimoe convert upcycle`: a dense model becomes a sparse one, with a receipt."""

import argparse

from ..model_folder import require_model
from ._argument_types import seed
from ._convert_options import (
    add_dtype,
    add_out,
    add_routing,
    add_sparsity,
    chosen_dtype,
    chosen_routing,
    parse_layers,
)

_EPILOG = """\
examples:
  unimoe convert upcycle HuggingFaceTB/SmolLM2-135M-Instruct --out smollm2-moe --layers odd
  unimoe convert upcycle microsoft/Phi-3-mini-4k-instruct --out phi3-moiie --groups moiie
  unimoe convert upcycle ./dense --out ./sparse --groups five --experts 10 --top-k 2
  unimoe convert upcycle ./dense --out ./sparse --experts 16 --top-k 4 --granularity 4
  unimoe convert upcycle ./dense --out ./sparse --experts 8 --drop-ratio 0.5 --allow-gap 20
  unimoe convert upcycle ./dense --out ./sparse --experts 6 --layers 1,3,5 --groups groups.json

groups: a preset, JSON, or a file that holds it (docs/routing.md has examples). Presets, and options that they go with:
  uni-moe   any number of --experts          one group of all experts
  modality  --experts 2 --top-k 1            one expert for vision, one for language
  separate  an even number of --experts      half of them for vision, half for language
  moiie     --experts 4, 8, 12, ...          a quarter for vision, a quarter for language, the rest for both
  five      --experts 6 or more, best 10     image, video, speech, sound and text have own experts, the rest is for all
  --top-k is at most what a group may choose from: half of the experts with separate, three quarters with moiie
JSON: experts and modalities of each routing group; groups may share experts
  {"vision":   {"experts": [0, 1, 2], "modalities": ["image", "video"]},
   "language": {"experts": [1, 2, 3], "modalities": ["text", "speech", "sound"]}}

how experts start:
  copies of the dense FFN, the default       Sparse Upcycling, arXiv 2212.05055
  --drop-ratio R                             Drop-Upcycling, arXiv 2502.19261
  --granularity G                            virtual groups and weight scaling, arXiv 2410.07524
  --granularity G --split slices             slices as in DCMoE's moe_copy
  --router-init prompts                      "hidden" gates of mergekit's MoE merges
  --router-init cluster                      the router's part of Cluster-aware Upcycling, arXiv 2604.13508
--noise, --drop-ratio, --null and slices change the function, and so does a granularity of 3, 5, 6, 7, ... in bf16 or fp16,
which round the scaled weights: such a model is only written with --allow-gap, and the receipt shows by how much its logits
differ and how much was to be expected.
"""
ROUTER_INITS = ("zeros", "normal", "prompts", "cluster")


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the conversion to those of `unimoe convert`."""
    parser = kinds.add_parser(
        "upcycle",
        help="copy the FFNs of a dense model into experts",
        description="Write a sparse model that computes what the dense SOURCE computes, and prove it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder or Hub id: a LLaMA-family model, a LLaVA-like one on top of such, or a dense one of ours",
    )
    add_out(parser)
    parser.add_argument("--experts", type=int, default=4, metavar="E", help="experts per sparse layer (default: 4)")
    add_sparsity(parser)
    parser.add_argument("--groups", metavar="PRESET|JSON", help="routing groups; without: one group of all experts")
    parser.add_argument("--shared", type=int, default=0, metavar="N", help="experts that every token uses as well")
    parser.add_argument(
        "--null", type=int, default=0, metavar="N", help="choices that compute nothing; needs --allow-gap"
    )
    add_routing(parser)
    _add_initialisation(parser)
    add_dtype(parser, "SOURCE")
    parser.add_argument("--seed", type=seed, default=0, help="of everything that is drawn (default: 0)")
    parser.add_argument(
        "--allow-gap", type=_gap, metavar="X", help="let logits differ from SOURCE's by up to X (inf: by anything)"
    )
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload OUT to this model repository")
    parser.set_defaults(run=run)


def _add_initialisation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--router-init",
        choices=ROUTER_INITS,
        default="normal",
        help="normal: random rows, spreads the tokens; zeros: all tokens start on the same experts, equal to SOURCE to "
        "the last bit; prompts: rows point to the hidden states of each expert's texts; cluster: to clusters of "
        "hidden states (default: normal)",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='texts for prompts ({"0": ["text", ...], "1": [...], ...}) or cluster (the same, or a text per line)',
    )
    parser.add_argument(
        "--noise", type=float, default=0.0, metavar="STD", help="noise on experts, in units of each matrix's deviation"
    )
    parser.add_argument(
        "--drop-ratio", type=float, default=0.0, metavar="R", help="share of each expert that starts anew, 0 to 1"
    )
    parser.add_argument(
        "--granularity", type=int, default=1, metavar="G", help="experts are 1/G as wide as the dense FFN (default: 1)"
    )
    parser.add_argument(
        "--split",
        choices=("virtual-groups", "slices"),
        default="virtual-groups",
        help="what the G parts are: together the dense FFN, or slices of it (default: virtual-groups)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan, convert, print the receipt."""
    require_model(args.source, others=True)
    from ..conversion.dense.sources import open_source
    from ..conversion.publishing.hub import push_folder
    from ..conversion.upcycling.group_options import parse_groups
    from ..conversion.upcycling.sparsity import Sparsity
    from ..conversion.upcycling.stream_upcycle import plan_upcycle, run_upcycle

    source = open_source(args.source)
    expert_groups, modality_groups = parse_groups(args.groups, args.experts, args.top_k)
    counts = {"num_shared_experts": args.shared, "num_null_experts": args.null}
    sparsity = Sparsity(
        num_experts=args.experts,
        num_experts_per_tok=args.top_k,
        sparse_layers=parse_layers(args.layers, source.config.text_config.num_hidden_layers),
        expert_groups=expert_groups,
        modality_groups=modality_groups,
        router_init=args.router_init,
        routing={**chosen_routing(args), **{name: count for name, count in counts.items() if count}},
        seed=args.seed,
        granularity=args.granularity,
        split=args.split,
        noise=args.noise,
        drop_ratio=args.drop_ratio,
    )
    plan = plan_upcycle(source, sparsity, chosen_dtype(args), prompts=args.prompts)
    print("Plan", *plan.lines(), sep="\n  ", flush=True)
    receipt = run_upcycle(plan, args.out, allow_gap=args.allow_gap)
    print("Receipt", *receipt.lines(), sep="\n  ")
    print(f"Saved in {args.out} (with receipt.json).")
    if args.push_to_hub is not None:
        print(f"Uploaded to {push_folder(args.out, args.push_to_hub)}")
    return 0


def _gap(text: str) -> float:
    """The type of `--allow-gap`."""
    try:
        gap = float(text)
    except ValueError:
        gap = -1.0
    if not gap >= 0:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number from 0 on, nor inf")
    return gap
