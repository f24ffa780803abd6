"""Gradients of one optimizer step of the Trainer, however it is cut into batches and ranks.

Run by torchrun too: `step_gradients.py FOLDER CASE BATCH_SIZE ACCUMULATION` writes `gradients-RANK.safetensors`.
"""

import sys
from pathlib import Path
from typing import Any

import tiny_training
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainingArguments

from unimoe.trainers.data.collator import RawCollator
from unimoe.trainers.data.conversations import ConversationDataset
from unimoe.trainers.steps.trainable import set_trainable
from unimoe.trainers.trainer import UniMoeTrainer

STEP = 8  # samples
LOSSES: dict[str, Any] = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "one-group": LOSSES
    | {
        "router_modality_loss_coef": 0.3,
        "modality_experts": {"image": [0], "text": [1]},
        "router_divergence_loss_coef": 0.2,
    },
    "two-groups": LOSSES
    | {
        "expert_groups": {"seen": [0, 1, 2], "told": [1, 2, 3]},
        "modality_groups": {"image": "seen", "video": "seen", "text": "told", "speech": "told", "sound": "told"},
        "router_aux_loss_layers": "joint",
    },
    "dynamic": LOSSES
    | {"router_type": "dynamic", "router_top_p": 0.5, "num_null_experts": 1, "num_shared_experts": 1},
}


class _Keep(TrainerCallback):
    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def step_gradients(
    folder: Path, case: str, batch_size: int, accumulation: int
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients by parameter, and the losses that were logged, of one step on pictures of different sizes of text."""
    processor = tiny_training.processor()
    model = tiny_training.model(processor, sparse=True, **CASES[case])
    set_trainable(model, ["router", "experts", "attention", "connectors"])
    samples = tiny_training.samples(folder, STEP)
    for index, sample in enumerate(samples):
        sample["messages"][0]["content"][-1]["text"] += " Look." * (index % 5)
    dataset = ConversationDataset.from_samples(samples, media_root=folder).select(["image"])
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = UniMoeTrainer(
        model,
        arguments,
        train_dataset=dataset,
        data_collator=RawCollator(processor),
        processing_class=processor,
    )
    keep = _Keep(model)
    trainer.add_callback(keep)
    trainer.train()
    logged = next(log for log in trainer.state.log_history if "ce_loss" in log)
    return keep.gradients, {name: logged[name] for name in logged if name.endswith("_loss")}


if __name__ == "__main__":
    import os

    target, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    gradients, losses = step_gradients(target / f"rank{rank}", sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    losses_tensors = {f"logged.{name}": torch.tensor(value) for name, value in losses.items()}
    save_file(gradients | losses_tensors, target / f"gradients-{rank}.safetensors")
    torch.distributed.destroy_process_group()
    # Now and then, on a busy machine, a thread of a library aborts a rank while the interpreter ends ("terminate called
    # without an active exception"); all that counts here is written.
    os._exit(0)
