"""Where the experts of an assembly come from: tuned dense models, or files that hold nothing but their FFNs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe_text import UniMoeTextConfig
from ..checkpoints.checkpoint_reader import Checkpoint, TensorFile
from ..dense.sources import Source, open_source
from .upcycle import FFN_PROJECTIONS, LANGUAGE_PREFIX

# Ours as in a model, ours as trainers leave it in expert.safetensors, and the original's.
_FFN_KEY = re.compile(
    r"(?:model\.language_model\.|model\.)?layers\.(?P<layer>\d{1,6})\.mlp\.(?P<projection>\w+_proj)\.weight"
)
_FILE_SUFFIXES = (".safetensors", ".bin")
# A dense model with another value in one of these is of another architecture than the base.
_ARCHITECTURE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
)

FfnKey = tuple[int, str]  # layer, projection


@dataclass(frozen=True)
class ExpertSource:
    """Where the FFNs of one expert or more are.

    Args:
        public_name: without where it was.
        tensors: (layer, "gate_proj" | "up_proj" | "down_proj") -> name in the checkpoint.
        others: tensors that are no FFN -> why they are left.
        ours: of others that the base has too, the name in our model.
    """

    public_name: str
    checkpoint: Checkpoint
    tensors: Mapping[FfnKey, str]
    others: Mapping[str, str]
    ours: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Expert:
    """One expert of the sparse layers, under the name that the user gave it."""

    name: str
    source: ExpertSource


def open_experts(given: Sequence[tuple[str, str | Path]], base: Source, layers: Sequence[int]) -> list[Expert]:
    """Open every expert's source, those that serve several experts once; only headers are read.

    Args:
        given: name of the expert, and a model folder, a Hub id, or a .safetensors or .bin file with FFNs.
        base: the dense model that the experts were tuned from.
        layers: those that need an FFN of every expert.

    Raises:
        ConversionError: a source is not there, damaged or of another architecture; holds what is no FFN (files), lacks
            a layer, or a shape does not fit; or a name stands for two sources.
    """
    opened: dict[str, ExpertSource] = {}
    by_name: dict[str, str] = {}
    experts = []
    for name, place in given:
        key = _identity(place)
        if by_name.setdefault(name, key) != key:
            raise ConversionError(f"The expert name {name!r} stands for two sources: give each a name of its own.")
        if key not in opened:
            opened[key] = _open(str(place), f"Expert {name!r}", base.config.text_config)
            _require_complete(opened[key], f"Expert {name!r}", base.config.text_config, layers)
        experts.append(Expert(name, opened[key]))
    return experts


def _identity(place: str | Path) -> str:
    path = Path(place).expanduser()
    return str(path.resolve()) if path.exists() else str(place)


def _open(place: str, who: str, base: UniMoeTextConfig) -> ExpertSource:
    path = Path(place).expanduser()
    if path.suffix in _FILE_SUFFIXES and not path.is_dir():
        return _open_file(path, who)
    if path.is_file():
        raise ConversionError(f"{who}: {path} is neither a model folder nor a {' or '.join(_FILE_SUFFIXES)} file.")
    try:
        source = open_source(place)
    except ConversionError as error:
        raise ConversionError(f"{who}: {error}") from error
    _require_same_architecture(source, who, base)
    tensors, others, names = {}, dict(source.dropped), {}
    for ours, name in source.keys.items():
        match = _FFN_KEY.fullmatch(ours) if ours.startswith(LANGUAGE_PREFIX) else None
        if match is None:
            others[name], names[name] = "no FFN: the base's is taken", ours
        else:
            tensors[int(match["layer"]), match["projection"]] = name
    return ExpertSource(source.public_name, source.checkpoint, tensors, others, names)


def _open_file(path: Path, who: str) -> ExpertSource:
    file = TensorFile(path)
    tensors: dict[FfnKey, str] = {}
    for name in sorted(file.tensors):
        match = _FFN_KEY.fullmatch(name)
        if match is None or match["projection"] not in FFN_PROJECTIONS:
            raise ConversionError(
                f"{who}: {path} holds {name}, which is no FFN weight. A file may hold "
                "model.layers.N.mlp.{gate,up,down}_proj.weight only; give the folder of a whole model instead."
            )
        key = int(match["layer"]), match["projection"]
        if key in tensors:
            raise ConversionError(f"{who}: {path} holds the same weight twice, as {tensors[key]} and {name}.")
        tensors[key] = name
    return ExpertSource(path.name, file, tensors, {})


def _require_same_architecture(source: Source, who: str, base: UniMoeTextConfig) -> None:
    text = source.config.text_config
    if text.sparse_layers:
        raise ConversionError(
            f"{who}: {source.name} is sparse already (layers {text.sparse_layers}); give dense models."
        )
    for name in _ARCHITECTURE:
        if getattr(text, name) != getattr(base, name):
            raise ConversionError(
                f"{who}: {source.name} has {name} {getattr(text, name)!r} but the base has {getattr(base, name)!r}; "
                "all models must be of one architecture."
            )


def _require_complete(source: ExpertSource, who: str, base: UniMoeTextConfig, layers: Sequence[int]) -> None:
    """Raises ConversionError unless all FFNs fit the base, and every layer in question has its three."""
    shapes = dict.fromkeys(FFN_PROJECTIONS, (base.intermediate_size, base.hidden_size))
    shapes["down_proj"] = (base.hidden_size, base.intermediate_size)
    for (layer, projection), name in source.tensors.items():
        info, expected = source.checkpoint.tensors[name], shapes[projection]
        if layer >= base.num_hidden_layers:
            raise ConversionError(
                f"{who}: {source.public_name} holds {name}, but the base's layers are 0 to {base.num_hidden_layers - 1}."
            )
        if info.shape != expected:
            raise ConversionError(
                f"{who}: {name} of {source.public_name} has shape {list(info.shape)}; the base needs {list(expected)}."
            )
        if not info.dtype.is_floating_point:
            raise ConversionError(
                f"{who}: {name} of {source.public_name} is stored as {info.dtype}; floating point is needed."
            )
    for layer in layers:
        for projection in FFN_PROJECTIONS:
            if (layer, projection) not in source.tensors:
                raise ConversionError(
                    f"{who}: {source.public_name} lacks model.layers.{layer}.mlp.{projection}.weight, which layer "
                    f"{layer} needs. Name only layers that it holds, or give the complete file."
                )
