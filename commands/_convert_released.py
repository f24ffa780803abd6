"""What conversions of released models, and back, do and print alike."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from ..conversion.released.import_plan import ImportPlan
    from ..conversion.released.import_receipt import ImportReceipt

    Plan = TypeVar("Plan", bound=ImportPlan)


def carry_out(args: argparse.Namespace, plan: "Plan", write: "Callable[[Plan, Path], ImportReceipt]") -> int:
    """Print the plan, convert to `args.out`, print the receipt, and upload where `args.push_to_hub` says."""
    from ..conversion.released.import_plan import push_import

    print("Plan", *plan.lines(), sep="\n  ", flush=True)
    receipt = write(plan, args.out)
    print("Receipt", *receipt.lines(), sep="\n  ")
    print(f"Saved in {args.out} (with receipt.json).", *(f"Warning: {text}" for text in plan.warnings), sep="\n")
    if args.push_to_hub is not None:
        print(f"Uploaded to {', '.join(push_import(receipt, args.out, args.push_to_hub))}")
    return 0


def report_export(args: argparse.Namespace, written: Iterable[str]) -> int:
    """Print what an export to `args.out` wrote."""
    print("Wrote", *written, sep="\n  ")
    print(f"Saved in {args.out}.")
    return 0
