"""What a run leaves: DIR/model, DIR/metrics.json, DIR/report.html, and the table on screen."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..conversion.checkpoints.parameters import count_parameters
from ..conversion.publishing.hub import save_bundle
from ..conversion.publishing.model_card import model_card
from ..modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..processing.processing_unimoe import UniMoeProcessor
from ..trainers.saving.checkpoints import write_durably
from ..trainers.stages.stage import StageReport
from .accuracy_table import accuracy_rows
from .evaluate import TASKS, Answer
from .parts import Part
from .report import write_report
from .run import METRICS_FILE, Quickstart

LIMITS = (
    "The default decoder has about 4 M parameters and knows only the corpus's English. --preset smollm2 runs the same "
    "stages on a pretrained 135 M model, which takes hours instead of minutes on a CPU.",
    "No pretrained BEATs comes as a package, so sounds go through the Whisper encoder and a connector of their own. A "
    "BEATs tower with its Q-Former is a matter of configuration.",
    "Towers are frozen and run once per medium: only pictures are seen in several random compositions.",
    "Audio windows are 3 seconds long instead of 30, because the corpus's clips are short.",
)
EXAMPLES_PER_TASK = 3
STAGE_FIELDS = ("name", "seconds", "steps", "trainable_parameters", "loss_first", "loss_last")


@dataclass
class Outcome:
    """A finished run: the content of metrics.json, and what the report and the screen show beside it.

    Args:
        router_load: the record of router_load.json: "layers", names of the "experts", and by name the "modalities", each
            a table [layers][experts] of shares.
        examples: see `example_rows`; `said` are their questions answered by the saved folder in a fresh process.
    """

    metrics: dict[str, Any]
    reports: list[StageReport]
    parts: list[Part]
    router_load: dict[str, Any]
    examples: list[dict[str, Any]]
    said: list[str]


def stage_metrics(report: StageReport) -> dict[str, Any]:
    fields = asdict(report)
    return {name: fields[name] for name in STAGE_FIELDS}


def example_rows(answers: list[Answer]) -> list[dict[str, Any]]:
    """Some held-out items of every task, evenly spread and not chosen by their answers."""
    rows = []
    for task in TASKS:
        of_task = [answer for answer in answers if answer.sample["task"] == task]
        for answer in of_task[:: max(1, -(-len(of_task) // EXAMPLES_PER_TASK))]:
            content = answer.sample["messages"][0]["content"]
            rows.append(
                {
                    "task": task,
                    "messages": answer.sample["messages"],
                    "question": next(item["text"] for item in content if item["type"] == "text"),
                    "truth": answer.truth,
                    "media": [(item["type"], item["path"]) for item in content if item["type"] != "text"],
                }
            )
    return rows


def save_model_folder(
    run: Quickstart,
    model: UniMoeForCausalLM,
    processor: UniMoeProcessor,
    metrics: dict[str, Any],
    router_load: dict[str, Any],
    parts: list[Part],
) -> None:
    """The folder that `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` loads."""
    card = model_card(
        "unimoe quickstart",
        model.config,
        count_parameters(model.config),
        sections={"Held-out accuracy": _accuracy_markdown(metrics), "Parts": _parts_markdown(parts)},
    )
    folder = run.out / "model"
    save_bundle(model, processor, folder, card)
    (folder / "router_load.json").write_text(json.dumps(router_load, indent=1), encoding="utf-8")


def write_results(run: Quickstart, outcome: Outcome) -> None:
    """metrics.json and report.html."""
    metrics = outcome.metrics
    details = {
        "loss_curves": _loss_curves(run, outcome.reports),
        "router_load": outcome.router_load,
        "parts": [(part.name, part.licence, part.source, part.digest[:16]) for part in outcome.parts],
        "examples": [{**row, "answer": text} for row, text in zip(outcome.examples, outcome.said, strict=True)],
        "limits": LIMITS,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }
    write_report(run.out, metrics, details)
    # Last: it says that the run is finished.
    write_durably(run.out / METRICS_FILE, json.dumps(metrics, indent=1))


def print_finished(run: Quickstart, metrics: dict[str, Any]) -> None:
    """The table of a run that an earlier attempt brought to its end."""
    print(f"{run.out} holds the finished result of this run; nothing is left to do.")
    _print_accuracy(metrics)
    run.say(f"Model: {run.out / 'model'}; look at {run.out / 'report.html'}")


def print_outcome(run: Quickstart, outcome: Outcome) -> None:
    """The table that a newcomer sees at the end, the answers of the saved folder, and where everything lies."""
    _print_accuracy(outcome.metrics)
    shown = set()
    for example, text in zip(outcome.examples, outcome.said, strict=True):
        if example["task"] in shown:
            continue
        shown.add(example["task"])
        verdict = "right" if text == example["truth"] else f"it is: {example['truth']}"
        run.say(f"  {example['task']:15s} {example['question']} -> {text} ({verdict})")
    run.say(f"Model: {run.out / 'model'}; look at {run.out / 'report.html'}")


def _print_accuracy(metrics: dict[str, Any]) -> None:
    header, rows = accuracy_rows(metrics)
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    print()
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    print(f"\n{metrics['seconds'] / 60:.1f} minutes, peak memory {metrics['peak_memory_bytes'] / 2**30:.1f} GiB\n")


def _loss_curves(run: Quickstart, reports: list[StageReport]) -> dict[str, list[tuple[int, float]]]:
    curves = {}
    for report in reports:
        root = run.work / ("language" if report.name == "stage0" else "stages") / report.name
        runs = [(inner.name, root / inner.name.split("/")[-1]) for inner in report.runs] or [(report.name, root)]
        for name, folder in runs:
            rows = [json.loads(line) for line in (folder / "losses.jsonl").read_text(encoding="utf-8").splitlines()]
            curves[name] = [(row["step"], row["ce_loss"]) for row in rows]
    return curves


def _accuracy_markdown(metrics: dict[str, Any]) -> str:
    header, rows = accuracy_rows(metrics)
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join([*lines, "", "Exact answers, generated freely as text, on things the model has never seen."])


def _parts_markdown(parts: list[Part]) -> str:
    return "\n".join(f"- {part.name} ({part.licence}), {part.source}, sha256 {part.digest}" for part in parts)
