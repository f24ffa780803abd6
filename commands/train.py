"""`unimoe train RECIPE.yaml`: a curriculum from a file; the same command goes on after a stop."""

import argparse
from typing import Any

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
    parser.add_argument("--plan", action="store_true", help="print what would be done, and stop")


def run(args: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    from pathlib import Path

    from ..trainers.curriculum import run_curriculum
    from ..trainers.moe_fit import require_fitting_moe
    from ..trainers.recipe_file import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if args.out is not None:
        recipe.out = str(Path(args.out).absolute())
    _print_plan(recipe)
    if args.plan:
        require_fitting_moe(recipe)
        return 0
    reports = run_curriculum(recipe, on_stage_start=_print_stage)
    for report in reports:
        print(
            f"{report.name}: {report.steps} steps in {report.seconds:.0f} s, {report.trainable_parameters:,} parameters, "
            f"loss {report.loss_first:.3f} -> {report.loss_last:.3f}"
        )
    print(f"The trained model is in {reports[-1].model}")
    return 0


def _print_plan(recipe: Any) -> None:
    from ..trainers.plan import missing_files, plan_curriculum

    print(f"From {recipe.model} to {recipe.out}, seed {recipe.seed}:")
    for row in plan_curriculum(recipe):
        limit = "" if row.seconds is None else f", at most {row.seconds:.0f} s"
        print(f"  {row.name}: {row.what}; {row.steps} steps of {row.batch_size} samples{limit}")
    for file in missing_files(recipe):
        print(f"  not there yet: {file}")


def _print_stage(name: str, rows: Any, steps: int) -> None:
    from ..trainers.trainable import format_trainable_table

    print(f"\n{name}: {steps} steps\n{format_trainable_table(rows)}", flush=True)
