"""`report.html`: what was trained, what it answers and which experts it used, with pictures inside the file."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

from ..processing.media_unimoe import load_image
from ..processing.media_video_unimoe import load_video
from .accuracy_table import accuracy_rows
from .stages import MOMENTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROBE_COLOUR, MODEL_COLOUR, BEFORE_COLOUR, CHANCE_COLOUR = "#9aa5b1", "#2563eb", "#93c5fd", "#dc2626"
TASK_TITLES = {
    "image": "image: what is in the picture",
    "speech": "speech: what is said",
    "sound": "sound: what sounds",
    "video_direction": "video: which way it moves",
    "video_object": "video: what moves",
    "text": "text: questions on unseen concepts",
}
SECONDS_AND_LOSSES = ("seconds", "loss_first", "loss_last")
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1f2933}
h1{margin-bottom:0}table{border-collapse:collapse;margin:1rem 0;width:100%}
td,th{padding:.3rem .5rem;border-bottom:1px solid #e4e7eb;text-align:right;vertical-align:top}
table.parts td{overflow-wrap:anywhere}
td:first-child,th:first-child{text-align:left}table.accuracy td:last-child{font-weight:bold}img{max-width:100%}.note{color:#52606d}
.card{display:inline-block;vertical-align:top;width:11rem;margin:.4rem;padding:.6rem;border:1px solid #e4e7eb;border-radius:.5rem}
.card img{height:5rem}.card audio{width:100%;height:2rem}.ok{color:#047857}.no{color:#b91c1c}
"""


def write_report(folder: Path, metrics: dict[str, Any], details: dict[str, Any]) -> Path:
    """Write `folder/report.html`.

    Args:
        metrics: the content of metrics.json.
        details: "loss_curves" {stage: [(step, loss)]}, "router_load" (see `Outcome`), "parts" (rows of name, licence,
            source, digest), "examples" (rows of task, question, answer, truth, media [(type, file)]), "limits"
            (sentences), "machine".
    """
    sections = [
        f"<h1>A sparse multimodal model, made in {metrics['seconds'] / 60:.1f} minutes</h1>",
        f"<p class=note>Seed {metrics['seed']}; {html.escape(details['machine'])}; peak memory "
        f"{metrics['peak_memory_bytes'] / 2**30:.1f} GiB. Every answer below was generated freely as text and counts "
        "only when it is exactly right.</p>",
        "<h2>Held-out accuracy</h2>",
        _picture(_accuracy_figure(metrics["heldout"], metrics["accuracy_by_stage"]), "accuracy per task"),
        _accuracy_table(metrics),
        "<h2>Some held-out answers</h2>",
        "".join(_example_card(example) for example in details["examples"]),
        "<h2>What each stage trained</h2>",
        _stage_table(metrics["stages"]),
        _picture(_loss_figure(details["loss_curves"]), "training loss per stage"),
        "<h2>Who answers: expert load per layer and modality</h2>",
        "<p class=note>Share of a modality's tokens that each expert received (rows sum to 100 %).</p>",
        _picture(_load_figure(details["router_load"]), "expert load"),
        "<h2>Upcycling</h2>",
        f"<p>Dense to sparse: largest difference of any logit {metrics['upcycling']['max_abs_logit_difference']:.1e} "
        "(float32).</p>",
        "<h2>Parts</h2>",
        _table(("part", "licence", "source", "digest"), details["parts"], "parts"),
        "<h2>What gave way to the time limit</h2>",
        "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in details["limits"]) + "</ul>",
    ]
    page = "\n".join(sections)
    path = folder / "report.html"
    path.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>unimoe quickstart</title><style>{STYLE}</style>"
        f"<body>{page}</body></html>",
        encoding="utf-8",
    )
    return path


def _accuracy_figure(heldout: dict[str, Any], by_stage: dict[str, dict[str, float]]) -> plt.Figure:
    tasks = list(heldout)
    figure, axes = plt.subplots(figsize=(10, 4.2), layout="constrained")
    before = by_stage.get(MOMENTS["stage2"], {})
    for offset, (label, colour, values) in enumerate(
        (
            ("linear probe on the frozen features", PROBE_COLOUR, [heldout[t]["probe_accuracy"] for t in tasks]),
            (MOMENTS["stage2"], BEFORE_COLOUR, [before.get(t) for t in tasks]),
            ("the model", MODEL_COLOUR, [heldout[t]["accuracy"] for t in tasks]),
        )
    ):
        heights = [100 * value if value is not None else 0 for value in values]
        axes.bar([i + 0.27 * (offset - 1) for i in range(len(tasks))], heights, 0.25, label=label, color=colour)
    for index, task in enumerate(tasks):
        majority = 100 * heldout[task]["majority"]
        axes.hlines(
            majority, index - 0.42, index + 0.42, CHANCE_COLOUR, label="majority answer" if index == 0 else None
        )
    axes.set(xticks=range(len(tasks)), xticklabels=[t.replace("_", "\n") for t in tasks], ylim=(0, 104), ylabel="%")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.12))
    return figure


def _loss_figure(curves: dict[str, list[tuple[int, float]]]) -> plt.Figure:
    figure, grid = plt.subplots(1, max(len(curves), 1), figsize=(10, 2.6), layout="constrained", squeeze=False)
    for axes, (stage, points) in zip(grid[0], curves.items(), strict=False):
        axes.plot([step for step, _ in points], [loss for _, loss in points], color=MODEL_COLOUR, linewidth=1.2)
        axes.set_title(stage, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("step", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("loss", fontsize=8)
    return figure


def _load_figure(record: dict[str, Any]) -> plt.Figure:
    load, layers, experts = record["modalities"], record["layers"], record["experts"]
    figure, grid = plt.subplots(1, len(layers), figsize=(10, 2.8), layout="constrained", squeeze=False)
    for column, layer in enumerate(layers):
        axes = grid[0][column]
        rows = [[100 * share for share in load[modality][column]] for modality in load]
        axes.imshow(rows, cmap="Blues", vmin=0, vmax=60, aspect="auto")
        for y, row in enumerate(rows):
            for x, share in enumerate(row):
                axes.text(x, y, f"{share:.0f}", ha="center", va="center", color="white" if share > 35 else "#1f2933")
        axes.set_title(f"layer {layer}")
        axes.set_xticks(range(len(experts)), [f"{i}: {name}" for i, name in enumerate(experts)], fontsize=8)
        axes.set_yticks(range(len(load)), list(load) if column == 0 else [""] * len(load))
    return figure


def _accuracy_table(metrics: dict[str, Any]) -> str:
    header, rows = accuracy_rows(metrics)
    return _table(header, [[TASK_TITLES[task], *cells] for task, *cells in rows], "accuracy")


def _stage_table(stages: list[dict[str, Any]]) -> str:
    rows = [
        (s["name"], f"{s['trainable_parameters']:,}", s["steps"], *(f"{s[key]:.2f}" for key in SECONDS_AND_LOSSES))
        for s in stages
    ]
    return _table(("stage", "trainable parameters", "steps", "seconds", "first loss", "last loss"), rows)


def _example_card(example: dict[str, Any]) -> str:
    media = "".join(_medium(kind, Path(path)) for kind, path in example["media"])
    right = example["answer"] == example["truth"]
    verdict = "" if right else f" <span class=note>(it is: {html.escape(example['truth'])})</span>"
    return (
        f"<div class=card>{media}<span class=note>{html.escape(example['task'])}</span><br>"
        f"{html.escape(example['question'])}<br><b class={'ok' if right else 'no'}>{html.escape(example['answer'])}</b>"
        f"{verdict}</div>"
    )


def _medium(kind: str, path: Path) -> str:
    """A picture, the first and the last frame of a video, or a player, all inside the page."""
    if kind == "audio":
        encoded = base64.b64encode(path.read_bytes()).decode()
        return f'<audio controls src="data:audio/{path.suffix[1:]};base64,{encoded}"></audio><br>'
    frames = [load_image(str(path))] if kind == "image" else [load_video(str(path))[i] for i in (0, -1)]
    return "".join(f'<img alt="" src="{_data_url(frame)}"> ' for frame in frames) + "<br>"


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table class='{kind}'><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    """Escaped; a figure stays on one line with its unit."""
    return html.escape(str(value)).replace(" %", "&nbsp;%")


def _picture(figure: plt.Figure, description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return f'<img alt="{description}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
