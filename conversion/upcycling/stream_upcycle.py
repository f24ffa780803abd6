"""Upcycling of checkpoints on disk: a folder in, a complete sparse model folder out, one tensor in memory at a time.

`plan_upcycle` reads headers only and says what would be written. `run_upcycle` writes into a hidden folder beside the
target, compares the result with the source, and lets the target appear only if the two agree.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import GenerationConfig

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ..checkpoints.checkpoint_reader import dtype_name, quantisation_notes
from ..checkpoints.checkpoint_writer import DEFAULT_SHARD_BYTES, OutputTensor
from ..checkpoints.finished_folder import finished_folder
from ..checkpoints.our_folder import in_model_order
from ..checkpoints.parameters import count_parameters, total_and_active
from ..checkpoints.read_back import write_and_read_back
from ..dense.picture_processor import picture_processor
from ..dense.sources import Source
from ..publishing.hub import complete_bundle, save_config
from ..publishing.model_card import model_card, receipt_section
from ..publishing.saved_receipt import RECEIPT_FILE
from .compare import compare_models
from .exactness import certain_changes, is_exact
from .expert_init import expected_deviation, routed_projection, shared_projection
from .prompted_rows import RouterRows
from .receipt import Comparison, Receipt
from .sparsity import Sparsity, sparse_config
from .upcycle import FFN_PROJECTIONS, LANGUAGE_PREFIX, initial_biases


@dataclass(frozen=True)
class UpcyclePlan:
    """What will be written. `dtype` is that of the output's floating point tensors; None keeps the source's."""

    source: Source
    sparsity: Sparsity
    config: UniMoeConfig
    dtype: torch.dtype | None
    rows: RouterRows
    outputs: tuple[OutputTensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(output.num_bytes for output in self.outputs)

    @property
    def written_dtype(self) -> torch.dtype:
        """Of most tensors."""
        return self.dtype or self.source.dtype

    @property
    def changes(self) -> list[str]:
        """What makes the model start as another function than the source, as far as that is certain already."""
        return certain_changes(self.config.text_config, self.sparsity, self.written_dtype)

    def require_leave(self, allow_gap: float | None) -> None:
        """Raises ConversionError for a model that certainly differs from its source, unless the user allows a gap."""
        if self.changes and allow_gap is None:
            raise ConversionError(
                f"The model would not start as its source, because of {' and '.join(self.changes)}. Nothing was written. "
                "Say by how much its logits may differ with --allow-gap X (inf: by anything); the receipt then shows by "
                "how much they do, and how much is to be expected."
            )

    def recipe(self) -> list[str]:
        """How experts and routers start, and where that was published; first what the source had lost."""
        sparsity, text = self.sparsity, self.config.text_config
        parts = sparsity.granularity
        lines = [
            *quantisation_notes(self.source.checkpoint, "source"),
            f"{text.num_experts} experts of width {text.moe_intermediate_size}, {text.num_experts_per_tok} per token",
        ]
        if parts == 1:
            lines.append("experts: copies of the dense FFN (arXiv 2212.05055)")
        elif sparsity.split == "virtual-groups":
            lines.append(
                f"experts: {parts} parts of each of {sparsity.num_copies} copies of the dense FFN (arXiv 2410.07524)"
            )
        else:
            lines.append(f"experts: slices, each 1/{parts} of the dense FFN (DCMoE's moe_copy)")
        if sparsity.drop_ratio:
            lines.append(f"drop: {sparsity.drop_ratio:g} of every expert's width starts anew (arXiv 2502.19261)")
        if sparsity.noise:
            lines.append(f"noise: {sparsity.noise:g} of every weight matrix's standard deviation")
        for count, kind in ((text.num_shared_experts, "shared"), (text.num_null_experts, "null")):
            if count:
                lines.append(f"{count} {kind} expert{'s' * (count > 1)}")
        sources = {"prompts": " (mergekit's hidden gates)", "cluster": " (arXiv 2604.13508)"}
        return [*lines, f"router: {sparsity.router_init}{sources.get(sparsity.router_init, '')}, seed {sparsity.seed}"]

    def lines(self) -> list[str]:
        """The plan for a reader."""
        checkpoint, text = self.source.checkpoint, self.config.text_config
        before = total_and_active(count_parameters(self.source.config))
        after = total_and_active(count_parameters(self.config))
        read = (
            f"{_gigabytes(checkpoint.num_bytes)} in {len(checkpoint.files)} file(s), {dtype_name(self.source.dtype)}"
        )
        groups = [
            f"group       {group.name}: {', '.join(group.modalities)} -> {list(group.experts)}"
            for group in text.router_groups
            if text.expert_groups
        ]
        return [
            f"source      {self.source.name}: {read}",
            f"sparse      {len(text.sparse_layers)} of {text.num_hidden_layers} layers {text.sparse_layers}",
            *(f"{'recipe':<12}{line}" for line in self.recipe()),
            *groups,
            f"parameters  {before.total:,} -> {after.total:,} ({after.active:,} active per token)",
            f"writes      {_gigabytes(self.num_bytes)}, {dtype_name(self.written_dtype)}",
            *(f"changes     the function: {change}" for change in self.changes),
        ]


def plan_upcycle(
    source: Source, sparsity: Sparsity, dtype: torch.dtype | None = None, *, prompts: str | Path | None = None
) -> UpcyclePlan:
    """Describe the conversion of a source; only headers are read.

    Args:
        prompts: file of texts for the router initialisations "prompts" and "cluster", see `read_prompts`.

    Raises:
        ConversionError: the source is sparse already, or would not become what the configuration describes.
        ConfigurationError: the sparsity is impossible.
    """
    config = sparse_config(source.config, sparsity)
    config.dtype = dtype or source.dtype
    rows = RouterRows(source, config.text_config, sparsity, prompts)
    outputs = kept_tensors(source, sparsity, dtype)
    for layer in sparsity.sparse_layers:
        outputs += _sparse_layer(source, config, sparsity, layer, dtype, rows)
    return UpcyclePlan(source, sparsity, config, dtype, rows, in_model_order(outputs, config))


def run_upcycle(
    plan: UpcyclePlan,
    out: Path,
    *,
    compare: bool = True,
    allow_gap: float | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
) -> Receipt:
    """Write the sparse model as a complete Hugging Face folder and prove it equal to the source.

    Args:
        compare: run both models; where memory does not suffice, or otherwise, what was written is only read back.
        allow_gap: by how much logits may differ from the source's, for ways that change the function; None asks for
            equality up to rounding, and refuses ways that cannot give it before anything is done.

    Raises:
        ConversionError: `out` is not empty, a file of the source is damaged, or the two models differ by more than they
            may. Then nothing is left behind.
    """
    source = plan.source
    plan.require_leave(allow_gap)
    with finished_folder(out) as folder:
        plan.rows.prepare(progress)
        written = write_and_read_back(folder, plan.outputs, max_shard_bytes=max_shard_bytes, progress=progress)
        write_beside_weights(source, plan.config, folder)
        receipt = Receipt(
            source=source.public_name,
            out=out.name,
            keys_consumed=source.keys_consumed,
            keys_produced=len(plan.outputs),
            keys_dropped=source.dropped,
            parameters_before=total_and_active(count_parameters(source.config)).total,
            parameters_after=total_and_active(count_parameters(plan.config)).total,
            parameters_active=total_and_active(count_parameters(plan.config)).active,
            dtype=dtype_name(plan.written_dtype),
            **written.facts,
            recipe=plan.recipe(),
            exact=is_exact(plan.config.text_config, plan.sparsity, plan.written_dtype),
            allowed_gap=allow_gap,
            comparison=_compared(plan, folder) if compare else "not asked for",
        )
        receipt.require_agreement()
        receipt.save(folder / RECEIPT_FILE)
        complete_bundle(folder, _card(plan, out.name, receipt))
    return receipt


def _compared(plan: UpcyclePlan, folder: Path) -> Comparison | str:
    deviation = expected_deviation(plan.config.text_config, plan.sparsity, plan.written_dtype)
    return compare_models(plan.source, plan.config, folder, plan.dtype, expected_ffn_deviation=deviation)


def kept_tensors(source: Source, sparsity: Sparsity, dtype: torch.dtype | None) -> list[OutputTensor]:
    """The source's tensors that a sparse model takes over as they are: all but the FFNs of its sparse layers."""
    replaced = {
        f"{LANGUAGE_PREFIX}layers.{layer}.mlp.{name}.weight"
        for layer in sparsity.sparse_layers
        for name in FFN_PROJECTIONS
    }
    return [_copied(source, key, dtype) for key in source.keys if key not in replaced]


def write_beside_weights(source: Source, config: UniMoeConfig, folder: Path) -> None:
    """What a folder holds beside weights, card and code: the source's tokenizer and the like, and configurations."""
    for path in source.kept_files():
        shutil.copyfile(path, folder / path.name)
    processor = picture_processor(source)
    if processor is not None:
        processor.save_pretrained(folder)
    settings = folder / "generation_config.json"
    generation = (
        GenerationConfig.from_pretrained(folder)
        if settings.exists()
        else GenerationConfig.from_model_config(config.text_config)
    )
    if source.kind == "multimodal" and config.image_token_id is not None:
        # An answer never holds a placeholder, which would stand for a picture that is not there.
        generation.suppress_tokens = sorted({*(generation.suppress_tokens or ()), config.image_token_id})
    if not settings.exists() or source.kind == "multimodal":
        generation.save_pretrained(folder)
    save_config(config, folder)


def _copied(source: Source, key: str, dtype: torch.dtype | None) -> OutputTensor:
    info = source.checkpoint.tensors[source.keys[key]]
    target = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype
    return OutputTensor(key, target, info.shape, (partial(source.checkpoint.read, source.keys[key]),))


def _sparse_layer(
    source: Source,
    config: UniMoeConfig,
    sparsity: Sparsity,
    layer: int,
    dtype: torch.dtype | None,
    rows: RouterRows,
) -> list[OutputTensor]:
    """The tensors of a sparse layer; each expert's piece is read anew, from the file system's cache."""
    text, mlp = config.text_config, f"{LANGUAGE_PREFIX}layers.{layer}.mlp."
    names = {name: source.keys[f"{mlp}{name}.weight"] for name in FFN_PROJECTIONS}
    dtype = dtype or source.checkpoint.tensors[names["down_proj"]].dtype

    def routed(name: str, expert: int) -> torch.Tensor:
        return routed_projection(source.checkpoint.read(names[name]), name, sparsity, layer, expert)

    def shared(name: str, _expert: int) -> torch.Tensor:
        return shared_projection(source.checkpoint.read(names[name]), name, text)

    outputs = [
        OutputTensor(mlp + "gate.weight", dtype, (text.num_gate_rows, text.hidden_size), (partial(rows.of, layer),))
    ]
    biases = initial_biases(text)
    outputs += [OutputTensor(mlp + n, b.dtype, tuple(b.shape), (b.clone,)) for n, b in biases.items()]
    outputs += fused_experts(
        mlp + "experts.", dtype, routed, text.num_experts, text.moe_intermediate_size, text.hidden_size
    )
    if text.num_shared_experts:
        width = text.shared_intermediate_size
        outputs += fused_experts(
            mlp + "shared_experts.", dtype, shared, text.num_shared_experts, width, text.hidden_size
        )
    return outputs


def fused_experts(
    prefix: str,
    dtype: torch.dtype,
    projection: Callable[[str, int], torch.Tensor],
    experts: int,
    width: int,
    hidden: int,
) -> list[OutputTensor]:
    """The two tensors of a layer's experts, from `projection(name, expert)`."""
    gate_up = tuple(partial(projection, name, e) for e in range(experts) for name in ("gate_proj", "up_proj"))
    down = tuple(partial(projection, "down_proj", e) for e in range(experts))
    return [
        OutputTensor(prefix + "gate_up_proj", dtype, (experts, 2 * width, hidden), gate_up),
        OutputTensor(prefix + "down_proj", dtype, (experts, hidden, width), down),
    ]


def _card(plan: UpcyclePlan, name: str, receipt: Receipt) -> str:
    source = plan.source
    origin = (
        f"[{source.name}](https://huggingface.co/{source.name})" if source.is_hub_id else f"`{source.public_name}`"
    )
    layers = plan.config.text_config.sparse_layers
    start = f"Upcycled from {origin}: the FFNs of layers {', '.join(map(str, layers))} became experts."
    recipe = "\n".join(f"- {line}" for line in plan.recipe())
    return model_card(
        name,
        plan.config,
        count_parameters(plan.config),
        license=source.license_metadata,
        base_models=[source.name] if source.is_hub_id else None,
        sections={
            "Recipe": f"{start}\n\n{recipe}",
            "Conversion receipt": receipt_section(receipt.lines()),
        },
    )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
