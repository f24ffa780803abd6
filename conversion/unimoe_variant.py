"""Which of Uni-MoE's released variants a checkpoint is, read off its tensors and configuration, never off its name.

audio       BEATs states through a Q-Former; experts in some of the layers
speech      Whisper states through queries and a Whisper decoder; experts in every layer
speech_dp   as speech, experts in some of the layers (also released as v1.5)
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConversionError
from .unimoe_keys import ALIGNER, PROJECTOR, AudioKind, Shape

_LAYER = re.compile(r"model\.layers\.(\d+)\.input_layernorm\.weight")
_GATE = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.weight")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.down_proj\.weight")
_PROJECTOR_WEIGHT = re.compile(re.escape(PROJECTOR) + r"(?:(\d+)\.)?weight")
_DEEPSPEED = re.compile(r"\.deepspeed_moe\.|_proj_lora_[AB]\.weight$")
_ALIGNERS: dict[AudioKind, str] = {"whisper": ALIGNER + "decoder.audio_decoder.", "beats": ALIGNER + "qformer."}


@dataclass(frozen=True)
class Variant:
    """What was recognised, and by what.

    Args:
        name: "audio", "speech" or "speech_dp".
        audio: the audio side.
        num_layers, sparse_layers, num_experts, num_experts_per_tok: the decoder.
        projector_depth: linear layers between the vision tower and the decoder.
        query_tokens: name of the learned queries.
        evidence: what was seen, for people.
    """

    name: str
    audio: AudioKind
    num_layers: int
    sparse_layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    projector_depth: int
    query_tokens: str
    evidence: tuple[str, ...]


def recognise(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Variant:
    """The variant of a checkpoint.

    Args:
        shapes: original tensor names -> shapes, everything that the original loader would end up with.
        config: its config.json.

    Raises:
        ConversionError: it is none of these; the message says which evidence is missing or contradicts itself.
    """
    refuse_deepspeed(shapes, config)
    missing: list[str] = []
    audio = _audio_kind(shapes, missing)
    layers = _layers(shapes, missing)
    sparse, num_experts = _experts(shapes, missing)
    depth = _projector_depth(shapes, missing)
    query_tokens = "model.query_tokens" if audio == "whisper" else ALIGNER + "query_tokens"
    if audio is not None and query_tokens not in shapes:
        missing.append(f"{query_tokens} (the learned queries)")
    chosen = config.get("num_experts_per_tok")
    if not isinstance(chosen, int):
        missing.append("num_experts_per_tok in config.json")
    if missing or audio is None:
        raise ConversionError(
            "The checkpoint cannot be recognised as Uni-MoE. Missing: " + "; ".join(missing) + ". Give the folders as "
            "they were released, --base with every file of the base model."
        )
    _check_config(config, num_experts, len(layers))
    everywhere = len(sparse) == len(layers)
    name = "audio" if audio == "beats" else "speech" if everywhere else "speech_dp"
    where = "every layer" if everywhere else f"{len(sparse)} of {len(layers)} layers ({_ranges(sparse)})"
    evidence = (
        f"audio side: {_ALIGNERS[audio]}* ({'Whisper and a query decoder' if audio == 'whisper' else 'BEATs and a Q-Former'})",
        f"experts: {num_experts} under model.layers.*.mlp.experts in {where}, {chosen} per token by config.json",
        f"image projector: {depth} linear layer(s) under {PROJECTOR}*",
    )
    return Variant(name, audio, len(layers), sparse, num_experts, int(chosen), depth, query_tokens, evidence)


def refuse_deepspeed(names: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raises ConversionError for the 8-expert layout, whose experts lie in files of their own."""
    seen = next((name for name in names if _DEEPSPEED.search(name)), None)
    field = next((name for name in ("moe_type", "ep_size", "lora_r") if name in config), None)
    if seen is not None or field is not None:
        what = f"it holds {seen}" if seen is not None else f"its config.json has {field}"
        raise ConversionError(f"This is the 8-expert variant in DeepSpeed's layout ({what}), which is not read yet.")


def _audio_kind(shapes: Mapping[str, Shape], missing: list[str]) -> AudioKind | None:
    found = [kind for kind, prefix in _ALIGNERS.items() if any(name.startswith(prefix) for name in shapes)]
    if len(found) == 2:
        raise ConversionError(
            f"The checkpoint holds both {_ALIGNERS['whisper']}* and {_ALIGNERS['beats']}*; every released model has one "
            "audio side. Give the files of one model."
        )
    if not found:
        missing.append(f"{_ALIGNERS['whisper']}* (speech) or {_ALIGNERS['beats']}* (audio)")
    return found[0] if found else None


def _layers(shapes: Mapping[str, Shape], missing: list[str]) -> tuple[int, ...]:
    layers = sorted(int(match[1]) for match in map(_LAYER.fullmatch, shapes) if match)
    if not layers:
        missing.append("model.layers.*.input_layernorm.weight (the decoder)")
    elif layers != list(range(len(layers))):
        absent = sorted(set(range(layers[-1] + 1)) - set(layers))
        missing.append(f"model.layers.{absent[0]}.input_layernorm.weight")
    return tuple(layers)


def _experts(shapes: Mapping[str, Shape], missing: list[str]) -> tuple[tuple[int, ...], int]:
    gates = {int(match[1]): shapes[match[0]][0] for match in map(_GATE.fullmatch, shapes) if match}
    experts: dict[int, set[int]] = {}
    for match in map(_EXPERT.fullmatch, shapes):
        if match:
            experts.setdefault(int(match[1]), set()).add(int(match[2]))
    if not gates and not experts:
        missing.append("model.layers.*.mlp.gate.weight and model.layers.*.mlp.experts.* (the mixture of experts)")
        return (), 0
    for layer in sorted({*gates, *experts}):
        if layer not in gates:
            missing.append(f"model.layers.{layer}.mlp.gate.weight")
        else:
            absent = set(range(gates[layer])) - experts.get(layer, set())
            missing += [f"model.layers.{layer}.mlp.experts.{i}.down_proj.weight" for i in sorted(absent)]
    sizes = set(gates.values())
    if len(sizes) > 1:
        raise ConversionError(f"The routers know {sorted(sizes)} experts in different layers; Uni-MoE has one number.")
    return tuple(sorted(gates)), next(iter(sizes), 0)


def _projector_depth(shapes: Mapping[str, Shape], missing: list[str]) -> int:
    positions = sorted(int(match[1] or 0) for match in map(_PROJECTOR_WEIGHT.fullmatch, shapes) if match)
    if not positions or positions != list(range(0, 2 * len(positions), 2)):
        missing.append(f"{PROJECTOR}0.weight, {PROJECTOR}2.weight (the image projector)")
    return len(positions)


def _check_config(config: Mapping[str, Any], num_experts: int, num_layers: int) -> None:
    """What config.json says must be what the tensors show."""
    if "moe" in config and config["moe"] is None:
        raise ConversionError(
            "config.json has moe: null, a dense model, but there are experts. Give the right config.json."
        )
    for field, shown in (("num_experts", num_experts), ("num_hidden_layers", num_layers)):
        if config.get(field, shown) != shown:
            raise ConversionError(f"config.json says {field} = {config[field]} but the tensors show {shown}.")
    linear = config.get("audio_projector_type", "linear")
    if linear != "linear":
        raise ConversionError(
            f"config.json says audio_projector_type = {linear!r}; every released model has 'linear'."
        )


def _ranges(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers[:4])) + (f", .. {layers[-1]}" if len(layers) > 4 else "")
