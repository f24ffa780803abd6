"""BEATs as its authors publish it: one pickled file, and what its tensors become in ours."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from ...errors import ConversionError
from ..checkpoints.checkpoint_reader import Checkpoint, TensorInfo
from ..checkpoints.key_rules import Rule
from ..checkpoints.pickle_files import load_pickle

_CLASSIFIER = "the classifier of a fine-tuned BEATs, which no model here uses"


class BeatsFile(Checkpoint):
    """A BEATs checkpoint: a pickled dict of `cfg` (a dict of plain values) and `model` (tensors).

    Raises:
        ConversionError: it is missing, damaged or something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cfg: dict[str, Any] = {}
        self._weights: dict[str, torch.Tensor] = {}
        super().__init__(path.parent)

    def _read_headers(self) -> dict[str, TensorInfo]:
        if not self.path.is_file():
            problem = "is a folder" if self.path.is_dir() else "is missing"
            raise ConversionError(f"{self.path} {problem}. Give the BEATs checkpoint, a file (.pt).")
        content = load_pickle(self.path, mapped=zipfile.is_zipfile(self.path))
        cfg, weights = (content.get(name) if isinstance(content, dict) else None for name in ("cfg", "model"))
        if not isinstance(cfg, dict) or not isinstance(weights, dict):
            raise ConversionError(f"{self.path} is no BEATs checkpoint: it needs a 'cfg' and a 'model'.")
        self.cfg, self._weights = cfg, {n: t for n, t in weights.items() if isinstance(t, torch.Tensor)}
        return {name: TensorInfo(self.path, t.dtype, tuple(t.shape)) for name, t in self._weights.items()}

    def _unpickled(self, path: Path) -> dict[str, torch.Tensor]:
        return self._weights


def beats_rules(prefix: str = "") -> tuple[Rule, ...]:
    """What the tensors of a BEATs become, whose names start with `prefix`."""
    return (
        Rule(prefix + "encoder.pos_conv.0.weight_g", "model.audio_tower.encoder.pos_conv.weight", "weight_norm", 0, 2),
        Rule(prefix + "encoder.pos_conv.0.weight_v", "model.audio_tower.encoder.pos_conv.weight", "weight_norm", 1, 2),
        Rule(prefix + "encoder.pos_conv.0.bias", "model.audio_tower.encoder.pos_conv.bias"),
        Rule(
            prefix + "encoder.layers.{layer}.self_attn.relative_attention_bias.weight",
            "model.audio_tower.encoder.relative_attention_bias.weight",
            "shared",
        ),
        *(Rule(prefix + name + ".{rest}", None, reason=_CLASSIFIER) for name in ("predictor", "predictor_dropout")),
        Rule(prefix + "{rest}", "model.audio_tower.{rest}"),
    )
