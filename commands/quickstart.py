"""`unimoe quickstart`: from parts to a trained sparse multimodal model, with a report, in minutes on a CPU."""

import argparse
from pathlib import Path

EXAMPLES = """examples:
  unimoe quickstart                          at most 13 minutes; about 11 on two CPU cores with bfloat16 units
  unimoe quickstart --minutes 30 --seed 1    train longer
  unimoe quickstart --compare                afterwards train a dense model equally long, for comparison
  unimoe quickstart --preset smollm2 --minutes 600 --out smollm2-run

The same command goes on where a killed run stopped.
"""
DEFAULT_MINUTES = 13.0


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help="make and train a sparse multimodal model, with a report",
        description="Make, train and test a sparse multimodal model from a language model, an image encoder and Whisper.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart-out"), help="result folder (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=float, default=DEFAULT_MINUTES, help="time for everything (default: %(default)g)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness (default: %(default)s)")
    parser.add_argument("--preset", choices=["compact", "smollm2"], default="compact", help="which language model")
    parser.add_argument("--language-model", metavar="FOLDER|HUB_ID", help="a LLaMA-family model of your own")
    parser.add_argument("--vision-tower", metavar="FOLDER|HUB_ID", help="any vision encoder of transformers")
    parser.add_argument("--speech-tower", metavar="FOLDER|HUB_ID", help="a Whisper model")
    parser.add_argument(
        "--compare", action="store_true", help="also train a dense model on as many batches, after the --minutes"
    )


def run(args: argparse.Namespace) -> int:
    from ..progress_bars import transformers_bars
    from ..quickstart.pipeline import run_quickstart
    from ..quickstart.run import Quickstart
    from ..quickstart.schedule import budget_for, print_plan

    language_model = args.language_model or ("default" if args.preset == "smollm2" else None)
    budget = budget_for(args.minutes)
    print_plan(budget, teach_language=language_model is None)
    with transformers_bars(shown=False):
        run_quickstart(
            Quickstart(
                out=args.out,
                seed=args.seed,
                budget=budget,
                language_model=language_model,
                vision_tower=args.vision_tower,
                speech_tower=args.speech_tower,
                compare=args.compare,
            )
        )
    return 0
