"""Checkpoints of models that are spread over ranks, which any number of ranks can go on from."""

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import TrainingArguments
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ...errors import CheckpointError
from .optimizer_parts import PARTS_FILE, load_parts, save_parts
from .resumable import ResumableTrainer
from .sharded_tensors import Region, fill_parts, is_sharded, require_shapes

_LoadResult = namedtuple("_LoadResult", ["missing_keys", "unexpected_keys"])


class ShardedCheckpoints(ResumableTrainer):
    """Weights, optimizer and schedule part by part. DeepSpeed and accelerate's FSDP keep their own forms."""

    def __init__(self, *, model: nn.Module, args: TrainingArguments, **kwargs: Any) -> None:
        wanted = args.save_only_model
        # The Trainer refuses to save the optimizer of a model that is spread, because it cannot; this class can.
        args.save_only_model = wanted or getattr(model, "is_distributed_loading_by_transformers", False)
        super().__init__(model=model, args=args, **kwargs)
        args.save_only_model = wanted

    @property
    def _is_spread(self) -> bool:
        """Whether transformers has split the model over ranks."""
        return getattr(self, "is_distributed_loading_by_transformers", False) and any(
            map(is_sharded, self.model.parameters())
        )

    def _save_optimizer(self, folder: Path) -> None:
        if not self._is_spread:
            super()._save_optimizer(folder)
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_parts(folder, self.model, _inner(self.optimizer))

    def _load_optimizer(self, checkpoint: Path) -> None:
        if self._is_spread or (checkpoint / PARTS_FILE).is_file():
            load_parts(checkpoint, self.model, _inner(self.optimizer))
        else:
            super()._load_optimizer(checkpoint)

    def _load_schedule(self, state: dict[str, Any]) -> None:
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        if len(state["base_lrs"]) != len(scheduler.base_lrs):
            # Experts on ranks of their own are a group of their own, so that other numbers of ranks have other groups.
            state = _for_other_groups(state, scheduler)
        super()._load_schedule(state)
        for group, rate in zip(_inner(self.optimizer).param_groups, state["_last_lr"], strict=True):
            group["lr"] = rate

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._is_spread and self._is_plain:
            self._issue_warnings_after_load(load_weights(Path(resume_from_checkpoint), model or self.model))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


def load_weights(folder: Path, model: nn.Module) -> Any:
    """Read the weights of a checkpoint into a model that is spread over ranks; each reads its own parts only.

    Returns:
        `missing_keys` and `unexpected_keys`, as `load_state_dict` does.

    Raises:
        CheckpointError: a file of weights is missing, or has tensors of other shapes.
    """
    saved = _saved_tensors(folder)
    tensors = model.state_dict(keep_vars=True)
    common = {name: tensor for name, tensor in tensors.items() if name in saved}
    require_shapes(folder, common, {name: shape for name, (_, shape) in saved.items()})

    def read(name: str, region: Region) -> torch.Tensor:
        with safe_open(saved[name][0], framework="pt") as file:
            return file.get_slice(name)[region.in_whole()] if region.sizes else file.get_tensor(name)

    fill_parts(common, read)
    return _LoadResult(sorted(set(tensors) - set(saved)), sorted(set(saved) - set(tensors)))


def _saved_tensors(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of every tensor of saved weights, unread."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    names = [SAFE_WEIGHTS_NAME]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in (folder / name for name in names):
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: put it back, or take another folder or checkpoint.")
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                found[name] = file, tuple(opened.get_slice(name).get_shape())
    return found


def _for_other_groups(state: dict[str, Any], scheduler: Any) -> dict[str, Any]:
    """A LambdaLR's state for its present groups: their rates follow from the step alone."""
    step = state["last_epoch"]
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    lambdas = [None] * len(rates)
    return state | {"base_lrs": list(scheduler.base_lrs), "_last_lr": rates, "lr_lambdas": lambdas}


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
