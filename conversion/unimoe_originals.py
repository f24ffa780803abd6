"""The tensors of a model of ours under the names, and in the pieces, that the original's code loads."""

from collections.abc import Iterable

import torch

from ..modeling_unimoe.configuration_unimoe import UniMoeConfig
from .io import Checkpoint
from .key_rules import KeyMap, take, weight_norm_magnitude
from .llava_keys import PROJECTOR


class Originals:
    """The original tensors of a model of ours, one at a time.

    targets: original name -> the tensor of ours that it is (a part of).
    """

    def __init__(self, checkpoint: Checkpoint, key_map: KeyMap, config: UniMoeConfig) -> None:
        self.checkpoint, self.key_map, self.config = checkpoint, key_map, config
        self.targets: dict[str, str] = {}
        layers = config.audio_config.num_hidden_layers if config.audio_config is not None else 1
        for name in checkpoint.tensors:
            for original in key_map.originals(name, config.text_config.num_experts, layers):
                self.targets[self._spelled(original)] = name

    def names(self, *prefixes: str) -> list[str]:
        return [name for name in self.targets if name.startswith(prefixes)]

    def read(self, original: str) -> torch.Tensor:
        place = self.key_map.place(original)
        tensor = self.checkpoint.read(self.targets[original])
        if place.rule.how == "weight_norm" and place.rule.part == 0:
            return weight_norm_magnitude(tensor)
        return take(tensor, place).clone()

    def read_all(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: self.read(name) for name in names}

    def _spelled(self, original: str) -> str:
        """A projector of one layer has no numbers in its names."""
        if self.config.image_connector.depth > 1 or not original.startswith(PROJECTOR):
            return original
        return original.replace(PROJECTOR + "0.", PROJECTOR)
