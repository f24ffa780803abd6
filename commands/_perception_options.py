"""The options that choose which vision models look at images, for every command that has them look."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._argument_types import positive

if TYPE_CHECKING:
    from ..processing.perception.choice import PerceiverChoice


def add_perception_options(parser: argparse.ArgumentParser, title: str) -> Any:
    """Add them as a group of their own, which is returned."""
    group = parser.add_argument_group(title)
    group.add_argument("--segment", nargs="?", const="", metavar="M", help="panoptic segmentation: Mask2Former, ...")
    group.add_argument("--detect", nargs="?", const="", metavar="M", help="object detection: OWLv2, DETR, ...")
    group.add_argument("--names", metavar="FILE", help="what --detect looks for, a name per line (open vocabularies)")
    group.add_argument("--relate", default="none", metavar="M|rules|none", help="scene graphs: a converted PSGTR")
    group.add_argument("--text", choices=("rapidocr", "none"), help="lines of text")
    group.add_argument(
        "--text-side", type=positive, default=736, metavar="N", help="pixels in which text is looked for"
    )
    group.add_argument("--original", action="store_true", help="as MoAI did, its faults included; for released models")
    return group


def models_for_answers(args: argparse.Namespace) -> "PerceiverChoice | None":
    """What the options of chat and serve ask for; None where they name nothing."""
    from ..errors import OptionError

    is_named = args.segment is not None or args.detect is not None or args.relate != "none" or args.text == "rapidocr"
    if is_named or args.original or args.names is not None:
        return chosen_models(args)
    if args.text == "none":
        raise OptionError("--text none leaves nobody to look at images: say --no-perception, or name what shall look.")
    return None


def chosen_models(args: argparse.Namespace) -> "PerceiverChoice":
    """What the options ask for; text alone where they name no model."""
    from ..errors import OptionError
    from ..processing.perception import detection_transformers, segmentation_transformers
    from ..processing.perception.choice import RULES, PerceiverChoice

    nothing_else = args.segment is None and args.detect is None and args.relate == "none"
    text = args.text or ("rapidocr" if nothing_else or args.original else "none")
    if args.relate == RULES and args.segment is None and args.detect is None:
        raise OptionError("--relate rules relates what --segment or --detect find: add one of them.")
    if args.names is not None and args.detect is None:
        raise OptionError("--names says what --detect looks for: add --detect.")
    return PerceiverChoice(
        segment=None if args.segment is None else args.segment or segmentation_transformers.ORIGINAL_MODEL,
        detect=None if args.detect is None else args.detect or detection_transformers.ORIGINAL_MODEL,
        names=None if args.names is None else _names(args.names),
        relate=None if args.relate == "none" else args.relate,
        text=text != "none",
        text_side=args.text_side,
        original=args.original,
    )


def _names(file: str) -> tuple[str, ...]:
    from ..errors import DataError

    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read ({error}).") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())
