"""`unimoe convert moiie` and `export-moiie`: a checkpoint of MoIIE's code becomes a folder of ours, and back."""

import argparse
from pathlib import Path

from ..model_folder import require_model, require_ours
from ._convert_options import add_dtype, add_out, chosen_dtype
from ._convert_released import carry_out, report_export

_EPILOG = """\
examples:
  unimoe convert moiie ./moiie-phi3-stage2 --vision-tower google/siglip-so400m-patch14-384 --out moiie-phi3
  unimoe convert moiie ./converted-llm --out moiie-llm      # without image projector: the language model alone

CHECKPOINT holds what the original's save_pretrained leaves:
  config.json                                 with num_experts_per_tok, and mm_vision_tower for a model that sees
  *.safetensors or pytorch_model*.bin         all weights, with the index file where there are several
  tokenizer.model or tokenizer.json           and tokenizer_config.json; without them OUT has no processor
Weights of LoRA or of the projector alone are no CHECKPOINT: merge them with the original's scripts first.

Architecture (MoIIE, vanilla, modality, separate pools, dense) and backbone (Phi-3, LLaMA) are read off the tensors.
OUT/receipt.json says what became of each.
"""
_EXPORT_EPILOG = """\
examples:
  unimoe convert export-moiie ./moiie-phi3 --out back                       what `unimoe convert moiie` made, bit-equal
  unimoe convert export-moiie ./phi3-moiie --out for-original               made with `convert upcycle --groups moiie`
  unimoe convert export-moiie ./dense --backbone phi3 --out for-original    by its tensors it could be either

Of our models those can be exported that the original's classes compute: every odd layer sparse (--layers odd), groups of the
presets moiie, separate or modality or no groups, softmax weights that sum to one, and no null or shared experts, slices
or biases. One that sees, with groups, also needs "route_run_end_as_text": true in its config.json, as in the original.
"""


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add both conversions to those of `unimoe convert`."""
    parser = kinds.add_parser(
        "moiie",
        help="read a checkpoint of MoIIE's code (phi3, llama; all its architectures)",
        description="Write a checkpoint of MoIIE's code as a Hugging Face folder that answers as the original does.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="folder or Hub id, as the original saved it; see below"
    )
    add_out(parser)
    parser.add_argument(
        "--vision-tower",
        metavar="DIR",
        help="folder or Hub id of SigLIP (default: what config.json names, if that is a folder)",
    )
    add_dtype(parser, "CHECKPOINT")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload OUT to this model repository")
    parser.set_defaults(run=run)
    export = kinds.add_parser(
        "export-moiie",
        help="write a model in MoIIE's own layout",
        description="Write a model of ours in the folder that MoIIE's own code loads.",
        epilog=_EXPORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument("model", metavar="MODEL", type=Path, help="folder of a model of ours")
    export.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; must not exist")
    export.add_argument(
        "--backbone", choices=("phi3", "llama"), help="whose classes shall load it (default: by the model)"
    )
    export.set_defaults(run=run_export)


def run(args: argparse.Namespace) -> int:
    """Print the plan, convert, print the receipt."""
    require_model(args.checkpoint, others=True)
    from ..conversion.released.import_moiie import plan_moiie
    from ..conversion.released.import_plan import write_import

    plan = plan_moiie(args.checkpoint, vision_tower=args.vision_tower, dtype=chosen_dtype(args))
    return carry_out(args, plan, write_import)


def run_export(args: argparse.Namespace) -> int:
    """Export and print what was written."""
    require_ours(args.model)
    from ..conversion.released.export_moiie import export_moiie

    return report_export(args, export_moiie(args.model, args.out, backbone=args.backbone))
