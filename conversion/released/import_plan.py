"""What every import of a released model does once the model is recognised: account for every tensor, write, give a receipt."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...processing.perception.choice import PerceiverChoice
from ...processing.processing_unimoe import UniMoeProcessor
from ..checkpoints.checkpoint_reader import dtype_name
from ..checkpoints.checkpoint_writer import DEFAULT_SHARD_BYTES, OutputTensor
from ..checkpoints.finished_folder import finished_folder
from ..checkpoints.key_rules import Target
from ..checkpoints.parameters import count_parameters, total_and_active
from ..checkpoints.pickle_files import refuse_damaged
from ..checkpoints.read_back import WrittenTensors, write_and_read_back
from ..checkpoints.source_tensors import SourceTensors
from ..publishing.hub import complete_bundle, push_folder, save_config
from ..publishing.model_card import model_card, receipt_section
from ..publishing.saved_receipt import RECEIPT_FILE
from .import_receipt import ImportReceipt, SourceRecord, TargetRecord
from .original_tokenizer import carry_tokenizer
from .unimoe_adapter import adapter_use

_NO_PROCESSOR = (
    "The folder has no tokenizer and no processor, so the model takes token ids only. Put the language model's "
    "tokenizer.model or tokenizer.json, with its tokenizer_config.json, beside the original config.json and convert "
    "again; the receipt's notes say what else was missing."
)
_SAMPLES = (
    "`generation_config.json` draws answers at temperature {}, as the original's scripts do, so they differ from run to "
    "run. `model.generate(..., do_sample=False)` gives the same answer every time."
)
WriteBeside = Callable[[Path], None]


@dataclass(frozen=True)
class ImportPlan:
    """What will be written, and from what.

    Args:
        variant: what was recognised; its `name` and `evidence` are told.
        gathered: the tensors of the original, each with its fate.
        targets: ours -> what it is made of; a tensor of ours that the original does not have is missing here.
        processor: of a language model alone its tokenizer, as it is; None where the original has no tokenizer.
        origin: where the model is from, for the card.
        tokenizer: the folder whose tokenizer files travel along for the export, or None.
        perception: the vision models whose results the model reads, or None.
    """

    variant: Any
    config: UniMoeConfig
    gathered: SourceTensors
    targets: dict[str, Target]
    outputs: tuple[OutputTensor, ...]
    dtype: torch.dtype
    processor: UniMoeProcessor | PreTrainedTokenizerBase | None
    generation: GenerationConfig
    origin: str
    notes: list[str] = field(default_factory=list)
    tokenizer: Path | None = None
    perception: PerceiverChoice | None = None

    @property
    def warnings(self) -> list[str]:
        """What keeps the result from being used as it is, with the remedy."""
        return [] if self.processor is not None else [_NO_PROCESSOR]

    def lines(self) -> list[str]:
        """The plan for a reader."""
        total = total_and_active(count_parameters(self.config))
        size = sum(output.num_bytes for output in self.outputs)
        return [
            f"variant     {self.variant.name}",
            *(f"            {line}" for line in self.variant.evidence),
            f"parameters  {total.total:,} ({total.active:,} active per token)",
            f"writes      {size / 1e6:,.1f} MB, {dtype_name(self.dtype)}",
        ]

    def receipt(self, out: str, written: WrittenTensors, merged: Iterable[str] = ()) -> ImportReceipt:
        """What became of every tensor.

        Args:
            merged: originals that LoRA was merged into.
        """
        sources: dict[str, dict[str, SourceRecord]] = {}
        for tensor in self.gathered.tensors:
            record = SourceRecord(list(tensor.info.shape), dtype_name(tensor.info.dtype), tensor.fate, tensor.note)
            sources.setdefault(tensor.file, {})[tensor.name] = record
        targets = {}
        for output in self.outputs:
            made_of = list(self.targets[output.name].sources) if output.name in self.targets else []
            count = sum(original in merged for original in made_of)
            targets[output.name] = TargetRecord.of(output, made_of, written.digests[output.name], lora_merged=count)
        total = total_and_active(count_parameters(self.config))
        return ImportReceipt(
            variant=self.variant.name,
            evidence=list(self.variant.evidence),
            out=out,
            dtype=dtype_name(self.dtype),
            parameters=total.total,
            parameters_active=total.active,
            sources=sources,
            targets=targets,
            notes=[*self.notes, *self.gathered.notes],
            **written.facts,
        )


def write_import(
    plan: ImportPlan,
    out: Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: bool = True,
    merged: Iterable[str] = (),
    beside: tuple[Path, WriteBeside] | None = None,
) -> ImportReceipt:
    """Write the model as a complete Hugging Face folder; every tensor is read back.

    Args:
        merged: originals that LoRA was merged into.
        beside: a second folder, that of an adapter, and what writes it.

    Raises:
        ConversionError: a folder is not empty, a file turned out to be damaged, or the disk returns something else than
            was written. Then nothing is left behind.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(finished_folder(out))
        second = stack.enter_context(finished_folder(beside[0])) if beside is not None else None
        for file in plan.gathered.files:
            refuse_damaged(file)
        written = write_and_read_back(folder, plan.outputs, max_shard_bytes=max_shard_bytes, progress=progress)
        if beside is not None and second is not None:
            beside[1](second)
        receipt = plan.receipt(out.name, written, merged)
        receipt.adapter = beside[0].name if beside is not None else None
        if plan.processor is not None:
            plan.processor.save_pretrained(folder)
        if plan.tokenizer is not None:
            carry_tokenizer(plan.tokenizer, folder)
        plan.generation.save_pretrained(folder)
        save_config(plan.config, folder)
        receipt.save(folder / RECEIPT_FILE)
        if plan.perception is not None:
            plan.perception.save(folder)
        complete_bundle(folder, _card(plan, out.name, receipt))
    return receipt


def push_import(receipt: ImportReceipt, out: Path, repository: str) -> list[str]:
    """Upload a converted model, and its adapter, if it has one, to `REPOSITORY-lora`; returns the addresses."""
    addresses = [push_folder(out, repository)]
    if receipt.adapter is not None:
        addresses.append(push_folder(out.with_name(receipt.adapter), f"{repository}-lora"))
    return addresses


def _card(plan: ImportPlan, name: str, receipt: ImportReceipt) -> str:
    sections = {"Origin": plan.origin, "Conversion receipt": receipt_section(receipt.lines())}
    if plan.perception is not None:
        sections = {"Perception": plan.perception.card_text(), **sections}
    if plan.generation.do_sample:
        sections = {"Generation": _SAMPLES.format(plan.generation.temperature), **sections}
    if receipt.adapter is not None:
        sections = {"Adapter": adapter_use(name, receipt.adapter), **sections}
    use = _NO_PROCESSOR if plan.processor is None else None
    return model_card(name, plan.config, count_parameters(plan.config), sections=sections, use=use)
