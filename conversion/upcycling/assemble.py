"""Assembly of checkpoints on disk: tuned dense models become the experts of one sparse model, tensor by tensor.

Expert e of every sparse layer is the FFN of the e-th source; everything else is the base's (Uni-MoE, arXiv 2405.11273,
section 3.3, between its second and third stage). `trainers.stages.assembly` does the same in memory inside a curriculum.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ..checkpoints.checkpoint_reader import Checkpoint, dtype_name, quantisation_notes
from ..checkpoints.checkpoint_writer import DEFAULT_SHARD_BYTES, OutputTensor
from ..checkpoints.file_digests import file_digests
from ..checkpoints.finished_folder import finished_folder
from ..checkpoints.our_folder import in_model_order
from ..checkpoints.parameters import count_parameters, total_and_active
from ..checkpoints.read_back import write_and_read_back
from ..dense.sources import Source
from ..publishing.hub import complete_bundle
from ..publishing.model_card import model_card, receipt_section
from ..publishing.saved_receipt import RECEIPT_FILE, TensorRecord
from .assembly_receipt import AssemblyReceipt, AssemblySource
from .expert_ffns import Expert, ExpertSource, open_experts
from .router_init import initial_router_rows
from .sparsity import RouterInit, Sparsity, sparse_config
from .stream_upcycle import fused_experts, kept_tensors, write_beside_weights
from .upcycle import FFN_PROJECTIONS, LANGUAGE_PREFIX

_COMPARED_AT_ONCE = 1 << 22  # values, so that memory need not hold tensors of two models


@dataclass(frozen=True)
class AssemblyPlan:
    """What will be written. `made_of` says of every output what its pieces are, in the order of its memory."""

    base: Source
    experts: tuple[Expert, ...]
    sparsity: Sparsity
    config: UniMoeConfig
    dtype: torch.dtype | None
    outputs: tuple[OutputTensor, ...]
    made_of: dict[str, list[str]]

    @property
    def num_bytes(self) -> int:
        return sum(output.num_bytes for output in self.outputs)

    @property
    def written_dtype(self) -> torch.dtype:
        """Of most tensors, whatever the experts were stored in."""
        return self.dtype or self.base.dtype

    @property
    def sources(self) -> list[tuple[ExpertSource, list[int]]]:
        """Every source once, with the ids of the experts that are made of it."""
        ids: dict[int, tuple[ExpertSource, list[int]]] = {}
        for index, expert in enumerate(self.experts):
            ids.setdefault(id(expert.source), (expert.source, []))[1].append(index)
        return list(ids.values())

    def notes(self) -> list[str]:
        """What the reader should know beyond tensors."""
        notes = quantisation_notes(self.base.checkpoint, "base")
        for source, _ in self.sources:
            notes += quantisation_notes(source.checkpoint, source.public_name)
            dtypes = {source.checkpoint.tensors[name].dtype for name in source.tensors.values()}
            if other := sorted(dtype_name(dtype) for dtype in dtypes - {self.written_dtype}):
                written = dtype_name(self.written_dtype)
                notes.append(f"{source.public_name} holds {', '.join(other)}, written as {written}")
        return notes

    def lines(self) -> list[str]:
        """The plan for a reader."""
        text = self.config.text_config
        before = total_and_active(count_parameters(self.base.config))
        after = total_and_active(count_parameters(self.config))
        return [
            f"base        {self.base.name}: {dtype_name(self.base.dtype)}",
            *(f"expert {i:<4} {expert.name}: {expert.source.public_name}" for i, expert in enumerate(self.experts)),
            f"sparse      {len(text.sparse_layers)} of {text.num_hidden_layers} layers {text.sparse_layers}: "
            f"{text.num_experts_per_tok} experts per token, router {self.sparsity.router_init}",
            f"parameters  {before.total:,} -> {after.total:,} ({after.active:,} active per token)",
            f"writes      {self.num_bytes / 1e6:,.1f} MB, {dtype_name(self.written_dtype)}",
            *(f"note        {note}" for note in self.notes()),
        ]


def plan_assembly(
    base: Source,
    experts: Sequence[tuple[str, str | Path]],
    *,
    sparse_layers: Sequence[int],
    num_experts_per_tok: int = 2,
    router_init: RouterInit = "normal",
    expert_groups: dict[str, list[int]] | None = None,
    modality_groups: dict[str, str] | None = None,
    routing: dict[str, Any] | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> AssemblyPlan:
    """Describe the assembly; only headers are read.

    Args:
        base: the dense model that gives everything but the experts, see `open_source`.
        experts: name and source of every expert, in the order of their ids; see `open_experts`. A source may serve
            several experts.
        sparse_layers: counted from 0.
        router_init, expert_groups, modality_groups, routing, seed: see `Sparsity`.
        dtype: of the output's floating point tensors; None keeps the base's, also for the experts.

    Raises:
        ConversionError: the base is sparse, a source cannot be read or does not fit.
        ConfigurationError: the sparsity is impossible.
    """
    if not experts:
        raise ConversionError("There are no experts: name at least one source.")
    if not 1 <= num_experts_per_tok <= len(experts):
        count = f"{len(experts)} expert{'s' * (len(experts) > 1)}"
        raise ConversionError(
            f"A token cannot use {num_experts_per_tok} of {count}: give more, or set --top-k (num_experts_per_tok)."
        )
    sparsity = Sparsity(
        num_experts=len(experts),
        num_experts_per_tok=num_experts_per_tok,
        sparse_layers=sparse_layers,
        expert_groups=expert_groups,
        modality_groups=modality_groups,
        router_init=router_init,
        routing=dict(routing or {}),
        seed=seed,
    )
    config = sparse_config(base.config, sparsity)
    config.dtype = dtype or base.dtype
    opened = tuple(open_experts(experts, base, sparsity.sparse_layers))
    outputs = kept_tensors(base, sparsity, dtype)
    made_of = {output.name: [f"base: {base.keys[output.name]}"] for output in outputs}
    for layer in sparsity.sparse_layers:
        for output, pieces in _sparse_layer(base, opened, config, sparsity, layer, dtype):
            outputs.append(output)
            made_of[output.name] = pieces
    return AssemblyPlan(base, opened, sparsity, config, dtype, in_model_order(outputs, config), made_of)


def run_assembly(
    plan: AssemblyPlan, out: Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, progress: bool = True
) -> AssemblyReceipt:
    """Write the sparse model as a complete Hugging Face folder; every tensor is read back and compared.

    Raises:
        ConversionError: `out` is not empty, a source is damaged, or the disk returns something else than was written.
            Then nothing is left behind.
    """
    with finished_folder(out) as folder:
        sources = _source_records(plan, file_digests(_read_files(plan), progress))
        written = write_and_read_back(folder, plan.outputs, max_shard_bytes=max_shard_bytes, progress=progress)
        write_beside_weights(plan.base, plan.config, folder)
        before, after = (total_and_active(count_parameters(c)) for c in (plan.base.config, plan.config))
        receipt = AssemblyReceipt(
            out=out.name,
            experts=[expert.name for expert in plan.experts],
            sparse_layers=list(plan.sparsity.sparse_layers),
            experts_per_token=plan.sparsity.num_experts_per_tok,
            router_init=plan.sparsity.router_init,
            seed=plan.sparsity.seed,
            dtype=dtype_name(plan.written_dtype),
            parameters_before=before.total,
            parameters_after=after.total,
            parameters_active=after.active,
            sources=sources,
            targets={o.name: TensorRecord.of(o, plan.made_of[o.name], written.digests[o.name]) for o in plan.outputs},
            notes=plan.notes(),
            **written.facts,
        )
        receipt.save(folder / RECEIPT_FILE)
        complete_bundle(folder, _card(plan, out.name, receipt))
    return receipt


def _sparse_layer(
    base: Source,
    experts: Sequence[Expert],
    config: UniMoeConfig,
    sparsity: Sparsity,
    layer: int,
    dtype: torch.dtype | None,
) -> list[tuple[OutputTensor, list[str]]]:
    """The three tensors of a sparse layer, each with what its pieces are."""
    text, mlp = config.text_config, f"{LANGUAGE_PREFIX}layers.{layer}.mlp."
    dtype = dtype or base.checkpoint.tensors[base.keys[f"{mlp}down_proj.weight"]].dtype
    hidden, inner, rows = text.hidden_size, text.moe_intermediate_size, initial_router_rows(text, sparsity, layer)

    def read(projection: str, index: int) -> torch.Tensor:
        source = experts[index].source
        return source.checkpoint.read(source.tensors[layer, projection])

    def pieces(*projections: str) -> list[str]:
        return [
            f"expert {index} ({expert.name}): {expert.source.tensors[layer, projection]}"
            for index, expert in enumerate(experts)
            for projection in projections
        ]

    router = OutputTensor(mlp + "gate.weight", dtype, tuple(rows.shape), (lambda: rows,))
    drawn = "zeros" if sparsity.router_init == "zeros" else f"drawn, seed {sparsity.seed}"
    gate_up, down = fused_experts(f"{mlp}experts.", dtype, read, len(experts), inner, hidden)
    return [
        (router, [f"router rows: {drawn}"]),
        (gate_up, pieces(*FFN_PROJECTIONS[:2])),
        (down, pieces(*FFN_PROJECTIONS[2:])),
    ]


def _read_files(plan: AssemblyPlan) -> list[Path]:
    checkpoints = [plan.base.checkpoint, *(source.checkpoint for source, _ in plan.sources)]
    return [file for checkpoint in checkpoints for file in checkpoint.files]


def _compared_with_base(source: ExpertSource, base: Source) -> dict[str, str]:
    """Tensors of an expert's source in whose place the base's are taken -> whether that loses anything."""
    reasons = {}
    for name, ours in source.ours.items():
        same = ours in base.keys and _same_values(source.checkpoint, name, base.checkpoint, base.keys[ours])
        reasons[name] = f"no FFN: the base's is taken, {'which is the same' if same else 'WHICH HAS OTHER VALUES'}"
    return reasons


def _same_values(one: Checkpoint, name: str, other: Checkpoint, other_name: str) -> bool:
    shape = one.tensors[name].shape
    if shape != other.tensors[other_name].shape:
        return False
    count = math.prod(shape)
    blocks = ((start, min(_COMPARED_AT_ONCE, count - start)) for start in range(0, count, _COMPARED_AT_ONCE))
    return all(
        torch.equal(one.read_flat(name, *block).float(), other.read_flat(other_name, *block).float())
        for block in blocks
    )


def _source_records(plan: AssemblyPlan, digests: dict[Path, str]) -> list[AssemblySource]:
    """The receipt's sources, the base first."""

    def files(checkpoint: Checkpoint) -> dict[str, str]:
        return {file.name: digests[file.resolve()] for file in checkpoint.files}

    base, sparse = plan.base, set(plan.sparsity.sparse_layers)
    kept = {output.name for output in plan.outputs}
    replaced = {name: "an FFN whose layer has experts now" for ours, name in base.keys.items() if ours not in kept}
    records = [
        AssemblySource(
            "base",
            base.public_name,
            [],
            files(base.checkpoint),
            len(base.keys) - len(replaced),
            {**base.dropped, **replaced},
        )
    ]
    for source, ids in plan.sources:
        unused = {
            n: "an FFN whose layer stays dense" for (layer, _), n in source.tensors.items() if layer not in sparse
        }
        taken = len(source.tensors) - len(unused)
        dropped = {**source.others, **_compared_with_base(source, base), **unused}
        records.append(AssemblySource("expert", source.public_name, ids, files(source.checkpoint), taken, dropped))
    return records


def _card(plan: AssemblyPlan, name: str, receipt: AssemblyReceipt) -> str:
    return model_card(
        name,
        plan.config,
        count_parameters(plan.config),
        license=plan.base.license_metadata,
        base_models=[plan.base.name] if plan.base.is_hub_id else None,
        sections={"Assembly receipt": receipt_section(receipt.lines())},
    )
