"""What two ranks must get through together: `rank_checks.py FOLDER`, which holds a model "top_k" and data.

Each rank leaves what it found in FOLDER/CHECK-RANK.json.
"""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import tiny_training
import torch
from forked_ranks import run_ranks
from transformers import TrainingArguments

from unimoe.errors import DataError
from unimoe.trainers.data.bad_samples import BadSamples, TolerantCollator
from unimoe.trainers.data.collator import RawCollator
from unimoe.trainers.data.conversations import ConversationDataset
from unimoe.trainers.parallel.parallel_run import load_spread
from unimoe.trainers.parallel.settings import Parallel, start
from unimoe.trainers.saving.sharded_tensors import whole_tensor
from unimoe.trainers.steps.trainable import set_trainable
from unimoe.trainers.trainer import UniMoeTrainer

HANGS_AFTER = 30  # seconds
SAMPLES, BAD, ALLOWED = 16, 4, 0.2


def media_beside_none(folder: Path) -> None:
    """Only connectors train, and in one step the first rank has a picture, the second a text."""
    parallel = Parallel(data=2, expert=2, zero=3)
    start(parallel)
    model = load_spread(folder / "top_k", parallel).train()
    set_trainable(model, ["connectors"])
    rank = int(os.environ["RANK"])
    picture = model.config.image_token_id
    ids = torch.tensor([[5, *[picture] * 4, 6, 7, 8]]) if rank == 0 else torch.tensor([[5, 6, 7, 8]])
    media = {"pixel_values": torch.ones(1, 3, 16, 16)} if rank == 0 else {}
    signal.alarm(HANGS_AFTER)
    outputs = model(input_ids=ids, labels=ids, **media)
    (outputs.loss + outputs.idle_branches).backward()
    signal.alarm(0)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    gradients = {name: float(whole_tensor(p.grad).abs().sum()) for name, p in named}
    _tell(folder, "media", gradients)


def bad_samples(folder: Path) -> None:
    """Each rank alone meets no more bad samples than are allowed, both together do: in training, and in evaluation."""
    parallel = Parallel(data=2)
    start(parallel)
    rank = int(os.environ["RANK"])
    samples = tiny_training.samples(folder / f"bad{rank}", SAMPLES)
    pictures = [sample for sample in samples if sample["modality"] == "image"]
    for index in range(BAD):
        (folder / f"bad{rank}" / f"{index}.png").write_bytes(b"no picture")
    dataset = ConversationDataset.from_samples(pictures, media_root=folder / f"bad{rank}")
    model = load_spread(folder / "top_k", parallel)
    set_trainable(model, ["connectors"])
    found = {}
    for where in ("train", "evaluate"):
        trainer = _trainer(folder / where, model, dataset, parallel)
        trainer.bad_samples = BadSamples(folder / where, SAMPLES, ALLOWED)
        said = ""
        try:
            trainer.train() if where == "train" else trainer.evaluate(dataset)
        except DataError as error:
            said = str(error)
        found[where] = {"step": trainer.state.global_step, "said": said, "own": trainer.data_collator.bad}
    _tell(folder, "bad", found)


def _trainer(out: Path, model: torch.nn.Module, dataset: ConversationDataset, parallel: Parallel) -> UniMoeTrainer:
    processor = tiny_training.processor()
    return UniMoeTrainer(
        model,
        TrainingArguments(
            output_dir=str(out),
            max_steps=SAMPLES // 2,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            **parallel.training_arguments(),
        ),
        train_dataset=dataset,
        data_collator=_Recording(TolerantCollator(RawCollator(processor))),
        processing_class=processor,
    )


class _Recording:
    """Remembers which bad samples its own rank met."""

    def __init__(self, collator: TolerantCollator) -> None:
        self.collator, self.bad = collator, 0

    def __call__(self, samples: Any) -> dict[str, Any]:
        batch = self.collator(samples)
        self.bad += len(batch.get("bad_samples", ()))
        return batch


def _tell(folder: Path, check: str, found: dict[str, Any]) -> None:
    (folder / f"{check}-{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    target, done = Path(sys.argv[1]), True
    for check in (media_beside_none, bad_samples):
        done = run_ranks(2, partial(check, target)) and done
    sys.exit(not done)
