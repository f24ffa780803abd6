"""What DeepSpeed has to know of a model before it trains it, and the model that it leaves behind."""

from typing import Any

from torch import nn

from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..steps.lora import put_adapters
from .ranks import is_first


def gather_adapted_experts(model: nn.Module) -> None:
    """Let ZeRO-3 gather fused experts and their adapters together; to be called before DeepSpeed gets the model.

    ZeRO-3 gathers a module's own weights when that module is called. PEFT reads the adapters of fused experts without
    calling them, and the experts' weights before it calls these. DeepSpeed gathers such weights when they are read, but only
    below a call of the engine: in the look ahead of a step, for instance, they would be empty.
    """
    from deepspeed.utils import set_z3_leaf_modules
    from peft.tuners.lora.layer import ParamWrapper

    set_z3_leaf_modules(model, [ParamWrapper], raise_if_not_found=False)


def model_after(trainer: Any, model: Any) -> Any:
    """The model that DeepSpeed has trained, in float32 and with its adapters; all ranks have to call this.

    ZeRO-3 leaves weights to none of them: there the first rank gets a new model with all of them, and the others keep
    one without weights and without adapters, which only names things.
    """
    engine = trainer.deepspeed
    sharded = engine.zero_optimization_stage() == 3
    weights = trainer.accelerator.get_state_dict(engine) if sharded else {}
    _let_go(engine)
    if not sharded:
        return model.float()
    base = trainer.base
    if not is_first():
        return base
    forget_deepspeed()  # a model that is made while it counts waits for other ranks
    whole = UniMoeForCausalLM(base.config)
    whole.generation_config = base.generation_config
    with_adapters = whole if model is base else put_adapters(whole, model.peft_config["default"])
    with_adapters.load_state_dict(weights)
    return with_adapters


def forget_deepspeed() -> None:
    """DeepSpeed's configuration of the stage before would split the weights of whatever model is made or loaded next,
    where not every rank does so alike.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _let_go(engine: Any) -> None:
    """Free what an engine keeps, which would otherwise live as long as the process: hooks, buffers, weights, moments."""
    from deepspeed.runtime.zero import parameter_offload

    engine.destroy()
    # ZeRO-3's stack of modules in their forward pass. The model itself stays on it, and what gradient checkpointing has
    # recomputed in part.
    stack = getattr(parameter_offload, "FWD_MODULE_STACK", [])
    own = set(engine.module.modules())
    stack[:] = [module for module in stack if module not in own]
