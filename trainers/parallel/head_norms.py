"""Norms of query and key heads on tensor ranks, which have a copy each and see their own heads only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .planned_forwards import forward_of_class, planned_style

_STYLE = "replicated_with_grad_allreduce"


def sum_norm_gradients(model: Any) -> None:
    """Let the gradients of such norms be sums over the tensor ranks, in every backward pass for itself.

    transformers 5.23 sums what has accumulated instead, so that the earlier batches of a step count again with every
    later one (`ReplicatedWithGradAllReduce`).

    Args:
        model: a `PreTrainedModel` that is spread over ranks, some of which share a batch.
    """
    mesh = model._mesh_manager.get_mesh("tp")
    for name, module in model.named_modules():
        if planned_style(model.tp_plan, name) == _STYLE:
            module.forward = _with_summed_gradients(module, mesh.get_group())


def _with_summed_gradients(module: nn.Module, ranks: Any) -> Callable[..., torch.Tensor]:
    """The forward of a module's class, whose parameters' gradients are sums over some ranks."""
    forward = forward_of_class(module)
    watched: dict[str, nn.Parameter] = {}

    def summed(gradient: torch.Tensor) -> torch.Tensor:
        whole = gradient.clone()
        torch.distributed.all_reduce(whole, group=ranks)
        return whole

    def with_summed_gradients(*args: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            # FSDP2 puts others in the place of the parameters while the module runs.
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad and watched.get(name) is not parameter:
                    parameter.register_hook(summed)
                    watched[name] = parameter
        return forward(*args)

    return with_summed_gradients
