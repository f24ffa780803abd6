"""`unimoe convert unimoe` and `export-unimoe`: a released Uni-MoE model becomes a folder of ours, and back."""

import argparse
from pathlib import Path

from ..model_folder import require_ours
from ._convert_options import add_dtype, add_out, chosen_dtype, read_fields
from ._convert_released import carry_out, report_export

_EPILOG = """\
examples:
  unimoe convert unimoe --base Uni-MoE-speech-base-interval --finetuned Uni-MoE-speech-v1.5 \\
      --clip clip-vit-large-patch14-336 --whisper whisper-small --out unimoe-v1.5
  unimoe convert unimoe --base Uni-MoE-audio-base --finetuned Uni-MoE-audio-e2 \\
      --clip clip-vit-large-patch14-336 --beats BEATs_iter3_plus_AS2M.pt --out unimoe-audio
  unimoe convert unimoe --base Uni-MoE-speech-base --experts Uni_MoE_8e_Experts --finetuned Uni_MoE_8e_e2 \\
      --clip clip-vit-large-patch14-336 --whisper whisper-small --out unimoe-8e

All folders as they were released; what they are is read off their tensors. OUT/receipt.json says what became of each.
"""


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the conversion to those of `unimoe convert`."""
    parser = kinds.add_parser(
        "unimoe",
        help="read a released Uni-MoE model (audio, speech, speech_dp, v1.5, 8e)",
        description="Write a released Uni-MoE model as a Hugging Face folder that answers as the original does.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for flag, required, text in (
        ("base", True, "the base model: shards, config.json, tokenizer"),
        ("finetuned", False, "LoRA, routers and connectors (e2, v1.5); without: the base model alone"),
        ("clip", True, "the vision encoder, clip-vit-large-patch14-336"),
        ("whisper", False, "the speech encoder, whisper-small; for speech variants"),
        ("experts", False, "the 8-expert variant's expert files (mlp_base.bin, ...)"),
    ):
        parser.add_argument(f"--{flag}", required=required, type=Path, metavar="DIR", help=text)
    parser.add_argument("--beats", type=Path, metavar="FILE.pt", help="the sound encoder; for the audio variant")
    parser.add_argument(
        "--qformer-config",
        metavar="JSON",
        help="fields, or a file with them, of a Q-Former that is not BLIP-2's; for the audio variant",
    )
    add_out(parser)
    add_dtype(parser, "BASE")
    parser.add_argument("--keep-lora", action="store_true", help="leave LoRA as a PEFT adapter in OUT-lora")
    parser.add_argument(
        "--push-to-hub", metavar="REPO", help="upload OUT to this model repository, OUT-lora to REPO-lora"
    )
    parser.set_defaults(run=run)
    export = kinds.add_parser(
        "export-unimoe",
        help="write a model in Uni-MoE's own layout",
        description="Write a model of ours in the folders that Uni-MoE's own code loads.",
    )
    export.add_argument(
        "model", metavar="MODEL", type=Path, help="folder of a Uni-MoE variant (audio, speech, speech_dp, 8e)"
    )
    export.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write; must not exist")
    export.add_argument(
        "--tokenizer",
        type=Path,
        metavar="BASE",
        help="folder with the original's tokenizer.model, if MODEL does not carry it (trained models do not)",
    )
    export.set_defaults(run=run_export)


def run(args: argparse.Namespace) -> int:
    """Print the plan, convert, print the receipt."""
    from ..conversion.released.import_unimoe import UniMoeFolders, plan_import, run_import

    folders = UniMoeFolders(
        base=args.base,
        clip=args.clip,
        finetuned=args.finetuned,
        whisper=args.whisper,
        beats=args.beats,
        experts=args.experts,
        qformer_config=None if args.qformer_config is None else read_fields("--qformer-config", args.qformer_config),
    )
    return carry_out(args, plan_import(folders, dtype=chosen_dtype(args), keep_lora=args.keep_lora), run_import)


def run_export(args: argparse.Namespace) -> int:
    """Export and print what was written."""
    require_ours(args.model)
    from ..conversion.released.export_unimoe import export_unimoe

    return report_export(args, export_unimoe(args.model, args.out, tokenizer=args.tokenizer))
