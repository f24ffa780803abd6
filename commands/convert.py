"""`unimoe convert`: a dense checkpoint becomes a sparse one, a released model one of ours; with a receipt."""

import argparse

from . import (
    _convert_assemble,
    _convert_compose,
    _convert_layouts,
    _convert_moai,
    _convert_moiie,
    _convert_psgtr,
    _convert_unimoe,
    _convert_upcycle,
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("convert", help="dense checkpoints and released models become ours")
    kinds = parser.add_subparsers(title="conversions", metavar="CONVERSION", required=True)
    _convert_compose.add_parser(kinds)
    _convert_upcycle.add_parser(kinds)
    _convert_assemble.add_parser(kinds)
    _convert_layouts.add_parser(kinds)
    _convert_unimoe.add_parser(kinds)
    _convert_moiie.add_parser(kinds)
    _convert_moai.add_parser(kinds)
    _convert_psgtr.add_parser(kinds)
