"""`unimoe train RECIPE.yaml`: a curriculum from a file; the same command goes on after a stop."""

import argparse
import os
from pathlib import Path
from typing import Any

from ._beforehand import require_file

_DESCRIPTION = """\
Run the stages of a recipe in order. Stages that are done are skipped and a stopped one goes on from its last complete
checkpoint, so the same command may be given again at any time. trainers/recipes/unimoe_three_stages.yaml is a recipe
to copy; every field is explained there."""


def add_parser(subparsers: Any) -> None:
    """Add the command to `unimoe`."""
    parser = subparsers.add_parser(
        "train",
        help="run or go on with a training recipe",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="a YAML file")
    parser.add_argument("--out", help="folder of the results, in place of the recipe's")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="override a field, e.g. seed=1 or connectors.steps=100 (stage name, field); may be repeated",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print what would be done, with tokens, memory and time, and stop; reads configurations and data, no weights",
    )
    parser.add_argument(
        "--tokens-per-second",
        type=float,
        metavar="N",
        help="speed of all devices together, for the plan's time where none was measured",
    )


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    require_file("The recipe", args.recipe)
    from ..trainers.recipe.recipe_file import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if args.out is not None:
        recipe.out = str(Path(args.out).absolute())
    speaks = os.environ.get("RANK", "0") == "0"  # one of the ranks of a parallel run
    if speaks:
        _print_plan(recipe, args)
    if args.plan:
        return 0
    from ..trainers.curriculum import run_curriculum

    reports = run_curriculum(recipe, on_stage_start=_print_stage)
    if not speaks:
        return 0
    for report in reports:
        print(
            f"{report.name}: {report.steps} steps in {report.seconds:.0f} s, {report.trainable_parameters:,} parameters, "
            f"loss {report.loss_first:.3f} -> {report.loss_last:.3f}"
        )
    print(f"The trained model is in {reports[-1].model}")
    return 0


def _print_plan(recipe: Any, args: argparse.Namespace) -> None:
    from ..trainers.planning.memory_plan import degrees_of
    from ..trainers.planning.plan import missing_files
    from ..trainers.planning.plan_text import format_plan
    from ..trainers.planning.run_plan import plan_run

    # A run that lacks its data says so itself, and at once.
    brief = not args.plan and bool(missing_files(recipe))
    plan = plan_run(recipe, degrees_of(recipe.parallel), args.tokens_per_second, brief)
    print(format_plan(recipe, plan), flush=True)


def _print_stage(name: str, rows: Any, steps: int) -> None:
    from ..trainers.steps.trainable import format_trainable_table

    print(f"\n{name}: {steps} steps\n{format_trainable_table(rows)}", flush=True)
