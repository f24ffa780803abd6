"""LoRA on a model that is spread over ranks: PEFT's adapters, whole on every rank, beside weights that are cut.

A rank computes with the part of an adapter that belongs to its part of the weight, so its gradient of the adapter is a
part of the whole one, and the sum over all ranks is the gradient; nothing but that sum is sent. Adapters and their
moments are the same on every rank and are saved as those of one process are.

Legend of shapes: E experts, O rows and I columns of a matrix, R the rank of an adapter.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ...modeling_unimoe.modeling_unimoe_text import UniMoeExperts
from ..saving.sharded_tensors import Region, filled_like, is_sharded, reshard
from .planned_forwards import forward_of_class, planned_style

_INSIDE = ".base_layer"


@contextmanager
def whole_adapters(model: UniMoeForCausalLM) -> Iterator[None]:
    """Let PEFT make adapters of whole weights. It cuts those for tensor ranks in a way of its own, and fails at experts."""
    cut: list[tuple[nn.Module, str, Any]] = [
        (module, name, p) for module in model.modules() for name, p in module._parameters.items() if is_sharded(p)
    ]
    # Of the whole's shape, in the memory of one value.
    whole = [nn.Parameter(p.to_local().new_zeros(1).expand(p.shape), p.requires_grad) for *_, p in cut]
    mesh, model._device_mesh = model._device_mesh, None
    for (module, name, _), parameter in zip(cut, whole, strict=True):
        module._parameters[name] = parameter
    try:
        yield
    finally:
        model._device_mesh = mesh
        for (module, name, original), parameter in zip(cut, whole, strict=True):
            module._parameters[name] = original.requires_grad_(parameter.requires_grad)


def spread_adapters(adapted: Any) -> None:
    """Let a model's adapters take part where transformers runs a module on parts of its weights.

    Weights that FSDP2 alone has cut are whole while their module runs, which PEFT's own code fits.

    Args:
        adapted: a `peft.PeftModel` around a model that is spread.
    """
    base = adapted.get_base_model()
    for name, adapters in _adapted_modules(base):
        module = adapters[0].get_base_layer()
        if "forward" not in vars(module):
            continue
        forward, meshes = forward_of_class(module), base._mesh_manager
        if not isinstance(module, UniMoeExperts):
            inner = _linear_forward(forward, module, adapters[0], meshes.get_mesh("tp"))
        elif _is_dispatched(base, module):
            inner = _dispatched_forward(forward, module, adapters, meshes.get_mesh("ep"))
        else:
            inner = _sliced_forward(forward, module, adapters, meshes.get_mesh("tp"))
        _install(base, name, module, inner)
        for adapter in adapters:
            adapter.forward = adapter.base_layer.__call__
            if isinstance(module, UniMoeExperts):
                adapter.num_experts = module.num_experts  # a layer asks whether the experts of this rank are all


@torch.no_grad()
def merge_spread_adapters(adapted: Any) -> UniMoeForCausalLM:
    """Add the adapters to the parts of the weights that this rank holds, and take PEFT away; all ranks must call it."""
    base = adapted.get_base_model()
    reshard(base)
    for name, adapters in list(_adapted_modules(base)):
        module = adapters[0].get_base_layer()
        for adapter in adapters:
            weight = module.get_parameter(getattr(adapter, "parameter_name", "weight"))
            added = filled_like(weight, lambda region, adapter=adapter: _added(adapter, region))
            local = [tensor.to_local() if is_sharded(tensor) else tensor for tensor in (weight, added)]
            local[0].add_(local[1])
        if "forward" in vars(module):
            _install(base, name, module, forward_of_class(module))
    return adapted.unload()


def sum_adapter_gradients(model: nn.Module, data_ranks: int) -> None:
    """Make every rank's gradients of the adapters the whole ones: means over batches, as FSDP2's of other weights.

    To be called by all ranks once per optimizer step, after its last backward pass.

    Args:
        data_ranks: ranks with batches of their own.
    """
    adapters = [p for name, p in model.named_parameters() if ".lora_" in name and p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in adapters]
    if not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= data_ranks
    for parameter, whole in zip(adapters, flat.split([p.numel() for p in adapters]), strict=True):
        parameter.grad = whole.view_as(parameter)


def _adapted_modules(base: nn.Module) -> Iterator[tuple[str, list[Any]]]:
    """Name before PEFT, and adapters from the outermost to the innermost, of every module that has some."""
    from peft.tuners.lora import LoraLayer

    for name, outermost in base.named_modules():
        if isinstance(outermost, LoraLayer) and not name.endswith(_INSIDE):
            adapters: list[Any] = [outermost]
            while isinstance(adapters[-1].base_layer, LoraLayer):
                adapters.append(adapters[-1].base_layer)
            yield name, adapters


def _install(base: Any, name: str, module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give a module another forward, and have transformers put around it what its plan says."""
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    module.forward = forward  # type: ignore[method-assign]
    meshes = base._mesh_manager
    if _is_dispatched(base, module):
        style, how = planned_style(base.ep_plan, name), base.config.distributed_config.ep_implementation
        mesh, tensor_mesh = meshes.get_mesh("ep"), meshes.get_mesh("tp")
        ALL_PARALLEL_STYLES[style].install_forward(module, mesh, tp_mesh=tensor_mesh, ep_implementation=how)
    else:
        ALL_PARALLEL_STYLES[planned_style(base.tp_plan, name)].install_forward(module, meshes.get_mesh("tp"))


def _is_dispatched(base: Any, module: nn.Module) -> bool:
    """Whether tokens travel to the ranks of this module's experts; otherwise every rank has a slice of each."""
    return isinstance(module, UniMoeExperts) and base.config.distributed_config.ep_size > 1


def _linear_forward(
    forward: Callable[..., Any], module: Any, adapter: Any, mesh: Any
) -> Callable[[torch.Tensor], torch.Tensor]:
    """W x + B A x, of which this rank has some rows of W and B, or some columns of W and A and what x has for these."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    by_rows = module.weight.placements[-1].is_shard(0)  # else by columns

    def with_adapters(x: Any) -> Any:
        result: Any = forward(x)
        if isinstance(x, DTensor):
            # By rows every rank has the whole x, and its gradient is a sum of what their rows give.
            x = x.to_local(grad_placements=[Partial()] if by_rows else None)
        for active in _active(adapter):
            b_OR, a_RI = _factors(adapter, active)
            if by_rows:
                b_OR = _own(b_OR, mesh, 0)
            else:
                a_RI = _own(a_RI, mesh, 1)
            added = F.linear(F.linear(adapter.lora_dropout[active](x), a_RI), b_OR) * adapter.scaling[active]
            if isinstance(result, DTensor):
                placement = Shard(added.dim() - 1) if by_rows else Partial()
                added = DTensor.from_local(added, mesh, [placement], run_check=False)
            result = result + added
        return result

    return with_adapters


def _dispatched_forward(
    forward: Callable[..., Any], module: nn.Module, adapters: list[Any], mesh: Any
) -> Callable[..., torch.Tensor]:
    """For ranks that hold some experts, each of them whole."""

    def own_factors(adapter: Any, b_EOR: torch.Tensor, a_ERI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _own(b_EOR, mesh, 0), _own(a_ERI, mesh, 0)

    return _experts_forward(forward, module, adapters, own_factors)


def _sliced_forward(
    forward: Callable[..., Any], module: nn.Module, adapters: list[Any], mesh: Any
) -> Callable[..., torch.Tensor]:
    """For ranks that hold a slice of every expert."""

    def own_factors(adapter: Any, b_EOR: torch.Tensor, a_ERI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if adapter.parameter_name == "down_proj":
            return b_EOR, _own(a_ERI, mesh, 2)
        return _own(b_EOR.unflatten(1, (2, -1)), mesh, 2).flatten(1, 2), a_ERI  # a slice of gate's rows, and of up's

    return _experts_forward(forward, module, adapters, own_factors)


def _experts_forward(
    forward: Callable[..., Any], module: nn.Module, adapters: list[Any], own_factors: Callable[..., Any]
) -> Callable[..., torch.Tensor]:
    """The forward of fused experts on weights to which this rank's part of the adapters is added.

    Args:
        own_factors: adapter, b [E, O, R], a [E, R, I] -> what of these belongs to the rank's part of the weight.
    """

    def with_adapters(*args: Any) -> torch.Tensor:
        # transformers has put this rank's parts in the places of the parameters, and takes them away afterwards.
        parts = {adapter.parameter_name: module._parameters[adapter.parameter_name] for adapter in adapters}
        try:
            for adapter in adapters:
                weight: Any = parts[adapter.parameter_name]
                # As PEFT does, not in autocast's dtype, in which a weight is too coarse for what is added to it.
                with torch.autocast(weight.device.type, enabled=False):
                    for active in _active(adapter):
                        b_EOR, a_ERI = own_factors(adapter, *_factors(adapter, active))
                        weight = torch.baddbmm(weight, b_EOR, a_ERI, alpha=adapter.scaling[active])
                module._parameters[adapter.parameter_name] = weight
            return forward(*args)
        finally:
            module._parameters.update(parts)

    return with_adapters


def _added(adapter: Any, region: Region) -> torch.Tensor:
    """What the adapters add to a region of their weight."""
    *experts, rows, columns = region.in_whole()  # a matrix has no experts
    added: Any = 0
    for active in _active(adapter):
        b, a = _factors(adapter, active)
        added = added + b[(*experts, rows)] @ a[(*experts, slice(None), columns)] * adapter.scaling[active]
    return added


def _factors(adapter: Any, active: str) -> tuple[torch.Tensor, torch.Tensor]:
    """b [O, R] and a [R, I] of a matrix; [E, O, R] and [E, R, I] of fused experts."""
    b, a = adapter.lora_B[active].weight, adapter.lora_A[active].weight
    if not hasattr(adapter, "parameter_name"):
        return b, a
    # PEFT keeps them as [O, R * E], experts last, and [E * R, I].
    return b.unflatten(1, (adapter.r[active], -1)).permute(2, 0, 1), a.unflatten(0, (-1, adapter.r[active]))


def _active(adapter: Any) -> list[str]:
    return [name for name in adapter.active_adapters if name in adapter.lora_A]


def _own(tensor: torch.Tensor, mesh: Any, dim: int) -> torch.Tensor:
    """This rank's slice of a whole tensor."""
    return tensor.chunk(mesh.size(), dim)[mesh.get_local_rank()]
