"""Checkpoints in MoIIE's own layout become folders of ours: one tensor in memory at a time, a receipt for every one.

The original keeps everything in one folder, the vision tower included. When it loads it, it takes the tower from there
if config.json has `unfreeze_vision_tower`, else from the tower's own folder, which therefore is read here too.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, SiglipVisionConfig

from ...errors import ConversionError
from ...model_folder import resolve_folder
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...processing.processing_unimoe import UniMoeProcessor
from ..checkpoints.accounting import account
from ..checkpoints.checkpoint_reader import Checkpoint, read_json
from ..checkpoints.checkpoint_writer import OutputTensor
from ..checkpoints.key_rules import KeyMap, Shape, Target
from ..checkpoints.llava_keys import VISION_TOWER, vision_prefix
from ..checkpoints.our_folder import expected_tensors
from ..checkpoints.source_tensors import SourceTensors
from ..dense.encoder_folders import named_config, nameless
from ..dense.prepared_tokenizers import prepare_bunny_tokenizer
from ..dense.tokenizer_files import read_tokenizer
from .bunny_processor import build_bunny_processor
from .import_plan import ImportPlan, push_import, write_import
from .import_receipt import ImportReceipt
from .moiie_config import our_moiie_config, sizes_of
from .moiie_keys import GROUPED, moiie_rules
from .moiie_variant import MoiieVariant, recognise_moiie

RELEASED_TOWER = "google/siglip-so400m-patch14-384"
_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt")
_IN_TOWER, _OWN_TOWER = "vision_model.", VISION_TOWER + "vision_model."
# Beside the vision tower, a SigLIP folder holds its text half.
_TEXT_HALF = ("text_model.", "logit_scale", "logit_bias")
_FROM_FOLDER = "taken from the tower's own folder, as the original does without unfreeze_vision_tower"
_FROM_CHECKPOINT = "the checkpoint's own tower counts, as in the original with unfreeze_vision_tower"


def plan_moiie(checkpoint: str, *, vision_tower: str | None = None, dtype: torch.dtype | None = None) -> ImportPlan:
    """Recognise the model and account for every tensor. Only headers and configurations are read.

    Args:
        checkpoint: folder or Hub id of a model as the original saved it.
        vision_tower: folder or Hub id of SigLIP; needed for a model that sees. None takes what config.json names, if
            that is a folder.
        dtype: of the floating point tensors; None takes that of the checkpoint.

    Raises:
        ConversionError: a file is missing or damaged, the variant cannot be recognised, a tensor is unknown, missing
            or of the wrong shape.
    """
    folder = resolve_folder(checkpoint, _FILES)
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder / 'config.json'} is missing: the folder is not complete. Fetch the file.")
    original = read_json(folder / "config.json")
    stored = Checkpoint(folder)
    gathered = SourceTensors()
    for tensor in gathered.add_file("checkpoint", stored):
        gathered.put(tensor.name, tensor)
    variant = recognise_moiie(gathered.shapes, original)
    tower = _tower_folder(variant, original, folder, vision_tower)
    if tower is not None:
        _add_tower(gathered, variant, original, tower)
    tokenizer = read_tokenizer(folder)
    version = "phi3" if variant.backbone == "phi3" else "llama"
    if tokenizer is not None and tower is not None:
        prepare_bunny_tokenizer(tokenizer, version)
    image_token = None if tokenizer is None else tokenizer.convert_tokens_to_ids("<image>")
    vision = None if tower is None else _vision_config(tower)
    wanted = dtype or stored.main_dtype
    with named_config(folder / "config.json"):
        config = our_moiie_config(original, variant, vision, gathered.shapes, image_token)  # type: ignore[arg-type]
        config.dtype = wanted
        expected = {name: tuple(tensor.shape) for name, tensor in expected_tensors(config).items()}
    key_map = moiie_key_map(variant, config, vision_prefix(expected))
    made = _made_routers(variant, config)
    targets = account(gathered, key_map, expected, made)
    processor: UniMoeProcessor | PreTrainedTokenizerBase | None = tokenizer
    if tokenizer is not None and tower is not None:
        aspect = original.get("image_aspect_ratio") or "square"
        processor = build_bunny_processor(config, tokenizer, version, tower, aspect)
    return ImportPlan(
        variant=variant,
        config=config,
        gathered=gathered,
        targets=targets,
        outputs=_outputs(gathered, config, wanted, expected, targets, made),
        dtype=wanted,
        processor=processor,
        generation=_generation_config(config, tokenizer),
        origin=_origin(variant),
        notes=[*_notes(original, variant, tower is not None, tokenizer is not None), *_balance_notes(config, variant)],
    )


def moiie_key_map(variant: MoiieVariant, config: UniMoeConfig, prefix: str) -> KeyMap:
    """The map of a variant's names; `prefix` is that of our vision tower's."""
    return KeyMap(moiie_rules(variant.kind, variant.backbone, sizes_of(config.text_config), variant.pools, prefix))


def import_moiie(checkpoint: str, out: Path, *, push_to_hub: str | None = None, **options: Any) -> ImportReceipt:
    """Convert a checkpoint; `options` are those of `plan_moiie`.

    Raises:
        ConversionError: see `plan_moiie`; nothing is written then.
    """
    receipt = write_import(plan_moiie(checkpoint, **options), out)
    if push_to_hub is not None:
        push_import(receipt, out, push_to_hub)
    return receipt


def _tower_folder(
    variant: MoiieVariant, original: dict[str, Any], folder: Path, vision_tower: str | None
) -> Path | None:
    if not variant.projector_depth:
        if variant.has_tower or vision_tower is not None:
            raise ConversionError(
                "There is a vision tower but no image projector (model.mm_projector.*) in the checkpoint. Give the model "
                "after its first stage of training, or the language model alone and no --vision-tower."
            )
        return None
    named = str(original.get("mm_vision_tower") or "")
    if vision_tower is None:
        # What config.json names is only taken where it is a folder: nothing is fetched that nobody asked for.
        near = [path for path in (folder / named, Path(named).expanduser()) if named and path.is_dir()]
        if not near:
            told = f" (config.json names {named!r})" if named else ""
            raise ConversionError(
                f"The model sees, and its vision tower's folder was not given{told}: add --vision-tower DIR_OR_HUB_ID, "
                f"for the authors' models {RELEASED_TOWER}."
            )
        return near[0]
    return resolve_folder(vision_tower, _FILES)


def _add_tower(gathered: SourceTensors, variant: MoiieVariant, original: dict[str, Any], tower: Path) -> None:
    """Decide, as the original does, whose weights the tower has."""
    has_weights = any(path.suffix in (".safetensors", ".bin") for path in tower.iterdir())
    own = variant.has_tower and (bool(original.get("unfreeze_vision_tower")) or not has_weights)
    if not has_weights:
        if own:
            return  # a folder with a configuration alone will do
        raise ConversionError(f"Neither {tower} nor the checkpoint holds the vision tower's weights. Fetch them.")
    inside = Checkpoint(tower)
    for tensor in gathered.add_file("vision_tower", inside):
        name = tensor.name if tensor.name.startswith(_IN_TOWER) else _IN_TOWER + tensor.name
        if tensor.name.startswith(_TEXT_HALF):
            tensor.drop("the text half of SigLIP, which no model here uses")
        elif own:
            tensor.drop(_FROM_CHECKPOINT)
        else:
            original_name = VISION_TOWER + name
            if original_name in gathered.live:
                gathered.live[original_name].drop(_FROM_FOLDER)
            gathered.live[original_name] = tensor
    if not own:
        names = {VISION_TOWER + _IN_TOWER + n.removeprefix(_IN_TOWER) for n in inside.tensors}
        for name in [n for n in gathered.live if n.startswith(_OWN_TOWER) and n not in names]:
            gathered.live.pop(name).drop(_FROM_FOLDER)


def _vision_config(tower: Path) -> SiglipVisionConfig:
    path = tower / "config.json"
    found = read_json(path).get("model_type") if path.is_file() else None
    if found not in ("siglip", "siglip_vision_model"):
        raise ConversionError(
            f"{path} describes {found!r}, not a SigLIP tower ('siglip' or 'siglip_vision_model'), which MoIIE's models have."
        )
    with named_config(path):
        return nameless(SiglipVisionConfig.from_pretrained(tower))


def _made_routers(variant: MoiieVariant, config: UniMoeConfig) -> tuple[str, ...]:
    """Our routers that the checkpoint does not have."""
    if variant.pools is None or (variant.has_routers and variant.kind != "modality"):
        return ()
    return tuple(f"model.language_model.layers.{layer}.mlp.gate.weight" for layer in config.text_config.sparse_layers)


def _outputs(
    gathered: SourceTensors,
    config: UniMoeConfig,
    dtype: torch.dtype,
    expected: dict[str, Shape],
    targets: dict[str, Target],
    made: tuple[str, ...],
) -> tuple[OutputTensor, ...]:
    std = 0.0 if config.text_config.num_experts_per_tok == 1 else config.text_config.initializer_range
    outputs = []
    for number, (name, shape) in enumerate(expected.items()):
        if name in made:
            pieces = (lambda shape=shape, seed=number: _drawn(shape, std, seed),)
        else:
            pieces = targets[name].pieces(gathered.read)  # type: ignore[assignment]
        outputs.append(OutputTensor(name, dtype, shape, pieces))
    return tuple(outputs)


def _drawn(shape: Shape, std: float, seed: int) -> torch.Tensor:
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _generation_config(config: UniMoeConfig, tokenizer: PreTrainedTokenizerBase | None) -> GenerationConfig:
    """The authors' evaluation: greedy, up to 1024 new tokens."""
    text = config.text_config
    ids = [config.image_token_id] if config.image_token_id is not None else []
    ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ends = list(dict.fromkeys([*ends, tokenizer.eos_token_id]))  # what answers end with in training
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=text.pad_token_id,
        do_sample=False,
        max_new_tokens=1024,
        suppress_tokens=[i for i in ids if i < text.vocab_size] or None,
    )


def _origin(variant: MoiieVariant) -> str:
    return (
        f"Converted from a checkpoint of MoIIE's code (arXiv 2508.09779), architecture *{variant.kind}*, backbone "
        f"*{variant.backbone}*. The terms of its authors, of the language model and of the vision tower hold."
    )


def _notes(original: dict[str, Any], variant: MoiieVariant, sees: bool, has_tokenizer: bool) -> list[str]:
    notes = []
    if variant.kind == "modality":
        notes.append("routers are zeros: with one expert per group there is nothing to choose, and its weight is 1")
    elif not variant.has_routers:
        notes.append("the checkpoint has no routers yet: drawn, as the original does when it loads it")
    if variant.pools is not None and len(variant.pools.unreached):
        notes.append(f"experts {[*variant.pools.unreached]} left out: no router of the original reaches them")
    if not sees:
        notes.append("a language model alone: no image projector in the checkpoint")
    if not has_tokenizer:
        nothing = "no processor" if sees else "no tokenizer"
        notes.append(f"{nothing}: the checkpoint's folder holds neither tokenizer.model nor tokenizer.json")
    if variant.kind in GROUPED and sees:
        notes.append("the last feature of every run of image features is routed as text (route_run_end_as_text)")
    for name in ("resid_pdrop", "embd_pdrop"):
        if original.get(name):
            notes.append(f"{name} {original[name]} is left out: it acts in training only")
    return notes


def _balance_notes(config: UniMoeConfig, variant: MoiieVariant) -> list[str]:
    """Why coefficients of balance losses are other numbers here than in the original."""
    text, times = config.text_config, variant.num_experts_per_tok
    if times == 1 or not any(text.aux_loss_coefs):
        return []
    ours = ", ".join(f"{c:g}" for c in dict.fromkeys(text.aux_loss_coefs))
    return [
        f"coefficients of balance losses ({ours}) are {times} times the original's numbers and weigh the same: an even load "
        f"costs the original {times}, one per expert of a token, and ours 1"
    ]


__all__ = ["RELEASED_TOWER", "import_moiie", "moiie_key_map", "plan_moiie"]
