"""A model of ours back into the folder that MoIIE's own code loads.

    OUT/           config.json, model*.safetensors, tokenizer
    OUT/siglip/    the vision tower, which the original looks up by a path with "siglip" in it

Importing this folder gives the same model again, to the last bit.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ..checkpoints.checkpoint_reader import Checkpoint, read_json
from ..checkpoints.checkpoint_writer import DEFAULT_SHARD_BYTES, OutputTensor
from ..checkpoints.finished_folder import finished_folder
from ..checkpoints.llava_keys import VISION_TOWER, vision_prefix, without_numbers
from ..checkpoints.our_folder import read_our_config
from ..checkpoints.read_back import write_and_read_back
from .import_moiie import moiie_key_map
from .moiie_config import SCALES, original_moiie_config
from .moiie_keys import GROUPED, Backbone, Kind, Pools
from .moiie_variant import MoiieVariant, model_type_of
from .originals import Originals

TOWER = "siglip"
# What the original cannot compute, and the values that mean "not used".
_NEEDED: dict[str, tuple[Any, ...]] = {
    "speech_config": (None,),
    "audio_config": (None,),
    "video_connector": (None,),
    "vision_feature_layer": (-2,),
    "vision_feature_select_strategy": ("full",),
    "vision_token_grid": (None,),
    "vision_scales": (None, SCALES),
}
_NEEDED_TEXT: dict[str, tuple[Any, ...]] = {
    "router_type": ("top_k",),
    "router_scoring": ("softmax",),
    "norm_topk_prob": (True,),
    "router_pick": ("max",),
    "router_bias_update_rate": (0,),
    "num_null_experts": (0,),
    "num_shared_experts": (0,),
    "attention_bias": (False,),
    "attention_output_bias": (False,),
    "use_qk_norm": (False,),
    "tie_word_embeddings": (False,),
}


def export_moiie(
    model: Path, out: Path, *, backbone: Backbone | None = None, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> list[str]:
    """Write a model folder of ours in the original's layout; returns what was written, for a reader.

    Args:
        backbone: whose classes shall load it; None takes Phi-3 for a model with a sliding window or with separate pools,
            else LLaMA.

    Raises:
        ConversionError: the folder holds no model of ours, or one that the original's classes cannot compute.
    """
    config = read_our_config(model)
    variant = exported_variant(config, backbone)
    checkpoint = Checkpoint(model)
    key_map = moiie_key_map(variant, config, vision_prefix(checkpoint.tensors))
    originals = Originals(checkpoint, key_map, config.text_config.num_experts)
    _check_covered(checkpoint, originals, variant)
    if config.image_connector is not None and config.image_connector.depth == 1:
        originals.sources = without_numbers(originals.sources)
    outputs = [
        OutputTensor(
            name,
            checkpoint.tensors[ours[0]].dtype,
            originals.shape(name),
            (lambda name=name: originals.read(name),),
        )
        for name, ours in originals.sources.items()
    ]
    outputs += _unreached(outputs, variant)
    config.dtype = outputs[0].dtype
    with finished_folder(out) as folder:
        shards = write_and_read_back(folder, outputs, max_shard_bytes=max_shard_bytes).files
        written = original_moiie_config(config, variant, TOWER, _aspect_ratio(model))
        (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in (*model.glob("tokenizer*"), *model.glob("special_tokens_map.json")):
            shutil.copyfile(path, folder / path.name)
        lines = [f"{variant.name}: {len(outputs)} tensors in {len(shards)} file(s)"]
        if variant.pools is not None and len(variant.pools.unreached):
            lines.append(
                f"experts {[*variant.pools.unreached]} are zeros: the original has them, and no router reaches them"
            )
        if config.vision_config is not None:
            lines.append(_write_tower(folder / TOWER, model, config, originals))
    return lines


def exported_variant(config: UniMoeConfig, backbone: Backbone | None = None) -> MoiieVariant:
    """Which of the original's models this is. Raises ConversionError when it is none of them."""
    text = config.text_config
    for owner, needed in ((config, _NEEDED if config.vision_config is not None else {}), (text, _NEEDED_TEXT)):
        for field, values in needed.items():
            if getattr(owner, field) not in values:
                found = getattr(owner, field)
                raise ConversionError(f"The original has no {field} = {found!r}; only {values[0]!r} can be exported.")
    kind, pools = _kind_and_pools(text)
    _check_connector(config)
    if kind in GROUPED and config.vision_config is not None and not config.route_run_end_as_text:
        raise ConversionError(
            "The model has route_run_end_as_text = False, and the original always routes the last feature of every run of "
            "image features as language, so it would compute something else. To export it nevertheless, set "
            '"route_run_end_as_text": true in its config.json: as long as its experts are equal copies that changes '
            "nothing, and once they differ the model should be trained on with it."
        )
    if backbone is None:
        backbone = "phi3" if text.sliding_window is not None or kind == "separate" else "llama"
    if backbone == "llama" and text.sliding_window is not None:
        raise ConversionError(
            f"The model has sliding_window = {text.sliding_window}, which the original's LLaMA lacks: use backbone phi3."
        )
    model_type_of(kind, backbone)
    depth = config.image_connector.depth if config.image_connector is not None else 0
    return MoiieVariant(
        kind=kind,
        backbone=backbone,
        num_layers=text.num_hidden_layers,
        sparse_layers=tuple(sorted(text.sparse_layers)),
        pools=pools,
        num_experts_per_tok=text.num_experts_per_tok,
        has_routers=True,
        projector_depth=depth,
        has_tower=depth > 0,
        evidence=(),
    )


def _kind_and_pools(text: UniMoeTextConfig) -> tuple[Kind, Pools | None]:
    if not text.sparse_layers:
        return "dense", None
    odd = list(range(1, text.num_hidden_layers, 2))
    if sorted(text.sparse_layers) != odd:
        raise ConversionError(f"Layers {sorted(text.sparse_layers)} have experts; the original has them in {odd}.")
    if text.moe_intermediate_size != text.intermediate_size:
        raise ConversionError(
            f"Experts are {text.moe_intermediate_size} wide, dense layers {text.intermediate_size}; the original has one width."
        )
    count = text.num_experts
    if text.expert_groups is None:
        return "vanilla", Pools(vision=range(count), language=range(count))
    groups = {group.name: group for group in text.router_groups}
    if set(groups) != {"vision", "language"} or "image" not in groups["vision"].modalities:
        raise ConversionError(
            f"The routing groups are {sorted(groups)}; the original has 'vision' for images and 'language' for text."
        )
    vision, language = ([*groups[name].experts] for name in ("vision", "language"))
    candidates = len(vision)
    if 1 < candidates == count - 1 and vision == [*range(candidates)] and language == [*range(1, count)]:
        # The original makes three quarters of its experts candidates, so there are more than a router reaches.
        unreached = range(count, math.ceil(candidates * 4 / 3))
        return "moiie", Pools(vision=range(candidates), language=range(1, count), unreached=unreached)
    if vision + language == [*range(count)]:
        pools = Pools(vision=range(len(vision)), language=range(len(vision), count))
        return ("modality" if count == 2 else "separate"), pools
    raise ConversionError(
        f"Vision chooses from experts {vision}, language from {language}; of {count} the original can do "
        f"{[*range(count - 1)]} and {[*range(1, count)]}, or two pools that share none."
    )


def _unreached(outputs: list[OutputTensor], variant: MoiieVariant) -> list[OutputTensor]:
    """The experts that the original has and no router reaches, as zeros of the last expert's shapes."""
    if variant.pools is None:
        return []
    last = f".mlp.experts.{variant.pools.num_experts - 1}."
    return [
        OutputTensor(
            output.name.replace(last, f".mlp.experts.{expert}."),
            output.dtype,
            output.shape,
            (lambda output=output: torch.zeros(output.shape, dtype=output.dtype),),
        )
        for expert in variant.pools.unreached
        for output in outputs
        if last in output.name
    ]


def _check_connector(config: UniMoeConfig) -> None:
    if config.vision_config is None:
        return
    connector = config.image_connector
    if config.vision_config.model_type != "siglip_vision_model":
        raise ConversionError(
            f"The tower is a {config.vision_config.model_type!r} model; only SigLIP can be exported."
        )
    if connector.type != "mlp" or connector.output_norm or connector.num_tokens is not None:
        raise ConversionError("The image connector is no plain mlp with one token per patch, which the original has.")


def _check_covered(checkpoint: Checkpoint, originals: Originals, variant: MoiieVariant) -> None:
    covered = {ours for sources in originals.sources.values() for ours in sources}
    lost = set(checkpoint.tensors) - covered
    if variant.kind == "modality":  # routers without a choice, which the original does not have
        lost = {name for name in lost if not name.endswith(".mlp.gate.weight")}
    if lost:
        raise ConversionError(f"{min(lost)} is no tensor of the original's model: it cannot be exported.")


def _aspect_ratio(model: Path) -> str:
    path = model / "processor_config.json"
    return (read_json(path) if path.is_file() else {}).get("image_aspect_ratio") or "pad"


def _write_tower(folder: Path, model: Path, config: UniMoeConfig, originals: Originals) -> str:
    folder.mkdir()
    config.vision_config.save_pretrained(folder)
    names = originals.names(VISION_TOWER)
    tensors = [
        OutputTensor(
            name.removeprefix(VISION_TOWER),
            originals.checkpoint.tensors[originals.sources[name][0]].dtype,
            originals.shape(name),
            (lambda name=name: originals.read(name),),
        )
        for name in names
    ]
    write_and_read_back(folder, tensors, progress=False)
    path = model / "processor_config.json"
    settings = (read_json(path) if path.is_file() else {}).get("image_processor")
    if settings:
        side = config.vision_config.image_size
        settings = {**settings, "size": {"height": side, "width": side}}  # the original enlarges it for S2 itself
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return f"{TOWER}: {len(names)} tensors"
