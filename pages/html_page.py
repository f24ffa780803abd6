"""Pages that are one file: no scripts, no fonts, nothing from a network; readable on a phone and in the dark."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_STYLE = """
:root{--ink:#1f2933;--soft:#5b6b7b;--line:#e1e6eb;--back:#fff;--panel:#f7f9fb;--heat:37 99 235;--less:217 119 6;--bad:#b42318;--good:#047857}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9fb0c0;--line:#2b3947;--back:#0f1720;--panel:#17212c;--heat:96 165 250;--less:251 146 60;--bad:#ff8a7a;--good:#5fd6a4}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:var(--ink);background:var(--back);max-width:76rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:.2rem 0;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:2.4rem 0 .3rem}h3{font-size:.95rem;margin:.2rem 0}
p{margin:.3rem 0 .8rem;max-width:52rem}.note{color:var(--soft);font-size:.92rem;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.6rem,1fr));gap:.6rem;margin:1rem 0}
.card{background:var(--panel);border:1px solid var(--line);border-radius:.6rem;padding:.5rem .7rem}
.card b{display:block;font-size:1.22rem;font-variant-numeric:tabular-nums;line-height:1.3}.card span{color:var(--soft);font-size:.84rem}
h3+.wide+h3{margin-top:.7rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(21rem,100%),1fr));gap:1rem;margin:.8rem 0}.narrow{grid-template-columns:repeat(auto-fill,minmax(min(17rem,100%),1fr))}
.panel{background:var(--panel);border:1px solid var(--line);border-radius:.6rem;padding:.7rem .8rem;min-width:0}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.86rem}
.plain{width:100%}.plain th,.plain td{padding:.28rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top;white-space:nowrap}
.plain th{color:var(--soft);font-weight:600}.plain td.left:not(:first-child){white-space:normal;overflow-wrap:anywhere}.plain th:first-child,.plain td:first-child,.plain .left{text-align:left}
.heat td{min-width:2.25rem;height:1.7rem;text-align:center;border:1px solid var(--back);padding:0 .15rem}
.heat th{font-weight:500;color:var(--soft);padding:0 .45rem 0 0;text-align:right;white-space:nowrap;font-size:.8rem}
.heat thead th{text-align:center;padding:.1rem;font-size:.74rem}.heat .strong{color:#fff}.heat .none{color:var(--soft);opacity:.6}
@media(prefers-color-scheme:dark){.heat .strong{color:#0b1220}}
svg{display:block;width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
.paper{background:#fff;border-radius:.6rem;padding:.4rem;max-width:52rem;margin:.8rem 0}
.key{font-size:.8rem;color:var(--soft);margin:.1rem 0 .2rem}.key i{display:inline-block;width:.8rem;height:.2rem;border-radius:1px;margin:0 .3rem .2rem 0}.key span{white-space:nowrap;margin-right:.6rem}
.key .dashed{height:0;border-top:2px dashed}
mark{border-radius:.2rem;padding:0 .1rem;background:rgb(var(--heat)/.28);color:inherit}.piece{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.86rem;margin:.25rem 0}
.bad{color:var(--bad)}.good{color:var(--good)}
"""


def write_page(file: Path, title: str, sections: Iterable[str]) -> Path:
    """Write a page; `sections` are HTML, the first of them usually `heading`."""
    body = "\n".join(section for section in sections if section)
    file.write_text(
        '<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,'
        f'initial-scale=1"><title>{escape(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n',
        encoding="utf-8",
    )
    return file


def escape(text: Any) -> str:
    """Any value as text that a page shows as it is; control characters are shown by their codes."""
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))
    return html.escape(shown)


def heading(title: str, note: str = "") -> str:
    return f"<h1>{escape(title)}</h1>" + (f"<p class=note>{escape(note)}</p>" if note else "")


def section(title: str, note: str, *parts: str) -> str:
    """A heading with what to see below it; "" when there is nothing below."""
    inside = "".join(parts)
    return f"<h2>{escape(title)}</h2><p class=note>{escape(note)}</p>{inside}" if inside else ""


def cards(figures: Iterable[tuple[str, str]]) -> str:
    """Single figures: pairs of name and value."""
    inside = "".join(
        f"<div class=card><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in figures
    )
    return f"<div class=cards>{inside}</div>"


def grid(panels: Iterable[str], narrow: bool = False) -> str:
    """Panels side by side where there is room; "" for none."""
    inside = "".join(f"<div class=panel>{panel}</div>" for panel in panels if panel)
    return f"<div class='grid{' narrow' if narrow else ''}'>{inside}</div>" if inside else ""


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], left: Sequence[int] = (0,)) -> str:
    """A table of figures; columns in `left` hold words. Cells that are `Html` stay as they are."""

    def cells(tag: str, row: Sequence[Any]) -> str:
        return "".join(
            f"<{tag}{' class=left' if i in left else ''}>{value if isinstance(value, Html) else escape(value)}</{tag}>"
            for i, value in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<div class=wide><table class=plain><thead><tr>{cells('th', header)}</tr></thead><tbody>{body}</tbody></table></div>"


def drawing(svg: str) -> str:
    """A picture that was drawn for white paper; "" for none."""
    return f"<div class=paper>{svg}</div>" if svg else ""


class Html(str):
    """Text that is HTML already."""


def items(lines: Iterable[str], kind: str = "") -> str:
    """A list of sentences."""
    inside = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul class='{kind}'>{inside}</ul>" if inside else ""
