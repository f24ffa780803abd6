"""Released Uni-MoE checkpoints become folders of ours: one tensor in memory at a time, and a receipt for every one.

`plan_import` reads headers and configurations, recognises the variant, and accounts for every tensor: one that nothing
knows, or one that is missing, ends it. `run_import` writes into a hidden folder that becomes the target at the end.

The original casts everything to float16 before it adds LoRA to the weights. Here sums are float32 and rounded once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, WhisperConfig

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe_beats import UniMoeBeatsConfig
from ..checkpoints.accounting import account
from ..checkpoints.checkpoint_reader import Checkpoint, read_json
from ..checkpoints.checkpoint_writer import DEFAULT_SHARD_BYTES, OutputTensor
from ..checkpoints.key_rules import KeyMap, Target
from ..checkpoints.llava_keys import vision_prefix
from ..checkpoints.our_folder import expected_tensors
from ..dense.beats_file import BeatsFile
from ..dense.encoder_folders import named_config, nameless, require_type
from ..dense.prepared_tokenizers import placeholder_ids
from .import_plan import ImportPlan, WriteBeside, push_import, write_import
from .import_receipt import ImportReceipt
from .original_tokenizer import tokenizer_folder
from .unimoe_adapter import require_one_lora_each, write_adapter
from .unimoe_config import MODALITY_EXPERTS, Encoders, our_config, preferred_experts
from .unimoe_experts import MODALITY_MAPS, add_absent_pairs, add_experts, integrate_pairs, require_equal_copies
from .unimoe_files import Gathered, add_encoder, gather, lay_over, reader
from .unimoe_keys import rules_for
from .unimoe_processor import (
    build_processor,
    generation_config,
    load_tokenizer,
    require_fitting_tokenizer,
)
from .unimoe_variant import Variant, layout_of, recognise

# The base of the 8-expert variant ships its configuration under this name, beside that of the 4-expert model.
_EIGHT_EXPERT_CONFIG = "8config.json"
_WEIGHTS = (".bin", ".pt", ".pth", ".safetensors")
_ORIGIN = (
    "Converted from the released Uni-MoE model, variant *{variant}* (arXiv 2405.11273). The terms of its authors, of the "
    "language model and of the encoders hold."
)


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
        qformer_config: fields of `Blip2QFormerConfig`, or a JSON file of them, where the Q-Former is not BLIP-2's.
    """

    base: Path
    clip: Path
    finetuned: Path | None = None
    whisper: Path | None = None
    beats: Path | None = None
    experts: Path | None = None
    qformer_config: Path | dict[str, Any] | None = None


@dataclass(frozen=True)
class UniMoePlan(ImportPlan):
    """What will be written; with `keep_lora`, LoRA goes into an adapter beside the model."""

    gathered: Gathered
    keep_lora: bool = False


def import_unimoe(
    folders: UniMoeFolders,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    keep_lora: bool = False,
    push_to_hub: str | None = None,
) -> ImportReceipt:
    """Convert a released model.

    Args:
        dtype, keep_lora: see `plan_import`.
        push_to_hub: also upload the result to this model repository.

    Raises:
        ConversionError: see `plan_import`; nothing is written then.
    """
    receipt = run_import(plan_import(folders, dtype=dtype, keep_lora=keep_lora), out)
    if push_to_hub is not None:
        push_import(receipt, out, push_to_hub)
    return receipt


def plan_import(folders: UniMoeFolders, *, dtype: torch.dtype | None = None, keep_lora: bool = False) -> UniMoePlan:
    """Recognise the model and account for every tensor. Only headers and configurations are read.

    Args:
        dtype: of the floating point tensors; None takes that of the base model's shards.
        keep_lora: leave LoRA to an adapter folder in place of merging it.

    Raises:
        ConversionError: a file is missing or damaged, the variant cannot be recognised, a tensor is unknown, missing
            or of the wrong shape.
    """
    original = read_json(_config_file(folders))
    gathered, pairs_absent = _gather(folders, original)
    variant = recognise(gathered.shapes, original)
    encoders = _add_encoders(gathered, variant, folders)
    tokenizer_files = tokenizer_folder(folders.base, folders.finetuned)
    tokenizer = load_tokenizer(tokenizer_files)
    ids = placeholder_ids(tokenizer) if tokenizer is not None else None
    with named_config(_config_file(folders)):
        config = our_config(original, variant, encoders, gathered.shapes, ids)
        config.dtype = dtype or gathered.base_dtype
        expected = {name: tuple(tensor.shape) for name, tensor in expected_tensors(config).items()}
    if tokenizer is not None and tokenizer_files is not None:
        require_fitting_tokenizer(tokenizer, tokenizer_files, config.text_config.vocab_size)
    key_map = KeyMap(rules_for(variant.audio, vision_prefix(expected), variant.layout))
    targets = _account(gathered, key_map, expected)
    if keep_lora:
        if not gathered.loras:
            raise ConversionError(
                "--keep-lora: no file has LoRA to be kept. Add --finetuned DIR, or leave --keep-lora out."
            )
        require_one_lora_each(gathered.loras)
    read = reader(gathered, merge_lora=not keep_lora)
    outputs = tuple(
        OutputTensor(name, config.dtype, shape, targets[name].pieces(read)) for name, shape in expected.items()
    )
    processor = None
    if tokenizer is not None:
        aspect = original.get("image_aspect_ratio", "square")
        processor = build_processor(config, tokenizer, folders.clip, folders.whisper, aspect)
    notes = [
        *_notes(original, variant, pairs_absent, has_processor=processor is not None),
        *_unused(folders, variant),
        *_unread(folders.finetuned, gathered.files),
    ]
    return UniMoePlan(
        variant=variant,
        config=config,
        gathered=gathered,
        targets=targets,
        outputs=outputs,
        dtype=config.dtype,
        processor=processor,
        generation=generation_config(config),
        origin=_ORIGIN.format(variant=variant.name),
        notes=notes,
        tokenizer=tokenizer_files,
        keep_lora=keep_lora,
    )


def run_import(
    plan: UniMoePlan, out: Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, progress: bool = True
) -> ImportReceipt:
    """Write the model as a complete Hugging Face folder, and with `keep_lora` the adapter beside it (`OUT-lora`).

    Raises:
        ConversionError: a folder is not empty, or a file turned out to be damaged or another's. Then nothing is left
            behind.
    """
    require_equal_copies(plan.gathered)
    loras = plan.gathered.loras
    beside: tuple[Path, WriteBeside] | None = None
    if plan.keep_lora and loras:
        layout = plan.variant.layout
        target = out.with_name(out.name + "-lora")
        beside = (
            target,
            lambda folder: write_adapter(folder, plan.config, loras, out.name, target.name, layout),
        )
    merged = () if plan.keep_lora else loras
    return write_import(plan, out, max_shard_bytes=max_shard_bytes, progress=progress, merged=merged, beside=beside)


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


def _gather(folders: UniMoeFolders, original: dict[str, Any]) -> tuple[Gathered, bool]:
    """All decoder and connector files, in the original's order; and whether low-rank pairs were in none of them."""
    gathered = gather(folders.base)
    layout = layout_of(gathered.live, original)
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
    pairs_absent = False
    if folders.finetuned is not None:
        if layout == "deepspeed":
            pairs_absent = add_absent_pairs(gathered, folders.finetuned, original)
        lay_over(gathered, folders.finetuned, layout)
    if layout == "deepspeed":
        integrate_pairs(gathered, original)
    return gathered, pairs_absent


def _add_encoders(gathered: Gathered, variant: Variant, folders: UniMoeFolders) -> Encoders:
    add_encoder(gathered, "clip", Checkpoint(folders.clip))
    vision = _vision_config(folders.clip)
    if variant.audio == "whisper":
        if folders.whisper is None:
            raise ConversionError("This is a speech model, and its Whisper folder was not given: add --whisper DIR.")
        add_encoder(gathered, "whisper", Checkpoint(folders.whisper))
        require_type(folders.whisper, "whisper")
        with named_config(folders.whisper / "config.json"):
            return Encoders(vision, whisper=nameless(WhisperConfig.from_pretrained(folders.whisper)))
    if folders.beats is None:
        raise ConversionError("This is the audio model, and its BEATs file was not given: add --beats FILE.pt.")
    beats = BeatsFile(folders.beats)
    add_encoder(gathered, "beats", beats)
    qformer = read_json(folders.qformer_config) if isinstance(folders.qformer_config, Path) else folders.qformer_config
    with named_config(folders.beats):
        return Encoders(vision, beats=UniMoeBeatsConfig.from_original(beats.cfg), qformer=qformer)


def _vision_config(folder: Path) -> CLIPVisionConfig:
    require_type(folder, "clip", "clip_vision_model")
    with named_config(folder / "config.json"):
        return nameless(CLIPVisionConfig.from_pretrained(folder))


def _account(gathered: Gathered, key_map: KeyMap, expected: dict[str, tuple[int, ...]]) -> dict[str, Target]:
    """As `account`; factors of LoRA share the fate of the weights that they change."""
    mapped = key_map.map(gathered.live)
    for target in mapped.targets.values():
        if target.name in expected:
            for original in target.sources:
                for factor in (factor for lora in gathered.loras.get(original, ()) for factor in lora.tensors):
                    factor.consume(target.name)
    return account(gathered, key_map, expected)


def _notes(original: dict[str, Any], variant: Variant, pairs_absent: bool, *, has_processor: bool) -> list[str]:
    """What the reader should know beyond tensors."""
    notes = []
    if variant.layout == "deepspeed":
        notes.append(
            "routing takes the best experts; the original draws every token's second one, in evaluation too "
            "(router_pick: sample_always does as well)"
        )
        if any(original.get(name) for name in ("aux_balance_loss", "aux_multimodal_loss", "aux_kl_loss")):
            notes.append(
                "losses of the routers are means over layers and samples, where the original takes sums "
                "(router_losses_as_released: true does as well)"
            )
        kept = preferred_experts(original, variant)
        short = [field for name, field in MODALITY_EXPERTS.items() if len(kept[name]) < len(original.get(field) or ())]
        if short:
            notes.append(f"{', '.join(short)}: without the experts that are not there; the loss that uses them is off")
    if pairs_absent:
        notes.append("low-rank pairs of dense layers are in no file, and random in the original: taken as zero")
    if not has_processor:
        notes.append("no processor: neither base nor fine-tuned folder holds tokenizer.model or tokenizer.json")
    if original.get("mm_use_im_patch_token", True):
        notes.append("left out: the untrained <im_patch> row that the original's loader adds, since no prompt uses it")
    return notes


def _unused(folders: UniMoeFolders, variant: Variant) -> list[str]:
    """What was given and is of no use to this variant."""
    of_the_other = ("beats", "qformer_config") if variant.audio == "whisper" else ("whisper",)
    options = ["--" + name.replace("_", "-") for name in of_the_other if getattr(folders, name) is not None]
    sides = {"whisper": "it hears through Whisper", "beats": "it hears through BEATs"}
    return [f"{option} was not used: this is the variant {variant.name}, {sides[variant.audio]}" for option in options]


def _unread(finetuned: Path | None, read: list[Path]) -> list[str]:
    """Which files of weights in the fine-tuned folder nothing reads."""
    files = sorted(finetuned.iterdir()) if finetuned is not None else []
    names = [
        file.name for file in files if file.suffix in _WEIGHTS and file not in read and file.name != MODALITY_MAPS
    ]
    return [f"not read, as in the original: {', '.join(names)} of the fine-tuned folder"] if names else []
