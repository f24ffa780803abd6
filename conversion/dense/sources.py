"""What a conversion starts from: a folder or Hub id, recognised by its tensors and described in our terms."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from ...errors import ConversionError
from ...model_folder import resolve_folder
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ..checkpoints.bitsandbytes_tensors import refuse_other_quantisation
from ..checkpoints.checkpoint_reader import Checkpoint, read_json
from ..checkpoints.meta_model import first_line
from ..checkpoints.our_folder import READING_ERRORS, expected_tensors, read_our_config
from ..checkpoints.tensor_parts import Part, PartsView
from . import llama_family
from .fused_layouts import internlm2_config, is_internlm2, unfused_parts
from .licences import licence_metadata
from .multimodal_layouts import (
    LanguagePart,
    language_part,
    llava_own_config,
    picture_part,
    special_token_ids,
    text_config_of,
    with_tower_names,
)

_HUB_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*", "NOTICE*")
# Everything beside weights and configuration that a converted folder keeps.
_KEPT_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "processor_config.json",
    "*preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)


Kind = Literal["llama", "internlm2", "multimodal", "unimoe"]


@dataclass(frozen=True)
class Source:
    """A dense model on disk.

    Args:
        name: as the user gave it.
        kind: "llama" for a text decoder of another class, "internlm2" for one that transformers has no class for,
            "multimodal" for a decoder inside a model that sees, "unimoe" for our own format.
        checkpoint: its tensors; fused ones in their parts.
        config: the dense model as ours.
        keys: our tensor name -> name in the checkpoint.
        dropped: tensors of the checkpoint that are not taken over -> why.
        special_ids: tokens that the source reads as media.
    """

    name: str
    folder: Path
    kind: Kind
    checkpoint: Checkpoint
    config: UniMoeConfig
    keys: dict[str, str]
    dropped: dict[str, str]
    special_ids: tuple[int, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most floating point values."""
        sizes: dict[torch.dtype, int] = {}
        for info in self.checkpoint.tensors.values():
            if info.dtype.is_floating_point:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def keys_consumed(self) -> int:
        """How many stored tensors are taken over; a fused one counts once."""
        if isinstance(self.checkpoint, PartsView):
            return len({self.checkpoint.parts[key].stored for key in self.keys.values()})
        return len(self.keys)

    @property
    def is_hub_id(self) -> bool:
        return not Path(self.name).expanduser().exists()

    @property
    def public_name(self) -> str:
        """The Hub id, or a folder's name without where it was."""
        return self.name if self.is_hub_id else self.folder.resolve().name

    @property
    def license(self) -> str | None:
        """The licence that the source's model card states, or None."""
        return self.license_metadata.get("license")

    @property
    def license_metadata(self) -> dict[str, str]:
        """What the source's model card says of its licence: `license`, and for others `license_name` and `license_link`.

        A source without such a card, but with a licence file, which is copied, has a link to that.
        """
        return licence_metadata(self.folder)

    def kept_files(self) -> list[Path]:
        """Tokenizer, processor, licence and the like; not the processor of a class that is not ours."""
        patterns = [p for p in _KEPT_FILES if self.kind != "multimodal" or "processor" not in p]
        found = {path for pattern in patterns for path in self.folder.glob(pattern)}
        return sorted(path for path in found if path.is_file() and path.suffix != ".py")


def open_source(name: str) -> Source:
    """Open a folder, or a Hub id through the Hub's cache.

    Raises:
        ConversionError: it is not there, damaged, or no dense model that we can read; the message says why.
    """
    folder = resolve_model_folder(name)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ConversionError(f"{folder} has no config.json: give a Hugging Face model folder.")
    checkpoint = Checkpoint(folder)
    refuse_other_quantisation(checkpoint.tensors, str(folder))
    if read_json(config_file).get("model_type") == UniMoeConfig.model_type:
        return _open_ours(name, checkpoint)
    return _open_foreign(name, checkpoint)


def resolve_model_folder(name: str) -> Path:
    """As `resolve_folder`, with weights: of a model on the Hub the safetensors files, or the pickled ones without these."""
    folder = resolve_folder(name, _HUB_PATTERNS)
    if Path(name).expanduser().is_dir() or any(folder.glob("*.safetensors")):
        return folder
    return resolve_folder(name, (*_HUB_PATTERNS, "pytorch_model*.bin*"))


def _open_ours(name: str, checkpoint: Checkpoint) -> Source:
    config = read_our_config(checkpoint.folder)
    expected = expected_tensors(config)
    _check_same(checkpoint, expected)
    keys = {key: key for key in expected}
    dropped = _extra_head(checkpoint, config, llama_family.HEAD, "model.language_model.embed_tokens.weight")
    return Source(name, checkpoint.folder, "unimoe", checkpoint, config, keys, dropped)


def _check_same(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    missing = sorted(set(expected) - set(checkpoint.tensors))
    unknown = sorted(set(checkpoint.tensors) - set(expected) - {llama_family.HEAD})
    if missing or unknown:
        problem = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not part of the model"
        raise ConversionError(f"{checkpoint.folder} does not match its config.json: {problem}. Save the model again.")
    for key, tensor in expected.items():
        if checkpoint.tensors[key].shape != tuple(tensor.shape):
            raise ConversionError(
                f"{checkpoint.folder}: {key} has shape {list(checkpoint.tensors[key].shape)} but config.json says "
                f"{list(tensor.shape)}. Save the model again."
            )


def _open_foreign(name: str, checkpoint: Checkpoint) -> Source:
    """A decoder of another class, alone or inside a multimodal model."""
    language = language_part(checkpoint.shapes)
    stored = {key: key for key in checkpoint.tensors} if language is None else dict(language.names)
    shapes = {key: checkpoint.tensors[where].shape for key, where in stored.items()}
    reason = llama_family.other_structure(shapes)
    if reason is not None:
        raise ConversionError(
            f"{name} cannot be upcycled: {reason}. A dense decoder of the LLaMA family or a dense model in our own "
            "format is needed."
        )
    hf_config = _hf_config(name, checkpoint)
    text = hf_config if language is None else text_config_of(hf_config)
    text_config = llama_family.text_config_from(text, shapes)
    parts = {key: replace(part, stored=stored[part.stored]) for key, part in unfused_parts(shapes, text).items()}
    keys, dropped = _decoder_keys(parts)
    config, special = UniMoeConfig(text_config=text_config), []
    if language is not None:
        config, pictures, left_out = _with_pictures(config, hf_config, language)
        parts |= {key: Part(where) for key, where in pictures.items()}
        keys |= {key: key for key in pictures}
        dropped |= left_out
        special = special_token_ids(hf_config)
    if any(part.rows or part.stored != key for key, part in parts.items()):
        checkpoint = PartsView(checkpoint, parts)
    extra = _extra_head(checkpoint, config, llama_family.HEAD, llama_family.EMBEDDING)
    keys = {ours: key for ours, key in keys.items() if key not in extra}
    kind: Kind = "multimodal" if language is not None else "internlm2" if is_internlm2(shapes) else "llama"
    return Source(name, checkpoint.folder, kind, checkpoint, config, keys, dropped | extra, tuple(special))


def _decoder_keys(parts: Mapping[str, Part]) -> tuple[dict[str, str], dict[str, str]]:
    """Our name -> name in the view, and what is dropped -> why."""
    keys, dropped = {}, {}
    for key in parts:
        ours = llama_family.our_key(key)
        if ours is None:
            dropped[key] = "computed from the configuration"
        else:
            keys[ours] = key
    return keys, dropped


def _with_pictures(
    config: UniMoeConfig, hf_config: PreTrainedConfig, language: LanguagePart
) -> tuple[UniMoeConfig, dict[str, str], dict[str, str]]:
    """The configuration with the picture part, its tensors (ours -> stored), and what is left out -> why."""
    pictures = picture_part(hf_config, language.others)
    if isinstance(pictures, str):
        return config, {}, dict.fromkeys(language.others, f"the picture part is left out: {pictures}")
    fields = dict(pictures.fields)
    fields["image_connector"] |= {"output_size": config.text_config.hidden_size}
    config = UniMoeConfig(text_config=config.text_config, **fields)
    names = with_tower_names(pictures.names, expected_tensors(config))
    return config, names, dict(pictures.dropped)


def _hf_config(name: str, checkpoint: Checkpoint) -> PreTrainedConfig:
    try:
        if is_internlm2(checkpoint.shapes):
            return internlm2_config(read_json(checkpoint.folder / "config.json"))
        llava = llava_own_config(read_json(checkpoint.folder / "config.json"))
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False) if llava is None else llava
    except READING_ERRORS as error:
        raise ConversionError(
            f"transformers cannot read the configuration of {name} ({first_line(error)}). Models with code "
            "of their own are not run; give one of a class that transformers has."
        ) from error


def load_dense(source: Source) -> UniMoeForCausalLM:
    """The source as a dense model of ours, in float32 and ready to run."""
    with no_init_weights():
        model = UniMoeForCausalLM(copy.deepcopy(source.config))  # building a model writes into its configuration
    state = {ours: source.checkpoint.read(key).to(torch.float32) for ours, key in source.keys.items()}
    # A tied head is in no source; it follows the embeddings.
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    if unexpected or set(missing) - {llama_family.HEAD}:
        raise ConversionError(
            f"{source.name} does not fill our model: {[*missing, *unexpected][:4]} differ. Report it."
        )
    model.tie_weights()
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model.eval()


def _extra_head(checkpoint: Checkpoint, config: UniMoeConfig, head: str, embedding: str) -> dict[str, str]:
    """A head that is stored although it is tied; one that differs from the embeddings is refused."""
    if head not in checkpoint.tensors or not config.text_config.tie_word_embeddings:
        return {}
    if not torch.equal(checkpoint.read(head), checkpoint.read(embedding)):
        raise ConversionError(
            f"{checkpoint.folder}: config.json ties the head to the embeddings, but {head} differs from {embedding}. "
            "Set tie_word_embeddings to false if the head is right, or remove it from the checkpoint."
        )
    return {head: "equal to the embeddings, which it is tied to"}
