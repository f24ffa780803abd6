"""The life of a parallel run: ranks join and watch each other, load the model, check who trains it, and get it back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, TrainerCallback
from transformers.utils import GENERATION_CONFIG_NAME, logging

from ...errors import RecipeError, TrainingError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ...modeling_unimoe.modeling_unimoe_text import UniMoeExperts, UniMoeSparseBlock
from ..saving.sharded_checkpoints import load_weights
from ..saving.sharded_tensors import is_sharded
from .deepspeed_models import forget_deepspeed, model_after
from .head_norms import sum_norm_gradients
from .heartbeat import heartbeat
from .settings import Parallel, start


@contextmanager
def joined(parallel: Parallel) -> Iterator[None]:
    """Join the other ranks, and watch that they live, while the block runs. Raises RecipeError as `start` does."""
    was_initialized = torch.distributed.is_initialized()
    start(parallel)
    with heartbeat(parallel.silence_seconds):
        yield
    if parallel.ranks > 1 and not was_initialized:
        torch.distributed.destroy_process_group()


def load_spread(folder: str | Path, parallel: Parallel) -> UniMoeForCausalLM:
    """A model in float32, as every rank needs it: whole, or its part.

    Raises:
        RecipeError: the model cannot be cut like this.
    """
    if parallel.ranks == 1:
        return UniMoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = UniMoeConfig.from_pretrained(folder)
    parallel = parallel.for_model(config)
    parallel.require_fits(config)
    if parallel.uses_deepspeed:
        forget_deepspeed()
    spread = parallel.distributed_config()
    if _leaves_ranks_empty(config, parallel):
        model = _load_part_by_part(Path(folder), config, spread)
    else:
        options = {} if spread is None else {"distributed_config": spread}
        model = UniMoeForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if parallel.tensor > 1:
        sum_norm_gradients(model)
    set_sharding(model, parallel)
    return model


def _leaves_ranks_empty(config: UniMoeConfig, parallel: Parallel) -> bool:
    """Whether a data rank gets nothing of shared experts that tensor ranks cut too."""
    return parallel.tensor > 1 and parallel.data > 1 and bool(config.text_config.num_shared_experts % parallel.data)


def _load_part_by_part(folder: Path, config: UniMoeConfig, spread: Any) -> UniMoeForCausalLM:
    """What transformers 5.23 fails at, because it looks for the first row of every part (`_slice_and_cat`)."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report every weight as missing
    try:
        model = UniMoeForCausalLM.from_pretrained(
            None, config=config, state_dict={}, dtype=torch.float32, distributed_config=spread
        )
    finally:
        logging.set_verbosity(verbosity)
    found = load_weights(folder, model)
    missing = set(found.missing_keys) - set(model.all_tied_weights_keys)
    if wrong := sorted(missing | set(found.unexpected_keys)):
        raise RecipeError(
            f"{folder} has other weights than its configuration says: {len(wrong)} differ, e.g. {wrong[:3]}. Load and save "
            "it once on one process, without parallel.tensor, or set parallel.tensor to 1."
        )
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def set_sharding(model: nn.Module, parallel: Parallel) -> None:
    """With zero 2, weights that a forward pass has gathered stay until the backward pass is over."""
    if parallel.shards_models and parallel.zero == 2:
        for module in model.modules():
            if hasattr(module, "set_reshard_after_forward"):
                module.set_reshard_after_forward(False, recurse=False)  # type: ignore[operator]


def whole_again(trainer: Any, model: Any) -> Any:
    """The model after training, with its adapters; under ZeRO-3 only the first rank has weights."""
    return model if getattr(trainer, "deepspeed", None) is None else model_after(trainer, model)


class RequireEngine(TrainerCallback):
    """Ends a run that another engine trains, or fewer ranks, than the recipe asks for."""

    def __init__(self, trainer: Any, parallel: Parallel) -> None:
        self.trainer, self.parallel = trainer, parallel.for_model(trainer.base.config)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ranks = args.world_size
        wanted, found = engine_of(self.parallel), self._found()
        if ranks != self.parallel.ranks or found != wanted:
            raise TrainingError(
                f"The recipe asks for {self.parallel.ranks} ranks and {wanted}, but {ranks} train by {found}: look at how the "
                "run was launched (no accelerate configuration of its own), and at training_arguments."
            )

    def _found(self) -> str:
        engine = getattr(self.trainer, "deepspeed", None)
        if engine is not None:
            return f"DeepSpeed ZeRO-{engine.zero_optimization_stage()}"
        if any(map(is_sharded, self.trainer.model.parameters())):
            blocks = [m for m in self.trainer.base.modules() if isinstance(m, UniMoeSparseBlock)]
            experts = [m for block in blocks for m in block.experts.modules() if isinstance(m, UniMoeExperts)]
            parts = {self.trainer.base.config.text_config.num_experts // local.num_experts for local in experts} or {1}
            return f"transformers' sharding, experts in {max(parts)} parts"
        if isinstance(self.trainer.model_wrapped, nn.parallel.DistributedDataParallel):
            return "DistributedDataParallel"
        return "no engine"


def engine_of(parallel: Parallel) -> str:
    """The engine that a recipe gets, in words."""
    if parallel.ranks == 1:
        return "no engine"
    if parallel.uses_deepspeed:
        return f"DeepSpeed ZeRO-{parallel.zero}"
    if parallel.shards_models:
        return f"transformers' sharding, experts in {parallel.expert} parts"
    return "DistributedDataParallel"
