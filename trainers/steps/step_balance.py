"""Balance losses over whole optimizer steps: what the batches of a step, on all ranks, sum up to.

The load-balancing loss multiplies two means over tokens. Taken batch by batch it depends on how a step is cut into
batches, and asks every small batch to be balanced by itself (see "Demons in the Detail", arXiv 2501.11873, section 3).
Here its gradient is that of the whole step: counts of choices carry none, so they can be known beforehand.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch

from ...modeling_unimoe.configuration_unimoe_text import LOSS_COEFFICIENTS, UniMoeTextConfig
from ...modeling_unimoe.gate_rows_unimoe import StepTotals
from ...modeling_unimoe.losses_unimoe import step_totals
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ...modeling_unimoe.routing_unimoe import UniMoeRouter

Batch = dict[str, Any]


class StepBalance:
    """The totals of the current optimizer step, where parts of it need them.

    Args:
        ranks: processes whose batches make one step.
        copies: of every batch among them (tensor-parallel ranks share one).
    """

    def __init__(self, ranks: int, copies: int = 1) -> None:
        self.ranks, self.copies = ranks, copies
        self.totals: StepTotals | None = None
        self._reduces = False

    def begin(self, model: UniMoeForCausalLM, count: int, batches: Iterable[Batch]) -> None:
        """Start a step; a step of several batches goes through the model once beforehand, without gradients.

        Args:
            count: of the batches.
            batches: inputs of the model's forward, on its device; asked for only when they are needed.
        """
        wanted = counts_balance(model.config.text_config)
        self.totals = None
        self._reduces = wanted and count == 1 and self.ranks > 1
        if wanted and count > 1:
            self.totals = self._over_ranks(_look_ahead(model, batches))

    def of(self, outputs: Any, model: UniMoeForCausalLM, inputs: Batch) -> StepTotals | None:
        """The step's totals for one of its batches; None when the batch is the whole step."""
        if self._reduces:
            # Kept for the rest of the step: whoever looks at its batch again must not wait for ranks that do not.
            self.totals, self._reduces = self._over_ranks(_totals(outputs, model, inputs)), False
        return self.totals

    def _over_ranks(self, totals: StepTotals) -> StepTotals:
        if self.ranks == 1:
            return totals
        flat = torch.cat([part.reshape(-1) for part in totals])
        torch.distributed.all_reduce(flat)
        flat = flat / self.copies
        parts = flat.split([part.numel() for part in totals])
        return StepTotals(*(part.view(old.shape) for part, old in zip(parts, totals, strict=True)))


def counts_balance(config: UniMoeTextConfig) -> bool:
    """Whether a loss of the routers trains the model; released losses are sums by themselves."""
    trains = any(config.aux_loss_coefs) or any(getattr(config, name) for name in LOSS_COEFFICIENTS.values())
    return bool(config.sparse_layers) and trains and not config.router_losses_as_released


def _look_ahead(model: UniMoeForCausalLM, batches: Iterable[Batch]) -> StepTotals:
    """Totals by a forward pass that draws the same random numbers as the training pass will, and counts nowhere else."""
    routers = [module for module in model.modules() if isinstance(module, UniMoeRouter)]
    counted = [router.load_C for router in routers]
    devices = [model.device.index or 0] if model.device.type == "cuda" else []
    parts = []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        for inputs in batches:
            outputs = model(**inputs, logits_to_keep=1, output_router_logits=True, use_cache=False)
            parts.append(_totals(outputs, model, inputs))
    for router, load_C in zip(routers, counted, strict=True):
        router.load_C = load_C
    return functools.reduce(StepTotals.plus, parts)


def _totals(outputs: Any, model: UniMoeForCausalLM, inputs: Batch) -> StepTotals:
    modality_ids = model.model.modality_ids(inputs["input_ids"])
    groups = model.model.token_groups(modality_ids)
    return step_totals(outputs.router_logits, model.config.text_config, modality_ids, groups, inputs["attention_mask"])
