"""Released Uni-MoE checkpoints become folders of ours: one tensor in memory at a time, and a receipt for every one.

`plan_import` reads headers and configurations, recognises the variant, and accounts for every tensor: one that nothing
knows, or one that is missing, ends it. `run_import` writes into a hidden folder that becomes the target at the end.

The original casts everything to float16 before it adds LoRA to the weights. Here sums are float32 and rounded once.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, WhisperConfig

from ..errors import ConversionError, UniMoeError
from ..modeling_unimoe.configuration_unimoe import UniMoeConfig
from ..modeling_unimoe.configuration_unimoe_beats import UniMoeBeatsConfig
from ..processing.processing_unimoe import UniMoeProcessor
from .hub import complete_bundle, push_folder, save_config
from .import_receipt import ImportReceipt, SourceRecord, TargetRecord
from .io import (
    DEFAULT_SHARD_BYTES,
    Checkpoint,
    OutputTensor,
    finished_folder,
    read_json,
    refuse_damaged,
    write_checkpoint,
)
from .model_card import model_card
from .parameters import count_parameters, total_and_active
from .receipt import RECEIPT_FILE
from .sources import expected_tensors
from .unimoe_adapter import require_one_lora_each, write_adapter
from .unimoe_config import Encoders, our_config
from .unimoe_experts import add_absent_pairs, add_experts, integrate_pairs
from .unimoe_files import BeatsFile, Gathered, add_encoder, gather, lay_over, reader
from .unimoe_keys import KeyMap, Target, rules_for, vision_prefix
from .unimoe_processor import build_processor, generation_config, load_tokenizer, placeholder_ids
from .unimoe_variant import Variant, layout_of, recognise

_SHOWN = 8
# The base of the 8-expert variant ships its configuration under this name, beside that of the 4-expert model.
_EIGHT_EXPERT_CONFIG = "8config.json"


@dataclass(frozen=True)
class UniMoeFolders:
    """Where a released model lies.

    Args:
        base: the base model: shards, config.json, tokenizer.
        finetuned: the folder with LoRA, routers and connectors (e2, v1.5); None converts the base model alone.
        clip: the vision encoder's folder.
        whisper: Whisper's folder, for the speech variants.
        beats: BEATs' .pt file, for the audio variant.
        experts: the folder with the 8-expert variant's expert files.
        qformer_config: JSON of `Blip2QFormerConfig` fields, where the Q-Former is not BLIP-2's.
    """

    base: Path
    clip: Path
    finetuned: Path | None = None
    whisper: Path | None = None
    beats: Path | None = None
    experts: Path | None = None
    qformer_config: Path | None = None


@dataclass(frozen=True)
class ImportPlan:
    """What will be written, and from what."""

    variant: Variant
    config: UniMoeConfig
    gathered: Gathered
    targets: dict[str, Target]
    outputs: tuple[OutputTensor, ...]
    dtype: torch.dtype
    processor: UniMoeProcessor | None
    keep_lora: bool
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The plan for a reader."""
        total = total_and_active(count_parameters(self.config))
        size = sum(output.num_bytes for output in self.outputs)
        return [
            f"variant     {self.variant.name}",
            *(f"            {line}" for line in self.variant.evidence),
            f"parameters  {total.total:,} ({total.active:,} active per token)",
            f"writes      {size / 1e6:,.1f} MB, {_name(self.dtype)}",
        ]


def import_unimoe(
    folders: UniMoeFolders, out: Path, *, push_to_hub: str | None = None, **options: Any
) -> ImportReceipt:
    """Convert a released model; `options` are those of `plan_import`.

    Raises:
        ConversionError: see `plan_import`; nothing is written then.
    """
    receipt = run_import(plan_import(folders, **options), out)
    if push_to_hub is not None:
        push_import(receipt, out, push_to_hub)
    return receipt


def push_import(receipt: ImportReceipt, out: Path, repository: str) -> list[str]:
    """Upload a converted model, and its adapter, if it has one, to `REPOSITORY-lora`; returns the addresses."""
    addresses = [push_folder(out, repository)]
    if receipt.adapter is not None:
        addresses.append(push_folder(out.with_name(receipt.adapter), f"{repository}-lora"))
    return addresses


def plan_import(folders: UniMoeFolders, *, dtype: torch.dtype | None = None, keep_lora: bool = False) -> ImportPlan:
    """Recognise the model and account for every tensor. Only headers and configurations are read.

    Args:
        dtype: of the floating point tensors; None takes that of the base model's shards.
        keep_lora: leave LoRA to an adapter folder in place of merging it.

    Raises:
        ConversionError: a file is missing or damaged, the variant cannot be recognised, a tensor is unknown, missing
            or of the wrong shape.
    """
    original = read_json(_config_file(folders))
    gathered, notes = _gather(folders, original)
    variant = recognise(gathered.shapes, original)
    encoders = _add_encoders(gathered, variant, folders)
    tokenizer = load_tokenizer(folders.base, folders.finetuned)
    ids = placeholder_ids(tokenizer) if tokenizer is not None else None
    with _named_config(_config_file(folders)):
        config = our_config(original, variant, encoders, gathered.shapes, ids)
        config.dtype = dtype or gathered.base_dtype
        expected = {name: tuple(tensor.shape) for name, tensor in expected_tensors(config).items()}
    key_map = KeyMap(rules_for(variant.audio, vision_prefix(expected), variant.layout))
    targets = _account(gathered, key_map, expected)
    if keep_lora:
        require_one_lora_each(gathered.loras)
    read = reader(gathered, merge_lora=not keep_lora)
    outputs = tuple(
        OutputTensor(name, config.dtype, shape, targets[name].pieces(read)) for name, shape in expected.items()
    )
    processor = None if tokenizer is None else build_processor(config, tokenizer, folders.clip, folders.whisper)
    notes += _notes(original, processor is not None)
    return ImportPlan(variant, config, gathered, targets, outputs, config.dtype, processor, keep_lora, notes)


def run_import(
    plan: ImportPlan, out: Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, progress: bool = True
) -> ImportReceipt:
    """Write the model as a complete Hugging Face folder, and with `keep_lora` the adapter beside it (`OUT-lora`).

    Raises:
        ConversionError: a folder is not empty, or a file turned out to be damaged. Then nothing is left behind.
    """
    adapter = out.with_name(out.name + "-lora") if plan.keep_lora and plan.gathered.loras else None
    digests: dict[str, str] = {}
    with ExitStack() as stack:
        folder = stack.enter_context(finished_folder(out))
        beside = stack.enter_context(finished_folder(adapter)) if adapter is not None else None
        for file in plan.gathered.files:
            refuse_damaged(file)
        started = time.monotonic()
        shards = write_checkpoint(
            folder, plan.outputs, max_shard_bytes=max_shard_bytes, progress=progress, digests=digests
        )
        seconds = time.monotonic() - started
        if beside is not None:
            write_adapter(beside, plan.config, plan.gathered.loras, out.name, plan.variant.layout)
        receipt = _receipt(plan, out.name, digests)
        receipt.adapter = adapter.name if adapter is not None else None
        receipt.bytes_written, receipt.seconds_writing = sum(p.stat().st_size for p in shards), round(seconds, 2)
        if plan.processor is not None:
            plan.processor.save_pretrained(folder)
        generation_config(plan.config).save_pretrained(folder)
        save_config(plan.config, folder)
        receipt.save(folder / RECEIPT_FILE)
        complete_bundle(folder, _card(plan, out.name, receipt))
    return receipt


def _config_file(folders: UniMoeFolders) -> Path:
    """The original loads the base's weights with the fine-tuned model's configuration."""
    for folder in (folders.base, folders.clip):
        if not folder.is_dir():
            raise ConversionError(f"{folder} is no folder.")
    folder = folders.finetuned or folders.base
    if folders.experts is not None and folders.finetuned is None and (folder / _EIGHT_EXPERT_CONFIG).is_file():
        return folder / _EIGHT_EXPERT_CONFIG
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder / 'config.json'} is missing: the folder is not complete. Fetch the file.")
    return folder / "config.json"


def _gather(folders: UniMoeFolders, original: dict[str, Any]) -> tuple[Gathered, list[str]]:
    """All decoder and connector files, in the original's order, and what the reader should know of them."""
    gathered = gather(folders.base)
    layout = layout_of(gathered.live, original)
    notes: list[str] = []
    if layout == "plain" and folders.experts is not None:
        raise ConversionError(
            "Expert files (--experts) belong to the 8-expert variant, but neither the tensors nor config.json (no "
            "moe_type, no lora_r) are of it. Leave --experts out, or give the config.json of the 8-expert model."
        )
    if layout == "deepspeed":
        if folders.experts is None:
            raise ConversionError(
                "This is the 8-expert variant (config.json has moe_type or lora_r, or tensors lie in DeepSpeed's layout); "
                "its experts lie in a folder of their own: add --experts DIR."
            )
        add_experts(gathered, folders.experts, folders.finetuned, original)
        notes.append(
            "routing takes the best experts; the original draws every token's second one, in evaluation too "
            "(router_pick: sample_always does as well)"
        )
        if any(original.get(name) for name in ("aux_balance_loss", "aux_multimodal_loss", "aux_kl_loss")):
            notes.append(
                "losses of the routers are means over layers and samples, where the original takes sums "
                "(router_losses_as_released: true does as well)"
            )
    if folders.finetuned is not None:
        if layout == "deepspeed" and add_absent_pairs(gathered, folders.finetuned, original):
            notes.append("low-rank pairs of dense layers are in no file, and random in the original: taken as zero")
        lay_over(gathered, folders.finetuned, layout)
    if layout == "deepspeed":
        integrate_pairs(gathered, original)
    return gathered, notes


def _add_encoders(gathered: Gathered, variant: Variant, folders: UniMoeFolders) -> Encoders:
    add_encoder(gathered, "clip", Checkpoint(folders.clip))
    vision = _vision_config(folders.clip)
    if variant.audio == "whisper":
        if folders.whisper is None:
            raise ConversionError("This is a speech model, and its Whisper folder was not given: add --whisper DIR.")
        add_encoder(gathered, "whisper", Checkpoint(folders.whisper))
        _require_type(folders.whisper, "whisper")
        with _named_config(folders.whisper / "config.json"):
            return Encoders(vision, whisper=_nameless(WhisperConfig.from_pretrained(folders.whisper)))
    if folders.beats is None:
        raise ConversionError("This is the audio model, and its BEATs file was not given: add --beats FILE.pt.")
    beats = BeatsFile(folders.beats)
    add_encoder(gathered, "beats", beats)
    qformer = None if folders.qformer_config is None else read_json(folders.qformer_config)
    with _named_config(folders.beats):
        return Encoders(vision, beats=UniMoeBeatsConfig.from_original(beats.cfg), qformer=qformer)


def _vision_config(folder: Path) -> CLIPVisionConfig:
    _require_type(folder, "clip", "clip_vision_model")
    with _named_config(folder / "config.json"):
        return _nameless(CLIPVisionConfig.from_pretrained(folder))


@contextmanager
def _named_config(path: Path) -> Iterator[None]:
    """Turns what configuration classes raise on impossible values into an error that names the file."""
    try:
        yield
    except UniMoeError:
        raise
    except (
        StrictDataclassError,
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        reason = " ".join(str(error).split())
        raise ConversionError(
            f"{path} describes no model that can be built ({reason}). Fetch the file again."
        ) from error


def _nameless(config: Any) -> Any:
    """Without where the encoder came from, which is nobody's business in a published folder."""
    config._name_or_path = ""
    return config


def _require_type(folder: Path, *allowed: str) -> None:
    path = folder / "config.json"
    found = read_json(path).get("model_type")
    if found not in allowed:
        raise ConversionError(f"{path} describes a {found!r} model; {' or '.join(map(repr, allowed))} is needed.")


def _account(gathered: Gathered, key_map: KeyMap, expected: dict[str, tuple[int, ...]]) -> dict[str, Target]:
    """Say what becomes of every tensor, and require that all of ours are made and nothing is left over."""
    mapped = key_map.map(gathered.live)
    for original, reason in mapped.dropped.items():
        gathered.live[original].drop(reason)
    for target in mapped.targets.values():
        if target.name in expected:
            for original in target.sources:
                gathered.live[original].consume(target.name)
                for factor in (factor for lora in gathered.loras.get(original, ()) for factor in lora.tensors):
                    factor.consume(target.name)
    unexpected = [f"{t.file}: {t.name}" for t in gathered.tensors if t.fate == "unexpected"]
    missing = [f"{name} (of {_listed(key_map.originals(name))})" for name in expected if name not in mapped.targets]
    problems = [f"{len(unexpected)} unexpected tensor(s): {_listed(unexpected)}"] if unexpected else []
    if missing:
        problems.append(f"{len(missing)} tensor(s) of ours cannot be made: {_listed(missing)}")
    problems += [problem for target in mapped.targets.values() if (problem := _misfit(target, gathered, expected))]
    if problems:
        shown = "; ".join(problems[:_SHOWN]).rstrip(".")
        raise ConversionError(
            f"{shown}. Nothing was written. Base, fine-tuned model and encoders must be complete and belong together."
        )
    return mapped.targets


def _misfit(target: Target, gathered: Gathered, expected: dict[str, tuple[int, ...]]) -> str | None:
    """Why the tensors of a target do not make it, or None when they do."""
    try:
        shape = target.shape(gathered.shapes)
    except ConversionError as error:
        return str(error)
    wanted = expected.get(target.name, shape)
    if shape == wanted:
        return None
    return (
        f"{_listed(target.sources)} make {target.name} of shape {list(shape)}, but the configuration asks for "
        f"{list(wanted)}"
    )


def _receipt(plan: ImportPlan, out: str, digests: dict[str, str]) -> ImportReceipt:
    sources: dict[str, dict[str, SourceRecord]] = {}
    for tensor in plan.gathered.tensors:
        record = SourceRecord(list(tensor.info.shape), _name(tensor.info.dtype), tensor.fate, tensor.note)
        sources.setdefault(tensor.file, {})[tensor.name] = record
    merged = () if plan.keep_lora else plan.gathered.loras
    targets = {}
    for output in plan.outputs:
        made_of = list(plan.targets[output.name].sources)
        count = sum(original in merged for original in made_of)
        targets[output.name] = TargetRecord(
            list(output.shape), _name(output.dtype), made_of, count, digests[output.name]
        )
    total = total_and_active(count_parameters(plan.config))
    return ImportReceipt(
        variant=plan.variant.name,
        evidence=list(plan.variant.evidence),
        out=out,
        dtype=_name(plan.dtype),
        parameters=total.total,
        parameters_active=total.active,
        sources=sources,
        targets=targets,
        notes=plan.notes,
    )


def _notes(original: dict[str, Any], has_processor: bool) -> list[str]:
    notes = []
    if not has_processor:
        notes.append("no processor: neither base nor fine-tuned folder holds tokenizer.model or tokenizer.json")
    if original.get("image_aspect_ratio", "square") != "square":
        notes.append(
            f"image_aspect_ratio is {original['image_aspect_ratio']!r}: pad pictures to a square before the processor"
        )
    if original.get("mm_use_im_patch_token", True):
        notes.append("left out: the untrained <im_patch> row that the original's loader adds, since no prompt uses it")
    return notes


def _card(plan: ImportPlan, name: str, receipt: ImportReceipt) -> str:
    source = (
        f"Converted from the released Uni-MoE model, variant *{plan.variant.name}* (arXiv 2405.11273). The terms of its "
        "authors, of the language model and of the encoders hold."
    )
    return model_card(
        name,
        plan.config,
        count_parameters(plan.config),
        sections={"Origin": source, "Conversion receipt": "```\n" + "\n".join(receipt.lines()) + "\n```"},
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
