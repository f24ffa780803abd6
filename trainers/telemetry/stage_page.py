"""`report.html` of a stage: losses, rates, expert load, drift, speed and memory, from the files that the stage leaves."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ...modeling_unimoe.configuration_unimoe_text import MODALITIES, UniMoeTextConfig
from ...pages.heat_map import heat_map
from ...pages.html_page import cards, grid, heading, items, section, write_page
from ...pages.line_chart import Curve, line_chart
from ..data.bad_samples import FILE as BAD_SAMPLES_FILE
from ..steps.loss_meter import BALANCED
from .routing_figures import ExpertLoad, load_change, mean_of_known
from .telemetry import read_telemetry

PAGE_FILE = "report.html"
LOSSES_FILE = "losses.jsonl"
# "Before" and "after" are the loads of the first and of the last such share of the steps.
EDGE = 0.1
_MOST_CURVES = 8
Records = list[dict[str, Any]]


def write_stage_page(folder: Path, name: str, config: UniMoeTextConfig) -> Path | None:
    """Draw the page of a finished run; None when it has logged nothing."""
    lines = (folder / LOSSES_FILE).read_text(encoding="utf-8").splitlines()
    losses: Records = [json.loads(line) for line in lines if line.endswith("}")]
    records = read_telemetry(folder)
    if not losses:
        return None
    return write_page(
        folder / PAGE_FILE,
        f"{name}: training",
        [
            heading(
                name,
                f"{losses[-1]['step']:,} steps in {_duration(losses[-1]['seconds'])}; figures of this folder's logs",
            ),
            _summary(losses, records, folder),
            _alarms(records),
            _losses(losses),
            _routing(records, config),
            _machine(losses, records),
        ],
    )


def _summary(losses: Records, records: Records, folder: Path) -> str:
    figures = [
        ("loss at the start", f"{losses[0]['ce_loss']:.3f}"),
        ("loss at the end", f"{losses[-1]['ce_loss']:.3f}"),
    ]
    if records:
        tokens = sum(sum(record["tokens"].values()) for record in records)
        seconds = sum(record["seconds"] for record in records)
        figures += [
            ("tokens", f"{tokens:,}"),
            ("tokens per second", f"{tokens / seconds:,.0f}" if seconds else "-"),
            ("peak memory", f"{max(record['memory_gb'] for record in records):.2f} GiB"),
            ("skipped steps", f"{records[-1]['skipped_steps']}"),
        ]
        routed = [record for record in records if "entropy" in record]
        if routed:
            figures.append(("dead experts at the end", f"{sum(map(len, routed[-1]['dead_experts']))}"))
    bad = folder / BAD_SAMPLES_FILE
    skipped = len(bad.read_text(encoding="utf-8").splitlines()) if bad.is_file() else 0
    return cards([*figures, ("skipped samples", f"{skipped}")])


def _alarms(records: Records) -> str:
    alarms = [f"Step {alarm['step']}: {alarm['what']}." for record in records for alarm in record.get("alarms", ())]
    note = "A router that sends all tokens to the same experts; the others learn nothing meanwhile."
    return section("Collapsed routers", note, items(alarms, "bad"))


def _losses(losses: Records) -> str:
    parts = {
        "ce_loss": "cross entropy",
        "aux_loss": "balance loss (aux)",
        "z_loss": "router z-loss",
        "modality_loss": "modality loss",
        "divergence_loss": "divergence loss",
        "loss": "total",
    }
    charts, even = [], ""
    for key, title in parts.items():
        values = _series(losses, key)
        if not any(value for _, value in values):
            continue  # what is 0 throughout does not train
        curves, balanced = [Curve("", values)], _series(losses, key + BALANCED)
        if any(value is not None for _, value in balanced):
            curves = [Curve("now", values), Curve("balanced", balanced, dashed=True)]
            even = " Dashed: the value that perfectly even routing has."
        charts.append(line_chart(title, curves))
    groups = list(dict.fromkeys(group for record in losses for group in record.get("groups", ())))
    if len(groups) > 1:
        by_group = [
            Curve(g, [(r["step"], r["groups"].get(g)) for r in losses if g in r.get("groups", ())]) for g in groups
        ]
        charts.append(line_chart("cross entropy by task", by_group))
    charts.append(line_chart("gradient norm", [Curve("", _series(losses, "grad_norm"))], from_zero=True))
    return section(
        "Losses",
        "As logged, so each point is the mean since the point before it; the figure beside a name is the last one."
        + even,
        grid(charts),
    )


def _routing(records: Records, config: UniMoeTextConfig) -> str:
    routed = [record for record in records if "entropy" in record]
    if not routed:
        return ""
    loads = [(r["step"], ExpertLoad.of(config, list(r["tokens"].values()), r["chosen"])) for r in routed]
    by_modality = [
        Curve(name, [(step, mean_of_known([row[m] for row in load.entropies])) for step, load in loads])
        for m, name in enumerate(MODALITIES)
    ]
    charts = [
        line_chart("load entropy per layer", _by_layer(routed, "entropy")),
        line_chart("load entropy per modality", by_modality),
        line_chart("largest load, times an even one", _by_layer(routed, "max_load_ratio"), from_zero=True),
        line_chart("router drift since the stage's start", _by_layer(routed, "router_drift"), from_zero=True),
    ]
    if config.router_type == "dynamic" or config.num_null_experts:
        charts.append(_choices_chart(loads))
    curves = section(
        "Routing",
        "Entropy 1 is an even load; with two choices per token and four experts 0.5 is the least. Drift is the change of "
        "a router's weights over their size: 0 none, 1 as large as the weights themselves.",
        grid(charts),
    )
    return curves + _load_maps(routed, config)


def _by_layer(routed: Records, name: str) -> list[Curve]:
    """A curve per layer, or where these are too many to tell apart, the lowest, the mean and the highest."""
    layers = routed[0]["layers"]
    if len(layers) <= _MOST_CURVES:
        return [Curve(f"layer {n}", [(r["step"], r[name][i]) for r in routed]) for i, n in enumerate(layers)]
    known = [(r["step"], [value for value in r[name] if value is not None]) for r in routed]
    kinds: dict[str, Callable[[list[float]], float]] = {"highest": max, "mean": mean, "lowest": min}
    return [Curve(kind, [(step, pick(v)) for step, v in known if v]) for kind, pick in kinds.items()]


def _choices_chart(loads: Sequence[tuple[int, ExpertLoad]]) -> str:
    used = [
        (step, float(load.chosen_LMX[..., :-1].sum() / (load.tokens_M.sum() * len(load.layers)).clamp(min=1)))
        for step, load in loads
    ]
    null = [(step, float(load.chosen_LMX[..., -1].sum() / load.chosen_LMX.sum().clamp(min=1))) for step, load in loads]
    return line_chart("experts per token", [Curve("experts", used), Curve("null share", null)], from_zero=True)


def _load_maps(routed: Records, config: UniMoeTextConfig) -> str:
    before, after = _edges(routed, config)
    change = load_change(before, after)
    names = [f"layer {layer}" for layer in after.layers]
    experts = [str(expert) for expert in range(config.num_experts)]
    full = min(1.0, 3 / max(1, config.num_experts))
    panels = []
    for modality in after.modalities:
        moments = [
            heat_map(f"{MODALITIES[modality]}, {when}", names, experts, load.shares[:, modality].tolist(), full)
            for when, load in (("first tenth", before), ("last tenth", after))
            if load.tokens_M[modality]
        ]
        panels.append("".join(moments))
    columns = [MODALITIES[m] for m in after.modalities]
    moved = [[row[m] for m in after.modalities] for row in change]
    panels.append(heat_map("share of choices that moved", names, columns, moved, 0.5))
    return section(
        "Who goes where, before and after",
        "Percent of a modality's choices that went to each expert, in the first and in the last tenth of the steps; rows "
        "sum to 100. The last table: the percent of them that go elsewhere in the end. "
        "Both tenths saw other samples, so small differences mean little.",
        grid(panels, narrow=True),
    )


def _edges(routed: Records, config: UniMoeTextConfig) -> tuple[ExpertLoad, ExpertLoad]:
    """The loads of the first and of the last steps."""
    last = routed[-1]["step"]
    first_part = [r for r in routed if r["step"] <= EDGE * last] or routed[:1]
    last_part = [r for r in routed if r["step"] > (1 - EDGE) * last] or routed[-1:]

    def total(part: Records) -> ExpertLoad:
        tokens = sum(torch.tensor(list(r["tokens"].values())) for r in part)
        return ExpertLoad.of(config, tokens, sum(torch.tensor(r["chosen"]) for r in part))

    return total(first_part), total(last_part)


def _machine(losses: Records, records: Records) -> str:
    roles = list(dict.fromkeys(role for record in records for role in record["learning_rates"]))
    rates = [Curve(role, [(r["step"], r["learning_rates"].get(role)) for r in records]) for role in roles]
    charts = [
        line_chart("learning rate", rates or [Curve("", _series(losses, "learning_rate"))], from_zero=True),
        line_chart("tokens per second", [Curve("", _series(records, "tokens_per_second"))], from_zero=True),
        line_chart("peak memory, GiB", [Curve("", _series(records, "memory_gb"))], from_zero=True),
        line_chart("skipped samples", [Curve("", _series(records, "skipped_samples"))], from_zero=True)
        if records and records[-1]["skipped_samples"]
        else "",
    ]
    return section("Rates, speed and memory", "Tokens count without padding, over all processes.", grid(charts))


def _series(records: Records, key: str) -> list[tuple[float, float | None]]:
    return [(record["step"], record.get(key)) for record in records]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
