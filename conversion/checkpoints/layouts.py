"""The same sparse model in other files: experts fused or one by one, or in files of their own for every rank.

    fused         `mlp.experts.gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I], as models of ours are saved
    per-expert    `mlp.experts.{e}.gate_proj.weight`, `up_proj` and `down_proj`, as other tools keep them
    expert-parallel over N ranks: per-expert, with the experts of rank r in files that hold nothing else, so that a rank
                  never opens those of another (`expert_shards.load_expert_parallel`)

Every layout loads with a plain `from_pretrained`. Tensors are copied bit by bit and streamed; nothing is computed.
"""

import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from .checkpoint_reader import PICKLE, PICKLE_INDEX, SAFETENSORS_INDEX, Checkpoint, TensorInfo
from .checkpoint_writer import DEFAULT_SHARD_BYTES, OutputTensor, split_into_shards, write_checkpoint, write_shards
from .finished_folder import finished_folder
from .our_folder import expected_tensors, read_our_config
from .read_back import require_digests

Layout = Literal["fused", "per-expert"]
_FUSED_EXPERTS = re.compile(r"(?P<mlp>.+\.mlp\.experts\.)(?P<name>gate_up_proj|down_proj)")
_ONE_EXPERT = re.compile(r"(?P<mlp>.+\.mlp\.experts\.)(?P<expert>\d+)\.(?P<projection>gate|up|down)_proj\.weight")
_PROJECTIONS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
_WEIGHT_FILES = ("*.safetensors", SAFETENSORS_INDEX, PICKLE, PICKLE_INDEX)


@dataclass(frozen=True)
class LayoutPlan:
    """What will be written: file name -> tensors, or everything split by size alone."""

    folder: Path
    outputs: tuple[OutputTensor, ...]
    layout: Layout
    ranks: int | None

    def lines(self) -> list[str]:
        """The plan for a reader."""
        size = sum(output.num_bytes for output in self.outputs)
        how = self.layout if self.ranks is None else f"{self.layout}, experts in files of {self.ranks} ranks"
        return [f"writes      {len(self.outputs)} tensors, {size / 1e6:,.1f} MB: {how}"]


def plan_layout(folder: Path, layout: Layout, ranks: int | None = None) -> LayoutPlan:
    """Describe another layout of a model of ours; only headers are read.

    Args:
        layout: "fused" or "per-expert".
        ranks: give every one of so many ranks files of its own for its experts; their number must divide the experts'.

    Raises:
        ConversionError: the folder holds no sparse model of ours, is incomplete, or cannot be laid out so.
    """
    config = read_our_config(folder)
    text = config.text_config
    if not text.sparse_layers:
        raise ConversionError(f"{folder} holds a dense model: it has no experts to lay out.")
    if ranks is not None:
        if layout == "fused":
            raise ConversionError("Fused experts are one tensor, which cannot be spread over files: use per-expert.")
        if ranks < 1 or text.num_experts % ranks:
            raise ConversionError(f"{ranks} ranks cannot share {text.num_experts} experts evenly: use a divisor.")
    checkpoint = Checkpoint(folder)
    fused = _fused_outputs(checkpoint, config)
    outputs = fused
    if layout == "per-expert":
        outputs = [one for output in fused for one in _taken_apart(output, checkpoint)]
    return LayoutPlan(folder, tuple(outputs), layout, ranks)


def run_layout(
    plan: LayoutPlan, out: Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, progress: bool = True
) -> list[str]:
    """Write the model as a complete folder, read every tensor back, and say what was written.

    Raises:
        ConversionError: `out` is not empty, a file is damaged, or what was written reads back otherwise. Then nothing is
            left behind.
    """
    started = time.monotonic()
    with finished_folder(out) as folder:
        weights = {path for pattern in _WEIGHT_FILES for path in plan.folder.glob(pattern)}
        for path in sorted(plan.folder.iterdir()):
            if path.is_file() and path not in weights:
                shutil.copyfile(path, folder / path.name)
        digests = dict[str, str]()
        if plan.ranks is None:
            files = write_checkpoint(
                folder, plan.outputs, max_shard_bytes=max_shard_bytes, progress=progress, digests=digests
            )
        else:
            shards = rank_shards(plan.outputs, plan.ranks, max_shard_bytes)
            metadata = {"expert_parallel_ranks": plan.ranks}
            files = write_shards(folder, shards, progress=progress, digests=digests, metadata=metadata)
        require_digests(Checkpoint(folder), digests, progress)
        sizes = {path.name: path.stat().st_size for path in files}
    seconds = max(time.monotonic() - started, 1e-3)
    total = sum(sizes.values())
    return [
        f"tensors     {len(plan.outputs)} written and read back, bit-equal",
        f"written     {total / 1e6:,.1f} MB in {len(sizes)} file(s), {seconds:.1f} s ({total / seconds / 1e6:,.0f} MB/s)",
    ]


def rank_shards(
    outputs: tuple[OutputTensor, ...], ranks: int, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> dict[str, list[OutputTensor]]:
    """File name -> tensors: first what all ranks need, then the experts of every rank."""
    experts = 1 + max(int(match["expert"]) for output in outputs if (match := _ONE_EXPERT.fullmatch(output.name)))
    groups: list[list[OutputTensor]] = [[] for _ in range(ranks + 1)]
    for output in outputs:
        match = _ONE_EXPERT.fullmatch(output.name)
        groups[0 if match is None else 1 + int(match["expert"]) * ranks // experts].append(output)
    files = {}
    for index, group in enumerate(groups):
        stem = "model-shared" if index == 0 else f"model-experts-rank-{index - 1:03d}-of-{ranks:03d}"
        for number, shard in enumerate(split_into_shards(group, lambda output: output.num_bytes, max_shard_bytes)):
            files[f"{stem}-{number:05d}.safetensors"] = shard
    return files


def _fused_outputs(checkpoint: Checkpoint, config: UniMoeConfig) -> list[OutputTensor]:
    """All tensors of the model in its own order, fused; from a checkpoint in either layout."""
    outputs, used = [], set()
    expected = expected_tensors(config)
    for name, tensor in expected.items():
        match = _FUSED_EXPERTS.fullmatch(name)
        sources = [name]
        if name not in checkpoint.tensors and match is not None:
            sources = [
                f"{match['mlp']}{expert}.{projection}_proj.weight"
                for expert in range(tensor.shape[0])
                for projection in _PROJECTIONS[match["name"]]
            ]
        infos = _infos(checkpoint, sources)
        used.update(sources)
        if any(info.shape != _shape_of(source, tensor) for source, info in zip(sources, infos, strict=True)):
            raise ConversionError(
                f"{checkpoint.folder}: {sources[0]} has shape {list(infos[0].shape)}, which does not make {name} "
                f"{list(tensor.shape)} of config.json. Save the model again."
            )
        pieces = tuple(partial(checkpoint.read, source) for source in sources)
        outputs.append(OutputTensor(name, infos[0].dtype, tuple(tensor.shape), pieces))
    unknown = sorted(set(checkpoint.tensors) - used - {"lm_head.weight"})
    if unknown:
        raise ConversionError(f"{checkpoint.folder} holds {unknown[0]}, which is no part of its model. Save it again.")
    return outputs


def _shape_of(source: str, made: torch.Tensor) -> tuple[int, ...]:
    """The shape that one of a tensor's sources must have: an expert's matrix, or all of the tensor."""
    match = _ONE_EXPERT.fullmatch(source)
    if match is None:
        return tuple(made.shape)
    _, rows, columns = made.shape
    return (rows if match["projection"] == "down" else rows // 2, columns)


def _infos(checkpoint: Checkpoint, names: list[str]) -> list[TensorInfo]:
    missing = [name for name in names if name not in checkpoint.tensors]
    if missing:
        raise ConversionError(f"{checkpoint.folder} lacks {missing[0]}. Fetch the model again, or save it again.")
    infos = [checkpoint.tensors[name] for name in names]
    if len({(info.dtype, info.shape) for info in infos}) > 1:
        kinds = sorted({f"{info.dtype} {list(info.shape)}" for info in infos})
        raise ConversionError(f"{checkpoint.folder}: {names[0]} and its like differ: {', '.join(kinds)}.")
    return infos


def _taken_apart(output: OutputTensor, checkpoint: Checkpoint) -> list[OutputTensor]:
    """The experts of a fused tensor one by one; other tensors as they are."""
    match = _FUSED_EXPERTS.fullmatch(output.name)
    if match is None:
        return [output]
    projections = _PROJECTIONS[match["name"]]
    experts, rows, columns = output.shape
    shape = (rows // len(projections), columns)
    made = []
    read: Callable[[], torch.Tensor]
    for expert in range(experts):
        for place, projection in enumerate(projections):
            index = expert * len(projections) + place
            if len(output.pieces) == 1:  # stored fused
                count = shape[0] * shape[1]
                read = partial(checkpoint.read_flat, output.name, index * count, count)
            else:
                read = output.pieces[index]
            made.append(OutputTensor(f"{match['mlp']}{expert}.{projection}_proj.weight", output.dtype, shape, (read,)))
    return made


def experts_by_file(weight_map: Mapping[str, str]) -> dict[str, set[int] | None]:
    """File -> ids of the experts in it, when it holds nothing else; None for files that every rank needs."""
    files: dict[str, set[int] | None] = {}
    for name, file in weight_map.items():
        match = _ONE_EXPERT.fullmatch(name)
        known = files.setdefault(file, set())
        if match is None:
            files[file] = None
        elif known is not None:
            known.add(int(match["expert"]))
    return files


__all__ = ["Layout", "LayoutPlan", "experts_by_file", "plan_layout", "rank_shards", "run_layout"]
