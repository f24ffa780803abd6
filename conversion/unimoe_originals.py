"""The tensors of a model of ours under the names, and in the pieces, that Uni-MoE's code loads."""

from ..modeling_unimoe.configuration_unimoe import UniMoeConfig
from . import originals
from .io import Checkpoint
from .key_rules import KeyMap
from .llava_keys import without_numbers


class Originals(originals.Originals):
    """As the base class; every original tensor is (a part of) one of ours.

    targets: original name -> the tensor of ours.
    """

    def __init__(self, checkpoint: Checkpoint, key_map: KeyMap, config: UniMoeConfig) -> None:
        layers = config.audio_config.num_hidden_layers if config.audio_config is not None else 1
        super().__init__(checkpoint, key_map, config.text_config.num_experts, layers)
        self.config = config
        if config.image_connector.depth == 1:
            self.sources = without_numbers(self.sources)
        self.targets = {name: ours[0] for name, ours in self.sources.items()}
