"""What the models return."""

from dataclasses import dataclass

import torch
from transformers import Cache
from transformers.modeling_outputs import ModelOutput


@dataclass
class UniMoeModelOutputWithPast(ModelOutput):
    """Output of `UniMoeModel`.

    mm_token_type_ids: modality id of every position, [B, S].
    idle_branches: in training, a scalar 0 that depends on the branches of absent modalities; add it to the loss.
    """

    last_hidden_state: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    mm_token_type_ids: torch.Tensor | None = None
    idle_branches: torch.Tensor | None = None


@dataclass
class UniMoeCausalLMOutputWithPast(ModelOutput):
    """Output of `UniMoeForCausalLM`.

    loss: ce_loss plus the routers' losses, each times its coefficient in the configuration (scalars, float32).
    ce_loss, aux_loss, z_loss, modality_loss, divergence_loss: its parts, unweighted; see `losses_unimoe.py`. The last two
    are None unless they are part of it.
    group_aux_losses: the parts of aux_loss, one per routing group, [G].
    idle_branches: see `UniMoeModelOutputWithPast`; it is part of loss.
    logits: [B, S, vocab]; router_logits: one [B * S, gate rows] tensor per sparse layer.
    """

    loss: torch.Tensor | None = None
    ce_loss: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    modality_loss: torch.Tensor | None = None
    divergence_loss: torch.Tensor | None = None
    group_aux_losses: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    idle_branches: torch.Tensor | None = None
