"""Which fields of an encoder's or a Q-Former's configuration a connector of ours keeps."""

# What the query decoder takes from its Whisper; the rest of a WhisperConfig describes the encoder and the vocabulary.
QUERY_DECODER_FIELDS = (
    "d_model",
    "decoder_layers",
    "decoder_attention_heads",
    "decoder_ffn_dim",
    "max_target_positions",
    "activation_function",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "decoder_layerdrop",
    "scale_embedding",
    "init_std",
)
QFORMER_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "intermediate_size",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "initializer_range",
    "layer_norm_eps",
    "cross_attention_frequency",
    "encoder_hidden_size",
)

__all__ = ["QFORMER_FIELDS", "QUERY_DECODER_FIELDS"]
