"""A tiny dense Llama of transformers, of the sizes of `tiny.text_config`, and such models as ours."""

from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from unimoe import UniMoeConfig, UniMoeForCausalLM
from unimoe.conversion.dense.fused_layouts import unfused_parts
from unimoe.conversion.dense.llama_family import our_key, text_config_from

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Short factors up to 16 positions, long ones beyond; heads of 8 have four frequencies.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}


def llama(seed: int = 0, **fields: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **fields})).eval()


def dense_from(hf_model: PreTrainedModel) -> UniMoeForCausalLM:
    """A dense text-only model of ours with copies of the weights of a LLaMA-family model in memory."""
    source = hf_model.state_dict()
    text_config = text_config_from(hf_model.config, {name: tuple(tensor.shape) for name, tensor in source.items()})
    parts = unfused_parts({n: tuple(t.shape) for n, t in source.items()}, hf_model.config)
    state = {
        our_key(name): part.of(source[part.stored]).detach().clone() for name, part in parts.items() if our_key(name)
    }
    with no_init_weights():
        model = UniMoeForCausalLM(UniMoeConfig(text_config=text_config))
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    if hf_model.generation_config is not None:
        model.generation_config = GenerationConfig(**hf_model.generation_config.to_dict())
    return model.to(hf_model.device).train(hf_model.training)  # type: ignore[arg-type]
