"""Short training runs on several ranks, several of them in one start: `parallel_runs.py FOLDER JOBS.json`.

The file maps numbers of ranks to jobs, and a job's name to arguments of `run`; or, under a launcher, which has started the
ranks, only jobs. What a rank found is in FOLDER/NAME-RANK.safetensors.
"""

import json
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import tiny_training
import torch
from accelerate.state import AcceleratorState
from forked_ranks import run_ranks
from in_float64 import InFloat64, collated
from safetensors.torch import save_file
from tiny import MOIIE_GROUPS
from transformers import TrainerCallback, TrainingArguments

from unimoe.modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from unimoe.trainers.data.collator import RawCollator
from unimoe.trainers.data.conversations import ConversationDataset
from unimoe.trainers.parallel.parallel_run import RequireEngine, load_spread, whole_again
from unimoe.trainers.parallel.settings import Parallel, start
from unimoe.trainers.recipe.recipe_parts import LoraSettings
from unimoe.trainers.saving.sharded_tensors import whole_tensor
from unimoe.trainers.stages.mixer_stage import MIXER_ROLES, add_mixers
from unimoe.trainers.steps.lora import add_lora, merge_lora
from unimoe.trainers.steps.trainable import set_trainable
from unimoe.trainers.trainer import UniMoeTrainer

LOSSES: dict[str, Any] = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "top_k": LOSSES,
    "shared": LOSSES | {"num_shared_experts": 1},
    "null": LOSSES | {"num_null_experts": 1, "num_experts_per_tok": 3},
    "grouped": LOSSES | MOIIE_GROUPS,
    "dynamic": LOSSES
    | {"router_type": "dynamic", "router_top_p": 0.6, "num_null_experts": 1, "num_shared_experts": 1},
    "heads": LOSSES
    | {"attention_bias": True, "attention_output_bias": True, "use_qk_norm": True},  # as in Qwen2 and Qwen3
    "mixers": LOSSES,
    "idle": LOSSES
    | {"num_experts_per_tok": 1},  # all tokens go to experts 0 and 1, so that later ranks' experts get nothing
}
Found = dict[str, torch.Tensor]
STEP = 8  # samples of an optimizer step, over all ranks
ROLES = ["router", "experts", "attention", "connectors", "norms", "embeddings", "head"]


class _Keep(TrainerCallback):
    """The gradients of the first step, whole."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if not self.gradients:
            named = self.model.named_parameters()
            self.gradients = {n: whole_tensor(p.grad).clone() for n, p in named if p.grad is not None}


def save_model(folder: Path, case: str) -> None:
    """The model that the runs of a case start from; to be called before the ranks start."""
    model = tiny_training.model(tiny_training.processor(), sparse=True, **CASES[case])
    if case == "mixers":
        add_mixers(model, {"layers": [0, 1], "rank": 8, "num_heads": 2, "num_latents": 3, "compressor_depth": 1})
    if case == "idle":
        for layer in model.config.text_config.sparse_layers:
            gate = model.model.language_model.layers[layer].mlp.gate
            with torch.no_grad():
                # One of the first two logits is positive, and those of later experts are nearer to 0, each differently.
                gate.weight[1] = -gate.weight[0]
                gate.weight[2:] = gate.weight[0] * torch.tensor([[0.5], [0.25]])
    model.save_pretrained(folder / case)


def run(
    folder: Path,
    case: str,
    parallel: Parallel,
    steps: int = 1,
    accumulation: int = 1,
    out: str | None = None,
    save_at: int = 0,
    resume: bool = False,
    float64: bool = False,
    lora: bool = False,
) -> Found:
    """Train; gradients of the first step ("gradients/NAME"), weights after the last one ("weights/NAME"), "losses",
    the optimizer's moments ("moments/NAME"), and logits of texts of unlike lengths, one per data rank ("logits/RANK").

    float64: with all arithmetic in it. lora: on attention, dense FFNs and experts, merged at the end; "adapters/NAME" before
    that.
    """
    model = load_spread(folder / case, parallel)
    with InFloat64() if float64 else nullcontext():
        if float64:
            model.double().set_experts_implementation("eager")  # grouped products exist in float32 and below
        has_mixers = model.config.text_config.mixer_config is not None
        set_trainable(model, [*ROLES, *(MIXER_ROLES if has_mixers else ())])
        if lora:
            model = with_lora(model)
        without_dropout(model)
        found = logits(model, parallel)
        options: dict[str, Any] = {
            "output_dir": str(folder / (out or "unused")),
            "max_steps": steps,
            "per_device_train_batch_size": STEP // parallel.data // accumulation,
            "gradient_accumulation_steps": accumulation,
            "save_strategy": "steps" if save_at else "no",
            "save_steps": save_at or 500,
            **parallel.training_arguments(),
        }
        trainer = trainer_of(folder, model, options, float64)
        keep = _Keep(model)
        trainer.add_callback(keep)
        trainer.add_callback(RequireEngine(trainer, parallel))
        trainer.train(resume_from_checkpoint=True if resume else None)
        moments = _moments(trainer, model)
        adapters = {f"adapters/{n}": p.detach().clone() for n, p in model.named_parameters() if ".lora_" in n}
        model = merge_lora(whole_again(trainer, model))
        found |= {f"gradients/{name}": gradient for name, gradient in keep.gradients.items()}
        found |= {f"weights/{name}": whole_tensor(p.detach()).clone() for name, p in model.named_parameters()}
        losses = [log["loss"] for log in trainer.state.log_history if "ce_loss" in log]
        found["losses"] = torch.tensor(losses, dtype=torch.float64)
        return found | moments | adapters


def with_lora(model: UniMoeForCausalLM) -> Any:
    """Adapters that change the model from the beginning, so that no gradient is zero."""
    torch.manual_seed(0)
    adapted = add_lora(model, LoraSettings(rank=4, alpha=8, targets=["attention", "ffn", "experts"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(parameter.numel()))
    return adapted


def without_dropout(model: torch.nn.Module) -> None:
    """A batch cut in two draws other random numbers, and so does ZeRO-3, under which more towers run on zeros."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@torch.no_grad()
def logits(model: torch.nn.Module, parallel: Parallel) -> Found:
    """Every data rank has a text of its own, one process all four."""
    own = int(os.environ.get("RANK", "0")) // parallel.tensor
    texts = [own] if parallel.data > 1 else range(4)
    found = {}
    for text in texts:
        values = model.eval()(torch.arange(5, 15 + 3 * text)[None], use_cache=False).logits
        found[f"logits/{text}"] = whole_tensor(values)
    return found


def trainer_of(folder: Path, model: torch.nn.Module, options: dict[str, Any], float64: bool) -> UniMoeTrainer:
    """A trainer on samples of unlike lengths."""
    processor = tiny_training.processor()
    media = folder / f"data{os.environ.get('RANK', '')}"
    samples = tiny_training.samples(media, STEP)
    for index, sample in enumerate(samples):
        sample["messages"][0]["content"][-1]["text"] += " Look." * (index % 5)
        if model.config.text_config.mixer_config and sample["modality"] == "image" and index % 3:
            sample["messages"][0]["content"][0]["aux"] = "A thing." * (1 + index % 4)
    collator = RawCollator(processor)
    return UniMoeTrainer(
        model,
        TrainingArguments(
            learning_rate=1e-3,
            adam_epsilon=1e-4,  # the usual 1e-8 makes whole steps of gradients that are rounding only
            weight_decay=0.01,
            max_grad_norm=1.0,
            lr_scheduler_type="constant",  # the same for runs of other lengths
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            **options,
        ),
        train_dataset=ConversationDataset.from_samples(samples, media_root=media),
        data_collator=partial(collated, collator) if float64 else collator,
        processing_class=processor,
    )


def _moments(trainer: UniMoeTrainer, model: torch.nn.Module) -> Found:
    if trainer.is_deepspeed_enabled:
        return {}
    state = getattr(trainer.optimizer, "optimizer", trainer.optimizer).state
    named = {name: state[p] for name, p in model.named_parameters() if p in state}
    return {
        f"moments/{name}/{key}": whole_tensor(value).clone()
        for name, values in named.items()
        for key, value in values.items()
        if isinstance(value, torch.Tensor)
    }


def run_jobs(folder: Path, jobs: dict[str, Any]) -> None:
    """One rank's part of some jobs, one after the other."""
    rank = int(os.environ["RANK"])
    for name, job in jobs.items():
        parallel = Parallel(**job.pop("parallel"))
        AcceleratorState._reset_state()  # the engine of the job before
        start(parallel)
        found = run(folder, parallel=parallel, **job)
        # Where ranks share nothing out, every one has its own copy of the weights, and these must not drift apart.
        kept = found if rank == 0 else {k: v for k, v in found.items() if k.startswith(("logits/", "weights/"))}
        save_file({key: value.contiguous() for key, value in kept.items()}, folder / f"{name}-{rank}.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    all_jobs = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    target = Path(sys.argv[1])
    if "RANK" in os.environ:
        run_jobs(target, all_jobs)
        sys.exit()
    sys.exit(not all(run_ranks(int(ranks), partial(run_jobs, target, jobs)) for ranks, jobs in all_jobs.items()))
