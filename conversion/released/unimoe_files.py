"""The files of a released Uni-MoE model, laid over each other in the order in which the original loads them.

    base shards  ->  non_lora_trainables.bin  ->  LoRA merged  ->  mm_audio_aligner.bin  ->  mlp_gates.bin
    8 experts: base shards  ->  experts  ->  non_lora_trainables.bin  ->  mlp_gates.bin  ->  LoRA  ->  mm_audio_aligner.bin

What comes later replaces what was there, also a weight that LoRA had changed: so the LoRA of a router, which is in the
files of two variants, has no effect. The encoders come from their own folders, as in every script of the original.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from ...errors import ConversionError
from ..checkpoints.checkpoint_reader import Checkpoint, TensorFile, read_json
from ..checkpoints.llava_keys import PROJECTOR, VISION_TOWER
from ..checkpoints.source_tensors import SourceTensor, SourceTensors
from .unimoe_keys import ALIGNER, AUDIO_TOWER, Layout
from .unimoe_lora import LORA_TENSOR, Lora, is_lora_of_router, lora_modules, read_lora_scale

# Written by the saver of every variant; a folder without one of them is not complete.
FINETUNED_FILES = (
    "config.json",
    "adapter_config.json",
    "non_lora_trainables.bin",
    "mm_audio_aligner.bin",
    "mlp_gates.bin",
)
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_BASE_EXTRAS = ("mm_projector.bin", "mm_audio_aligner.bin")
# What each file holds all of; the query decoder's word embeddings are of no use, and left out by some savers.
_PROJECTOR_TENSOR = re.compile(re.escape(PROJECTOR) + ".+")
_ROUTERS: dict[Layout, re.Pattern[str]] = {
    "plain": re.compile(r"model\.layers\.\d+\.mlp\.gate\.weight"),
    "deepspeed": re.compile(r"model\.layers\.\d+\.mlp\.deepspeed_moe\.gate\.wg\.weight"),
}
_ALIGNER_TENSOR = re.compile(rf"model\.query_tokens|{re.escape(ALIGNER)}(?!decoder\.audio_decoder\.embed_tokens\.).+")
_TOWERS = ("model.vision_tower.", "model.audio_tower.")

# How the names in an encoder's own folder begin -> how the original's do, or None with the reason for dropping it.
_ENCODER_NAMES: dict[str, tuple[tuple[str, str | None, str], ...]] = {
    "clip": (
        ("vision_model.", VISION_TOWER + "vision_model.", ""),
        *((begin, VISION_TOWER + "vision_model." + begin, "") for begin in ("embeddings.", "encoder.")),
        *((begin, VISION_TOWER + "vision_model." + begin, "") for begin in ("pre_layrnorm.", "post_layernorm.")),
        *(
            (begin, None, "the text half of CLIP and its projections, which no model here uses")
            for begin in ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
        ),
    ),
    "whisper": (
        ("model.encoder.", AUDIO_TOWER, ""),
        ("encoder.", AUDIO_TOWER, ""),
        *(
            (begin, None, "the tower is Whisper's encoder; the query decoder is in the checkpoint")
            for begin in ("model.decoder.", "decoder.", "proj_out.")
        ),
    ),
    "beats": (("", AUDIO_TOWER, ""),),
}


@dataclass
class Gathered(SourceTensors):
    """Everything that was read.

    Args:
        loras: original name of a weight -> everything that is added to it.
        copies: pairs of tensors that the original's savers wrote with the same values.
    """

    loras: dict[str, list[Lora]] = field(default_factory=dict)
    copies: list[tuple[SourceTensor, SourceTensor]] = field(default_factory=list)
    base_dtype: torch.dtype = torch.float32

    def read(self, original: str) -> torch.Tensor:
        """A tensor with its LoRA, if it has one, merged in float32."""
        tensor = super().read(original)
        for lora in self.loras.get(original, ()):
            tensor = lora.merged_into(tensor)
        return tensor

    def put(self, original: str, tensor: SourceTensor) -> None:
        """Lay a tensor over what is there; LoRA that was to change the old one goes with it."""
        super().put(original, tensor)
        for lora in self.loras.pop(original, ()):
            for factor in lora.tensors:
                factor.drop(f"the weight that it changes is replaced by {tensor.file}")


def gather(base: Path) -> Gathered:
    """The base model. Only headers are read.

    Raises:
        ConversionError: a file is missing or damaged; the message names it.
    """
    gathered = Gathered()
    _require(base, ("config.json",))
    shards = Checkpoint(base)
    gathered.base_dtype = shards.main_dtype
    for tensor in gathered.add_file("base", shards):
        if tensor.name.startswith(_TOWERS):
            tensor.drop("the encoders are taken from their own folders, as the original does")
        else:
            gathered.put(tensor.name, tensor)
    for name in _BASE_EXTRAS:
        if (base / name).is_file():
            _fill_in(gathered, TensorFile(base / name))
    return gathered


def require_finetuned(finetuned: Path) -> Path:
    """The adapter file of a fine-tuned folder. Raises ConversionError when the folder lacks a file."""
    _require(finetuned, FINETUNED_FILES)
    adapter = next((finetuned / name for name in _ADAPTERS if (finetuned / name).is_file()), None)
    if adapter is None:
        raise ConversionError(f"{finetuned / _ADAPTERS[1]} is missing: the folder is not complete. Fetch the file.")
    return adapter


def lay_over(gathered: Gathered, finetuned: Path, layout: Layout) -> None:
    """Lay the fine-tuned model over the base, in the original's order.

    Raises:
        ConversionError: a file is missing or damaged, or does not fit; the message names it.
    """
    adapter = require_finetuned(finetuned)
    gates = partial(_replace, gathered, TensorFile(finetuned / "mlp_gates.bin"), _ROUTERS[layout])
    _replace(gathered, TensorFile(finetuned / "non_lora_trainables.bin"), _PROJECTOR_TENSOR)
    if layout == "deepspeed":
        gates()
    adapter_config = finetuned / "adapter_config.json"
    _add_loras(gathered, TensorFile(adapter), read_lora_scale(adapter_config), lora_modules(adapter_config))
    _replace(gathered, TensorFile(finetuned / "mm_audio_aligner.bin"), _ALIGNER_TENSOR)
    if layout == "plain":
        gates()


def add_encoder(gathered: Gathered, kind: Literal["clip", "whisper", "beats"], checkpoint: Checkpoint) -> None:
    """Take an encoder from its own folder or file."""
    for tensor in gathered.add_file(kind, checkpoint):
        for begin, original, reason in _ENCODER_NAMES[kind]:
            if not tensor.name.startswith(begin):
                continue
            if original is None:
                tensor.drop(reason)
            else:
                gathered.put(original + tensor.name.removeprefix(begin), tensor)
            break


def reader(gathered: Gathered, merge_lora: bool) -> Callable[[str], torch.Tensor]:
    """What reads a tensor by its original name, with or without LoRA."""
    return gathered.read if merge_lora else lambda original: gathered.live[original].read()


def _fill_in(gathered: Gathered, file: TensorFile) -> None:
    """The base folder's extra files hold what the shards hold too; where these do not, they are the only source."""
    for tensor in gathered.add_file("base", file):
        if tensor.name in gathered.live:
            tensor.drop(f"also in {gathered.live[tensor.name].file}, whose copy the original takes")
        else:
            gathered.put(tensor.name, tensor)


def _replace(gathered: Gathered, file: TensorFile, whole: re.Pattern[str]) -> None:
    """Lay a file over what is there. Of the kind `whole` it must hold all that there is, as the savers write it."""
    refuse_incomplete(
        file, [name for name in gathered.live if whole.fullmatch(name)], map(without_wrappers, file.tensors)
    )
    seen: dict[str, str] = {}
    for tensor in gathered.add_file("finetuned", file):
        original = without_wrappers(tensor.name)
        if is_lora_of_router(original):
            tensor.drop("LoRA of a router, which the original does not load")
            continue
        if original in seen:
            raise ConversionError(
                f"{file.path} holds {original} twice, as {seen[original]} and {tensor.name}. Fetch the file again."
            )
        seen[original] = tensor.name
        gathered.put(original, tensor)


def refuse_incomplete(file: TensorFile, needed: Iterable[str], there: Iterable[str], what: str = "") -> None:
    """Raises ConversionError for a file that lacks something: what is under it would show through unnoticed."""
    absent = sorted(set(needed) - set(there))
    if absent:
        raise ConversionError(
            f"{file.path} lacks {what}{absent[0]}"
            + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
            + ", which "
            "the original's saver writes there. Fetch the file again; all files must be of one model."
        )


def _add_loras(gathered: Gathered, file: TensorFile, scale: Mapping[str, float], modules: Sequence[str]) -> None:
    """`modules` are those that the adapter says it changes, whole names or ends of names."""
    factors: dict[str, dict[str, SourceTensor]] = {}
    for tensor in gathered.add_file("finetuned", file):
        match = LORA_TENSOR.fullmatch(tensor.name)
        original = without_wrappers(match["module"]) + ".weight" if match else ""
        if match and original in gathered.live:  # else it stays unexpected
            factors.setdefault(original, {})[match["factor"]] = tensor
    for original, pair in factors.items():
        if set(pair) != {"A", "B"}:
            given = next(iter(pair.values()))
            raise ConversionError(f"{file.path} holds {given.name} without its other factor. Fetch the file again.")
        shape = gathered.live[original].info.shape
        gathered.loras[original] = [Lora.fitting(original, shape, pair["A"], pair["B"], scale)]
    ends = tuple(f".{without_wrappers(module)}.weight" for module in modules)
    decoder = (
        name for name in gathered.live if name.startswith("model.layers.") and not name.endswith(".gate.weight")
    )
    refuse_incomplete(file, (name for name in decoder if f".{name}".endswith(ends)), factors, "LoRA of ")


def without_wrappers(name: str) -> str:
    """A name without PEFT's wrapping, which savers left in some files."""
    name = name.removeprefix("base_model.model.")
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def _require(folder: Path, files: tuple[str, ...]) -> None:
    if not folder.is_dir():
        raise ConversionError(f"{folder} is no folder.")
    for name in files:
        if not (folder / name).is_file():
            raise ConversionError(f"{folder / name} is missing: the folder is not complete. Fetch the file.")
        if name.endswith(".json"):
            read_json(folder / name)
