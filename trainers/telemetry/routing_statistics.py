"""Counts of what routers decide, kept on the device: which modality's tokens went to which experts of which layer.

Nothing here waits for the device until `RoutingCounts.read`. Hooks see every decision as the experts got it: after biases
and draws, and without the need to return router logits.

Shape suffixes: T = batch * sequence tokens, R gate rows, C those that can be chosen, K experts per token, N tasks, L sparse
layers, M modalities, E experts, X = E + 1 (the last column is "null": a choice that computes nothing).
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from ...errors import UniMoeError
from ...modeling_unimoe.configuration_unimoe_text import MODALITIES, UniMoeTextConfig
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ...modeling_unimoe.routing_dynamic_unimoe import chosen_rows
from ...modeling_unimoe.routing_unimoe import UniMoeRouter

# A choice is decided when its logit lies above the next one's by this much. Routers that are zero, or nearly so, as those
# of freshly upcycled models, send all tokens to the same experts without preferring any.
DECIDED_BY = 0.5
# Layers are counted together, but never so many that a temporary tensor gets larger than this many elements.
_MOST_ELEMENTS = 1 << 22


class RoutingCounts:
    """Sums over tokens, int64, on one device; they only grow.

    Attributes:
        tokens_NM: tokens that are not padding.
        chosen_NLMX: how often each expert was chosen; null choices last.
        together_LXX: tokens that chose both of two experts; on the diagonal, one.
        first_LMX, decided_LMX: tokens whose best choice, and whose choices, are decided (see `DECIDED_BY`): over the second
            best, and over all that was not chosen.
    """

    ALL: ClassVar[tuple[str, ...]] = ("tokens_NM", "chosen_NLMX", "together_LXX", "first_LMX", "decided_LMX")

    def __init__(self, tasks: int, layers: int, experts: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        columns, modalities = experts + 1, len(MODALITIES)
        self.tokens_NM = zeros(tasks, modalities)
        self.chosen_NLMX = zeros(tasks, layers, modalities, columns)
        self.together_LXX = zeros(layers, columns, columns)
        self.first_LMX = zeros(layers, modalities, columns)
        self.decided_LMX = zeros(layers, modalities, columns)

    def read(self, over_ranks: bool = False, only: tuple[str, ...] = ALL) -> "RoutingCounts":
        """A copy of some of the sums on the CPU; with `over_ranks`, which every rank must then ask for, of all ranks."""
        parts = [getattr(self, name) for name in only]
        flat = torch.cat([part.reshape(-1) for part in parts])
        if over_ranks:
            torch.distributed.all_reduce(flat)
        values = flat.cpu().split([part.numel() for part in parts])
        return _counts({name: v.view(p.shape) for name, v, p in zip(only, values, parts, strict=True)})

    def since(self, earlier: "RoutingCounts | None") -> "RoutingCounts":
        """What has come on top of an earlier reading of the same sums; everything when there was none."""
        if earlier is None:
            return self
        return _counts({name: value - getattr(earlier, name) for name, value in vars(self).items()})


def _counts(tensors: dict[str, torch.Tensor]) -> RoutingCounts:
    counts = RoutingCounts.__new__(RoutingCounts)
    vars(counts).update(tensors)
    return counts


class RoutingRecorder:
    """Counts while attached: `with RoutingRecorder(model) as recorder: ...; recorder.counts.read()`.

    Args:
        model: dense ones have tokens but no choices.
        tasks: names that `task` may take, for counts apart from each other.
        in_training_only: leaves out passes without gradients or in eval mode.

    Attributes:
        task: index of the task that the next tokens belong to.
        last: per sparse layer the weight of each routed expert in each token of the last pass, 0 for those that it did not
            choose, float32 [T, E]; with `keep_last`.
    """

    def __init__(
        self,
        model: UniMoeForCausalLM,
        tasks: Sequence[str] = ("all",),
        in_training_only: bool = False,
        keep_last: bool = False,
    ) -> None:
        self.model = model
        self.tasks = list(tasks)
        self.task = 0
        self.in_training_only = in_training_only
        self.keep_last = keep_last
        self.last: list[torch.Tensor] = []
        config = model.config.text_config
        self.routers = [module for module in model.modules() if isinstance(module, UniMoeRouter)]
        if config.sparse_layers and not self.routers:
            raise UniMoeError(
                f"{type(model).__name__} of {type(model).__module__} came from the code in its folder (trust_remote_code), whose "
                "routers are not known here: import unimoe before from_pretrained."
            )
        self.counts = RoutingCounts(len(self.tasks), len(self.routers), config.num_experts, model.device)
        self._seen: dict[int, tuple[torch.Tensor, ...]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "RoutingRecorder":
        self.attach()
        return self

    def __exit__(self, *error: Any) -> None:
        self.detach()

    def attach(self) -> None:
        """Start counting; twice is once."""
        self.detach()
        for index, router in enumerate(self.routers):
            self._hooks.append(router.register_forward_hook(self._router_hook(index)))
        self._hooks.append(self.model.model.register_forward_hook(self._model_hook, with_kwargs=True))

    def detach(self) -> None:
        """Stop counting; the counts stay."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._seen = [], {}

    def _router_hook(self, index: int) -> Any:
        def hook(router: nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
            self._seen[index] = tuple(tensor.detach() for tensor in output)

        return hook

    def _model_hook(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen, self._seen = self._seen, {}
        if self.in_training_only and not (model.training and torch.is_grad_enabled()):
            return
        state = output.last_hidden_state
        modality_ids = output.mm_token_type_ids
        if modality_ids is None:
            modality_ids = torch.zeros(state.shape[:2], dtype=torch.long, device=state.device)
        mask = kwargs.get("attention_mask")
        # What a cache holds comes first; masks of other shapes say nothing about padding.
        mask = mask[:, -modality_ids.shape[1] :] if mask is not None and mask.dim() == 2 else None
        with torch.no_grad(), maybe_autocast(state.device.type, enabled=False):
            self._count(seen, modality_ids, mask)

    def _count(
        self, seen: dict[int, tuple[torch.Tensor, ...]], modality_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> None:
        counts = self.counts
        if counts.tokens_NM.device != modality_ids.device:
            for name in RoutingCounts.ALL:
                setattr(counts, name, getattr(counts, name).to(modality_ids.device))
        member_TM = nn.functional.one_hot(modality_ids.reshape(-1), len(MODALITIES)).float()
        if mask is not None:
            member_TM = member_TM * mask.reshape(-1, 1)
        counts.tokens_NM[self.task] += member_TM.sum(dim=0).long()
        groups = self.model.model.token_groups(modality_ids) if seen else None
        group_T = None if groups is None else groups.reshape(-1)
        mask_T = None if mask is None else mask.reshape(-1)
        self.last = []
        size = max(1, _MOST_ELEMENTS // (len(member_TM) * counts.chosen_NLMX.shape[-1]))
        for start in range(0, len(seen), size):
            self._count_layers(list(range(start, min(start + size, len(seen)))), seen, member_TM, group_T, mask_T)

    def _count_layers(
        self,
        layers: list[int],
        seen: dict[int, tuple[torch.Tensor, ...]],
        member_TM: torch.Tensor,
        group_T: torch.Tensor | None,
        mask_T: torch.Tensor | None,
    ) -> None:
        config, counts = self.model.config.text_config, self.counts
        chosen_LTX = torch.stack([_chosen(seen[layer][0], seen[layer][2], config, mask_T) for layer in layers])
        score_LTX = torch.stack([_scores(seen[layer][0], self.routers[layer], config, group_T) for layer in layers])
        first_LTX, decided_LTX = _decided(score_LTX, chosen_LTX)
        # Sums of at most T ones each: exact in float32.
        sums = member_TM.T @ torch.cat((chosen_LTX, first_LTX, decided_LTX), dim=-1)
        chosen_LMX, first_LMX, decided_LMX = sums.long().chunk(3, dim=-1)
        rows = slice(layers[0], layers[-1] + 1)
        counts.chosen_NLMX[self.task, rows] += chosen_LMX
        counts.first_LMX[rows] += first_LMX
        counts.decided_LMX[rows] += decided_LMX
        used_LTX = (chosen_LTX > 0).float()
        valid_T1 = member_TM.sum(dim=1, keepdim=True)
        counts.together_LXX[rows] += (used_LTX.transpose(1, 2) @ (used_LTX * valid_T1)).long()
        if self.keep_last:
            self.last += [_weights(seen[layer][1], seen[layer][2], config) for layer in layers]


def _chosen(
    logits_TR: torch.Tensor,
    index_TK: torch.Tensor,
    config: UniMoeTextConfig,
    mask_T: torch.Tensor | None,
) -> torch.Tensor:
    """How often a token chose each expert, float32 [T, X]: 0 or 1, and for null any number."""
    if config.router_type == "dynamic":
        # Its empty slots may be null experts, dropped tokens or no choices at all: the logits tell which.
        picked_TC = chosen_rows(logits_TR, config, mask_T).float()
        experts_TE, null_TN = picked_TC.split([config.num_experts, config.num_null_experts], dim=1)
        return torch.cat((experts_TE, null_TN.sum(dim=1, keepdim=True)), dim=1)
    routed_TK = index_TK[:, : index_TK.shape[1] - config.num_shared_experts]
    empty_TX = torch.zeros(len(index_TK), config.num_experts + 1, device=index_TK.device)
    return empty_TX.scatter_add_(1, routed_TK, torch.ones_like(routed_TK, dtype=torch.float32))


def _weights(weights_TK: torch.Tensor, index_TK: torch.Tensor, config: UniMoeTextConfig) -> torch.Tensor:
    """The routed experts' mixing weights, float32 [T, E]."""
    routed = index_TK.shape[1] - config.num_shared_experts
    empty_TX = torch.zeros(len(index_TK), config.num_experts + 1, device=index_TK.device)
    return empty_TX.scatter_add_(1, index_TK[:, :routed], weights_TK[:, :routed].float())[:, :-1]


def _scores(
    logits_TR: torch.Tensor, router: UniMoeRouter, config: UniMoeTextConfig, group_T: torch.Tensor | None
) -> torch.Tensor:
    """What the choice went by, as logits, float32 [T, X]; -inf where a token has no such choice."""
    choosable = logits_TR.shape[1] - config.num_shared_experts
    score_TC = router.own_rows(logits_TR, group_T)[:, :choosable]
    if router.bias_update_rate:
        shares_TC = score_TC.softmax(dim=-1) if router.scoring == "softmax" else score_TC.sigmoid()
        biased_TC = (shares_TC + router.choice_bias_C).clamp(min=1e-6).log()
        score_TC = biased_TC.masked_fill(score_TC == float("-inf"), float("-inf"))
    if choosable == config.num_experts and len(router.groups) == 1:
        return nn.functional.pad(score_TC, (0, 1), value=float("-inf"))
    column_TC = router.row_expert_R[:choosable].expand_as(score_TC)
    empty_TX = torch.full((len(score_TC), config.num_experts + 1), float("-inf"), device=score_TC.device)
    return empty_TX.scatter_reduce_(1, column_TC, score_TC, reduce="amax")


def _decided(score_LTX: torch.Tensor, chosen_LTX: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which choices the scores leave no doubt about, float32 [L, T, X] each: the best one, and all that were made."""
    best_LT2 = score_LTX.topk(2, dim=-1)
    sure_LT1 = best_LT2.values[..., :1] - best_LT2.values[..., 1:] >= DECIDED_BY
    first_LTX = torch.zeros_like(score_LTX).scatter_(-1, best_LT2.indices[..., :1], sure_LT1.float())
    left_LTX = score_LTX.masked_fill(chosen_LTX > 0, float("-inf"))
    above_LTX = score_LTX - left_LTX.amax(dim=-1, keepdim=True) >= DECIDED_BY
    return first_LTX, (above_LTX & (chosen_LTX > 0)).float()
