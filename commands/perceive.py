"""`unimoe perceive`: what other vision models see in an image, to look at; or in all images of a data file, to train on."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._argument_types import positive
from ._perception_options import add_perception_options, chosen_models

if TYPE_CHECKING:
    from ..processing.perception.perceiver import Perceiver

EXIT_PROBLEMS = 1
DATA_SUFFIXES = (".json", ".jsonl")

_DESCRIPTION = """\
Look at images with other vision models, and say what they see in the words that a MoAI-style model reads. With an image:
print the text, and with --show draw a picture of it. With data files and --out: keep what is seen in all their images, for
training; the same command goes on after a stop."""
_EPILOG = """\
examples:
  unimoe perceive photo.jpg --show                        text in the image (pip install 'unimoe[perception]')
  unimoe perceive photo.jpg --segment --detect --show     the models that MoAI used, from the Hub
  unimoe perceive photo.jpg --detect MODEL --names things.txt --relate rules
  unimoe perceive train.jsonl --out seen                  results for training

--relate rules is a stand-in that only knows where boxes are; a scene graph model: see docs/perception.md."""


def add_parser(subparsers: Any) -> None:
    """Add the command to `unimoe`."""
    parser = subparsers.add_parser(
        "perceive",
        help="see an image as other vision models do",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("input", nargs="+", metavar="IMAGE|DATA", help="one image, or data files (.jsonl, .json)")
    parser.add_argument("--show", nargs="?", const="", metavar="FILE", help="draw a picture (default: IMAGE.seen.png)")
    parser.add_argument("--out", metavar="CACHE", help="of data files: the folder that keeps the results")
    models = add_perception_options(parser, "what looks (M: Hub id or folder; default: --text rapidocr alone)")
    models.add_argument("--replay", metavar="FILE", help="recorded results in place of all models")
    more = parser.add_argument_group("options")
    more.add_argument("--device", default="cpu", help="e.g. cuda; text is read on the CPU (default: cpu)")
    more.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    more.add_argument("--batch-size", type=positive, default=8, metavar="N", help="images at a time (default: 8)")
    more.add_argument("--media-root", metavar="DIR", help="of data files: folder that holds the media")
    more.add_argument("--json", action="store_true", help="of an image: print the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Look at an image, or fill a cache; returns the exit code."""
    from ..errors import OptionError

    is_data = [Path(name).suffix.lower() in DATA_SUFFIXES for name in args.input]
    if all(is_data) and args.out is not None:
        if args.show is not None:
            raise OptionError("--show draws one image: name that image in place of the data.")
        return _run_data(args)
    if any(is_data) or len(args.input) > 1 or args.out is not None:
        raise OptionError("Name one image; or data files (.jsonl, .json) with --out CACHE.")
    return _run_image(args)


def _run_image(args: argparse.Namespace) -> int:
    import json

    from ..errors import OptionError
    from ..processing.media_unimoe import load_image
    from ..processing.perception.picture import perception_picture
    from ..processing.perception.verbalize import verbalize

    file = Path(args.input[0])
    image = load_image(str(file), where=str(file))
    perceiver, rules = chosen_perceiver(args), chosen_models(args).rules
    (seen,) = perceiver.perceive([image])
    text = verbalize(seen, rules)
    print(json.dumps(seen.to_json(), ensure_ascii=False) if args.json else _printable(text))
    if args.show is not None:
        target = Path(args.show or file.with_suffix(".seen.png").name)
        try:
            perception_picture(image, seen, rules).save(target)
        except (OSError, ValueError) as error:
            raise OptionError(f"{target} cannot be written ({error}): name a file that ends in .png.") from error
        print(f"Drawn in {target}")
    return 0


def _run_data(args: argparse.Namespace) -> int:
    from ..processing.media_policy_unimoe import MediaPolicy
    from ..trainers.caches.perceive_data import carry_out, data_samples, open_cache, plan_perception

    perceiver = chosen_perceiver(args)
    samples = data_samples(args.input, args.media_root)
    policy = MediaPolicy(media_root=args.media_root)
    cache = open_cache(args.out, perceiver, policy)
    if args.replay is None:
        chosen_models(args).save(cache.folder)  # for models that are trained from it
    plan = plan_perception(samples, cache)
    print(f"{plan.samples:,} samples with {plan.images:,} images, {plan.known:,} of them in {cache.folder} already")
    for task, adapter in perceiver.identity().items():
        print(f"  {task}: {_in_short(adapter)}")
    print(f"{len(plan.missing):,} to do", flush=True)
    done = carry_out(plan, perceiver, cache, args.batch_size)
    print(f"{done:,} images perceived; {len(cache):,} in {cache.folder}")
    for image, reason in plan.unreadable[:5]:
        print(f"  not readable: {_printable(image)}: {reason}")
    if len(plan.unreadable) > 5:
        print(f"  and {len(plan.unreadable) - 5} more")
    return EXIT_PROBLEMS if plan.unreadable else 0


def chosen_perceiver(args: argparse.Namespace) -> "Perceiver":
    """The perceiver that the options ask for; nothing is loaded yet."""
    if args.replay is None:
        return chosen_models(args).perceiver(args.device, args.dtype, args.batch_size)
    from ..processing.perception.perceiver import ORIGINAL_SIDE, Perceiver
    from ..processing.perception.replay import Replay

    replay = Replay(args.replay)
    adapters: dict[str, Any] = dict.fromkeys(replay.tasks, replay)
    return Perceiver(**adapters, stretch_to=ORIGINAL_SIDE if args.original else None)


def _in_short(adapter: Any) -> str:
    if not isinstance(adapter, dict):
        return str(adapter)
    return ", ".join(f"{k} {len(v)}" if isinstance(v, list | tuple) else f"{k} {v}" for k, v in adapter.items())


def _printable(text: str) -> str:
    """What an image holds may be anything; a terminal must not act on it."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
