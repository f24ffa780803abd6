"""The report of a run: report.md and report.html, the latter in one file."""

import html
from collections.abc import Sequence
from pathlib import Path

from ..noise.modality_bias import Bias, modality_bias
from ..task_result import TaskResult
from .plots import plot_gains, plot_modality
from .table import HEADER, markdown_table, table_rows

_NOTES = (
    "The interval holds 95 % of 2,000 bootstrap samples; items that share a picture or a recording are drawn together "
    "(groups). Where all items are right, or none is, the exact bound of a share stands instead. Chance is what guessing "
    "among the options reaches, majority what one and the same answer to everything does. Failed items (missing or "
    "unreadable media) are not in the score."
)
_BIAS_NOTE = (
    "Performance bias across modalities, of which the abstract of Uni-MoE speaks (Li et al. 2024, arXiv:2405.11273) "
    "without a formula, is defined here as the largest gain of a modality minus the smallest. Gain is (score - base) / "
    "(best - base), averaged over the modality's tasks; base is chance, or the most frequent answer where chance is not "
    "known, else 0."
)
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;font-size:14px;display:block;overflow-x:auto}"
    "th,td{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:left;white-space:nowrap}"
    "svg{max-width:100%;height:auto}"
)


def write_report(results: Sequence[TaskResult], model: str, out: Path) -> list[Path]:
    """Write report.md, report.html and one SVG per modality; returns the first two."""
    by_modality: dict[str, list[TaskResult]] = {}
    for result in results:
        by_modality.setdefault(result.modality, []).append(result)
    plots = {name: plot_modality(members) for name, members in by_modality.items()}
    bias = modality_bias(results)
    if bias is not None:
        plots["gain over chance"] = plot_gains(bias)
    files = {name: f"{name.replace(' ', '_')}.svg" for name, svg in plots.items() if svg}
    (out / "plots").mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        (out / "plots" / file).write_text(plots[name], encoding="utf-8")
    pages = [out / "report.md", out / "report.html"]
    pages[0].write_text(_markdown(results, model, files, bias), encoding="utf-8")
    pages[1].write_text(_html(results, model, plots, bias), encoding="utf-8")
    return pages


def bias_sentence(bias: Bias) -> str:
    """The bias in one sentence."""
    order = sorted(bias.gains.items(), key=lambda named: named[1][0])
    return (
        f"Bias {bias.value:.2f} (95 % interval {bias.low:.2f} to {bias.high:.2f}): best is {order[-1][0]} with a gain of "
        f"{order[-1][1][0]:.2f}, worst {order[0][0]} with {order[0][1][0]:.2f}."
    )


def _markdown(results: Sequence[TaskResult], model: str, files: dict[str, str], bias: Bias | None) -> str:
    parts = [f"# Evaluation of {model}", markdown_table([HEADER, *table_rows(results)]), _NOTES]
    for name, file in files.items():
        if name != "gain over chance":
            parts += [f"## {name.capitalize()}", f"![Scores of {name} tasks](plots/{file})"]
    if bias is not None:
        parts += ["## Bias across modalities", bias_sentence(bias)]
        parts += [f"![Gain over chance by modality](plots/{files['gain over chance']})", _BIAS_NOTE]
    return "\n\n".join(parts) + "\n"


def _html(results: Sequence[TaskResult], model: str, plots: dict[str, str], bias: Bias | None) -> str:
    title = f"Evaluation of {html.escape(model)}"
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in HEADER)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table_rows(results)
    )
    parts = [f"<h1>{title}</h1>", f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"]
    parts.append(f"<p>{html.escape(_NOTES)}</p>")
    for name, svg in plots.items():
        if svg and name != "gain over chance":
            parts.append(f"<h2>{html.escape(name.capitalize())}</h2>{svg}")
    if bias is not None:
        sentences = f"<p>{html.escape(bias_sentence(bias))}</p>", f"<p>{html.escape(_BIAS_NOTE)}</p>"
        parts.append(f"<h2>Bias across modalities</h2>{sentences[0]}{plots['gain over chance']}{sentences[1]}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )
