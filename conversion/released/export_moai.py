"""A model of ours with mixers back into the folder that MoAI's own code loads.

Importing this folder gives the same model again, to the last bit.
"""

import json
from pathlib import Path
from typing import Any

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...processing.perception.choice import PerceiverChoice
from ..checkpoints.checkpoint_reader import Checkpoint, dtype_name
from ..checkpoints.checkpoint_writer import DEFAULT_SHARD_BYTES, OutputTensor
from ..checkpoints.finished_folder import finished_folder
from ..checkpoints.llava_keys import vision_prefix
from ..checkpoints.our_folder import read_our_config
from ..checkpoints.read_back import write_and_read_back
from .import_moai import moai_key_map
from .moai_config import COMPRESSOR_HEADS, IMAGE_SIZE, MIXER_HEADS, original_moai_config
from .moai_keys import EMBEDDING
from .original_tokenizer import give_back_tokenizer
from .originals import Originals

# What the original cannot compute, and the value that it has.
_NEEDED: dict[str, Any] = {
    "speech_config": None,
    "audio_config": None,
    "video_connector": None,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "patch",
    "vision_token_grid": None,
    "vision_scales": None,
}
_NEEDED_TEXT: dict[str, Any] = {
    "sparse_layers": [],
    "attention_bias": False,
    "attention_output_bias": False,
    "use_qk_norm": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


def export_moai(model: Path, out: Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> list[str]:
    """Write a model folder of ours in the original's layout; returns what was written, for a reader.

    Raises:
        ConversionError: the folder holds no model of ours, or one that the original's classes cannot compute.
    """
    config = read_our_config(model)
    _require_moai(config)
    checkpoint = Checkpoint(model)
    key_map = moai_key_map(config, vision_prefix(checkpoint.tensors), config.text_config.vocab_size)
    originals = Originals(checkpoint, key_map, experts=1)
    covered = {ours for sources in originals.sources.values() for ours in sources}
    if lost := set(checkpoint.tensors) - covered:
        raise ConversionError(f"{min(lost)} is no tensor of the original's model: it cannot be exported.")
    outputs = [_output(originals, name) for name in originals.sources]
    with finished_folder(out) as folder:
        shards = write_and_read_back(folder, outputs, max_shard_bytes=max_shard_bytes).files
        written = original_moai_config(config, dtype_name(outputs[0].dtype))
        (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if (chosen := PerceiverChoice.of_folder(model)) is not None:
            chosen.save(folder)
        lines = [f"moai: {len(outputs)} tensors in {len(shards)} file(s)"]
        lines += [line.replace("base: ", "tokenizer: ", 1) for line in give_back_tokenizer(model, folder, None)]
    return [*lines, *_other_sizes(config)]


def _output(originals: Originals, name: str) -> OutputTensor:
    stored = originals.checkpoint.tensors[originals.sources[name][0]]
    shape, pieces = originals.shape(name), [lambda: originals.read(name)]
    if name == EMBEDDING:
        # The original's table has a row for `<image>`, which nothing reads, and of which it must not be all zeros.
        shape = (shape[0] + 1, *shape[1:])
        pieces.append(lambda: originals.read(name).float().mean(dim=0, keepdim=True).to(stored.dtype))
    return OutputTensor(name, stored.dtype, shape, tuple(pieces))


def _require_moai(config: UniMoeConfig) -> None:
    text = config.text_config
    for field in ("mixer_config", "plora_config"):
        if getattr(text, field) is None:
            raise ConversionError(f"The model has no {field}, which the original needs: only a MoAI can be exported.")
    for owner, needed in ((config, _NEEDED), (text, _NEEDED_TEXT)):
        for field, value in needed.items():
            if getattr(owner, field) != value:
                raise ConversionError(
                    f"The original has no {field} = {getattr(owner, field)!r}; only {value!r} can be exported."
                )
    vision, connector = config.vision_config, config.image_connector
    if vision is None or vision.model_type != "clip_vision_model":
        raise ConversionError("The model's vision tower is no CLIP, which the original needs.")
    if connector.type != "mlp" or connector.depth != 2 or connector.output_norm or connector.num_tokens is not None:
        raise ConversionError(
            "The image connector is no mlp of two layers with one token per patch, as the original's."
        )


def _other_sizes(config: UniMoeConfig) -> list[str]:
    """What the original's code has as constants and this model otherwise."""
    mixer, pixels = config.text_config.mixer_config, config.vision_config.image_size
    sizes = {
        "heads of the mixers' experts": (mixer.num_heads, MIXER_HEADS),
        "heads of the compressor": (mixer.compressor_heads, COMPRESSOR_HEADS),
        "pixels of pictures": (pixels, IMAGE_SIZE),
    }
    return [
        f"note: {what}: {found}; the original's code has {constant} as a constant, which must be changed there"
        for what, (found, constant) in sizes.items()
        if found != constant
    ]


__all__ = ["export_moai"]
