"""A Trainer whose checkpoints are whole or ignored, hold everything that a run depends on, and unpickle nothing.

CHECKPOINT/model.safetensors, or the adapters and `TRAINED_FILE`
CHECKPOINT/optimizer.json, .safetensors     by names of parameters
CHECKPOINT/schedule.json, .safetensors
CHECKPOINT/process_RANK.json, .safetensors  random numbers, losses not logged yet, steps left out
CHECKPOINT/trainer_state.json, training_args.json
CHECKPOINT/COMPLETE                         see `checkpoints`

Under DeepSpeed and FSDP, optimizer and weights are written by these.
"""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from ...errors import CheckpointError
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..steps.loss_meter import LossMeter
from ..steps.non_finite import FiniteGuard
from ..steps.router_bias import choice_biases
from .checkpoints import SAVING_FOLDER, newest_checkpoint, rotate, seal, told, verify
from .folder_lock import exclusive
from .optimizer_state import WHOLE_STATE, load_state_by_name, state_by_name
from .random_state import random_state, set_random_state
from .sharded_tensors import fill_parts, require_shapes, whole_tensor
from .state_tree import has_tree, load_tree, save_tree

logger = logging.get_logger(__name__)

TRAINED_FILE = "trained_parameters.safetensors"
_ARGUMENTS_FILE = "training_args.json"
_SCHEDULE, _SCALER, _PROCESS = "schedule", "scaler", "process"


class ResumableTrainer(Trainer):
    """The part of `UniMoeTrainer` that saves and goes on; what it needs of the rest are these two."""

    finite_guard: FiniteGuard
    losses: LossMeter

    _saving = False
    _resumed_from: str | None = None

    def __init__(self, model: nn.Module, args: TrainingArguments, **kwargs: Any) -> None:
        with told("The folder for checkpoints could not be made", Path(args.output_dir)):
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        super().__init__(model=model, args=args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As usual; `resume_from_checkpoint=True` means the newest complete checkpoint, if there is one.

        Raises:
            CheckpointError: the checkpoint is incomplete or altered, another process writes to this folder, or it cannot
                be written.
        """
        folder = Path(self.args.output_dir)
        saves = self.args.save_strategy != SaveStrategy.NO and self.is_world_process_zero()
        with exclusive(folder) if saves else nullcontext():
            if resume_from_checkpoint is True:
                newest = newest_checkpoint(folder)
                resume_from_checkpoint = None if newest is None else str(newest)
            elif resume_from_checkpoint:
                verify(Path(resume_from_checkpoint))
            # Steps that were only timed leave no trace.
            self.losses.end_step(made=False)
            self.finite_guard.forget()
            if saves:
                # What a killed process was writing must not become part of another checkpoint.
                shutil.rmtree(folder / SAVING_FOLDER, ignore_errors=True)
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    # ---- saving

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / SAVING_FOLDER) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        written = folder / SAVING_FOLDER / name
        try:
            with told(f"{name} could not be written", folder):
                self._write_checkpoint(model, trial, written)
                self.accelerator.wait_for_everyone()
                if self.state.best_model_checkpoint == str(written):
                    self.state.best_model_checkpoint = str(folder / name)
                if self.args.should_save:
                    self.state.save_to_json(
                        str(written / TRAINER_STATE_NAME)
                    )  # the best one's place is only known now
                    seal(written, folder / name)
                    best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
                    rotate(folder, self.args.save_total_limit or 1 << 30, spared=Path(best) if best else None)
        except CheckpointError:
            shutil.rmtree(written, ignore_errors=True)  # it may be what fills the disk
            raise
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, model: nn.Module, trial: Any, written: Path) -> None:
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        name = f"{_PROCESS}_{self.args.process_index}"
        save_tree(self._process_state(), written, name)

    def _process_state(self) -> dict[str, Any]:
        return {
            "random": random_state(),
            "losses": self.losses.state_dict(),
            "skipped": self.finite_guard.skipped,
        }

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        # PEFT saves its adapters only; routers and connectors trained beside them would be lost.
        trained = {} if self._is_plain else _whole_trained_tensors(self.model, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle
        (folder / _ARGUMENTS_FILE).write_text(self.args.to_json_string(), encoding="utf-8")
        if trained:
            save_file(trained, folder / TRAINED_FILE)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._saves_optimizer:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self._save_optimizer(Path(output_dir))
        if self.args.should_save:
            save_tree(self.lr_scheduler.state_dict(), Path(output_dir), _SCHEDULE)

    def _save_optimizer(self, folder: Path) -> None:
        state = state_by_name(self.optimizer, self.model)
        if self.args.should_save:
            save_tree(state, folder, WHOLE_STATE)

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            save_tree(scaler.state_dict(), Path(output_dir), _SCALER)

    def _save_rng_state(self, output_dir: str) -> None:
        """Part of `_process_state`."""
        Path(output_dir).mkdir(parents=True, exist_ok=True)

    # ---- going on

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._saves_optimizer:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            self._load_optimizer(Path(checkpoint))
            self._load_schedule(load_tree(Path(checkpoint), _SCHEDULE))
        self._resumed_from = checkpoint
        if checkpoint is not None:
            self._find_best_again(Path(checkpoint).parent)
        state = self._state_of_process(checkpoint)
        if state is not None:
            self.losses.load_state_dict(state["losses"])
            self.finite_guard.skipped = state["skipped"]

    def _load_optimizer(self, checkpoint: Path) -> None:
        load_state_by_name(self.optimizer, self.model, load_tree(checkpoint, WHOLE_STATE))

    def _load_schedule(self, state: dict[str, Any]) -> None:
        self.lr_scheduler.load_state_dict(state)

    def _find_best_again(self, folder: Path) -> None:
        """The Trainer forgets the best checkpoint when its path is another, as where the whole run was moved."""
        if not self.args.load_best_model_at_end or not self.state.best_global_step or self.state.best_model_checkpoint:
            return
        best = folder / f"checkpoint-{self.state.best_global_step}"
        verify(best)
        self.state.best_model_checkpoint = str(best)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and has_tree(Path(checkpoint), _SCALER):
            self.accelerator.scaler.load_state_dict(load_tree(Path(checkpoint), _SCALER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self._resumed_from = None
        state = self._state_of_process(checkpoint)
        if state is not None:
            set_random_state(state["random"])

    def _restore_random_numbers_once(self) -> None:
        """For what draws random numbers before the Trainer restores them: the look ahead of the first step in an epoch.

        At the start of an epoch it has restored them before, and the data loader has drawn since.
        """
        if self._resumed_from is not None:
            self._load_rng_state(self._resumed_from)

    def _state_of_process(self, checkpoint: str | None) -> dict[str, Any] | None:
        if checkpoint is None:
            return None
        # Tensor ranks share a batch, and draw the same numbers.
        first = self.args.process_index - self.args.process_index % self.get_tp_size()
        name = f"{_PROCESS}_{first}"
        if first > 0 and not has_tree(Path(checkpoint), name):
            logger.warning(
                f"The checkpoint {checkpoint} was written by fewer processes: process {first} draws random numbers of its "
                "own from now on."
            )
            return None
        return load_tree(Path(checkpoint), name)

    # ---- weights

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trained_file = Path(resume_from_checkpoint) / TRAINED_FILE
        if self._is_plain or not trained_file.is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self._load_trained(trained_file, model or self.model)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint or "")
        verify(best)
        super()._load_best_model()
        if not self._is_plain:
            self._load_trained(best / TRAINED_FILE, self.model)

    def _load_trained(self, trained_file: Path, model: nn.Module) -> None:
        trained = load_file(trained_file)
        target = _trained_tensors(model)
        if set(trained) != set(target):
            different = sorted(set(trained) ^ set(target))[:5]
            raise CheckpointError(
                f"{trained_file} holds other trained parameters than this run, e.g. {different}: resume with the "
                "settings of the run that wrote it, or start in another folder."
            )
        require_shapes(trained_file, target, {name: tuple(tensor.shape) for name, tensor in trained.items()})
        fill_parts(target, lambda name, region: trained[name][region.in_whole()])

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        tied = set(self.base.all_tied_weights_keys) if hasattr(self.base, "all_tied_weights_keys") else set()
        wrong = [key for key in (*load_result.missing_keys, *load_result.unexpected_keys) if key not in tied]
        if wrong:
            raise CheckpointError(
                f"The checkpoint's weights do not fit this model: {len(wrong)} differ, e.g. {wrong[:5]}. Resume with "
                "the settings of the run that wrote it, or start in another folder."
            )

    @property
    def base(self) -> UniMoeForCausalLM:
        """The model itself, without PEFT and parallel wrappers."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def _is_plain(self) -> bool:
        return isinstance(self.accelerator.unwrap_model(self.model), UniMoeForCausalLM)

    @property
    def _saves_optimizer(self) -> bool:
        return not (self.is_deepspeed_enabled or self.is_fsdp_enabled)


def _trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training moves: parameters, and the routers' biases."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | choice_biases(model)


def _whole_trained_tensors(model: nn.Module, gathered: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """On CPUs; ranks that hold parts of them must all call it.

    Args:
        gathered: what an engine that leaves none in the model has put together, by the same names.
    """
    tensors = {name: p if gathered is None else gathered[name] for name, p in _trained_tensors(model).items()}
    return {name: whole_tensor(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
