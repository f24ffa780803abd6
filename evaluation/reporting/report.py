"""The report of a run: report.md and report.html, the latter in one file."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...pages.html_page import drawing, escape, heading, section, table, write_page
from ..noise.modality_bias import Bias, modality_bias
from ..task_result import TaskResult
from .plots import plot_gains, plot_modality
from .table import HEADER, few_items_note, markdown_table, table_rows

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
_BIAS_TITLE = "Bias across modalities"
_GAINS = "gain over chance"
_WORDS = [HEADER.index(name) for name in ("task", "modality", "scored by")]


def write_report(results: Sequence[TaskResult], model: str, out: Path) -> list[Path]:
    """Write report.md, report.html and one SVG per modality; returns the first two."""
    by_modality: dict[str, list[TaskResult]] = {}
    for result in results:
        by_modality.setdefault(result.modality, []).append(result)
    plots = {name: plot_modality(members) for name, members in by_modality.items()}
    bias = modality_bias(results)
    if bias is not None:
        plots[_GAINS] = plot_gains(bias)
    (out / "plots").mkdir(parents=True, exist_ok=True)
    for name, svg in plots.items():
        if svg:
            (out / _file_of(name)).write_text(svg, encoding="utf-8")
    title = f"Evaluation of {model}"
    markdown = out / "report.md"
    markdown.write_text(_markdown(title, by_modality, plots, bias), encoding="utf-8")
    return [markdown, write_page(out / "report.html", title, _sections(title, by_modality, plots, bias))]


def bias_sentence(bias: Bias) -> str:
    """The bias in one sentence."""
    order = sorted(bias.gains.items(), key=lambda named: named[1][0])
    return (
        f"Bias {bias.value:.2f} (95 % interval {bias.low:.2f} to {bias.high:.2f}): best is {order[-1][0]} with a gain of "
        f"{order[-1][1][0]:.2f}, worst {order[0][0]} with {order[0][1][0]:.2f}."
    )


def _few(by_modality: Mapping[str, Sequence[TaskResult]]) -> list[str]:
    note = few_items_note([result for results in by_modality.values() for result in results])
    return [note] if note else []


def _file_of(plot: str) -> str:
    return f"plots/{plot.replace(' ', '_')}.svg"


def _markdown(
    title: str, by_modality: Mapping[str, Sequence[TaskResult]], plots: Mapping[str, str], bias: Bias | None
) -> str:
    parts = [f"# {title}", _NOTES, *_few(by_modality)]
    for name, results in by_modality.items():
        parts += [f"## {name.capitalize()}", markdown_table([HEADER, *table_rows(results)])]
        if plots[name]:
            parts.append(f"![Scores of {name} tasks]({_file_of(name)})")
    if bias is not None:
        parts += [f"## {_BIAS_TITLE}", bias_sentence(bias)]
        parts += [f"![Gain over chance by modality]({_file_of(_GAINS)})", _BIAS_NOTE]
    return "\n\n".join(parts) + "\n"


def _sections(
    title: str, by_modality: Mapping[str, Sequence[TaskResult]], plots: Mapping[str, str], bias: Bias | None
) -> Iterator[str]:
    yield heading(title, _NOTES)
    for few in _few(by_modality):
        yield f"<p class=note>{escape(few)}</p>"
    for name, results in by_modality.items():
        yield section(name.capitalize(), "", table(HEADER, table_rows(results), left=_WORDS), drawing(plots[name]))
    if bias is not None:
        yield section(
            _BIAS_TITLE, bias_sentence(bias), drawing(plots[_GAINS]), f"<p class=note>{escape(_BIAS_NOTE)}</p>"
        )
