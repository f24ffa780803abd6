"""Upcycling of checkpoints on disk: a folder in, a complete sparse model folder out, one tensor in memory at a time.

`plan_upcycle` reads headers only and says what would be written. `run_upcycle` writes into a hidden folder beside the
target, compares the result with the source, and lets the target appear only if the two agree.
"""

import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import GenerationConfig

from ..errors import ConversionError
from ..modeling_unimoe.configuration_unimoe import UniMoeConfig
from .compare import compare_models
from .hub import complete_bundle, save_config
from .io import DEFAULT_SHARD_BYTES, Checkpoint, OutputTensor, finished_folder, write_checkpoint
from .model_card import model_card
from .parameters import count_parameters, total_and_active
from .receipt import RECEIPT_FILE, Receipt
from .sources import Source, expected_tensors
from .upcycle import FFN_PROJECTIONS, LANGUAGE_PREFIX, Sparsity, initial_router_rows, sparse_config


@dataclass(frozen=True)
class UpcyclePlan:
    """What will be written. `dtype` is that of the output's floating point tensors; None keeps the source's."""

    source: Source
    sparsity: Sparsity
    config: UniMoeConfig
    dtype: torch.dtype | None
    outputs: tuple[OutputTensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(output.num_bytes for output in self.outputs)

    def lines(self) -> list[str]:
        """The plan for a reader."""
        checkpoint, text = self.source.checkpoint, self.config.text_config
        before = total_and_active(count_parameters(self.source.config))
        after = total_and_active(count_parameters(self.config))
        read = f"{_gigabytes(checkpoint.num_bytes)} in {len(checkpoint.files)} file(s), {_name(self.source.dtype)}"
        experts = (
            f"{text.num_experts} experts, {text.num_experts_per_tok} per token, router {self.sparsity.router_init}"
        )
        groups = [
            f"group       {group.name}: {', '.join(group.modalities)} -> {list(group.experts)}"
            for group in text.router_groups
            if text.expert_groups
        ]
        return [
            f"source      {self.source.name}: {read}",
            f"sparse      {len(text.sparse_layers)} of {text.num_hidden_layers} layers {text.sparse_layers}: {experts}",
            *groups,
            f"parameters  {before.total:,} -> {after.total:,} ({after.active:,} active per token)",
            f"writes      {_gigabytes(self.num_bytes)}, {_name(self.dtype or self.source.dtype)}",
        ]


def plan_upcycle(source: Source, sparsity: Sparsity, dtype: torch.dtype | None = None) -> UpcyclePlan:
    """Describe the conversion of a source; only headers are read.

    Raises:
        ConversionError: the source is sparse already, or would not become what the configuration describes.
        ConfigurationError: the sparsity is impossible.
    """
    config = sparse_config(source.config, sparsity)
    config.dtype = dtype or source.dtype
    outputs = kept_tensors(source, sparsity, dtype)
    for layer in sparsity.sparse_layers:
        outputs += _sparse_layer(source, config, sparsity, layer, dtype)
    return UpcyclePlan(source, sparsity, config, dtype, in_model_order(outputs, config))


def run_upcycle(
    plan: UpcyclePlan,
    out: Path,
    *,
    compare: bool = True,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
) -> Receipt:
    """Write the sparse model as a complete Hugging Face folder and prove it equal to the source.

    Args:
        compare: run both models; otherwise, and where memory does not suffice, the written tensors are read back and
            compared with the source's.

    Raises:
        ConversionError: `out` is not empty, a file of the source is damaged, or the two models differ. Then nothing
            is left behind.
    """
    source, started = plan.source, time.monotonic()
    with finished_folder(out) as folder:
        shards = write_checkpoint(folder, plan.outputs, max_shard_bytes=max_shard_bytes, progress=progress)
        seconds = time.monotonic() - started
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
            dtype=_name(plan.dtype or source.dtype),
            bytes_written=sum(path.stat().st_size for path in shards),
            seconds_writing=round(seconds, 2),
            comparison=compare_models(source, plan.config, folder, plan.dtype) if compare else "not asked for",
        )
        if isinstance(receipt.comparison, str):
            verify_written(Checkpoint(folder), plan.outputs)
            receipt.tensors_read_back = len(plan.outputs)
        receipt.require_agreement()
        receipt.save(folder / RECEIPT_FILE)
        complete_bundle(folder, _card(plan, out.name, receipt))
    return receipt


def kept_tensors(source: Source, sparsity: Sparsity, dtype: torch.dtype | None) -> list[OutputTensor]:
    """The source's tensors that a sparse model takes over as they are: all but the FFNs of its sparse layers."""
    return [_copied(source, key, dtype) for key in source.keys if not _is_replaced(key, sparsity)]


def in_model_order(outputs: list[OutputTensor], config: UniMoeConfig) -> tuple[OutputTensor, ...]:
    """The tensors in the order of the model, so that those of a layer are beside each other.

    Raises:
        ConversionError: they are not what a model of this configuration consists of.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in expected_tensors(config).items()}
    made = {output.name: output.shape for output in outputs}
    if made != expected:
        differing = sorted(key for key in {*made, *expected} if made.get(key) != expected.get(key))[0]
        raise ConversionError(
            f"The output's {differing} would have shape {made.get(differing)} but the model needs "
            f"{expected.get(differing)}: the source does not hold what its configuration says."
        )
    by_name = {output.name: output for output in outputs}
    return tuple(by_name[key] for key in expected)


def write_beside_weights(source: Source, config: UniMoeConfig, folder: Path) -> None:
    """What a folder holds beside weights, card and code: the source's tokenizer and the like, and configurations."""
    for path in source.kept_files():
        shutil.copyfile(path, folder / path.name)
    if not (folder / "generation_config.json").exists():
        GenerationConfig.from_model_config(config.text_config).save_pretrained(folder)
    save_config(config, folder)


def verify_written(written: Checkpoint, outputs: tuple[OutputTensor, ...]) -> None:
    """Read every tensor back and compare it, bit by bit, with what it was made from."""
    for output in outputs:
        start = 0
        for make in output.pieces:
            piece = make().to(output.dtype).reshape(-1)
            if not torch.equal(written.read_flat(output.name, start, piece.numel()), piece):
                raise ConversionError(f"{output.name} reads back differently from what was written: check the disk.")
            start += piece.numel()


def _is_replaced(key: str, sparsity: Sparsity) -> bool:
    return key in {
        f"{LANGUAGE_PREFIX}layers.{layer}.mlp.{name}.weight"
        for layer in sparsity.sparse_layers
        for name in FFN_PROJECTIONS
    }


def _copied(source: Source, key: str, dtype: torch.dtype | None) -> OutputTensor:
    info = source.checkpoint.tensors[source.keys[key]]
    target = dtype if dtype is not None and info.dtype.is_floating_point else info.dtype
    return OutputTensor(key, target, info.shape, (partial(source.checkpoint.read, source.keys[key]),))


def _sparse_layer(
    source: Source, config: UniMoeConfig, sparsity: Sparsity, layer: int, dtype: torch.dtype | None
) -> list[OutputTensor]:
    """The three tensors of a sparse layer; each expert's piece is read anew, from the file system's cache."""
    text, read, mlp = config.text_config, source.checkpoint.read, f"{LANGUAGE_PREFIX}layers.{layer}.mlp."
    names = {name: source.keys[f"{mlp}{name}.weight"] for name in FFN_PROJECTIONS}
    dtype = dtype or source.checkpoint.tensors[names["down_proj"]].dtype
    gate_up = (partial(read, names["gate_proj"]), partial(read, names["up_proj"]))
    down = (partial(read, names["down_proj"]),)
    experts, hidden, inner = text.num_experts, text.hidden_size, text.moe_intermediate_size
    rows = initial_router_rows(text, sparsity, layer)
    return [
        OutputTensor(mlp + "gate.weight", dtype, tuple(rows.shape), (lambda: rows,)),
        OutputTensor(mlp + "experts.gate_up_proj", dtype, (experts, 2 * inner, hidden), gate_up * experts),
        OutputTensor(mlp + "experts.down_proj", dtype, (experts, hidden, inner), down * experts),
    ]


def _card(plan: UpcyclePlan, name: str, receipt: Receipt) -> str:
    return model_card(
        name,
        plan.config,
        count_parameters(plan.config),
        license=plan.source.license,
        base_models=[plan.source.name] if plan.source.is_hub_id else None,
        sections={"Conversion receipt": "```\n" + "\n".join(receipt.lines()) + "\n```"},
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
