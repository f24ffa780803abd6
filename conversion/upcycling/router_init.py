"""Gate rows to start from: drawn, zero, or read off the hidden states that texts make in the dense model.

    normal    drawn, with the configuration's `initializer_range`
    zeros     no preference at all
    prompts   a row points to the mean hidden state of texts that the user gave for its expert (the "hidden" gate mode of
              mergekit's MoE merges)
    cluster   rows are the centroids of hidden states that were clustered (Cluster-aware Upcycling, arXiv 2604.13508, of
              which this is the router's part)

Hidden states are the inputs of the layer's FFN. They all share a large component, their mean, which says nothing about
a token; without a bias the gate could not take it out, so rows are made orthogonal to it. Their length is such that
logits have a standard deviation of one.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from .sparsity import Sparsity

DATA_INITS = ("prompts", "cluster")
_CLUSTER_ROUNDS = 30


def initial_router_rows(config: UniMoeTextConfig, sparsity: Sparsity, layer: int) -> torch.Tensor:
    """Gate rows [R, H] in float32; the same for the same seed and layer, whatever else is converted.

    With virtual groups all parts of a copy of the dense FFN have the same row.
    """
    if sparsity.router_init not in ("normal", "zeros"):
        raise ConversionError(
            f"router_init is {sparsity.router_init!r}; it must be 'normal' or 'zeros', or rows must be given."
        )
    return _drawn_rows(config, sparsity, layer)


def rows_of_experts(
    expert_rows: torch.Tensor, config: UniMoeTextConfig, sparsity: Sparsity, layer: int
) -> torch.Tensor:
    """Gate rows [R, H] from one row per copy of the dense FFN, [copies, H]; an expert's row is the same in every group.

    Null and shared experts, which no data speaks of, have drawn rows.
    """
    rows = _drawn_rows(config, sparsity, layer)
    for row, expert in enumerate(_experts_of_rows(config)):
        if expert is not None:
            rows[row] = expert_rows[expert // sparsity.parts_per_copy]
    return rows


def expert_rows_from_prompts(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows [copies, H] that point to the mean hidden states of each copy's texts.

    Args:
        states: per copy the hidden states [N, H] of its texts.
    """
    everything = torch.cat(list(states))
    common = _common_direction(everything)
    rows = torch.stack([F.normalize(_without(own, common), dim=-1).mean(0) for own in states])
    # What all copies share makes no difference between them.
    return _scaled(F.normalize(_without(rows - rows.mean(0), common), dim=-1), everything)


def expert_rows_from_clusters(states: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Rows [count, H] that are the centroids of hidden states [N, H], clustered by direction (spherical k-means).

    Raises:
        ConversionError: there are fewer states than clusters.
    """
    if len(states) < count:
        raise ConversionError(f"The prompts have {len(states)} tokens, too few for {count} clusters: give more text.")
    common = _common_direction(states)
    directions = F.normalize(_without(states, common), dim=-1)
    centroids = _spread_start(directions, count, torch.Generator().manual_seed(seed))
    for _ in range(_CLUSTER_ROUNDS):
        nearest = (directions @ centroids.T).argmax(-1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, directions)
        # A centroid that lost all its states stays where it was.
        kept = torch.where(sums.norm(dim=-1, keepdim=True) > 0, sums, centroids)
        moved = F.normalize(kept, dim=-1)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return _scaled(centroids, states)


@torch.no_grad()
def ffn_inputs(
    model: UniMoeForCausalLM, layers: Sequence[int], texts: Iterable[torch.Tensor]
) -> dict[int, list[torch.Tensor]]:
    """The inputs of the FFNs of some layers: layer -> one float32 tensor [S - 1, H] per text.

    The first token is left out: many models park attention on it, and its state is like no other's.

    Args:
        texts: token ids [1, S].
    """
    states: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}

    def keep(layer: int):  # type: ignore[no-untyped-def]
        return lambda _module, inputs: states[layer].append(inputs[0][0, 1:].float().clone())

    decoder = model.model.language_model.layers
    handles = [decoder[layer].mlp.register_forward_pre_hook(keep(layer)) for layer in layers]
    for ids in texts:
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return states


def data_router_rows(
    states: Mapping[int, Sequence[torch.Tensor]],
    owners: Sequence[int] | None,
    config: UniMoeTextConfig,
    sparsity: Sparsity,
) -> dict[int, torch.Tensor]:
    """Layer -> gate rows [R, H] from hidden states.

    Args:
        states: as `ffn_inputs` returns them.
        owners: for "prompts", the copy that each text was given for.
    """
    copies, rows = sparsity.num_copies, {}
    for layer, of_texts in states.items():
        if owners is None:
            found = expert_rows_from_clusters(torch.cat(list(of_texts)), copies, sparsity.seed * 1_000_003 + layer)
        else:
            own = [[s for s, o in zip(of_texts, owners, strict=True) if o == copy] for copy in range(copies)]
            found = expert_rows_from_prompts([torch.cat(states_of_copy) for states_of_copy in own])
        rows[layer] = rows_of_experts(found, config, sparsity, layer)
    return rows


def _drawn_rows(config: UniMoeTextConfig, sparsity: Sparsity, layer: int) -> torch.Tensor:
    shape = (config.num_gate_rows, config.hidden_size)
    if sparsity.router_init == "zeros":
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(sparsity.seed * 1_000_003 + layer)
    rows = torch.randn(shape, generator=generator) * config.initializer_range
    if sparsity.parts_per_copy > 1:
        for group in _rows_of_groups(config):
            first: dict[int, int] = {}
            for row, expert in group:
                rows[row] = rows[first.setdefault(expert // sparsity.parts_per_copy, row)]
    return rows


def _rows_of_groups(config: UniMoeTextConfig) -> list[list[tuple[int, int]]]:
    """Per routing group its experts' (gate row, expert id); null experts' rows follow them and are left out."""
    groups, row = [], 0
    for group in config.router_groups:
        groups.append([(row + i, expert) for i, expert in enumerate(group.experts)])
        row += len(group.experts) + config.num_null_experts
    return groups


def _experts_of_rows(config: UniMoeTextConfig) -> list[int | None]:
    """Expert id of every gate row; None for null and shared experts."""
    experts: list[int | None] = [None] * config.num_gate_rows
    for group in _rows_of_groups(config):
        for row, expert in group:
            experts[row] = expert
    return experts


def _common_direction(states: torch.Tensor) -> torch.Tensor:
    return F.normalize(states.mean(0), dim=-1)


def _without(states: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    return states - (states @ direction)[..., None] * direction


def _scaled(rows: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    deviation = (states @ rows.T).std()
    return rows / deviation if deviation > 0 else rows


def _spread_start(directions: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++: each next centroid is drawn with a probability that grows with its distance from those there."""
    chosen = [int(torch.randint(len(directions), (1,), generator=generator))]
    for _ in range(count - 1):
        distance = (1 - (directions @ directions[chosen].T).amax(-1)).clamp(min=0)
        if distance.sum() == 0:
            distance = torch.ones_like(distance)
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    return directions[chosen].clone()


__all__ = ["DATA_INITS", "data_router_rows", "ffn_inputs", "initial_router_rows"]
