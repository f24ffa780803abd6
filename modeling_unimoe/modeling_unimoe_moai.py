"""MoAI's parts (arXiv 2403.07508, section 3), as a difference on the decoder: compressor, mixers and partial LoRA.

The compressor brings what external vision models saw to a few tokens. A mixer rewrites what the attention of its layer
reads, at the image and at the text positions of the prompt; the residual stream stays. Partial LoRA adds to projections
at image positions.

Shape suffixes: B batch, S sequence, H hidden size, M samples that are mixed, N rows of one of them, A aux tokens,
L latents.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .configuration_unimoe_moai import UniMoeMixerConfig
from .configuration_unimoe_text import UniMoeTextConfig
from .idle_branches_unimoe import must_run, without_value

# What a mixer's three experts per side read, in the order of the gates' columns.
SOURCES = ("aux", "other", "own")


class Rows(NamedTuple):
    """Some positions of M samples out of a batch [B, S, H], padded to equal numbers.

    place: [M, N] int64, position in the batch laid flat, [B * S]. valid: [M, N] bool, false on padding. filled: where it is
    true, as indices of M and of N; counted here, once, because the host waits for the device to do so.
    """

    place: torch.Tensor
    valid: torch.Tensor
    filled: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, mask_BS: torch.Tensor, samples_M: torch.Tensor) -> "Rows":
        """The positions that a mask [B, S] marks in some samples, in their order."""
        mask_MS = mask_BS[samples_M]
        most = int(mask_MS.sum(dim=1).max())
        place_MN = mask_MS.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        valid_MN = mask_MS.gather(1, place_MN)
        return cls(place_MN + samples_M[:, None] * mask_BS.shape[1], valid_MN, valid_MN.nonzero(as_tuple=True))

    def take(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """[M, N, H]; what stands on padding means nothing."""
        return x_BSH.reshape(-1, x_BSH.shape[-1])[self.place]

    def put(self, x_BSH: torch.Tensor, rows_MNH: torch.Tensor) -> torch.Tensor:
        """A copy of the batch with other rows at these positions."""
        flat = x_BSH.reshape(-1, x_BSH.shape[-1])
        rows = rows_MNH[self.filled].to(x_BSH.dtype)
        return flat.index_put((self.place[self.filled],), rows).view_as(x_BSH)


class Mixing(NamedTuple):
    """What the mixers of one forward pass read and write.

    aux: compressed aux tokens [M, L, H]. image, language: the positions that are mixed. choices: per mixer the number, in
    `SOURCES`, of the one expert that images and the one that text gets; None asks the gates.
    """

    aux: torch.Tensor
    image: Rows
    language: Rows
    choices: tuple[tuple[int, int], ...] | None = None


class UniMoePerceiverAttention(nn.Module):
    """Latents attend to the aux tokens and to themselves."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.norm_media = nn.LayerNorm(hidden_size)
        self.norm_latents = nn.LayerNorm(hidden_size)
        self.to_q = nn.Linear(hidden_size, inner, bias=False)
        self.to_kv = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, hidden_size, bias=False)

    def forward(
        self, latents_MLH: torch.Tensor, media_MAH: torch.Tensor, valid_MA: torch.Tensor | None
    ) -> torch.Tensor:
        latents, media = self.norm_latents(latents_MLH), self.norm_media(media_MAH)
        key, value = self.to_kv(torch.cat((media, latents), dim=1)).chunk(2, dim=-1)
        mask = None
        if valid_MA is not None:
            mask = torch.cat((valid_MA, valid_MA.new_ones(latents.shape[:2])), dim=1)[:, None, None]
        return self.to_out(_attend(self.to_q(latents), key, value, self.num_heads, mask))


class UniMoeCompressorFFN(nn.Module):
    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, ffn_size, bias=False)
        self.down = nn.Linear(ffn_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class UniMoeCompressorBlock(nn.Module):
    def __init__(self, config: UniMoeMixerConfig, hidden_size: int) -> None:
        super().__init__()
        self.attention = UniMoePerceiverAttention(hidden_size, config.compressor_heads, config.compressor_head_dim)
        self.ffn = UniMoeCompressorFFN(hidden_size, config.compressor_ffn_size or hidden_size)

    def forward(self, latents: torch.Tensor, media: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        latents = self.attention(latents, media, valid) + latents
        return self.ffn(latents) + latents


class UniMoeCompressor(nn.Module):
    """A perceiver resampler (Flamingo, arXiv 2204.14198): any number of aux tokens become a fixed one."""

    def __init__(self, config: UniMoeMixerConfig, hidden_size: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.num_latents, hidden_size))
        blocks = [UniMoeCompressorBlock(config, hidden_size) for _ in range(config.compressor_depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, aux_MAH: torch.Tensor, valid_MA: torch.Tensor | None = None) -> torch.Tensor:
        """[M, A, H] aux tokens, of which `valid_MA` (bool; None: all) are no padding -> [M, L, H]."""
        latents = self.latents.to(aux_MAH.dtype).expand(len(aux_MAH), -1, -1)
        for block in self.blocks:
            latents = block(latents, aux_MAH, valid_MA)
        return self.norm(latents)


class UniMoeLowRankLinear(nn.Module):
    """A square projection through a bottleneck, nothing in between."""

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = nn.Linear(rank, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


class UniMoeAttentionExpert(nn.Module):
    """Attention of some rows to others, without order and without causal mask; the rows themselves are the residual."""

    def __init__(self, config: UniMoeMixerConfig, hidden_size: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = UniMoeLowRankLinear(hidden_size, config.rank)
        self.k_proj = UniMoeLowRankLinear(hidden_size, config.rank)
        self.v_proj = UniMoeLowRankLinear(hidden_size, config.rank)
        self.o_proj = UniMoeLowRankLinear(hidden_size, config.rank)

    def forward(
        self, query_MNH: torch.Tensor, source_MKH: torch.Tensor, valid_MK: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[M, N, H] rows and [M, K, H] of what they read -> [M, N, H]."""
        query, key, value = (
            F.gelu(project(x))
            for project, x in ((self.q_proj, query_MNH), (self.k_proj, source_MKH), (self.v_proj, source_MKH))
        )
        mask = None if valid_MK is None else valid_MK[:, None, None]
        return query_MNH + F.gelu(self.o_proj(_attend(query, key, value, self.num_heads, mask)))


class UniMoeMixer(nn.Module):
    """Six attention experts and two gates in front of one layer's attention.

    Args:
        number: which of the model's mixers this is.
    """

    def __init__(self, config: UniMoeTextConfig, number: int) -> None:
        super().__init__()
        mixer = config.mixer_config
        self.config, self.number = mixer, number
        self.image_experts = nn.ModuleDict({name: self._expert(config) for name in SOURCES})
        self.language_experts = nn.ModuleDict({name: self._expert(config) for name in SOURCES})
        self.image_gate = nn.Linear(config.hidden_size, len(SOURCES))
        self.language_gate = nn.Linear(config.hidden_size, len(SOURCES))

    def forward(self, x_BSH: torch.Tensor, mixing: Mixing | None) -> torch.Tensor:
        """The batch with the rows that `mixing` names rewritten; both sides read what was there before."""
        if mixing is None and not self.training:
            return x_BSH
        if mixing is None:
            return x_BSH + self._idle(x_BSH, [*self._experts(), self.image_gate, self.language_gate])
        image, language = mixing.image.take(x_BSH), mixing.language.take(x_BSH)
        sources = {
            "aux": (mixing.aux.to(x_BSH.dtype), None),
            "image": (image, mixing.image.valid),
            "language": (language, mixing.language.valid),
        }
        chosen = (None, None) if mixing.choices is None else mixing.choices[self.number]
        read = [sources[name] for name in ("aux", "language", "image")]
        image_mix = self._mix(image, read, self.image_experts, self.image_gate, chosen[0])
        read = [sources[name] for name in ("aux", "image", "language")]
        language_mix = self._mix(language, read, self.language_experts, self.language_gate, chosen[1])
        return mixing.language.put(mixing.image.put(x_BSH, image_mix), language_mix)

    def gate_weights(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax of gate logits in the precision that the configuration names."""
        name = self.config.gate_training_precision if self.training else self.config.gate_precision
        return logits.to(getattr(torch, name)).softmax(dim=-1)

    def _mix(
        self,
        rows_MNH: torch.Tensor,
        sources: list[tuple[torch.Tensor, torch.Tensor | None]],
        experts: nn.ModuleDict,
        gate: nn.Linear,
        chosen: int | None,
    ) -> torch.Tensor:
        if chosen is None:
            weights = self.gate_weights(gate(rows_MNH)).to(rows_MNH.dtype).unbind(-1)
            outputs = (expert(rows_MNH, *source) for expert, source in zip(experts.values(), sources, strict=True))
            return sum((w[..., None] * y for w, y in zip(weights, outputs, strict=True)), torch.zeros_like(rows_MNH))
        # Always in the same order: ranks that share out weights wait for each other in every module.
        mix = torch.zeros_like(rows_MNH)
        for number, expert in enumerate(experts.values()):
            mix = mix + (expert(rows_MNH, *sources[number]) if number == chosen else self._idle(rows_MNH, [expert]))
        return mix + self._idle(rows_MNH, [gate])

    def _idle(self, x: torch.Tensor, modules: list[nn.Module]) -> torch.Tensor | float:
        """In training, a 0 through which modules that are not asked are part of the graph; see `idle_branches_unimoe`."""
        if not (self.training and torch.is_grad_enabled()):
            return 0.0
        row = x.new_zeros(1, 1, x.shape[-1])
        waited_for = [module for module in modules if must_run(module)]
        outputs = [m(row, row) if isinstance(m, UniMoeAttentionExpert) else m(row) for m in waited_for]
        return sum((without_value(y) for y in outputs), x.new_zeros((), dtype=torch.float32)).to(x.dtype)

    def _experts(self) -> list[nn.Module]:
        return [*self.image_experts.values(), *self.language_experts.values()]

    @staticmethod
    def _expert(config: UniMoeTextConfig) -> UniMoeAttentionExpert:
        return UniMoeAttentionExpert(config.mixer_config, config.hidden_size)


class UniMoePloraUp(nn.Linear):
    """The second matrix of a partial LoRA, a class of its own because it starts at zero."""


class UniMoePlora(nn.Module):
    """What both kinds of partial LoRA share. Matrices are called a (down) and b (up), as in LoRA."""

    def __init__(self, config: UniMoeTextConfig) -> None:
        super().__init__()
        plora = config.plora_config
        self.rank = plora.rank
        self.scale = plora.alpha / plora.rank
        self.dropout = nn.Dropout(plora.dropout)

    def _low(self, a: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return a(self.dropout(x))

    def _added(self, y: torch.Tensor, low: torch.Tensor, b: nn.Linear, image_mask: torch.Tensor) -> torch.Tensor:
        return y + torch.where(image_mask[..., None], b(low) * self.scale, 0.0)


class UniMoeAttentionPlora(UniMoePlora):
    """Partial LoRA of an attention's projections; q, k and v share their a."""

    def __init__(self, config: UniMoeTextConfig) -> None:
        super().__init__(config)
        query, key_value = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.qkv_a = nn.Linear(config.hidden_size, self.rank, bias=False)
        self.q_b = UniMoePloraUp(self.rank, query, bias=False)
        self.k_b = UniMoePloraUp(self.rank, key_value, bias=False)
        self.v_b = UniMoePloraUp(self.rank, key_value, bias=False)
        self.o_a = nn.Linear(query, self.rank, bias=False)
        self.o_b = UniMoePloraUp(self.rank, config.hidden_size, bias=False)

    def inputs(
        self, x: torch.Tensor, projected: tuple[torch.Tensor, ...], image_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Query, key and value [B, S, features], with the additions where `image_mask` [B, S] is true."""
        if image_mask is None:
            return projected
        low = self._low(self.qkv_a, x)
        additions = zip(projected, (self.q_b, self.k_b, self.v_b), strict=True)
        return tuple(self._added(y, low, b, image_mask) for y, b in additions)

    def output(self, x: torch.Tensor, projected: torch.Tensor, image_mask: torch.Tensor | None) -> torch.Tensor:
        if image_mask is None:
            return projected
        return self._added(projected, self._low(self.o_a, x), self.o_b, image_mask)


class UniMoeMLPPlora(UniMoePlora):
    """Partial LoRA of a dense FFN."""

    def __init__(self, config: UniMoeTextConfig) -> None:
        super().__init__(config)
        self.gate_a = nn.Linear(config.hidden_size, self.rank, bias=False)
        self.gate_b = UniMoePloraUp(self.rank, config.intermediate_size, bias=False)
        self.up_a = nn.Linear(config.hidden_size, self.rank, bias=False)
        self.up_b = UniMoePloraUp(self.rank, config.intermediate_size, bias=False)
        self.down_a = nn.Linear(config.intermediate_size, self.rank, bias=False)
        self.down_b = UniMoePloraUp(self.rank, config.hidden_size, bias=False)

    def inputs(
        self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, image_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if image_mask is None:
            return gate, up
        gate = self._added(gate, self._low(self.gate_a, x), self.gate_b, image_mask)
        return gate, self._added(up, self._low(self.up_a, x), self.up_b, image_mask)

    def output(self, x: torch.Tensor, projected: torch.Tensor, image_mask: torch.Tensor | None) -> torch.Tensor:
        if image_mask is None:
            return projected
        return self._added(projected, self._low(self.down_a, x), self.down_b, image_mask)


def init_moai_weights(module: nn.Module) -> None:
    """Initial values that are not those of every linear layer; for a model's `_init_weights`.

    As in the original, except that the additions of partial LoRA start at zero.
    """
    if isinstance(module, UniMoeCompressor):
        init.normal_(module.latents, mean=0.0, std=1.0)
        for linear in (m for m in module.modules() if isinstance(m, nn.Linear)):
            init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    elif isinstance(module, UniMoePloraUp):
        init.zeros_(module.weight)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_heads: int, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention in so many heads over [M, rows, features]; a mask [M, 1, 1, K] is true where keys count."""
    heads = [t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (query, key, value)]
    return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2).flatten(2)


__all__ = [
    "SOURCES",
    "Mixing",
    "Rows",
    "UniMoeAttentionPlora",
    "UniMoeCompressor",
    "UniMoeMLPPlora",
    "UniMoeMixer",
    "init_moai_weights",
]
