"""`unimoe convert start`: a language model and a vision tower become a dense model to train, as MoIIE's recipes want it."""

import argparse

from ._convert_options import add_out, seed

_EPILOG = """\
examples:
  unimoe convert start microsoft/Phi-3-mini-4k-instruct google/siglip-so400m-patch14-384 --template phi3 \\
      --out runs/moiie_phi3/start
  unimoe convert start llama-3-8b siglip-so400m --template llama --scales 1,2,3 --out start

Both models are held in memory: about 9 GB for Phi-3-mini, 17 GB for Llama-3-8B in bf16. The connector is new and knows
nothing: runs/moiie_phi3/README.md goes on from here.
"""


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the conversion to those of `unimoe convert`."""
    parser = kinds.add_parser(
        "start",
        help="join a language model and a SigLIP tower by a new connector, to train from",
        description="Write a dense model of a language model, a SigLIP tower and a new connector, with its processor.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("language", metavar="LANGUAGE", help="folder or Hub id: a LLaMA-family model")
    parser.add_argument("tower", metavar="TOWER", help="folder or Hub id: a SigLIP model")
    parser.add_argument(
        "--template",
        required=True,
        choices=("bunny", "llama", "minicpm", "phi3"),
        help="Bunny's chat template; it must fit the token with which the language model ends texts",
    )
    add_out(parser)
    parser.add_argument(
        "--scales", type=_scales, metavar="1,2,3", help="look at pictures in these sizes, S2 (default: one)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="store weights so (default: bf16)")
    parser.add_argument("--seed", type=seed, default=0, help="of the connector (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the folder."""
    import torch

    from ..conversion.bunny_start import write_bunny_start

    write_bunny_start(
        args.language,
        args.tower,
        args.template,
        args.out,
        scales=args.scales,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype],
        seed=args.seed,
    )
    print(f"Saved in {args.out}; what is in it: unimoe inspect {args.out}")
    return 0


def _scales(text: str) -> list[int]:
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 1,2,3")
    return [int(part) for part in text.split(",")]
