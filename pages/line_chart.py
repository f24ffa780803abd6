"""Curves as SVG inside the page, small enough to stand side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .html_page import escape

COLOURS = (
    "#2563eb",
    "#d97706",
    "#059669",
    "#db2777",
    "#7c3aed",
    "#0891b2",
    "#65a30d",
    "#dc2626",
    "#475569",
    "#a16207",
)
_WIDTH, _HEIGHT = 340.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 8.0, 8.0, 24.0
_MOST_POINTS = 240


@dataclass(frozen=True)
class Curve:
    """One line: points (x, y) in order of x, None where y is unknown; `dashed` for what others are compared with."""

    name: str
    points: Sequence[tuple[float, float | None]]
    dashed: bool = False


def line_chart(title: str, curves: Sequence[Curve], x_name: str = "step", from_zero: bool = False) -> str:
    """A chart with its key; "" when no curve has a point."""
    drawn = [(curve, _thinned(curve.points)) for curve in curves]
    drawn = [(curve, points) for curve, points in drawn if points]
    if not drawn:
        return ""
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    low, high = min([0.0, *ys] if from_zero else ys), max(ys)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    x_low, x_high = min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for tick in ticks:
        y = place(x_low, tick)[1]
        parts.append(
            f'<path d="M{_LEFT:.0f} {y:.1f}H{_WIDTH - _RIGHT:.0f}" stroke="var(--line)"/>'
            f'<text x="{_LEFT - 5:.0f}" y="{y + 4:.1f}" text-anchor="end">{_figure(tick)}</text>'
        )
    for x, anchor in ((x_low, "start"), (x_high, "end"))[: 2 if x_high > x_low else 1]:
        parts.append(
            f'<text x="{place(x, low)[0]:.0f}" y="{_HEIGHT - 7:.0f}" text-anchor="{anchor}">{_figure(x)}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + _WIDTH) / 2:.0f}" y="{_HEIGHT - 7:.0f}" text-anchor="middle">{escape(x_name)}</text>'
    )
    parts += [_line(curve, [place(*p) for p in points], COLOURS[i % 10]) for i, (curve, points) in enumerate(drawn)]
    return (
        f'<h3>{escape(title)}</h3>{_key(drawn)}<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _line(curve: Curve, places: list[tuple[float, float]], colour: str) -> str:
    if len(places) == 1:
        return f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3" fill="{colour}"/>'
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dash = ' stroke-dasharray="5 4"' if curve.dashed else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.7" stroke-linejoin="round"{dash}/>'


def _key(drawn: list[tuple[Curve, list[tuple[float, float]]]]) -> str:
    """The names with the last value of each."""
    parts = []
    for index, (curve, points) in enumerate(drawn):
        colour = COLOURS[index % len(COLOURS)]
        mark = (
            f'<i class=dashed style="border-color:{colour}"></i>'
            if curve.dashed
            else f'<i style="background:{colour}"></i>'
        )
        name = f"{escape(curve.name)} " if curve.name else ""
        parts.append(f"<span>{mark}{name}{_figure(points[-1][1])}</span>")
    return f"<div class=key>{' '.join(parts)}</div>"


def _thinned(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float]]:
    """Known, finite points; means of neighbours where they are many."""
    known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    size = max(1, math.ceil(len(known) / _MOST_POINTS))
    bins = [known[i : i + size] for i in range(0, len(known), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in bins]


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers around the values."""
    if high <= low:
        low, high = (low - 0.5 * abs(low), high + 0.5 * abs(high)) if low else (0.0, 1.0)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _figure(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
