"""The tensors of a Uni-MoE model of ours under the names that the original's code loads."""

from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ..checkpoints.checkpoint_reader import Checkpoint
from ..checkpoints.key_rules import KeyMap
from ..checkpoints.llava_keys import without_numbers
from .originals import Originals


class UniMoeOriginals(Originals):
    """As `Originals`, of a model with this configuration."""

    def __init__(self, checkpoint: Checkpoint, key_map: KeyMap, config: UniMoeConfig) -> None:
        layers = config.audio_config.num_hidden_layers if config.audio_config is not None else 1
        super().__init__(checkpoint, key_map, config.text_config.num_experts, layers)
        self.config = config
        if config.image_connector.depth == 1:
            self.sources = without_numbers(self.sources)

    def ours(self, original: str) -> str:
        """The tensor of ours that an original one is (a part of)."""
        return self.sources[original][0]
