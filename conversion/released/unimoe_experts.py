"""What only the 8-expert variant has: experts in files of their own, and a low-rank pair inside every projection of an MLP.

    gate, up and down:  W x + lora_alpha / lora_r * B (A x),  with A under `gate_proj_lora_A` and B under `gate_proj_lora_B`

W comes from the files that the experts were tuned in, A and B from the fine-tuned model; both lie one expert to a file.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import ConversionError
from ..checkpoints.checkpoint_reader import TensorFile, TensorInfo
from ..checkpoints.key_rules import Shape
from ..checkpoints.source_tensors import SourceTensor
from ..upcycling.upcycle import FFN_PROJECTIONS
from .unimoe_files import Gathered, refuse_incomplete, require_finetuned, without_wrappers
from .unimoe_keys import EXPERTS
from .unimoe_lora import LORA_TENSOR, Lora, MergedFactor
from .unimoe_variant import decoder_layers, eight_expert_layers

# Expert i is in the i-th of these; two files serve twice.
EXPERT_FILES = (
    "mlp_audiocap.bin",
    "mlp_basev.bin",
    "mlp_base.bin",
    "mlp_base1.bin",
    "mlp_base4.bin",
    "mlp_base7.bin",
    "mlp_base.bin",
    "mlp_base7.bin",
)
FINETUNED_FILE = "{expert}_mlp_experts.bin"
# Maps in front of the routers, empty unless config.json has use_fm_block.
MODALITY_MAPS = "fm_adapter.bin"
_FACTORS = tuple(f"{projection}_lora_{factor}" for projection in FFN_PROJECTIONS for factor in "AB")
_FACTOR = re.compile(r"(?P<weight>.+\.(?:gate|up|down)_proj)_lora_[AB]\.weight")
_DENSE_MLP = re.compile(r"model\.layers\.(\d+)\.mlp\.(?:gate|up|down)_proj(?:_lora_[AB])?\.weight")
# Relative rounding of bfloat16, the coarsest type that files are saved in, and the step of float16 near zero.
_ROUNDING, _SUBNORMAL = 2.0**-8, 2.0**-24
_SLOT = re.compile(r"\.deepspeed_experts\.(\d+)\.")


def add_experts(gathered: Gathered, folder: Path, finetuned: Path | None, config: Mapping[str, Any]) -> None:
    """Lay the experts over the base model: per expert its fine-tuned file and on top the file that it was tuned in.

    Args:
        folder: the `EXPERT_FILES`.
        finetuned: the folder with `{expert}_mlp_experts.bin`.
        config: the original's config.json.

    Raises:
        ConversionError: a file is missing or damaged, or holds the experts of several slots.
    """
    num_experts = _count(config, "num_experts")
    layers = set(eight_expert_layers(config, len(decoder_layers(gathered.live))))
    _drop_dense_mlps(gathered, layers)
    sources = {}
    for name in _needed(num_experts):
        file = _expert_file(folder / name)
        if file.tensors:  # without any, the weights are those of the fine-tuned files
            refuse_incomplete(file, _leaves(layers, FFN_PROJECTIONS), _leaves_of(file))
        sources[name] = gathered.add_file("experts", file)
    for path in sorted(folder.glob("*.bin")):
        if path.name not in sources:
            for tensor in gathered.add_file("experts", TensorFile(path)):
                tensor.drop("no expert of the 8-expert model comes from this file")
    if finetuned is not None:
        require_finetuned(finetuned)
        if (finetuned / MODALITY_MAPS).is_file():
            gathered.add_file("finetuned", TensorFile(finetuned / MODALITY_MAPS))  # what it holds stays unexpected
    for expert in range(num_experts):
        if finetuned is not None:
            file = TensorFile(finetuned / FINETUNED_FILE.format(expert=expert))
            _refuse_several_slots(file)
            refuse_incomplete(file, _leaves(layers, _FACTORS), _leaves_of(file))
            _place(gathered, gathered.add_file("finetuned", file), expert, layers, (*FFN_PROJECTIONS, *_FACTORS))
        _place(gathered, sources[_file_of(expert)], expert, layers, FFN_PROJECTIONS)


def require_equal_copies(gathered: Gathered) -> None:
    """The files of fine-tuned experts hold the frozen weights too: they tell files that are swapped. Reads all of both.

    Raises:
        ConversionError: a weight differs by more than rounding from that of the file that the expert was tuned in.
    """
    for copy, source in gathered.copies:
        found, expected = copy.read().float(), source.read().float()
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=_ROUNDING, atol=_SUBNORMAL):
            raise ConversionError(
                f"{copy.file} holds other values than {source.file} in {copy.name}, which training left as it was: the two "
                "are not of the same expert. Check that no file was swapped or renamed, and fetch both again."
            )


def add_absent_pairs(gathered: Gathered, finetuned: Path, config: Mapping[str, Any]) -> bool:
    """Zeros for the pairs of dense layers that no file holds though the adapter changes them; says whether there are any.

    The original starts such pairs at random each time it loads the model.
    """
    rank = _count(config, "lora_r")
    absent = False
    for name in TensorFile(require_finetuned(finetuned)).tensors:
        match = LORA_TENSOR.fullmatch(name)
        pair = _FACTOR.fullmatch(without_wrappers(match["module"]) + ".weight") if match else None
        weight = f"{pair['weight']}.weight" if pair else ""
        if pair is None or weight not in gathered.live:
            continue
        rows, columns = gathered.live[weight].info.shape
        for factor, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            original = f"{pair['weight']}_lora_{factor}.weight"
            if original not in gathered.live:
                gathered.put(original, _zeros(original, shape))
                absent = True
    return absent


def integrate_pairs(gathered: Gathered, config: Mapping[str, Any]) -> None:
    """Turn the pairs inside MLPs into LoRA of the weights that they belong to.

    Raises:
        ConversionError: a pair is not complete, or does not fit its weight.
    """
    scale = _scale(config)
    for weight in pairs_in(gathered.live):
        factors = []
        for factor in "AB":
            original = f"{weight}_lora_{factor}.weight"
            tensor, changes = gathered.live.pop(original), gathered.loras.pop(original, [])
            factors.append(MergedFactor(tensor, tuple(changes)) if changes else tensor)
        name = f"{weight}.weight"
        fitting = Lora.fitting(name, gathered.live[name].info.shape, factors[0], factors[1], scale)
        gathered.loras.setdefault(name, []).append(fitting)


def pairs_in(names: Iterable[str]) -> list[str]:
    """Projections, without `.weight`, that have a pair.

    Raises:
        ConversionError: one factor or the weight is missing.
    """
    names = set(names)
    found = sorted({match["weight"] for match in map(_FACTOR.fullmatch, names) if match})
    for weight in found:
        for part in (".weight", "_lora_A.weight", "_lora_B.weight"):
            if weight + part not in names:
                raise ConversionError(f"{weight + part} is missing, though {weight} has a low-rank pair.")
    return found


def _count(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or value < 1:
        raise ConversionError(f"config.json has {field} = {value!r}; the 8-expert variant needs a number from 1 on.")
    return value


def _scale(config: Mapping[str, Any]) -> dict[str, float]:
    rank, alpha = _count(config, "lora_r"), config.get("lora_alpha")
    if not isinstance(alpha, int | float):
        raise ConversionError(f"config.json has lora_alpha = {alpha!r}; the pairs inside the MLPs need a number.")
    return {"r": rank, "lora_alpha": alpha}


def _file_of(expert: int) -> str:
    return EXPERT_FILES[expert % len(EXPERT_FILES)]


def _needed(num_experts: int) -> list[str]:
    return sorted({_file_of(expert) for expert in range(num_experts)})


def _expert_file(path: Path) -> TensorFile:
    if not path.parent.is_dir():
        raise ConversionError(f"{path.parent} is no folder.")
    return TensorFile(path)


def _drop_dense_mlps(gathered: Gathered, layers: set[int]) -> None:
    """The base may hold the FFN of a layer that has experts here; the original has no place for it."""
    for name in list(gathered.live):
        match = _DENSE_MLP.fullmatch(name)
        if match and int(match[1]) in layers:
            gathered.live.pop(name).drop("the layer has experts in the place of this MLP")


def _refuse_several_slots(file: TensorFile) -> None:
    slots = {match[1] for match in map(_SLOT.search, file.tensors) if match}
    if len(slots) > 1:
        raise ConversionError(
            f"{file.path} holds experts of {len(slots)} slots; the original's loader takes one expert from each of its "
            "files. Save the model with one expert per process (ep_size = num_experts)."
        )


def _leaves(layers: Iterable[int], leaves: tuple[str, ...]) -> list[str]:
    return [f"model.layers.{layer}.mlp.{leaf}.weight" for layer in layers for leaf in leaves]


def _leaves_of(file: TensorFile) -> list[str]:
    """The names in a file, reduced to what counts, see `_place`."""
    parts = [name.split(".") for name in file.tensors]
    return [f"model.layers.{part[2]}.mlp.{part[-2]}.weight" for part in parts if len(part) >= 4]


def _place(
    gathered: Gathered, tensors: Iterable[SourceTensor], expert: int, layers: set[int], leaves: tuple[str, ...]
) -> None:
    """Put one expert's tensors in; as in the original, only the layer and the last part of a name count."""
    for tensor in tensors:
        parts = tensor.name.split(".")
        if len(parts) < 4 or not parts[2].isdecimal() or parts[-2] not in leaves:
            continue  # stays unexpected
        layer = int(parts[2])
        if layer not in layers:
            tensor.drop(f"layer {layer} has no experts")
            continue
        original = f"model.layers.{layer}.mlp.{EXPERTS['deepspeed']}.{expert}.{parts[-2]}.weight"
        if original in gathered.live:
            gathered.copies.append((gathered.live[original], tensor))
        gathered.put(original, tensor)


@dataclass(frozen=True)
class _Zeros:
    """Reads zeros in place of a tensor that no file holds."""

    shape: Shape

    def read(self, name: str) -> torch.Tensor:
        return torch.zeros(self.shape)


def _zeros(original: str, shape: Shape) -> SourceTensor:
    return SourceTensor("", original, TensorInfo(Path(), torch.float32, shape), _Zeros(shape))
