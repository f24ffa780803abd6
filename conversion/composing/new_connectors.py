"""Connectors that nobody has trained yet: drawn with a seed, one at a time, as a new model draws them."""

from collections.abc import Callable
from functools import partial

import torch

from ...modeling_unimoe.configuration_unimoe import UniMoeConfig, UniMoeConnectorConfig
from ...modeling_unimoe.connectors_unimoe import build_connector
from ...modeling_unimoe.modeling_unimoe import UniMoePreTrainedModel
from ..checkpoints.key_rules import Shape
from .composed_part import Made

CONNECTORS = ("image_connector", "video_connector", "speech_connector", "sound_connector")
_OUTPUT_NORM = "output_norm.weight"


class _Holder(UniMoePreTrainedModel):
    """A model of one connector, which initialises it by the rules of the whole one."""

    def __init__(self, config: UniMoeConfig, connector: UniMoeConnectorConfig) -> None:
        super().__init__(config)
        self.connector = build_connector(connector)
        self.post_init()


class NewConnectors:
    """Draws connectors of a configuration; what is drawn for one does not depend on which others there are.

    Args:
        word_scale: gives the root mean square of the word embeddings, at which the output norms start.
    """

    def __init__(self, config: UniMoeConfig, seed: int, word_scale: Callable[[], float]) -> None:
        self._config, self._seed, self._word_scale = config, seed, word_scale
        self._drawn: tuple[str, dict[str, torch.Tensor]] | None = None

    def made(self, name: str, shape: Shape) -> Made:
        """One tensor, by its name in the model, e.g. "model.image_connector.layers.0.weight"."""
        connector, _, inner = name.removeprefix("model.").partition(".")
        if inner == _OUTPUT_NORM:
            return Made(
                shape, (lambda: torch.full(shape, self._word_scale()),), ("new: the scale of word embeddings",)
            )
        return Made(shape, (partial(self._read, connector, inner),), (f"new: drawn, seed {self._seed}",))

    def _read(self, connector: str, inner: str) -> torch.Tensor:
        if self._drawn is None or self._drawn[0] != connector:
            self._drawn = None  # only one of them in memory
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed * len(CONNECTORS) + CONNECTORS.index(connector))
                holder = _Holder(self._config, self._lean(getattr(self._config, connector)))
            self._drawn = connector, dict(holder.connector.state_dict())
        return self._drawn[1][inner]

    @staticmethod
    def _lean(config: UniMoeConnectorConfig) -> UniMoeConnectorConfig:
        """A query decoder's decoder is Whisper's, so that one layer of it is enough to draw the rest beside."""
        if config.type != "query_decoder":
            return config
        fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
        fields["decoder_config"] = {**fields["decoder_config"], "decoder_layers": 1}
        return UniMoeConnectorConfig(**fields)


__all__ = ["CONNECTORS", "NewConnectors"]
