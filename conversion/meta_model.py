"""An empty copy of a model: names and shapes of everything that it has, and no memory."""

import torch

from ..modeling_unimoe.configuration_unimoe import UniMoeConfig
from ..modeling_unimoe.modeling_unimoe import UniMoeForCausalLM


def meta_model(config: UniMoeConfig) -> UniMoeForCausalLM:
    """The model of this configuration on the "meta" device; tensors that are tied are one.

    It gets a configuration of its own, because building a model writes into it.
    """
    fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    with torch.device("meta"):
        model = UniMoeForCausalLM(UniMoeConfig(**fields))
    model.tie_weights()
    return model
