"""How many processes train, and how they share the work: the `parallel` section of a recipe.

Every process (rank) has one device. `tensor` ranks work on one batch, `data` batches make a step, so that
data * tensor ranks run; the experts of every layer are spread over `expert` of these same ranks.
"""

import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch

from ...errors import RecipeError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ..recipe.recipe_values import require, require_choice, require_range

ENGINES = ("auto", "deepspeed", "fsdp")
MAX_RANKS = 1 << 16
# The longest that a collective may take: saving a large model lets all ranks but one wait. Dead ranks are found sooner,
# by `heartbeat`.
COLLECTIVE_MINUTES = 60


@dataclass
class Parallel:
    """Degrees of parallelism.

    Args:
        data: batches per step, each on ranks of its own.
        expert: ranks that share out the experts of a layer; tokens travel to them and back (all-to-all). A divisor of
            data * tensor and a multiple of tensor.
        tensor: ranks that share one batch and every matrix of the model.
        zero: what the `data` ranks share out instead of each having a copy: nothing (0), the optimizer's state (1), the
            gradients too (2), the weights too (3).
        engine: who does this. "auto" takes DistributedDataParallel for zero 0 and DeepSpeed for zero 1 to 3, and with
            tensor or expert above 1, which DeepSpeed lacks here, transformers' own sharding (FSDP2, for zero 2 and 3).
            "fsdp" takes that for zero 2 and 3 without them too.
        silence_seconds: a rank that was not heard of for so long is taken for dead, and the others stop; 0 waits.
    """

    data: int = 1
    expert: int = 1
    tensor: int = 1
    zero: Literal[0, 1, 2, 3] = 0
    engine: Literal["auto", "deepspeed", "fsdp"] = "auto"
    silence_seconds: float = 45.0

    @property
    def ranks(self) -> int:
        return self.data * self.tensor

    @property
    def shards_models(self) -> bool:
        """Whether transformers splits the model while it loads: its parameters are DTensors then."""
        return self.ranks > 1 and (self.tensor > 1 or self.expert > 1 or self.engine == "fsdp")

    @property
    def uses_deepspeed(self) -> bool:
        return self.zero > 0 and not self.shards_models

    def for_model(self, config: UniMoeConfig) -> "Parallel":
        """The same for a model that has no experts yet: nothing to spread; still sharded by FSDP2."""
        if config.text_config.sparse_layers or self.expert == 1:
            return self
        return replace(self, expert=1, engine="fsdp" if self.data > 1 else "auto")

    def check(self, where: str = "parallel") -> None:
        """Raise RecipeError naming field, value and what is allowed, if the degrees do not go together."""
        for name in ("data", "expert", "tensor"):
            require_range(f"{where}.{name}", getattr(self, name), 1, MAX_RANKS)
        require_choice(f"{where}.engine", self.engine, ENGINES)
        require(self.zero in (0, 1, 2, 3), f"{where}.zero", self.zero, "0, 1, 2 or 3")
        require_range(f"{where}.silence_seconds", self.silence_seconds, 0, 86_400)
        fits = self.expert == 1 or (self.ranks % self.expert == 0 and self.expert % self.tensor == 0)
        wanted = f"1, or a divisor of data * tensor ({self.ranks}) that is a multiple of tensor ({self.tensor})"
        require(fits, f"{where}.expert", self.expert, wanted)
        if self.engine == "deepspeed":
            alone = self.tensor == 1 and self.expert == 1
            require(alone, f"{where}.engine", self.engine, "'auto' or 'fsdp' with expert or tensor above 1")
            require(self.zero > 0, f"{where}.zero", self.zero, "1, 2 or 3 with the engine 'deepspeed'")
        self._check_zero(where)

    def _check_zero(self, where: str) -> None:
        if self.data == 1:
            require(self.zero == 0, f"{where}.zero", self.zero, "0 with data = 1: there is nobody to share with")
        elif self.tensor > 1 or self.expert > 1 or self.engine == "fsdp":
            allowed = "2 or 3 (FSDP2) with expert or tensor above 1 or the engine 'fsdp'"
            require(self.zero in (2, 3), f"{where}.zero", self.zero, allowed)

    def require_fits(self, config: UniMoeConfig, where: str = "parallel") -> None:
        """Raise RecipeError if a model cannot be cut like this."""
        text = config.text_config
        if self.expert > 1:
            sparse = bool(text.sparse_layers)
            require(sparse, f"{where}.expert", self.expert, "1 for a dense model, which has no experts")
            divides = text.num_experts % self.expert == 0
            require(divides, f"{where}.expert", self.expert, f"a divisor of the model's {text.num_experts} experts")
        if self.tensor > 1:
            names = ["num_attention_heads", "num_key_value_heads", "intermediate_size", "moe_intermediate_size"]
            for name in [*names, *(["shared_intermediate_size"] if text.num_shared_experts else [])]:
                size = getattr(text, name)
                require(size % self.tensor == 0, f"{where}.tensor", self.tensor, f"a divisor of {name} ({size})")

    def distributed_config(self) -> Any:
        """transformers' DistributedConfig; None where it has nothing to do.

        Raises:
            RecipeError: this release of transformers cannot spread experts over ranks.
        """
        if not self.shards_models:
            return None
        from transformers.distributed import DistributedConfig

        if (self.expert > 1 or self.tensor > 1) and not can_spread_experts():
            from transformers import __version__

            raise RecipeError(
                f"parallel.expert is {self.expert} and parallel.tensor is {self.tensor}, but transformers {__version__} cannot "
                "spread models over such ranks: install transformers 5.23 or newer, or set both to 1."
            )
        sizes: dict[str, Any] = {"tp_size": self.tensor, "fsdp_size": self.data}
        if self.expert > 1:
            # "auto" computes in another order without gradients than with them.
            sizes |= {"ep_size": self.expert, "ep_implementation": "all_to_all"}
        return DistributedConfig(**sizes)

    def training_arguments(self) -> dict[str, Any]:
        """What `TrainingArguments` need to know."""
        if self.uses_deepspeed:
            return {"deepspeed": deepspeed_settings(self.zero)}
        # Every trained parameter is in the graph of every step: DDP need not look for others.
        options: dict[str, Any] = {"ddp_find_unused_parameters": False}
        if self.tensor > 1:
            from .tensor_ranks import TensorRanks

            options["parallelism_config"] = TensorRanks(tp_size=self.tensor, dp_shard_size=self.data)
        return options


def can_spread_experts() -> bool:
    """Whether this release of transformers can."""
    from transformers.distributed import DistributedConfig

    return "ep_size" in {field.name for field in fields(DistributedConfig)}


def check_stage(parallel: Parallel, stage: Any, where: str) -> None:
    """Raise RecipeError for what a stage cannot do on several ranks."""
    if parallel.ranks == 1:
        return
    if stage.time_limit_seconds is not None:
        raise RecipeError(
            f"{where}.time_limit_seconds is {stage.time_limit_seconds}, but the speed is measured on one process only: "
            "leave it out, and set steps."
        )
    if stage.max_skipped_steps and parallel.uses_deepspeed:
        raise RecipeError(
            f"{where}.max_skipped_steps is {stage.max_skipped_steps}, but DeepSpeed makes a step before it can be left "
            "out: set it to 0, or parallel.engine to 'fsdp' (zero 2 or 3)."
        )


def deepspeed_settings(zero: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Its optimizer is the Trainer's own; weights are saved whole with ZeRO-3 too."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": zero, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
    }


def world_size() -> int:
    """Processes that a launcher has started together with this one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(parallel: Parallel) -> None:
    """Join the other ranks. Does nothing for one process.

    Raises:
        RecipeError: the launcher started another number of processes than the recipe asks for, or DeepSpeed is missing.
    """
    require_launched(parallel)
    if parallel.ranks == 1:
        return
    if parallel.uses_deepspeed:
        _prepare_deepspeed()
    if not torch.distributed.is_initialized():
        import datetime

        limit = datetime.timedelta(minutes=COLLECTIVE_MINUTES)
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        backend = torch.distributed.get_default_backend_for_device(device_type())
        torch.distributed.init_process_group(backend, timeout=limit)
    found = torch.distributed.get_world_size()
    if found != parallel.ranks:
        raise RecipeError(f"{found} processes found each other, but the recipe asks for {_what(parallel)}.")


def require_launched(parallel: Parallel) -> None:
    """Raise RecipeError unless as many processes were started as the recipe asks for; some launchers start only one."""
    found = world_size()
    if found == parallel.ranks:
        return
    if parallel.ranks == 1:
        raise RecipeError(
            f"{found} processes were started, but the recipe is for one: set parallel, e.g. parallel: {{data: {found}}}."
        )
    raise RecipeError(
        f"{found} {'process was' if found == 1 else 'processes were'} started, but the recipe asks for {_what(parallel)}. "
        f"Start it with `torchrun --nproc_per_node {parallel.ranks} -m unimoe train RECIPE.yaml`, or the same number of "
        "processes by `accelerate launch` or `deepspeed` (`accelerate launch --cpu` starts a single one, without a word; "
        "give it --num_machines 1 and --multi_gpu on GPUs, on CPUs use torchrun)."
    )


def device_type() -> str:
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator is not None and torch.accelerator.is_available() else "cpu"


def _prepare_deepspeed() -> None:
    """On CPUs DeepSpeed would compile an extension while ranks join, for minutes; one that is killed then blocks all
    later ones. Plain gloo does the same work.
    """
    if device_type() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise RecipeError(
            "parallel.zero needs DeepSpeed, which is not installed: `pip install unimoe[deepspeed]`, or set "
            "parallel.engine to 'fsdp' (zero 2 or 3)."
        ) from error
    if device_type() == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _what(parallel: Parallel) -> str:
    degrees = ", ".join(f"{name} {asdict(parallel)[name]}" for name in ("data", "expert", "tensor"))
    return f"{parallel.ranks} ({degrees})"
