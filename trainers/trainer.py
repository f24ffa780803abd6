"""`transformers.Trainer` for Uni-MoE: modality batches, learning rates by role, exact resume, losses apart."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from ..errors import DataError, RecipeError
from ..roles import role_of
from .data.bad_samples import BadSamples
from .data.batching import Batching, BatchSampler, make_sampler
from .data.data_sets import TrainingData
from .parallel.deepspeed_models import gather_adapted_experts
from .parallel.ranks import of_all, sum_of_all
from .parallel.spread_lora import sum_adapter_gradients
from .saving.sharded_checkpoints import ShardedCheckpoints
from .saving.sharded_tensors import reshard
from .steps.loss_meter import LossMeter
from .steps.non_finite import FiniteGuard
from .steps.objective import columns_to_keep, training_loss
from .steps.router_bias import RouterBiasUpdate
from .steps.step_balance import StepBalance
from .telemetry.telemetry import Telemetry

_NOT_FOR_THE_MODEL = ("labels", "logits_to_keep", "sample_ids", "group", "bad_samples")
BadAndReadable = tuple[Sequence[tuple[str, str]], int]


class UniMoeTrainer(ShardedCheckpoints):
    """A Trainer whose batches come from one modality each.

    Args:
        model: `UniMoeForCausalLM`, or one with PEFT around it. Set what trains with `trainable.set_trainable` first.
        args: as usual; `learning_rate` is used where learning_rates is silent.
        train_dataset: a `ConversationDataset`, or a `StreamedConversations` (with `args.max_steps`).
        data_collator: `RawCollator` or `CachedCollator`.
        processing_class: the processor; saved with every checkpoint.
        learning_rates: role -> learning rate.
        label_smoothing: share of the target spread evenly over the vocabulary.
        modality_weights: share of the steps by modality or task; see `sampler.group_weights`.
        min_learning_rate_ratio: the schedule ends at this share of the peak rate.
        max_skipped_steps: steps whose loss or gradient is not finite that are left out; one more ends the run.
        batching: how samples become batches, see `batching_of`; by modality when None.

    `bad_samples`, when set, lists the samples that a `TolerantCollator` could not read; without it the first ends the run.

    A checkpoint counts once its `COMPLETE` file is there; `train(resume_from_checkpoint=True)` takes the newest of
    these, or starts from the beginning when there is none. What random numbers a batch needs depends on its position
    only, so that a resumed run is bit-equal to one that was never stopped.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: TrainingData | None = None,
        data_collator: Any = None,
        processing_class: Any = None,
        learning_rates: Mapping[str, float] | None = None,
        label_smoothing: float = 0.0,
        modality_weights: Mapping[str, float] | None = None,
        min_learning_rate_ratio: float = 0.0,
        max_skipped_steps: int = 0,
        batching: Batching | None = None,
        **kwargs: Any,
    ) -> None:
        # One finiteness check of our own replaces this one, which hides bad losses instead of stopping.
        args.logging_nan_inf_filter = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,
            processing_class=processing_class,
            **kwargs,
        )
        if self.is_deepspeed_enabled and not self._is_plain:
            gather_adapted_experts(self.model)
        self.learning_rates = dict(learning_rates or {})
        self.label_smoothing = label_smoothing
        self.modality_weights = dict(modality_weights or {})
        self.min_learning_rate_ratio = min_learning_rate_ratio
        self.batching = batching or Batching()
        self.finite_guard = FiniteGuard(max_skipped_steps)
        ranks = self.args.world_size if self.args.average_tokens_across_devices else 1
        self.step_balance = StepBalance(ranks, copies=self.get_tp_size())
        # The loss is ours, and divided by the tokens of the whole accumulated batch.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.bad_samples: BadSamples | None = None
        self._met_in_evaluation: list[BadAndReadable] = []
        self.losses = LossMeter()
        self.add_callback(RouterBiasUpdate(self))
        self.telemetry = Telemetry(self)
        self.add_callback(self.telemetry)

    @property
    def data_ranks(self) -> int:
        """Ranks with batches of their own; tensor-parallel ranks share one."""
        return self.args.world_size // self.get_tp_size()

    # ---- data

    def train_sampler(self) -> BatchSampler:
        """The batches of this run, over all ranks."""
        return make_sampler(
            self.train_dataset,  # type: ignore[arg-type]
            self.batching,
            self.args.per_device_train_batch_size,
            self.args.max_steps if self.args.max_steps > 0 else None,
            self.args.gradient_accumulation_steps * self.data_ranks,
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            self.modality_weights,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Batches of one modality each; all ranks and accumulation steps of an optimizer step share it."""
        if self.train_dataset is None:
            raise ValueError("UniMoeTrainer needs a train_dataset to train.")
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.train_sampler(),
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=workers > 0 and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    # ---- loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """The batches of an optimizer step; what the balance losses need to know of all of them is found here."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._note_bad_of_all_ranks([_bad_and_readable(batch) for batch in batches])
        self._restore_random_numbers_once()
        self.model.train()
        prepared = (_model_inputs(self._prepare_inputs(batch)) for batch in batches)
        with self.accelerator.autocast():
            self.step_balance.begin(self.base, len(batches), prepared)
        return batches, items

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross entropy (smoothed) at the labelled tokens plus balance terms; see `objective.training_loss`."""
        raw, labels, inputs = inputs, inputs["labels"], _model_inputs(inputs)
        group = raw.get("group", "")
        if not model.training:
            self._met_in_evaluation.append(_bad_and_readable(raw))
        base, config = self.base, self.base.config.text_config
        keep = raw.get("logits_to_keep") or columns_to_keep(labels)
        outputs = model(
            **inputs, logits_to_keep=keep, output_router_logits=bool(config.sparse_layers), use_cache=False
        )
        modality_ids = base.model.modality_ids(inputs["input_ids"])
        parts = training_loss(
            outputs,
            labels,
            inputs.get("attention_mask"),
            base.model.token_groups(modality_ids) if config.sparse_layers else None,
            modality_ids,
            config,
            self.label_smoothing if model.training else 0.0,
            num_items_in_batch,
            self.step_balance.of(outputs, base, inputs) if model.training else None,
        )
        loss = parts.total
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.data_ranks
        if model.training:
            if raw.get("sample_ids") != []:  # else none of them could be read
                self._require_something_to_learn(loss, group)
            if outputs.idle_branches is not None:
                loss = loss + outputs.idle_branches
            self.losses.add(parts, group)
            self.finite_guard.add(raw, inputs, loss)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As usual; bad samples are counted at the end, over all ranks, which may have met unlike numbers of batches."""
        self._met_in_evaluation = []
        output = super().evaluation_loop(*args, **kwargs)
        met, self._met_in_evaluation = self._met_in_evaluation, []
        self._note_bad_of_all_ranks(met)
        return output

    def _note_bad_of_all_ranks(self, found: list[BadAndReadable]) -> None:
        """Count the samples of all ranks, so that all stop together when too many are bad."""
        if self.args.process_index % self.get_tp_size():
            found = []  # the first tensor rank has the same batches
        bad = [pair for pairs, _ in found for pair in pairs]
        how_many, readable = sum_of_all([len(bad), sum(count for _, count in found)], self.args.device)
        self._note_bad(of_all(bad) if how_many else [], readable)

    def _note_bad(self, bad: Sequence[tuple[str, str]], readable: int) -> None:
        if self.bad_samples is not None:
            self.bad_samples.note(bad, readable)
        elif bad:
            raise DataError(
                f"The sample {bad[0][0]} cannot be read: {bad[0][1]} Repair it, or set trainer.bad_samples."
            )

    def _require_something_to_learn(self, loss: torch.Tensor, group: str) -> None:
        if not loss.requires_grad:
            raise RecipeError(
                f"No trained parameter takes part in batches of {group!r}: train another role, or leave these samples "
                "out of the stage (modalities)."
            )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As usual; what is not finite is found by `finite_guard` and must not spoil the mean that is logged."""
        loss = super().training_step(*args, **kwargs)
        if self._is_spread and self.accelerator.sync_gradients:
            sum_adapter_gradients(self.model, self.data_ranks)
        return torch.nan_to_num(loss, posinf=0.0, neginf=0.0)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called right before the optimizer's step: the place to stop when a loss or a gradient is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.losses.end_step(made=self.finite_guard.passes(self, norm))
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As usual, with the parts of the loss beside the total, and what they were if experts were used evenly.

        Steps that were left out are counted apart; where none was made, there is no loss.
        """
        if "loss" in logs:
            del logs["loss"]  # a mean over all steps
            logs |= self.losses.read(
                self.base.config.text_config, self.args.gradient_accumulation_steps, self._losses_of_all_ranks
            )
            if not self.finite_guard.step_made:
                logs.pop("grad_norm", None)
            if self.finite_guard.skipped:
                logs["skipped_steps"] = self.finite_guard.skipped
            logs |= self.telemetry.figures()
        super().log(logs, start_time)

    def _losses_of_all_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes == 1:
            return sums
        if not self.args.average_tokens_across_devices:
            return self.accelerator.reduce(sums.to(self.args.device), "mean")
        # What is divided by the tokens of all ranks adds up over them.
        return self.accelerator.reduce(sums.to(self.args.device), "sum") / self.get_tp_size()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the count walks over all parameters in every step, and is wrong for sparse models."""
        return 0

    # ---- optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One parameter group per role, weight decay and device mesh, whose parameters one kernel cannot mix."""
        if self.optimizer is not None:
            return self.optimizer
        model = self.model if model is None else model
        reshard(model)
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[str, bool, Any], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                mesh = getattr(parameter, "device_mesh", None)
                groups.setdefault((role_of(name), name in decayed, mesh), []).append(parameter)
        if not groups:
            raise RecipeError("Every parameter is frozen: call set_trainable with the roles to train.")
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)  # type: ignore[arg-type]
        self.optimizer = optimizer_class(
            [
                {
                    "params": parameters,
                    "lr": self.learning_rates.get(role, self.args.learning_rate),
                    "weight_decay": self.args.weight_decay if decay else 0.0,
                    "role": role,
                }
                for (role, decay, _), parameters in groups.items()
            ],
            **options,
        )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As usual, but ending at `min_learning_rate_ratio` of the peak."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        floor = self.min_learning_rate_ratio
        if floor and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR) and self._created_lr_scheduler:
            warmup = self.args.get_warmup_steps(num_training_steps)
            scheduler.lr_lambdas = [_with_floor(function, floor, warmup) for function in scheduler.lr_lambdas]
        return scheduler


def _model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What the model's forward takes of a batch, without labels: their loss is ours."""
    return {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}


def _bad_and_readable(batch: dict[str, Any]) -> BadAndReadable:
    """A batch's unreadable samples, (id, reason) each, and the number of the others."""
    return batch.get("bad_samples", ()), len(batch.get("sample_ids", ()))


def _with_floor(schedule: Callable[[int], float], floor: float, warmup_steps: int) -> Callable[[int], float]:
    """Squeezes a schedule that ends at 0 so that it ends at the floor; the warm-up stays as it is."""

    # A plain function, because LambdaLR saves the attributes of any other callable, which resuming then refuses.
    def factor(step: int) -> float:
        value = schedule(step)
        return value if step < warmup_steps else floor + (1.0 - floor) * value

    return factor
