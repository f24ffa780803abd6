"""An empty copy of a model: names and shapes of everything that it has, and no memory."""

import torch
from huggingface_hub.errors import StrictDataclassError

from ...errors import ConversionError, UniMoeError
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM

# What transformers raises when it builds a model of impossible fields; RuntimeError is torch's for negative sizes.
BUILDING_ERRORS = (
    StrictDataclassError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)


def meta_model(config: UniMoeConfig) -> UniMoeForCausalLM:
    """The model of this configuration on the "meta" device; tensors that are tied are one.

    It gets a configuration of its own, because building a model writes into it.

    Raises:
        ConversionError: the fields of a tower do not go together, so that transformers cannot build it.
    """
    fields = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    try:
        with torch.device("meta"):
            model = UniMoeForCausalLM(UniMoeConfig(**fields))
    except UniMoeError:
        raise
    except BUILDING_ERRORS as error:
        raise ConversionError(
            f"No model can be built of this config.json ({type(error).__name__}: {first_line(error)}). Correct the "
            "fields of its towers and connectors."
        ) from error
    model.tie_weights()
    return model


def first_line(error: Exception) -> str:
    """The first line of what an error says; a strict configuration class hides that in the cause."""
    told = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ is not None else error
    return str(told).strip().partition("\n")[0].partition(" Errors: ")[0].rstrip(".")
