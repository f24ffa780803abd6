"""New mixers whose aux experts start as copies: what was seen is passed on from the first step, and training refines that.

MoAI starts all experts at random, with 4096 features, 7 B parameters behind them and a million pictures to learn from. The
quickstart's model learns for minutes: from random values it learns by heart which word goes with which aux, and can say no
other word.
"""

from typing import cast

import torch

from ..modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..modeling_unimoe.modeling_unimoe_moai import UniMoeAttentionExpert, UniMoeMixer, UniMoePerceiverAttention

# GELU halves small values; this about makes up for it, twice in each expert.
_GAIN = 1.5
# The compressor's latents are normalised with what they read: small ones leave it the larger part.
_LATENTS = 0.1


@torch.no_grad()
def start_as_copies(model: UniMoeForCausalLM) -> None:
    """Change new mixers and their compressor in place.

    Values and outputs of the compressor, and of the experts that read aux, become the identity, as far as their ranks
    go; queries, keys, the other experts and the gates stay as they were drawn.
    """
    compressor = model.model.aux_compressor
    compressor.latents.mul_(_LATENTS)
    for attention in (part for part in compressor.modules() if isinstance(part, UniMoePerceiverAttention)):
        inner = attention.to_out.in_features
        _copy(attention.to_kv.weight[inner:])  # keys come first
        _copy(attention.to_out.weight)
    for mixer in (part for part in model.modules() if isinstance(part, UniMoeMixer)):
        for experts in (mixer.image_experts, mixer.language_experts):
            expert = cast(UniMoeAttentionExpert, experts["aux"])
            for projection in (expert.v_proj, expert.o_proj):
                _copy(projection.down.weight)
                _copy(projection.up.weight, _GAIN)


def _copy(weight: torch.Tensor, gain: float = 1.0) -> None:
    weight.copy_(gain * torch.eye(*weight.shape, device=weight.device))


__all__ = ["start_as_copies"]
