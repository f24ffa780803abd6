"""How long an optimizer step takes on a machine that does nothing else, measured on steps that leave no trace."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..data.conversations import Draw
from ..data.streaming import StreamDraw
from ..saving.checkpoints import seal
from ..steps.objective import IGNORED
from ..steps.trainable import count_trainable
from ..trainer import UniMoeTrainer

_MOST_TIMED_STEPS = 3  # of each group
_LONG_ENOUGH = 2.0  # seconds on one group after which a single timed step does


def seconds_per_step(trainer: UniMoeTrainer) -> float:
    """Mean duration of an optimizer step over the groups of samples, by their share of the steps.

    Every group gets one step for warming up (kernels are built for new shapes) and up to three timed ones, with
    collating, forward, backward, clipping and optimizer. The fastest counts: what else the machine does for a moment
    makes steps slower, never faster, and must not decide how long a whole stage trains. Weights and random states are
    put back afterwards; the trainer's own optimizer is never made.
    """
    sampler = trainer.train_sampler()
    model = trainer.model.to(trainer.args.device)  # type: ignore[arg-type]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    random_state = torch.random.get_rng_state()
    model.train()
    total = 0.0
    for share, draws in sampler.probes():
        durations: list[float] = []
        while len(durations) < 2 or (len(durations) <= _MOST_TIMED_STEPS and sum(durations) < _LONG_ENOUGH):
            started = time.perf_counter()
            for _ in range(trainer.args.gradient_accumulation_steps):
                _forward_backward(trainer, model, draws)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            durations.append(time.perf_counter() - started)
        total += share * min(durations[1:])
    with torch.no_grad():
        for parameter, value in zip(parameters, saved, strict=True):
            parameter.copy_(value)
    torch.random.set_rng_state(random_state)
    return total


def seconds_per_checkpoint(trainer: UniMoeTrainer, folder: Path) -> float:
    """About how long a checkpoint takes: one save of the model, and the optimizer's two states by their size."""
    started = time.perf_counter()
    trainer.save_model(str(folder))
    seal(folder, folder.with_name(f"{folder.name}.sealed"))
    seconds = time.perf_counter() - started
    shutil.rmtree(folder.with_name(f"{folder.name}.sealed"))
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    return seconds * (1 + 2 * count_trainable(trainer.model) / total)


def _forward_backward(trainer: UniMoeTrainer, model: torch.nn.Module, draws: Sequence[Draw | StreamDraw]) -> None:
    batch = trainer.data_collator([trainer.train_dataset[draw] for draw in draws])
    batch = trainer._prepare_inputs(batch)
    items = (batch["labels"][:, 1:] != IGNORED).sum()
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(model, batch, num_items_in_batch=items)
    loss.backward()
