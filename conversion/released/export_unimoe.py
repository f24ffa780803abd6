"""A model of ours back into the folders that Uni-MoE's own code loads: base model, encoders, connectors.

    OUT/base/      config.json, pytorch_model*.bin, mm_projector.bin, mm_audio_aligner.bin, tokenizer
    OUT/clip/      the vision encoder in Hugging Face's layout
    OUT/whisper/   the speech encoder, or OUT/BEATs.pt with OUT/qformer_config.json

A model with a float32 router, which of the released ones only the 8-expert variant has, is written in that variant's
layout: OUT/experts and OUT/finetuned come on top, see `export_eight_experts`.

Importing these folders gives the same model again, to the last bit.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ..checkpoints.checkpoint_reader import PICKLE, PICKLE_INDEX, Checkpoint, read_json
from ..checkpoints.checkpoint_writer import DEFAULT_SHARD_BYTES, shard_names, split_into_shards
from ..checkpoints.finished_folder import finished_folder
from ..checkpoints.key_rules import KeyMap
from ..checkpoints.llava_keys import PROJECTOR, VISION_TOWER, vision_prefix
from ..checkpoints.read_back import require_equal_file, save_bin
from ..publishing.saved_receipt import RECEIPT_FILE
from .export_eight_experts import DEEPSPEED_MOE, absent_pairs, eight_expert_fields, write_eight_experts
from .original_tokenizer import give_back_tokenizer
from .unimoe_config import original_config
from .unimoe_keys import ALIGNER, AUDIO_TOWER, AudioKind, Layout, rules_for
from .unimoe_originals import UniMoeOriginals

BEATS_FILE = "BEATs.pt"
_QUERY_EMBEDDINGS = ALIGNER + "decoder.audio_decoder.embed_tokens.weight"
# What the original cannot compute, and the value that means "not used".
_NEEDED: dict[str, Any] = {
    "video_connector": None,
    "vision_token_grid": None,
    "video_pooling": "mean",
}
_NEEDED_TEXT: dict[str, Any] = {
    "expert_groups": None,
    "router_type": "top_k",
    "num_null_experts": 0,
    "num_shared_experts": 0,
    "router_scoring": "softmax",
    "attention_bias": False,
    "attention_output_bias": False,
    "use_qk_norm": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


def export_unimoe(
    model: Path, out: Path, *, tokenizer: Path | None = None, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> list[str]:
    """Write a model folder of ours in the original's layout; returns what was written, for a reader.

    Args:
        tokenizer: folder with the original's tokenizer, of a model that does not carry it since its conversion.

    Raises:
        ConversionError: the folder holds no model of ours, or one that the original's classes cannot compute.
    """
    if read_json(model / "config.json").get("model_type") != UniMoeConfig.model_type:
        raise ConversionError(f"{model} holds no model of ours: give a folder that `unimoe convert unimoe` wrote.")
    config = UniMoeConfig.from_pretrained(model)
    audio = audio_kind(config)
    layout = layout_for(config.text_config)
    checkpoint = Checkpoint(model)
    key_map = KeyMap(rules_for(audio, vision_prefix(checkpoint.tensors), layout))
    processor = _processor_settings(model)
    aspect = processor.get("image_aspect_ratio", "square")
    fields = original_config(config, "clip", "whisper" if audio == "whisper" else BEATS_FILE, aspect)
    if layout == "deepspeed":
        fields |= eight_expert_fields(config.text_config)
    with finished_folder(out) as folder:
        base = folder / "base"
        base.mkdir()
        originals = UniMoeOriginals(checkpoint, key_map, config)
        pairs = absent_pairs(originals) if layout == "deepspeed" else {}
        written = _write_base(base, originals, pairs, max_shard_bytes)
        if layout == "deepspeed":
            written += write_eight_experts(folder, originals, fields)
        _write_json(base / "config.json", fields)
        written += _write_encoders(folder, originals)
        written += give_back_tokenizer(model, base, tokenizer)
        _write_preprocessors(folder, processor)
    return written + _notes(model)


def _notes(model: Path) -> list[str]:
    """What was converted with --keep-lora is exported without what was kept apart."""
    receipt = model / RECEIPT_FILE
    adapter = read_json(receipt).get("adapter") if receipt.is_file() else None
    if adapter is None:
        return []
    return [
        f"note: LoRA was left in {adapter} by --keep-lora and is not in these files. To have it in, convert again "
        "without --keep-lora, or merge it (see README.md there) and export what you saved then."
    ]


def layout_for(text: UniMoeTextConfig) -> Layout:
    """The layout whose code routes as a model does. Raises ConversionError when neither does."""
    layout: Layout = "deepspeed" if text.router_in_float32 else "plain"
    # DeepSpeed divides by the sum of two weights, but leaves a single one as it is; the other code always divides.
    normalised = text.num_experts_per_tok > 1 or layout == "plain"
    picks = ("max", "sample_always") if layout == "deepspeed" else ("max",)
    for field, allowed in (("norm_topk_prob", (normalised,)), ("router_pick", picks)):
        if getattr(text, field) not in allowed:
            raise ConversionError(
                f"The original has no {field} = {getattr(text, field)!r} with router_in_float32 = "
                f"{text.router_in_float32} and {text.num_experts_per_tok} experts per token; only "
                f"{' or '.join(map(repr, allowed))} can be exported."
            )
    return layout


def audio_kind(config: UniMoeConfig) -> AudioKind:
    """Which audio side of the original a model has. Raises ConversionError when it has none of them."""
    text = config.text_config
    for owner, needed in ((config, _NEEDED), (text, _NEEDED_TEXT)):
        for field, value in needed.items():
            if getattr(owner, field) != value:
                found = getattr(owner, field)
                raise ConversionError(f"The original has no {field} = {found!r}; only {value!r} can be exported.")
    connectors = [config.image_connector, config.speech_connector, config.sound_connector]
    types = [connector.type if connector is not None else None for connector in connectors]
    kinds: dict[tuple[str | None, ...], AudioKind] = {
        ("mlp", "query_decoder", None): "whisper",
        ("mlp", None, "qformer"): "beats",
    }
    if tuple(types) not in kinds or any(connector.output_norm for connector in connectors if connector is not None):
        raise ConversionError(
            f"The model's image, speech and sound connectors are {types}; the original has an mlp for images and either a "
            "query decoder for speech or a Q-Former for sound, without norms."
        )
    _require_plain_sizes(text)
    if not text.sparse_layers:
        raise ConversionError("The model is dense; the original's variants are mixtures of experts.")
    return kinds[tuple(types)]


def _require_plain_sizes(text: UniMoeTextConfig) -> None:
    """Refuses what the original's configuration has no field for: its code computes with fixed values."""
    rope = text.rope_parameters
    fixed = {
        "moe_intermediate_size": (text.moe_intermediate_size, text.intermediate_size),
        "head_dim": (text.head_dim, text.hidden_size // text.num_attention_heads),
        "rope_theta": (float(rope["rope_theta"]), 10_000.0),
    }
    for field, (found, value) in fixed.items():
        if found != value:
            raise ConversionError(f"The original has no {field} = {found!r}; only {value!r} can be exported.")
    if rope["rope_type"] not in ("default", "linear", "dynamic"):
        raise ConversionError(
            f"The original has no rope_type = {rope['rope_type']!r}; only 'default', 'linear' or 'dynamic' can be exported."
        )


def _write_base(
    folder: Path, originals: UniMoeOriginals, pairs: dict[str, torch.Tensor], max_shard_bytes: int
) -> list[str]:
    checkpoint = originals.checkpoint
    elsewhere = {*originals.names(VISION_TOWER, AUDIO_TOWER), *(n for n in originals.sources if DEEPSPEED_MOE in n)}
    names = [name for name in originals.sources if name not in elsewhere]
    pieces = Counter(originals.ours(name) for name in names)

    def num_bytes(name: str) -> int:
        ours = originals.ours(name)
        return checkpoint.tensors[ours].num_bytes // pieces[ours]

    shards = split_into_shards(names, num_bytes, max_shard_bytes)
    files = shard_names(PICKLE, len(shards))
    for file, members in zip(files, shards, strict=True):
        save_bin(originals.read_all(members) | (pairs if file == files[-1] else {}), folder / file)
    if len(shards) > 1:
        shards[-1] += pairs
        weight_map = {name: file for file, members in zip(files, shards, strict=True) for name in members}
        _write_json(folder / PICKLE_INDEX, {"metadata": {}, "weight_map": weight_map})
    save_bin(originals.read_all(originals.names(PROJECTOR)), folder / "mm_projector.bin")
    save_bin(_aligner(originals), folder / "mm_audio_aligner.bin")
    return [f"base: {len(names)} tensors in {len(files)} file(s), mm_projector.bin, mm_audio_aligner.bin"]


def _aligner(originals: UniMoeOriginals) -> dict[str, torch.Tensor]:
    """Queries first, which one of the original's loaders takes by position; then everything that it loads strictly."""
    aligner = originals.read_all([*originals.names("model.query_tokens"), *originals.names(ALIGNER)])
    whisper = originals.config.speech_config
    if whisper is not None:
        dtype = next(iter(aligner.values())).dtype
        aligner[_QUERY_EMBEDDINGS] = torch.zeros(whisper.vocab_size, whisper.d_model, dtype=dtype)
    return aligner


def _write_encoders(folder: Path, originals: UniMoeOriginals) -> list[str]:
    config = originals.config
    vision = {n.removeprefix(VISION_TOWER): originals.read(n) for n in originals.names(VISION_TOWER)}
    _write_hf(folder / "clip", config.vision_config, vision)
    audio = {name.removeprefix(AUDIO_TOWER): originals.read(name) for name in originals.names(AUDIO_TOWER)}
    if config.speech_config is not None:
        _write_hf(folder / "whisper", config.speech_config, {f"encoder.{name}": t for name, t in audio.items()})
        return [f"clip: {len(vision)} tensors", f"whisper: {len(audio)} tensors (encoder)"]
    torch.save({"cfg": config.audio_config.to_original(), "model": audio}, folder / BEATS_FILE)
    _write_json(folder / "qformer_config.json", config.sound_connector.qformer_config or {})
    return [f"clip: {len(vision)} tensors", f"{BEATS_FILE}: {len(audio)} tensors"]


def _write_hf(folder: Path, config: Any, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir()
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    require_equal_file(folder / "model.safetensors", tensors)


def _processor_settings(model: Path) -> dict[str, Any]:
    path = model / "processor_config.json"
    return read_json(path) if path.is_file() else {}


def _write_preprocessors(folder: Path, settings: Mapping[str, Any]) -> None:
    if settings.get("image_processor"):
        _write_json(folder / "clip" / "preprocessor_config.json", settings["image_processor"])
    extractor = settings.get("feature_extractor")
    if extractor and (folder / "whisper").is_dir():
        fields = ("feature_size", "sampling_rate", "hop_length", "n_fft", "padding_value")
        whisper = {name: extractor[name] for name in fields if name in extractor}
        whisper |= {"feature_extractor_type": "WhisperFeatureExtractor", "return_attention_mask": False}
        _write_json(
            folder / "whisper" / "preprocessor_config.json", whisper | {"chunk_length": extractor["window_seconds"]}
        )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
