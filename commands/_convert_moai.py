"""`unimoe convert moai` and `export-moai`: a checkpoint of MoAI's code becomes a folder of ours, and back."""

import argparse
from pathlib import Path

from ..model_folder import require_model, require_ours
from ._convert_options import add_dtype, add_out, chosen_dtype
from ._convert_released import carry_out, report_export

_EPILOG = """\
examples:
  unimoe convert moai ./MoAI-7B --dtype bf16 --out moai
  unimoe convert export-moai moai --out moai-original

The tokenizer is read from tokenizer.model; code in the checkpoint is never run. Weights that were saved in 4 or 8 bits are
refused. OUT/receipt.json says what became of each tensor.
"""


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add both conversions to those of `unimoe convert`."""
    parser = kinds.add_parser(
        "moai",
        help="read a checkpoint of MoAI's code",
        description="Write a checkpoint of MoAI's code as a Hugging Face folder that answers as the original does.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id, as the original saved it")
    add_out(parser)
    add_dtype(parser, "CHECKPOINT")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload OUT to this model repository")
    parser.set_defaults(run=run)
    export = kinds.add_parser(
        "export-moai",
        help="write a model in MoAI's own layout",
        description="Write a model of ours in the folder that MoAI's own code loads.",
    )
    export.add_argument("model", metavar="MODEL", type=Path, help="folder of a model of ours")
    export.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; must not exist")
    export.set_defaults(run=run_export)


def run(args: argparse.Namespace) -> int:
    """Print the plan, convert, print the receipt."""
    require_model(args.checkpoint, others=True)
    from ..conversion.released.import_moai import plan_moai
    from ..conversion.released.import_plan import write_import

    return carry_out(args, plan_moai(args.checkpoint, dtype=chosen_dtype(args)), write_import)


def run_export(args: argparse.Namespace) -> int:
    """Export and print what was written."""
    require_ours(args.model)
    from ..conversion.released.export_moai import export_moai

    return report_export(args, export_moai(args.model, args.out))
