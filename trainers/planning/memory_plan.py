"""How much memory one process of a training run needs: arithmetic on counts of parameters, no model.

Per rank and kind of memory, all in bytes:

weights       parameters held * weight_bytes
gradients     trained parameters held * gradient_bytes
optimizer     trained parameters held * optimizer_bytes (AdamW: two moments)
copies        weights in the dtype of the matrix products, which autocast keeps until the backward pass, experts with
              their adapters added, and weights that a run of an expert puts back at its end
activations   what the backward pass needs of a forward pass, see `activation_bytes`
buffers       what is being sent: buckets of gradients (zero 0; of adapters always), gathered weights of two layers (zero 3)

Tensor ranks split the matrices of the decoder, expert ranks the routed experts (without expert ranks tensor ranks split
these too); both kinds of ranks are among the `data` * `tensor` processes. ZeRO then splits over the processes that hold
the same thing: optimizer (1), gradients too (2), weights too (3).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

KINDS = ("weights", "gradients", "optimizer", "copies", "activations", "buffers")


@dataclass(frozen=True)
class Count:
    """Numbers of parameters of one kind: in all, and of these trained."""

    total: int = 0
    trained: int = 0


@dataclass(frozen=True)
class ParameterSizes:
    """A model's parameters by what parallel runs do with them.

    Args:
        experts: routed experts, which expert ranks split.
        split: other matrices of the decoder and its head, which tensor ranks split.
        whole: all else, which every rank has: towers, connectors, routers, norms, embeddings.
        adapters: LoRA's matrices, of which every rank of a spread model has all.
        adapted_experts: parameters of experts that carry adapters.
        largest_layer: parameters of the largest decoder layer, which ZeRO-3 gathers.
        layer_experts: those of them that are routed experts; a rank gathers only its part, from others that hold the same.
        set_aside: parameters of which the run keeps a second copy, as those of experts do.
    """

    experts: Count = Count()
    split: Count = Count()
    whole: Count = Count()
    adapters: Count = Count()
    adapted_experts: int = 0
    largest_layer: int = 0
    layer_experts: int = 0
    set_aside: int = 0

    @property
    def total(self) -> int:
        return sum(count.total for count in self._counts)

    @property
    def trained(self) -> int:
        return sum(count.trained for count in self._counts)

    @property
    def _counts(self) -> tuple[Count, ...]:
        return self.experts, self.split, self.whole, self.adapters


@dataclass(frozen=True)
class MemorySettings:
    """How a model trains.

    Args:
        weight_bytes, gradient_bytes, optimizer_bytes: per parameter held; the last two per trained one.
        compute_bytes: of the dtype of the matrix products: 4, or 2 with bfloat16.
        keeps_gradients: gradients of earlier batches wait while the next one runs (gradient accumulation).
        layers, hidden_size, query_size, heads: of the decoder; sizes over all heads.
        ffn_size: inner width of what one token goes through in a layer: intermediate size, or that of an expert times
            the experts per token (shared ones included); the mean over the layers.
        copies_per_token: times that a layer copies a token for its experts: experts per token; 1 in dense layers.
        vocabulary_size: entries of the head.
        rows, row_length: of the batch of a forward pass.
        logits_length: positions of a row that go through the head.
        stores_scores: attention keeps its matrix of row_length * row_length ("eager").
        checkpointing: only the inputs of layers are kept, one layer at a time is computed again.
        below_decoder: what trains lies at the decoder's input or below or within it, so that its layers keep their
            activations; False when only the head trains.
        frozen_matrices: nothing in the decoder's layers trains but routers, so that its matrices and norms keep no inputs.
        tower_activations: bytes that towers and connectors keep for the backward pass or hold at once.
    """

    weight_bytes: int = 4
    gradient_bytes: int = 4
    optimizer_bytes: int = 8
    compute_bytes: int = 4
    keeps_gradients: bool = False
    layers: int = 0
    hidden_size: int = 0
    query_size: int = 0
    heads: int = 0
    ffn_size: float = 0
    copies_per_token: float = 1
    vocabulary_size: int = 0
    rows: int = 1
    row_length: int = 0
    logits_length: int = 0
    stores_scores: bool = False
    checkpointing: bool = False
    below_decoder: bool = True
    frozen_matrices: bool = False
    tower_activations: int = 0


@dataclass(frozen=True)
class Degrees:
    """A `parallel:` section: `data` * `tensor` processes, of which every `expert` together hold all experts."""

    data: int = 1
    expert: int = 1
    tensor: int = 1
    zero: int = 0
    engine: str = "auto"

    @property
    def ranks(self) -> int:
        return self.data * self.tensor

    @property
    def shares_out_adapters(self) -> bool:
        """Whether ZeRO splits adapters: DeepSpeed's does; transformers' sharding leaves them whole."""
        return self.expert == 1 and self.tensor == 1 and self.engine != "fsdp"

    @property
    def expert_parts(self) -> int:
        """Parts that the routed experts are split into."""
        return max(self.expert, self.tensor)

    @property
    def expert_replicas(self) -> int:
        """Processes that hold the same experts."""
        return max(1, self.ranks // self.expert_parts)


def degrees_of(parallel: Any) -> Degrees:
    """Those of a recipe's `Parallel`, which knows more about processes than arithmetic wants."""
    return Degrees(**{field.name: getattr(parallel, field.name) for field in fields(Degrees)})


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank by kind (see `KINDS`); `total` is the peak: not all kinds are there at the same time."""

    bytes_of: Mapping[str, int]
    total: int
    degrees: Degrees = field(default_factory=Degrees)


def memory_per_rank(
    parameters: ParameterSizes, training: MemorySettings, parallel: Degrees | None = None
) -> MemoryPlan:
    """What the fullest rank needs; see the head of this file for the arithmetic.

    The peak is weights, optimizer, copies and buffers, and the larger of gradients and activations: while the backward
    pass makes the ones it gives up the others. Where gradients of earlier batches wait, both count.
    """
    parallel = parallel or Degrees()
    held = _held(parameters, parallel)
    trained = sum(count.trained for count in held)
    # Which kinds ZeRO splits, over how many processes: those with the same experts, or the same of all else.
    of_adapters = 1 / parallel.data if parallel.shares_out_adapters else 1.0
    shares = (1 / parallel.expert_replicas, 1 / parallel.data, 1 / parallel.data, of_adapters)

    def split(stage: int, counts: list[int], size: int) -> int:
        factors = shares if parallel.zero >= stage else (1, 1, 1, 1)
        return round(size * sum(count * factor for count, factor in zip(counts, factors, strict=True)))

    activations = activation_bytes(training, parallel.tensor) + training.tower_activations
    found = {
        "weights": split(3, [count.total for count in held], training.weight_bytes),
        "gradients": split(2, [count.trained for count in held], training.gradient_bytes),
        "optimizer": split(1, [count.trained for count in held], training.optimizer_bytes),
        "copies": _copies(parameters, held, training, parallel),
        "activations": activations,
        "buffers": _buffers(parameters, trained, training, parallel),
    }
    moving = (found["gradients"], activations)
    total = sum(found.values()) - (0 if training.keeps_gradients else min(moving))
    return MemoryPlan(found, total, parallel)


def activation_bytes(training: MemorySettings, tensor: int = 1) -> int:
    """The most that decoder and head hold at once for the backward pass: `kept_activations`, and what passes.

    In passing, one layer has its scores twice more and the gradients of its feed-forward network's inside; with
    checkpointing it is computed again.
    """
    tokens = training.rows * training.row_length
    again = _layer_bytes(training, tensor) if training.checkpointing or not training.below_decoder else 0
    inside = 3 * training.compute_bytes * training.ffn_size / tensor
    return kept_activations(training, tensor) + round(again + tokens * (8 * _scores(training, tensor) + inside))


def kept_activations(training: MemorySettings, tensor: int = 1) -> int:
    """What a forward pass leaves for the backward pass in the decoder and its head, bytes."""
    if not training.below_decoder:
        layers = 0.0
    elif training.checkpointing:
        layers = training.layers * training.rows * training.row_length * training.hidden_size * 4
    else:
        layers = training.layers * _layer_bytes(training, tensor)
    # Logits, those of labelled positions in float32, their log-softmax, and the gradient.
    head = training.rows * training.logits_length * training.vocabulary_size * (training.compute_bytes + 4 + 4 + 4)
    return round(layers + head)


def _layer_bytes(training: MemorySettings, tensor: int) -> float:
    """What a layer keeps, b being the bytes of the compute dtype.

    Both norms keep their input and its scaled form in float32 and their output in b; attention keeps queries, keys and
    values for every head, and its output; the feed-forward network keeps gate, its activation, up and the product, and the
    inputs and outputs of chosen experts. Scores are kept after their softmax, in float32 and in b. Where the matrices are
    frozen, only what comes before a nonlinearity or a product of two activations is kept.
    """
    b, hidden = training.compute_bytes, training.hidden_size
    frozen = training.frozen_matrices
    norms = 2 * hidden * (4 if frozen else 4 + 4 + b)
    attention = b * (3 if frozen else 4) * training.query_size / tensor
    scores = _scores(training, tensor) * (4 if b == 4 else 4 + b)
    experts = (1 if frozen else 2) * training.copies_per_token * hidden if training.copies_per_token != 1 else 0
    ffn = b * ((3 if frozen else 4) * training.ffn_size / tensor + experts)
    return training.rows * training.row_length * (norms + attention + scores + ffn)


def _scores(training: MemorySettings, tensor: int) -> float:
    """Scores of attention per token and layer, where they are stored."""
    return training.heads * training.row_length / tensor if training.stores_scores else 0.0


def _held(parameters: ParameterSizes, parallel: Degrees) -> tuple[Count, ...]:
    """What one rank has of experts, split matrices, all else and adapters before ZeRO."""

    def part(count: Count, ranks: int) -> Count:
        return Count(-(-count.total // ranks), -(-count.trained // ranks))

    experts, split = part(parameters.experts, parallel.expert_parts), part(parameters.split, parallel.tensor)
    return experts, split, parameters.whole, parameters.adapters


def _copies(parameters: ParameterSizes, held: tuple[Count, ...], training: MemorySettings, parallel: Degrees) -> int:
    share = 1 / max(1, training.layers) if training.checkpointing else 1.0
    adapted = parameters.adapted_experts / parallel.expert_parts * training.weight_bytes * share
    adapted += parameters.set_aside * training.weight_bytes
    if training.compute_bytes == training.weight_bytes or parallel.zero == 3:
        return round(adapted)
    return round(adapted + (held[0].total + held[1].total) * training.compute_bytes * share)


def _buffers(parameters: ParameterSizes, trained: int, training: MemorySettings, parallel: Degrees) -> int:
    if parallel.ranks == 1:
        return 0
    if parallel.zero == 0:
        return trained * training.gradient_bytes
    adapters = 0 if parallel.shares_out_adapters else parameters.adapters.trained * training.gradient_bytes
    if parallel.zero < 3:
        return adapters
    elsewhere = parallel.expert_parts - 1 if parallel.expert_replicas > 1 else parallel.expert_parts
    not_gathered = parameters.layer_experts * elsewhere // parallel.expert_parts
    return adapters + 2 * (parameters.largest_layer - not_gathered) * training.weight_bytes
