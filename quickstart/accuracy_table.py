"""The table of accuracies, as cells: the screen, the model card and the report only join them."""

from typing import Any


def accuracy_columns(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What stands beside the final model's accuracy: the model after each stage and, with --compare, its dense twin."""
    twin = {"dense twin": metrics["dense_twin"]["accuracy"]} if "dense_twin" in metrics else {}
    return {**metrics["accuracy_by_stage"], **twin}


def accuracy_rows(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header, and one row per task that starts with the task's name.

    Args:
        metrics: the content of metrics.json.
    """
    columns = accuracy_columns(metrics)
    rows = []
    for task, row in metrics["heldout"].items():
        probe = _percent(row["probe_accuracy"])
        if row.get("pixel_probe_accuracy") is not None:
            probe += f" (pixels {_percent(row['pixel_probe_accuracy'])})"
        baselines = [_percent(row["chance"]), _percent(row["majority"]), probe]
        trail = [_percent(accuracy.get(task)) for accuracy in columns.values()]
        rows.append([task, str(row["n"]), *baselines, *trail, _percent(row["accuracy"])])
    return ["task", "n", "chance", "majority", "linear probe", *columns, "final"], rows


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
