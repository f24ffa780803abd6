"""`inspect.html`: what a model's experts do, from the figures in `inspect.json`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..pages.heat_map import heat_map
from ..pages.html_page import Html, cards, escape, grid, heading, items, section, table, write_page
from ..pages.line_chart import COLOURS
from .usage import Passage

PAGE_FILE = "inspect.html"
# Passages are shown for so many layers, spread over the depth.
_PASSAGE_LAYERS = 3


def write_model_page(folder: Path, facts: dict[str, Any], passages: Sequence[Passage] = ()) -> Path:
    """Draw the page into a folder; what `facts` lacks is left out."""
    return write_page(
        folder / PAGE_FILE,
        f"Inside {facts['model']}",
        [
            heading(f"Inside {facts['model']}", _note(facts)),
            _summary(facts),
            _changes(facts),
            _loads(facts),
            _tasks(facts),
            _entropies(facts),
            _dead(facts),
            _together(facts),
            _words(facts),
            _passages(facts, passages),
            _skipped(facts),
        ],
    )


def _note(facts: dict[str, Any]) -> str:
    parts = [f"data: {', '.join(facts['data'])}"] if facts.get("data") else []
    if facts["experts"] != _experts(facts):
        parts.append(f"experts: {', '.join(facts['experts'])}")
    return "; ".join(parts + ([f"compared with {facts['compared_with']}"] if facts.get("compared_with") else []))


def _summary(facts: dict[str, Any]) -> str:
    figures = [("sparse layers", f"{len(facts['layers'])}"), ("experts per layer", f"{len(facts['experts'])}")]
    if "load" in facts:
        known = [value for value in facts["entropy"]["all"] if value is not None]
        ratios = [value for value in facts["max_load_ratio"] if value is not None]
        tokens = sum(sum(by_modality.values()) for by_modality in facts["tokens"].values())
        figures += [
            ("samples", f"{sum(facts['samples'].values()):,}"),
            ("tokens", f"{tokens:,}"),
            ("mean load entropy", f"{sum(known) / len(known):.2f}" if known else "-"),
            ("largest load, times even", f"{max(ratios):.2f}" if ratios else "-"),
            ("dead experts", f"{sum(map(len, facts['dead_experts']))}"),
        ]
    if "duplicate_experts" in facts:
        figures.append(("duplicate pairs", f"{sum(map(len, facts['duplicate_experts']))}"))
    return cards(figures)


def _loads(facts: dict[str, Any]) -> str:
    if "load" not in facts:
        return ""
    panels = [_load_map(facts, modality, rows) for modality, rows in facts["load"].items()]
    return section(
        "Expert load per layer and modality",
        "Percent of the choices of a modality's tokens that each expert received; rows sum to 100. The shade is full "
        f"from three times an even load on ({100 * _full(facts):.0f} %).",
        grid(panels, narrow=True),
    )


def _tasks(facts: dict[str, Any]) -> str:
    if len(facts.get("load_by_task", ())) < 2:
        return ""
    panels = [
        _load_map(facts, f"{task}: {modality}", rows)
        for task, by_modality in facts["load_by_task"].items()
        for modality, rows in by_modality.items()
    ]
    details = f"<details><summary class=note>{len(panels)} tables</summary>{grid(panels, narrow=True)}</details>"
    return section(
        "The same for each task", "The tokens of a modality apart for the tasks that they came in.", details
    )


def _load_map(facts: dict[str, Any], title: str, rows: Sequence[Sequence[float]]) -> str:
    return heat_map(title, _layers(facts), _experts(facts), rows, _full(facts))


def _entropies(facts: dict[str, Any]) -> str:
    if "entropy" not in facts:
        return ""
    names = list(facts["entropy"])
    rows = [list(row) for row in zip(*facts["entropy"].values(), strict=True)]
    panels = [
        heat_map("load entropy", _layers(facts), names, rows, 1.0, "{:.2f}".format),
        heat_map(
            "load, times an even one", _layers(facts), _experts(facts), facts["load_ratio"], 3.0, "{:.1f}".format
        ),
    ]
    used = facts["experts_per_token"]
    if len({round(value, 3) for row in used.values() for value in row}) > 1:
        by_layer = list(zip(*used.values(), strict=True))
        most = max(max(row) for row in by_layer)
        panels.append(heat_map("experts per token", _layers(facts), list(used), by_layer, most, "{:.2f}".format))
    if any(any(row) for row in facts["null_expert_share"].values()):
        by_layer = list(zip(*facts["null_expert_share"].values(), strict=True))
        panels.append(heat_map("null choices, percent", _layers(facts), list(used), by_layer, 1.0))
    return section(
        "Balance",
        "Entropy 1 is an even load over the experts that a modality may use. A model whose tokens use k of E experts "
        "cannot go below log k / log E. A dot stands where too few tokens were seen.",
        grid(panels, narrow=True),
    )


def _dead(facts: dict[str, Any]) -> str:
    parts = []
    if "dead_experts" in facts:
        dead = [
            f"layer {n}: expert {e}"
            for n, experts in zip(facts["layers"], facts["dead_experts"], strict=True)
            for e in experts
        ]
        parts.append(items(dead, "bad") or "<p class=good>No expert is dead on these data.</p>")
    if "duplicate_experts" in facts:
        pairs = [
            f"layer {n}: experts {a} and {b} have nearly equal weights"
            for n, found in zip(facts["layers"], facts["duplicate_experts"], strict=True)
            for a, b in found
        ]
        parts.append(items(pairs, "bad") or "<p class=good>No two experts of a layer have nearly equal weights.</p>")
        maps = [
            heat_map(f"layer {n}: distance", _experts(facts), _experts(facts), rows, 1.5, "{:.2f}".format)
            for n, rows in zip(facts["layers"], facts["expert_distances"], strict=True)
        ]
        parts.append(grid(maps, narrow=True))
    return section(
        "Dead and duplicate experts",
        "Dead: less than 1 % of an even load. Duplicate: weights closer than a thousandth of their size. Distances are "
        "|a - b| over the size of the weights: 0 equal, about 1.4 unrelated.",
        *parts,
    )


def _together(facts: dict[str, Any]) -> str:
    if "co_activation" not in facts:
        return ""
    maps = [
        heat_map(f"layer {n}", _experts(facts), _experts(facts), _without_diagonal(rows), 1.0)
        for n, rows in zip(facts["layers"], facts["co_activation"], strict=True)
    ]
    return section(
        "Co-activation",
        "Of the tokens that chose the row's expert, the percent that chose the column's too.",
        grid(maps, narrow=True),
    )


def _words(facts: dict[str, Any]) -> str:
    if not any(words for row in facts.get("favourite_words", ()) for words in row):
        return ""
    panels = []
    for layer, row in zip(facts["layers"], facts["favourite_words"], strict=True):
        rows = [(name, Html(_word_list(words))) for name, words in zip(facts["experts"], row, strict=True)]
        panels.append(f"<h3>layer {layer}</h3>{table(('expert', 'words'), rows, left=(0, 1))}")
    return section(
        "Words that experts take",
        "Text tokens that an expert gets far more often than its share of all text; percent of the token's own choices.",
        grid(panels),
    )


def _word_list(words: Sequence[dict[str, Any]]) -> str:
    """Words with a mark in place of a space, which else would not be seen."""
    marked = [(_shown(word["text"].replace(" ", "\u2423")), f"{100 * word['share']:.0f}&nbsp;%") for word in words]
    return ", ".join(f"<mark>{text}</mark>&nbsp;{share}" for text, share in marked) or "-"


def _passages(facts: dict[str, Any], passages: Sequence[Passage]) -> str:
    layers = facts["layers"]
    count = min(_PASSAGE_LAYERS, len(layers))
    shown = [layers[i * (len(layers) - 1) // max(1, count - 1)] for i in range(count)]
    panels = []
    for passage in passages:
        lines = "".join(
            f"<div class=piece><span class=note>layer {layer}</span> {_coloured(passage, layer)}</div>"
            for layer in dict.fromkeys(shown)
        )
        panels.append(f"<h3>{escape(passage.task)}</h3>{lines}")
    key = " ".join(
        f'<span><i style="background:{COLOURS[i % len(COLOURS)]}"></i>{escape(name)}</span>'
        for i, name in enumerate(facts["experts"])
    )
    return section(
        "Tokens and their experts",
        "The first sample of every task; each token has the colour of the expert that weighs most in it.",
        f"<div class=key>{key}</div>" if panels else "",
        grid(panels),
    )


def _coloured(passage: Passage, layer: int) -> str:
    return "".join(
        f'<mark style="background:{COLOURS[expert % len(COLOURS)]}55">{_shown(piece)}</mark>'
        for piece, expert in zip(passage.pieces, passage.best[layer], strict=True)
    )


def _changes(facts: dict[str, Any]) -> str:
    if "weights" not in facts:
        return ""
    changes = facts["weights"]
    rows = [
        (
            r["role"],
            f"{r['changed']} of {r['tensors']}",
            f"{r['parameters']:,}",
            f"{100 * r['relative']:.2f} %" if r["changed"] else "none",
            f"{r['largest']:.1e}" if r["changed"] else "0",
        )
        for r in changes["roles"]
    ]
    panels = []
    if changes["routers"]:
        names = [f"layer {router['layer']}" for router in changes["routers"]]
        cosines = [router["row_cosines"] for router in changes["routers"]]
        columns = [str(i) for i in range(max(map(len, cosines)))]
        drift = [[router["drift"]] for router in changes["routers"]]
        panels.append(heat_map("router drift", names, ["drift"], drift, 1.0, "{:.2f}".format))
        panels.append(heat_map("cosine of each gate row", names, columns, cosines, 1.0, "{:.2f}".format))
    if "moved" in facts:
        moved = [list(row) for row in zip(*facts["moved"].values(), strict=True)]
        panels.append(heat_map("percent of choices that moved", _layers(facts), list(facts["moved"]), moved, 0.5))
        panels += [_gain_map(facts, modality) for modality in facts["load"]]
    return section(
        f"What changed since {facts['compared_with']}",
        "Change is |difference| over the weights' size before. Drift of a router likewise, over the larger of both. The "
        "tables of a modality show by how many percent points each expert's load rose or fell.",
        items(changes["unmatched"], "bad"),
        table(("role", "tensors that differ", "parameters", "change", "largest"), rows),
        grid(panels, narrow=True),
    )


def _gain_map(facts: dict[str, Any], modality: str) -> str:
    before = facts["load_before"].get(modality)
    if before is None:
        return ""
    gains = [
        [now - then for now, then in zip(*pair, strict=True)]
        for pair in zip(facts["load"][modality], before, strict=True)
    ]
    return heat_map(
        f"{modality}: load, percent points", _layers(facts), _experts(facts), gains, 0.3, lambda v: f"{100 * v:+.0f}"
    )


def _skipped(facts: dict[str, Any]) -> str:
    lines = [f"{sample['id']}: {sample['reason']}" for sample in facts.get("skipped", ())]
    more = [f"... and {len(lines) - 20} more, in inspect.json"] if len(lines) > 20 else []
    return section("Samples that could not be read", "They count nowhere.", items(lines[:20] + more))


def _without_diagonal(rows: Sequence[Sequence[float]]) -> list[list[float | None]]:
    return [[None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(rows)]


def _shown(text: str) -> str:
    """A token with its line ends to be seen."""
    return escape(text.replace("\n", "\u23ce") or "\u2205")


def _layers(facts: dict[str, Any]) -> list[str]:
    return [f"layer {layer}" for layer in facts["layers"]]


def _experts(facts: dict[str, Any]) -> list[str]:
    return [str(index) for index in range(len(facts["experts"]))]


def _full(facts: dict[str, Any]) -> float:
    return min(1.0, 3 / max(1, len(facts["experts"])))
