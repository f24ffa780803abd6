"""Which of Uni-MoE's released variants a checkpoint is, read off its tensors and configuration, never off its name.

audio       BEATs states through a Q-Former; experts in some of the layers
speech      Whisper states through queries and a Whisper decoder; experts in every layer
speech_dp   as speech, experts in some of the layers (also released as v1.5)
8e          as speech, experts in DeepSpeed's layout, low-rank pairs inside every MLP; layers by `moe_type`
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ConversionError
from ..checkpoints.key_rules import Shape
from ..checkpoints.llava_keys import PROJECTOR
from .unimoe_keys import ALIGNER, EXPERTS, GATES, AudioKind, Layout

_LAYER = re.compile(r"model\.layers\.(\d+)\.input_layernorm\.weight")
_PROJECTOR_WEIGHT = re.compile(re.escape(PROJECTOR) + r"(?:(\d+)\.)?weight")
_DEEPSPEED = re.compile(r"\.deepspeed_moe\.|_proj_lora_[AB]\.weight$")
_DEEPSPEED_FIELDS = ("moe_type", "ep_size", "lora_r")
_ALIGNERS: dict[AudioKind, str] = {"whisper": ALIGNER + "decoder.audio_decoder.", "beats": ALIGNER + "qformer."}


@dataclass(frozen=True)
class Variant:
    """What was recognised, and by what.

    Args:
        name: "audio", "speech", "speech_dp" or "8e".
        audio: the audio side.
        layout: how the experts lie in the files.
        num_layers, sparse_layers, num_experts, num_experts_per_tok: the decoder.
        projector_depth: linear layers between the vision tower and the decoder.
        query_tokens: name of the learned queries.
        evidence: what was seen, for people.
    """

    name: str
    audio: AudioKind
    layout: Layout
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
    layout = layout_of(shapes, config)
    missing: list[str] = []
    audio = _audio_kind(shapes, missing)
    layers = _layers(shapes, missing)
    sparse, num_experts = _experts(shapes, layout, missing)
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
    if layout == "deepspeed":
        name = "8e"
        _check_eight_experts(config, audio, sparse, len(layers))
    where = "every layer" if everywhere else f"{len(sparse)} of {len(layers)} layers ({_ranges(sparse)})"
    evidence = (
        f"audio side: {_ALIGNERS[audio]}* ({'Whisper and a query decoder' if audio == 'whisper' else 'BEATs and a Q-Former'})",
        f"experts: {num_experts} under model.layers.*.mlp.{EXPERTS[layout]} in {where}, {chosen} per token by config.json",
        f"image projector: {depth} linear layer(s) under {PROJECTOR}*",
    )
    return Variant(name, audio, layout, len(layers), sparse, num_experts, int(chosen), depth, query_tokens, evidence)


def layout_of(names: Iterable[str], config: Mapping[str, Any]) -> Layout:
    """How the experts lie: seen in the names of tensors or in fields of config.json that only one layout has."""
    seen = any(_DEEPSPEED.search(name) for name in names) or any(field in config for field in _DEEPSPEED_FIELDS)
    return "deepspeed" if seen else "plain"


def eight_expert_layers(config: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    """Layers with experts of the 8-expert variant. Raises ConversionError when config.json does not say."""
    kind, stride = config.get("moe_type"), config.get("moe_stride")
    if kind == "dense":
        return tuple(range(num_layers))
    if kind == "sparse" and isinstance(stride, int) and stride > 0:
        return tuple(range(0, num_layers, stride))
    raise ConversionError(
        f"This is the 8-expert variant, and its config.json has moe_type {kind!r} and moe_stride {stride!r}; needed are "
        "'dense', or 'sparse' with a stride of at least 1. Give the model's own config.json (8config.json of the base)."
    )


def decoder_layers(names: Iterable[str]) -> list[int]:
    """Numbers of the decoder's layers that there are tensors of."""
    return sorted(int(match[1]) for match in map(_LAYER.fullmatch, names) if match)


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
    layers = decoder_layers(shapes)
    if not layers:
        missing.append("model.layers.*.input_layernorm.weight (the decoder)")
    elif layers != list(range(len(layers))):
        absent = sorted(set(range(layers[-1] + 1)) - set(layers))
        missing.append(f"model.layers.{absent[0]}.input_layernorm.weight")
    return tuple(layers)


def _experts(shapes: Mapping[str, Shape], layout: Layout, missing: list[str]) -> tuple[tuple[int, ...], int]:
    gate_name, expert_name = GATES[layout], EXPERTS[layout]
    gate = re.compile(rf"model\.layers\.(\d+)\.mlp\.{re.escape(gate_name)}\.weight")
    expert = re.compile(rf"model\.layers\.(\d+)\.mlp\.{re.escape(expert_name)}\.(\d+)\.down_proj\.weight")
    gates = {int(match[1]): shapes[match[0]][0] for match in map(gate.fullmatch, shapes) if match}
    experts: dict[int, set[int]] = {}
    for match in map(expert.fullmatch, shapes):
        if match:
            experts.setdefault(int(match[1]), set()).add(int(match[2]))
    if not gates and not experts:
        names = f"model.layers.*.mlp.{gate_name}.weight and model.layers.*.mlp.{expert_name}.*"
        missing.append(f"{names} (the mixture of experts)")
        return (), 0
    without = sorted({*gates} - {*experts}) if layout == "plain" and experts else []
    if without:
        raise ConversionError(
            f"Layers {_ranges(tuple(without))} have a router but no experts: the fine-tuned files were tuned on another "
            "base, one with experts in more layers. Give the --base that belongs to --finetuned."
        )
    for layer in sorted({*gates, *experts}):
        if layer not in gates:
            where = " (the 8-expert model's routers come with --finetuned)" if layout == "deepspeed" else ""
            missing.append(f"model.layers.{layer}.mlp.{gate_name}.weight{where}")
        else:
            absent = set(range(gates[layer])) - experts.get(layer, set())
            missing += [f"model.layers.{layer}.mlp.{expert_name}.{i}.down_proj.weight" for i in sorted(absent)]
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


def _check_eight_experts(
    config: Mapping[str, Any], audio: AudioKind, sparse: tuple[int, ...], num_layers: int
) -> None:
    if audio != "whisper":
        raise ConversionError("The experts lie in DeepSpeed's layout, whose one released model hears through Whisper.")
    if config.get("use_fm_block"):
        raise ConversionError(
            "config.json has use_fm_block: the routers read other states then, which is not supported."
        )
    wanted = eight_expert_layers(config, num_layers)
    if wanted != sparse:
        raise ConversionError(
            f"config.json puts experts into layers {_ranges(wanted)} ({len(wanted)}), but {_ranges(sparse)} "
            f"({len(sparse)}) have a router. Give the config.json of this very model."
        )


def _ranges(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers[:4])) + (f", .. {layers[-1]}" if len(layers) > 4 else "")
