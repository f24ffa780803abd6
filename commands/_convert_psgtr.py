"""`unimoe convert psgtr`: OpenPSG's checkpoint of PSGTR becomes a folder that `unimoe perceive --relate` takes."""

import argparse
from pathlib import Path

from ._convert_options import add_out


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the conversion to those of `unimoe convert`."""
    parser = kinds.add_parser(
        "psgtr",
        help="read OpenPSG's scene graph model (psgtr_r50_epoch_60.pth)",
        description="Write a checkpoint of PSGTR as a folder for `unimoe perceive IMAGE --relate FOLDER`.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="the .pth file; code in it is never run")
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert and print what was done."""
    from ..conversion.released.import_psgtr import convert_psgtr

    print(*convert_psgtr(args.checkpoint, args.out), sep="\n")
    return 0
