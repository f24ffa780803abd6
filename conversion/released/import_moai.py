"""Checkpoints in MoAI's own layout become folders of ours: one tensor in memory at a time, a receipt for every one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ...errors import ConversionError
from ...model_folder import resolve_folder
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...processing.chat_unimoe import IMAGE_TOKEN
from ...processing.perception.choice import PerceiverChoice, original_models
from ..checkpoints.accounting import account
from ..checkpoints.checkpoint_reader import Checkpoint, read_json
from ..checkpoints.checkpoint_writer import OutputTensor
from ..checkpoints.key_rules import KeyMap, Shape
from ..checkpoints.llava_keys import vision_prefix
from ..checkpoints.our_folder import expected_tensors
from ..checkpoints.source_tensors import SourceTensor, SourceTensors
from ..dense.encoder_folders import named_config
from .import_plan import ImportPlan, push_import, write_import
from .import_receipt import ImportReceipt
from .moai_config import is_moai, moai_sizes, our_moai_config
from .moai_keys import EMBEDDING, HEAD, POSITIONS, moai_rules
from .moai_processor import build_moai_processor, resized_positions
from .moai_tokenizer import END_OF_TURN, read_moai_tokenizer

_FILES = ("*.json", "*.safetensors", "*.bin", "tokenizer.model")
_ORIGIN = (
    "Converted from a checkpoint of MoAI's code (arXiv 2403.07508) on InternLM2 with partial LoRA. The terms of its authors "
    "and those of InternLM-XComposer2 and of CLIP hold."
)
_NOTES = (
    "gates are computed in float32 and padding of aux is masked; the original has float16 and reads it (gate_precision, "
    "compress_aux_padding in text_config.mixer_config)",
    "pictures of segments are fed as the original feeds them (aux_maps 'released' in processor_config.json)",
    "perception.json names the vision models of the original that are on the Hub; for scene graphs, convert PSGTR (`unimoe "
    'convert psgtr`) and name its folder there under "relate"',
)


@dataclass(frozen=True)
class MoaiVariant:
    """What was recognised."""

    name: str
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class _Resized:
    """Reads a table of positions for a grid of other size."""

    inner: SourceTensor
    grid: int

    def read(self, name: str) -> torch.Tensor:
        return resized_positions(self.inner.read(), self.grid)


def plan_moai(checkpoint: str, *, dtype: torch.dtype | None = None) -> ImportPlan:
    """Recognise the model and account for every tensor. Only headers and configurations are read.

    Args:
        checkpoint: folder or Hub id of a model as the original saved it.
        dtype: of the floating point tensors; None takes that of the checkpoint.

    Raises:
        ConversionError: a file is missing or damaged, this is no MoAI, its weights were quantised otherwise than by
            bitsandbytes, or a tensor is unknown, missing or of the wrong shape.
    """
    folder = resolve_folder(checkpoint, _FILES)
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder / 'config.json'} is missing: the folder is not complete. Fetch the file.")
    original, stored = read_json(folder / "config.json"), Checkpoint(folder)
    gathered = SourceTensors()
    for tensor in gathered.add_file("checkpoint", stored):
        gathered.put(tensor.name, tensor)
    _refuse_others(gathered.shapes)
    tokenizer = read_moai_tokenizer(folder)
    with named_config(folder / "config.json"):
        config = our_moai_config(original, gathered.shapes, _image_id(tokenizer, gathered.shapes[HEAD][0]))
        config.dtype = wanted = dtype or stored.main_dtype
        expected = {name: tuple(tensor.shape) for name, tensor in expected_tensors(config).items()}
    table = _resize_positions(gathered, config)
    key_map = moai_key_map(config, vision_prefix(expected), gathered.shapes[EMBEDDING][0])
    notes = list(_NOTES)
    if table is not None:
        table.consume(key_map.place(POSITIONS).target)
        notes.append(
            f"CLIP's {table.info.shape[0]} positions were resized to {gathered.live[POSITIONS].info.shape[0]}"
        )
    targets = account(gathered, key_map, expected)
    if tokenizer is None:
        notes.append("no processor: the checkpoint's folder holds no tokenizer.model")
    return ImportPlan(
        variant=_variant(config),
        config=config,
        gathered=gathered,
        targets=targets,
        outputs=tuple(
            OutputTensor(name, wanted, shape, targets[name].pieces(gathered.read)) for name, shape in expected.items()
        ),
        dtype=wanted,
        processor=None if tokenizer is None else build_moai_processor(config, tokenizer),
        generation=_generation_config(config, tokenizer),
        origin=_ORIGIN,
        notes=notes,
        tokenizer=None if tokenizer is None else folder,
        perception=PerceiverChoice.of_folder(folder) or original_models(),
    )


def moai_key_map(config: UniMoeConfig, prefix: str, embeddings: int) -> KeyMap:
    """The map of names; `prefix` is that of our vision tower's, `embeddings` the rows of the original's table."""
    return KeyMap(moai_rules(moai_sizes(config.text_config, embeddings), prefix))


def import_moai(
    checkpoint: str, out: Path, *, dtype: torch.dtype | None = None, push_to_hub: str | None = None
) -> ImportReceipt:
    """Convert a checkpoint; arguments as of `plan_moai`.

    Raises:
        ConversionError: see `plan_moai`; nothing is written then.
    """
    receipt = write_import(plan_moai(checkpoint, dtype=dtype), out)
    if push_to_hub is not None:
        push_import(receipt, out, push_to_hub)
    return receipt


def _refuse_others(shapes: Mapping[str, Shape]) -> None:
    if not is_moai(shapes):
        raise ConversionError(
            "This is no checkpoint of MoAI's code: it has no moai_compressor.latents, or no layer has moai_SA_img. For "
            "Uni-MoE and MoIIE there are `unimoe convert unimoe` and `unimoe convert moiie`."
        )


def _image_id(tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> int:
    if tokenizer is None:
        return vocabulary
    found: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if found < vocabulary:
        raise ConversionError(
            f"tokenizer.model knows {found} pieces, the model {vocabulary}: they do not belong together."
        )
    return found


def _resize_positions(gathered: SourceTensors, config: UniMoeConfig) -> SourceTensor | None:
    """Put CLIP's table in the size of the configuration's pictures; returns the stored one, None if it has that size."""
    table, vision = gathered.live.get(POSITIONS), config.vision_config
    grid = vision.image_size // vision.patch_size
    if table is None or table.info.shape[0] == grid * grid + 1:
        return None
    old = round((table.info.shape[0] - 1) ** 0.5)
    if old * old + 1 != table.info.shape[0]:
        raise ConversionError(
            f"{POSITIONS} has {table.info.shape[0]} rows, which are a class token and no square grid."
        )
    info = replace(table.info, shape=(grid * grid + 1, *table.info.shape[1:]))
    gathered.live[POSITIONS] = SourceTensor(table.file, table.name, info, _Resized(table, grid))
    return table


def _variant(config: UniMoeConfig) -> MoaiVariant:
    text, mixer = config.text_config, config.text_config.mixer_config
    pixels = config.vision_config.image_size
    return MoaiVariant(
        "moai",
        (
            f"mixers in layers {', '.join(map(str, mixer.layers))} of {text.num_hidden_layers}, rank {mixer.rank}",
            f"compressor of {mixer.compressor_depth} blocks to {mixer.num_latents} tokens",
            f"partial LoRA of rank {text.plora_config.rank}, pictures of {pixels} x {pixels}",
        ),
    )


def _generation_config(config: UniMoeConfig, tokenizer: PreTrainedTokenizerBase | None) -> GenerationConfig:
    """The authors' benchmarks: three beams, up to 128 new tokens. The end of a turn, at which they cut, ends an answer."""
    text = config.text_config
    ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    if tokenizer is not None and END_OF_TURN in tokenizer.get_vocab():
        ends = [*ends, tokenizer.convert_tokens_to_ids(END_OF_TURN)]
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=text.pad_token_id if text.pad_token_id is not None else ends[0],
        do_sample=False,
        num_beams=3,
        max_new_tokens=128,
    )


__all__ = ["import_moai", "moai_key_map", "plan_moai"]
