"""`unimoe convert compose`: a language model and encoders become one dense model, ready to train."""

import argparse
import dataclasses
from pathlib import Path

from ..errors import ConversionError
from ..model_folder import require_model
from ._argument_types import seed
from ._convert_options import add_dtype, add_out, chosen_dtype

_EPILOG = """\
examples:
  unimoe convert compose --language-model HuggingFaceTB/SmolLM2-135M-Instruct \\
      --vision-tower google/siglip-base-patch16-224 --speech-tower openai/whisper-tiny.en --out dense
  unimoe convert compose --language-model llava-hf/llava-1.5-7b-hf --speech-tower openai/whisper-small --out start-speech
  unimoe convert compose --language-model lmsys/vicuna-7b-v1.5 --vision-tower openai/clip-vit-large-patch14-336 \\
      --image-projector mm_projector.bin --beats BEATs_iter3_plus_AS2M.pt --out start-sound
  unimoe convert compose --language-model meta-llama/Meta-Llama-3-8B --vision-tower google/siglip-so400m-patch14-384 \\
      --scales 1,2,3 --image-aspect-ratio pad --chat-template llama --out start

A LLaVA-1.5 brings its tower and projection; a dense model of ours keeps what it has, so that parts can be added one after
another. Connectors that no part brings are new: train them first (stage 1 of a recipe), then make the model sparse with
`unimoe convert upcycle OUT --out SPARSE`. OUT/receipt.json says of every tensor what it was made of.
"""


def add_parser(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the conversion to those of `unimoe convert`."""
    parser = kinds.add_parser(
        "compose",
        help="put a dense language model, encoders and connectors together",
        description="Write a dense multimodal model of a language model and encoders, one tensor in memory at a time.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, where = parser.add_argument, "DIR|HUB_ID"
    add("--language-model", required=True, metavar=where, help="a LLaMA-family model, a LLaVA, or a dense one of ours")
    add_out(parser)
    add("--vision-tower", metavar=where, help="any vision encoder: CLIP, SigLIP, DINOv2, MobileNetV2, ...")
    add(
        "--image-projector", metavar="FILE|new", help="a trained one (mm_projector.bin); new: not the language model's"
    )
    add("--speech-tower", metavar=where, help="a Whisper: its encoder, and its decoder for the query decoder")
    add("--beats", type=Path, metavar="FILE.pt", help="the sound encoder BEATs")
    add("--qformer-config", type=Path, metavar="JSON", help="sizes of the Q-Former (default: BLIP-2's)")
    add("--qformer-weights", metavar="FILE|" + where, help="a trained Q-Former (default: a new one)")
    _add_choices(parser)
    add_dtype(parser, "--language-model")
    add("--seed", type=seed, default=0, help="of everything that is drawn (default: 0)")
    add("--push-to-hub", metavar="REPO", help="upload OUT to this model repository")
    parser.set_defaults(run=run)


def _add_choices(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--speech-connector", choices=("query_decoder", "mlp"), default="query_decoder", help="default: query_decoder")
    add("--speech-tokens", type=int, default=50, metavar="N", help="embeddings per window of speech (default: 50)")
    add("--speech-queries", choices=("zeros", "prompt"), default="zeros", help="prompt: begin as Whisper's own prompt")
    add(
        "--sound-connector",
        choices=("qformer", "mlp"),
        help="default: qformer; without --beats: read the speech tower",
    )
    add("--sound-tokens", type=int, default=50, metavar="N", help="embeddings per window of sound (default: 50)")
    add("--projector-depth", type=int, default=2, metavar="N", help="linear layers of new mlp connectors (default: 2)")
    add("--output-norm", action="store_true", help="new connectors end with a norm, at the scale of word embeddings")
    add("--vision-feature-layer", type=int, metavar="N", help="hidden state to read (default: -2; convolutions: -1)")
    add(
        "--scales",
        dest="vision_scales",
        type=_scales,
        metavar="1,2,3",
        help="see pictures at these multiples of the tower's size, S2 (default: its own size)",
    )
    add("--image-grid", type=int, metavar="N", help="pool a picture to N x N embeddings")
    add("--image-size", type=int, metavar="N", help="stretch pictures to N x N pixels")
    add("--image-aspect-ratio", choices=("square", "pad"), help="pad: pictures on a square of the mean colour")
    add("--video-frames", type=int, default=8, metavar="N", help="frames per video (default: 8)")
    add(
        "--video-pooling",
        choices=("mean", "none"),
        help="mean over the frames (default), or the tokens of every frame",
    )
    add("--window-seconds", type=int, metavar="S", help="length of an audio window (default: 30)")
    add("--chat-template", metavar="NAME|FILE", help="chatml, vicuna, llama or phi3 (default: by the tokenizer)")


def run(args: argparse.Namespace) -> int:
    """Print the plan, compose, print the receipt."""
    for name in ("speech_tokens", "sound_tokens", "projector_depth", "video_frames", "image_grid", "image_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConversionError(f"--{name.replace('_', '-')} is {getattr(args, name)}; give at least 1.")
    for name in filter(None, (args.language_model, args.vision_tower, args.speech_tower)):
        require_model(name, others=True)
    from ..conversion.composing.compose import ComposeOptions, Ingredients, plan_composition, run_composition
    from ..conversion.publishing.hub import push_folder

    ingredients = Ingredients(
        language_model=args.language_model,
        vision_tower=args.vision_tower,
        image_projector=args.image_projector,
        speech_tower=args.speech_tower,
        beats=args.beats,
        qformer_config=args.qformer_config,
        qformer_weights=args.qformer_weights,
    )
    # Flags that are called as the choice is.
    same = [field.name for field in dataclasses.fields(ComposeOptions) if field.name in args and field.name != "dtype"]
    chosen = {name: getattr(args, name) for name in same}
    options = ComposeOptions(**chosen, vision_token_grid=args.image_grid, dtype=chosen_dtype(args))
    plan = plan_composition(ingredients, options)
    print("Plan", *plan.lines(), sep="\n  ", flush=True)
    receipt = run_composition(plan, args.out)
    print("Receipt", *receipt.lines(), sep="\n  ")
    print(f"Saved in {args.out} (with receipt.json).")
    if args.push_to_hub is not None:
        print(f"Uploaded to {push_folder(args.out, args.push_to_hub)}")
    return 0


def _scales(text: str) -> list[int]:
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 1,2,3")
    return [int(part) for part in text.split(",")]
