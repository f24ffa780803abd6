"""What tests of the Trainer share: a processor, data and cached states, and trainers on them that take a fraction of a second."""

from pathlib import Path
from typing import Any

import tiny_training
from transformers import TrainingArguments

from unimoe import UniMoeForCausalLM
from unimoe.trainers.caches.encoder_cache import EncoderCache
from unimoe.trainers.data.collator import CachedCollator
from unimoe.trainers.data.conversations import ConversationDataset
from unimoe.trainers.trainer import UniMoeTrainer

OWN_OPTIONS = ("learning_rates", "modality_weights", "max_skipped_steps", "eval_dataset")
ONLY_TEXT = {"text": 1, "image": 0, "speech": 0, "sound": 0}


class Bench:
    """A processor, data and cached states that trainers of one test file share."""

    def __init__(self, folder: Path) -> None:
        self.processor = tiny_training.processor()
        self.dataset = ConversationDataset.from_samples(tiny_training.samples(folder, 4), media_root=folder)
        self.cache = EncoderCache(folder / "cache", self.model(), self.processor)
        self.cache.build(self.dataset.samples, progress=False)

    def model(self) -> UniMoeForCausalLM:
        return tiny_training.model(
            self.processor, sparse=True, attention_dropout=0.1, router_aux_loss_coef=0.01, router_z_loss_coef=0.01
        )

    def trainer(self, folder: Path, model: Any, steps: int, augment: Any = None, **options: Any) -> UniMoeTrainer:
        own = {name: options.pop(name) for name in OWN_OPTIONS if name in options}
        arguments = {
            "output_dir": str(folder),
            "max_steps": steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
        }
        collator = CachedCollator(self.processor, self.cache, feature_noise=0.1, token_dropout=0.1, augment=augment)
        collator.fit(self.dataset)
        return UniMoeTrainer(
            model,
            TrainingArguments(**{**arguments, **options}),
            train_dataset=self.dataset,
            data_collator=collator,
            processing_class=self.processor,
            label_smoothing=0.05,
            min_learning_rate_ratio=0.1,
            **own,
        )
