"""What an inspection has found, as plain data: the content of `inspect.json`, and what the page draws."""

from typing import Any

from ..modeling_unimoe.configuration_unimoe_text import MODALITIES, UniMoeTextConfig
from ..trainers.telemetry.routing_figures import ExpertLoad, co_activation, load_change
from .expert_weights import duplicates
from .favourites import Favourite
from .usage import Usage


def usage_findings(config: UniMoeTextConfig, usage: Usage, favourites: list[list[list[Favourite]]]) -> dict[str, Any]:
    """Figures about expert load; tables are [layers][experts], None where too little was seen to tell."""
    whole = usage.load(config)
    names = [MODALITIES[index] for index in whole.modalities]
    return {
        "samples": dict(zip(usage.tasks, usage.samples, strict=True)),
        "skipped": [{"id": name, "reason": reason} for name, reason in usage.skipped],
        "tokens": {
            task: _by_modality(usage.load(config, i).tokens_M.int().tolist()) for i, task in enumerate(usage.tasks)
        },
        "load": _load_table(whole),
        "load_by_task": {task: _load_table(usage.load(config, i)) for i, task in enumerate(usage.tasks)},
        "entropy": {
            "all": whole.layer_entropies,
            **{MODALITIES[m]: [row[m] for row in whole.entropies] for m in whole.modalities},
        },
        "max_load_ratio": whole.max_ratios,
        "load_ratio": whole.ratios.tolist(),
        "dead_experts": whole.dead,
        "experts_per_token": {name: whole.experts_per_token[:, MODALITIES.index(name)].tolist() for name in names},
        "null_expert_share": {name: whole.null_shares[:, MODALITIES.index(name)].tolist() for name in names},
        "co_activation": co_activation(usage.counts.together_LXX).tolist(),
        "favourite_words": [[[word._asdict() for word in words] for words in row] for row in favourites],
    }


def weight_findings(distances: list[list[list[float]]]) -> dict[str, Any]:
    """Distances between experts and the pairs of duplicates, by layer."""
    return {"expert_distances": distances, "duplicate_experts": [duplicates(layer) for layer in distances]}


def change_findings(config: UniMoeTextConfig, before: Usage, after: Usage) -> dict[str, Any]:
    """The other model's load on the same data, and the share of choices that go elsewhere, by modality and layer."""
    load_before, load_after = before.load(config), after.load(config)
    change = load_change(load_before, load_after)
    return {
        "load_before": _load_table(load_before),
        "entropy_before": load_before.layer_entropies,
        "moved": {MODALITIES[m]: [row[m] for row in change] for m in load_after.modalities},
    }


def _load_table(load: ExpertLoad) -> dict[str, list[list[float]]]:
    return {MODALITIES[m]: load.shares[:, m].tolist() for m in load.modalities}


def _by_modality(values: list[int]) -> dict[str, int]:
    return {name: value for name, value in zip(MODALITIES, values, strict=True) if value}
