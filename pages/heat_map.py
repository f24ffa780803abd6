"""Heat maps as tables: every cell can be read, selected and heard, and nothing gets small on a phone."""

from collections.abc import Callable, Sequence

from .html_page import escape

Figure = float | None


def heat_map(
    title: str,
    row_names: Sequence[str],
    column_names: Sequence[str],
    rows: Sequence[Sequence[Figure]],
    full: float,
    text: Callable[[float], str] = lambda value: f"{100 * value:.0f}",
) -> str:
    """A table of shades.

    Args:
        rows: figures; None where nothing is known, which stays empty.
        full: the figure (of either sign) from which on a cell has its full shade; figures below 0 get another colour.
        text: what a cell says.
    """
    head = "<th></th>" + "".join(f"<th>{escape(name)}</th>" for name in column_names)
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(_cell(value, full, text) for value in row)}</tr>"
        for name, row in zip(row_names, rows, strict=True)
    )
    return (
        f"<h3>{escape(title)}</h3><div class=wide><table class=heat><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: Figure, full: float, text: Callable[[float], str]) -> str:
    if value is None:
        return "<td class=none>·</td>"
    strength = min(1.0, abs(value) / full) if full else 0.0
    colour = "--heat" if value >= 0 else "--less"
    strong = " class=strong" if strength > 0.75 else ""
    return f'<td{strong} style="background:rgb(var({colour})/{strength:.2f})">{escape(text(value))}</td>'
