"""One plot per modality: scores with intervals, beside chance and the most frequent answer."""

import io
from collections.abc import Sequence
from typing import Any

from ..noise.modality_bias import Bias
from ..task_result import TaskResult

_SCORE, _BASE, _MAJORITY = "#1f5fa8", "#8a8a8a", "#c4722a"
# Inches: of the figure, of its margins, and per task.
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM, _BAR = 8.8, 3.1, 0.1, 0.4, 0.55, 0.46


def plot_modality(results: Sequence[TaskResult]) -> str:
    """An SVG of the tasks of one modality that have a score and a best possible one; "" if there is none."""
    shown = [result for result in results if result.low is not None and result.best]
    if not shown:
        return ""
    figure, axes = _figure(len(shown))
    for place, result in enumerate(shown):
        scale = 100 / result.best
        score, low, high = (scale * value for value in (result.score, result.low, result.high))
        axes.barh(place, score, height=0.55, color=_SCORE, alpha=0.85)
        axes.plot([low, high], [place, place], color="black", linewidth=1.4, solid_capstyle="butt")
        for value, colour, style in ((result.chance, _BASE, "-"), (result.majority, _MAJORITY, (0, (2, 1.2)))):
            if value is not None:
                at = scale * value
                axes.plot([at, at], [place - 0.36, place + 0.36], color=colour, linewidth=2, linestyle=style)
        axes.text(max(high, score) + 1.2, place, f"{score:.1f}", va="center", fontsize=9)
    axes.set_yticks(range(len(shown)), [f"{result.title} (n = {result.n})" for result in shown])
    axes.set_xlabel("score, percent of the best possible")
    _legend(axes)
    return _svg(figure)


def plot_gains(bias: Bias) -> str:
    """An SVG of each modality's gain over its base."""
    figure, axes = _figure(len(bias.gains))
    for place, (low, high, gain) in enumerate((g[1], g[2], g[0]) for g in bias.gains.values()):
        axes.barh(place, 100 * gain, height=0.55, color=_SCORE, alpha=0.85)
        axes.plot([100 * low, 100 * high], [place, place], color="black", linewidth=1.4, solid_capstyle="butt")
        axes.text(100 * max(high, gain, 0) + 1.2, place, f"{100 * gain:.0f}", va="center", fontsize=9)
    axes.set_yticks(range(len(bias.gains)), list(bias.gains))
    axes.set_xlabel("gain over chance, percent of what is possible; line: 95 % interval")
    lowest = min(0.0, *(100 * gain[1] for gain in bias.gains.values()))
    axes.set_xlim(1.05 * lowest, 112)
    return _svg(figure)


def _figure(rows: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    height = _TOP + _BOTTOM + _BAR * rows
    figure = Figure(figsize=(_WIDTH, height))
    # The same margins in every plot, so that their axes stand below each other.
    axes = figure.add_axes((_LEFT / _WIDTH, _BOTTOM / height, 1 - (_LEFT + _RIGHT) / _WIDTH, _BAR * rows / height))
    axes.set_xlim(0, 112)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="x", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _legend(axes: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(color=_SCORE, alpha=0.85, label="score"),
        Line2D([], [], color="black", linewidth=1.4, label="95 % interval"),
        Line2D([], [], color=_BASE, linewidth=2, label="chance"),
        Line2D([], [], color=_MAJORITY, linewidth=2, linestyle=(0, (2, 1.2)), label="most frequent answer"),
    ]
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=9)


def _svg(figure: Any) -> str:
    stream = io.StringIO()
    # Neither dates nor random ids: the same results give the same file.
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "unimoe"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
