"""Connectors: they turn the states of a frozen tower into embeddings of the decoder.

Three kinds, chosen by `UniMoeConnectorConfig.type`, with one signature: states [batch, positions, input_size] in,
embeddings [batch, tokens, output_size] out.

    mlp             one embedding per position (or per pooled position): LLaVA's projector
    query_decoder   learned queries through a Whisper decoder that attends to the states: Uni-MoE's speech connector
    qformer         learned queries through a BLIP-2 Q-Former: Uni-MoE's audio connector
"""

from itertools import pairwise
from typing import cast

import torch
from torch import nn
from torch.nn import functional
from transformers import Blip2QFormerConfig, Blip2QFormerModel, WhisperConfig
from transformers import initialization as init
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from .configuration_unimoe import UniMoeConnectorConfig
from .errors_unimoe import ConfigurationError
from .modeling_unimoe_text import UniMoeRMSNorm
from .validation_unimoe import MAX_HIDDEN_SIZE, MAX_INTERMEDIATE_SIZE, MAX_LAYERS, MAX_QUERIES, require_sizes

OUTPUT_NORM_EPS = 1e-6

_LARGEST_DECODER = {
    "decoder_layers": MAX_LAYERS,
    "decoder_ffn_dim": MAX_INTERMEDIATE_SIZE,
    "max_target_positions": MAX_QUERIES,
}
_LARGEST_QFORMER = {
    "num_hidden_layers": MAX_LAYERS,
    "intermediate_size": MAX_INTERMEDIATE_SIZE,
    "hidden_size": MAX_HIDDEN_SIZE,
}

# A query decoder has no vocabulary (see QueryDecoderConnector); one row is the least that a WhisperConfig describes.
_NO_VOCABULARY = {
    "vocab_size": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "decoder_start_token_id": 0,
}


class UniMoeConnector(nn.Module):
    """What the three kinds share: `output_norm` and the order of steps."""

    def __init__(self, config: UniMoeConnectorConfig) -> None:
        super().__init__()
        self.output_norm = UniMoeRMSNorm(config.output_size, OUTPUT_NORM_EPS) if config.output_norm else nn.Identity()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Connects one batch of tower states.

        Args:
            states: float [batch, positions, input_size], any float dtype.

        Returns:
            [batch, tokens, output_size] in the connector's dtype. tokens = `num_tokens`, or positions for an "mlp"
            without `num_tokens`.
        """
        return self.output_norm(self.connect(states))

    def connect(self, states: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not define connect().")


class MlpConnector(UniMoeConnector):
    """`depth` linear layers with exact GELU between them; the positions are average-pooled to `num_tokens` first."""

    def __init__(self, config: UniMoeConnectorConfig) -> None:
        super().__init__(config)
        self.num_tokens = config.num_tokens
        widths = [config.input_size] + [config.output_size] * config.depth
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in pairwise(widths))

    def connect(self, states: torch.Tensor) -> torch.Tensor:
        weight = cast(nn.Linear, self.layers[0]).weight
        # A quantised layer stores integers and takes any float input.
        if weight.is_floating_point():
            states = states.to(weight.dtype)
        if self.num_tokens is not None:
            states = functional.adaptive_avg_pool1d(states.transpose(1, 2), self.num_tokens).transpose(1, 2)
        states = self.layers[0](states)
        for layer in self.layers[1:]:
            states = layer(functional.gelu(states))
        return states


class QueryDecoderConnector(UniMoeConnector):
    """Learned queries through a full Whisper decoder, then one linear layer (Uni-MoE's speech connector).

    The queries take the place of word embeddings: they get the decoder's positions 0..N-1, attend causally to each
    other and freely to the tower's states.
    """

    def __init__(self, config: UniMoeConnectorConfig) -> None:
        super().__init__(config)
        decoder_config = _whisper_decoder_config(config)
        self.query_tokens = nn.Parameter(torch.zeros(1, _num_queries(config), decoder_config.d_model))
        self.decoder = WhisperDecoder(decoder_config)
        # Queries replace the vocabulary: a 51865-row table that nothing reads would be saved, loaded and optimised.
        self.decoder.embed_tokens = nn.Identity()  # type: ignore[assignment]
        self.projector = nn.Linear(decoder_config.d_model, config.output_size)

    def connect(self, states: torch.Tensor) -> torch.Tensor:
        queries = self.query_tokens.expand(states.shape[0], -1, -1)
        decoded = self.decoder(
            inputs_embeds=queries, encoder_hidden_states=states.to(queries.dtype), use_cache=False, return_dict=True
        )
        return self.projector(decoded.last_hidden_state)


class QFormerConnector(UniMoeConnector):
    """Learned queries through a BLIP-2 Q-Former that attends to all states, then one linear layer (Uni-MoE's audio)."""

    def __init__(self, config: UniMoeConnectorConfig) -> None:
        super().__init__(config)
        qformer_config = _qformer_config(config)
        self.query_tokens = nn.Parameter(torch.zeros(1, _num_queries(config), qformer_config.hidden_size))
        self.qformer = Blip2QFormerModel(qformer_config)
        self.projector = nn.Linear(qformer_config.hidden_size, config.output_size)

    def connect(self, states: torch.Tensor) -> torch.Tensor:
        queries = self.query_tokens.expand(states.shape[0], -1, -1)
        attended = self.qformer(query_embeds=queries, encoder_hidden_states=states.to(queries.dtype), return_dict=True)
        return self.projector(attended.last_hidden_state)


CONNECTORS: dict[str, type[UniMoeConnector]] = {
    "mlp": MlpConnector,
    "query_decoder": QueryDecoderConnector,
    "qformer": QFormerConnector,
}


def build_connector(config: UniMoeConnectorConfig) -> UniMoeConnector:
    """Builds the connector that `config.type` names, with the attention implementation set on `config`.

    Raises:
        ConfigurationError: the type is unknown, or the sizes inside do not fit the tower and the number of queries.
    """
    if config.type not in CONNECTORS:
        raise ConfigurationError(f"The connector type is {config.type!r}; choose one of {sorted(CONNECTORS)}.")
    return CONNECTORS[config.type](config)


def init_connector_weights(module: nn.Module, initializer_range: float = 0.02) -> None:
    """Initialises the raw parameters of a connector; for a model's `_init_weights`, which sees every module.

    Linear layers and norms are covered by `PreTrainedModel._init_weights`; other modules are left alone.
    """
    if isinstance(module, QueryDecoderConnector):
        init.zeros_(module.query_tokens)
    elif isinstance(module, QFormerConnector):
        # Uni-MoE starts from zeros here too, but the Q-Former has no positions and normalises its queries first: equal
        # zero rows meet a LayerNorm with eps 1e-12, whose gradient is a million times that of the other weights.
        init.normal_(module.query_tokens, mean=0.0, std=initializer_range)


def _num_queries(config: UniMoeConnectorConfig) -> int:
    if config.num_tokens is None:
        raise ConfigurationError(
            f"num_tokens is None; a {config.type!r} connector needs a number of queries (Uni-MoE: 50)."
        )
    return config.num_tokens


def _whisper_decoder_config(config: UniMoeConnectorConfig) -> WhisperConfig:
    if config.decoder_config is None:
        raise ConfigurationError(
            "A 'query_decoder' connector has no decoder_config: give the WhisperConfig fields of its decoder "
            "(d_model, decoder_layers, decoder_attention_heads, decoder_ffn_dim, max_target_positions)."
        )
    decoder = WhisperConfig(**{**config.decoder_config, **_NO_VOCABULARY})
    require_sizes("decoder_config", decoder, _LARGEST_DECODER)
    if decoder.d_model != config.input_size:
        raise ConfigurationError(
            f"decoder_config.d_model is {decoder.d_model} but the connector's input_size is {config.input_size}; a "
            "Whisper decoder attends to states of its own width, so make them equal."
        )
    if _num_queries(config) > decoder.max_target_positions:
        raise ConfigurationError(
            f"num_tokens is {config.num_tokens} but the decoder has {decoder.max_target_positions} positions: lower "
            "num_tokens or raise decoder_config.max_target_positions."
        )
    decoder._attn_implementation = getattr(config, "_attn_implementation", None)
    return decoder


def _qformer_config(config: UniMoeConnectorConfig) -> Blip2QFormerConfig:
    fields = {"encoder_hidden_size": config.input_size, **(config.qformer_config or {})}
    qformer = Blip2QFormerConfig(**fields)
    require_sizes("qformer_config", qformer, _LARGEST_QFORMER)
    if qformer.encoder_hidden_size != config.input_size:
        raise ConfigurationError(
            f"qformer_config.encoder_hidden_size is {qformer.encoder_hidden_size} but the connector's input_size is "
            f"{config.input_size}: make them equal or leave encoder_hidden_size out."
        )
    qformer._attn_implementation = getattr(config, "_attn_implementation", None)
    return qformer


__all__ = [
    "CONNECTORS",
    "MlpConnector",
    "QFormerConnector",
    "QueryDecoderConnector",
    "UniMoeConnector",
    "build_connector",
    "init_connector_weights",
]
