"""`unimoe convert assemble`: tuned dense models become the experts of one sparse model."""

import argparse

from ..errors import ConversionError
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
  unimoe convert assemble --base llava-7b --expert vision=task2 --expert spoken=task3 --expert listening=task7 \\
      --expert untuned=llava-7b --out unimoe-4e --layers all
  unimoe convert assemble --base dense --layers 1,3 --out sparse \\
      --expert image=training/experts/image/expert.safetensors --expert speech=training/experts/speech/expert.safetensors
  unimoe convert assemble --base dense --layers all --out unimoe-8e --expert audio=mlp_audiocap.bin \\
      --expert v=mlp_basev.bin --expert base=mlp_base.bin --expert base1=mlp_base1.bin --expert base4=mlp_base4.bin \\
      --expert base7=mlp_base7.bin --expert base=mlp_base.bin --expert base7=mlp_base7.bin

The order of the experts is that of their ids. Only FFNs are taken from them: connectors, attention and all else are
those of BASE. OUT/receipt.json says of every tensor what it was made of.
"""


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the conversion to those of `unimoe convert`."""
    parser = kinds.add_parser(
        "assemble",
        help="make one sparse model of several tuned dense ones",
        description="Write a sparse model whose experts are the FFNs of tuned dense models; all else is from BASE.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--base", required=True, metavar="DENSE", help="folder or Hub id: a LLaMA-family model, or a dense one of ours"
    )
    parser.add_argument(
        "--expert",
        required=True,
        action="append",
        metavar="NAME=SOURCE",
        help="a model like BASE, or a .safetensors or .bin file with FFN weights only; repeat it, once per expert",
    )
    add_out(parser)
    add_sparsity(parser)
    parser.add_argument(
        "--router-init",
        choices=("normal", "zeros"),
        default="normal",
        help="normal: random rows; zeros: all tokens start on the first K experts (default: normal)",
    )
    add_routing(parser)
    add_dtype(parser, "BASE")
    parser.add_argument("--seed", type=seed, default=0, help="of the router's rows (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan, assemble, print the receipt."""
    experts = [parse_expert(text) for text in args.expert]
    require_model(args.base, others=True)
    from ..conversion.dense.sources import open_source
    from ..conversion.upcycling.assemble import plan_assembly, run_assembly

    base = open_source(args.base)
    plan = plan_assembly(
        base,
        experts,
        sparse_layers=parse_layers(args.layers, base.config.text_config.num_hidden_layers),
        num_experts_per_tok=args.top_k,
        router_init=args.router_init,
        routing=chosen_routing(args),
        seed=args.seed,
        dtype=chosen_dtype(args),
    )
    print("Plan", *plan.lines(), sep="\n  ", flush=True)
    receipt = run_assembly(plan, args.out)
    print("Receipt", *receipt.lines(), sep="\n  ")
    print(f"Saved in {args.out} (receipt.json says of every tensor what it was made of).")
    return 0


def parse_expert(text: str) -> tuple[str, str]:
    """Name and source of "NAME=SOURCE". Raises ConversionError when one of them is missing."""
    name, separator, source = text.partition("=")
    if not (separator and name.strip() and source):
        raise ConversionError(f"--expert is {text!r}; write NAME=SOURCE, for example speech=./speech-expert.")
    return name.strip(), source
