"""BEATs as the sound tower, and a trained Q-Former for the connector behind it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConversionError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...modeling_unimoe.configuration_unimoe_beats import UniMoeBeatsConfig
from ..checkpoints.accounting import account
from ..checkpoints.checkpoint_reader import Checkpoint, TensorFile, read_json
from ..checkpoints.key_rules import KeyMap, Shape
from ..checkpoints.source_tensors import SourceTensors
from ..dense.beats_file import BeatsFile, beats_rules
from ..dense.connector_fields import QFORMER_FIELDS
from ..dense.sources import resolve_model_folder
from .composed_part import ComposedPart, Made, left_over, taken

TOWER, CONNECTOR = "model.audio_tower.", "model.sound_connector."


@dataclass(frozen=True)
class SoundTower:
    """A BEATs file; `add_tensors` fills its part once the shapes of ours are known."""

    part: ComposedPart
    config: UniMoeBeatsConfig
    gathered: SourceTensors

    def add_tensors(self, expected: Mapping[str, Shape]) -> None:
        """Say of every tensor of ours what it is made of.

        Args:
            expected: our names -> shapes, of the whole model.

        Raises:
            ConversionError: a tensor of BEATs is missing, unknown or of another shape.
        """
        wanted = {name: shape for name, shape in expected.items() if name.startswith(TOWER)}
        targets = account(self.gathered, KeyMap(beats_rules()), wanted)
        stored = {name: tensor.name for name, tensor in self.gathered.live.items()}
        for name, shape in wanted.items():
            made_of = tuple(stored[original] for original in targets[name].sources)
            self.part.tensors[name] = Made(shape, targets[name].pieces(self.gathered.read), made_of)
        self.part.dropped = {t.name: t.note for t in self.gathered.tensors if t.fate == "dropped"}


def open_beats(path: Path) -> SoundTower:
    """Open a BEATs checkpoint (.pt).

    Raises:
        ConversionError: it is missing, damaged or something else.
        ConfigurationError: its `cfg` cannot work.
    """
    file, gathered = BeatsFile(path), SourceTensors()
    for tensor in gathered.add_file("beats", file):
        gathered.put(tensor.name, tensor)
    config = UniMoeBeatsConfig.from_original(file.cfg)
    facts = f"BEATs, {config.num_hidden_layers} layers of width {config.hidden_size}"
    return SoundTower(ComposedPart("sound tower", str(path), path, facts, (path,)), config, gathered)


def qformer_fields(path: Path | None, input_size: int) -> dict[str, Any]:
    """`qformer_config` of the connector: BLIP-2's sizes, or those of a JSON file (its own, or a BLIP-2's config.json).

    Raises:
        ConversionError: the file is no JSON object, or is made for states of another width.
    """
    given = {} if path is None else read_json(path)
    given = given.get("qformer_config", given)
    fields = {name: given[name] for name in QFORMER_FIELDS if name in given}
    if fields.setdefault("encoder_hidden_size", input_size) != input_size:
        raise ConversionError(
            f"{path} describes a Q-Former for states of width {fields['encoder_hidden_size']}, but the sound tower's are "
            f"{input_size} wide. Give another one, or leave encoder_hidden_size out."
        )
    return fields


def open_qformer(name: str, config: UniMoeConfig, expected: Mapping[str, Shape]) -> ComposedPart:
    """A trained Q-Former, from a file of tensors, a folder or a Hub id; its queries come along where their number fits.

    Args:
        expected: names below `model.sound_connector.` -> shapes.

    Raises:
        ConversionError: a tensor is missing or of another shape.
    """
    path = Path(name).expanduser()
    checkpoint: Checkpoint = TensorFile(path) if path.is_file() else Checkpoint(resolve_model_folder(name))
    inner = {k.removeprefix("qformer."): shape for k, shape in expected.items() if k.startswith("qformer.")}
    tensors = taken(checkpoint, CONNECTOR + "qformer.", inner, "the Q-Former")
    queries = next((n for n in checkpoint.tensors if n.rpartition(".")[2] == "query_tokens"), None)
    if queries is not None and checkpoint.tensors[queries].shape == tuple(expected["query_tokens"]):
        prefix = queries.removesuffix("query_tokens")
        tensors |= taken(checkpoint, CONNECTOR, {"query_tokens": expected["query_tokens"]}, f"{prefix}queries")
    where = path if path.is_file() else checkpoint.folder
    facts = f"Q-Former, {config.sound_connector.num_tokens} queries"
    dropped = left_over(checkpoint, tensors.values(), "not part of the Q-Former")
    return ComposedPart("Q-Former", name, where, facts, tuple(checkpoint.files), tensors, dropped)


__all__ = ["SoundTower", "open_beats", "open_qformer", "qformer_fields"]
