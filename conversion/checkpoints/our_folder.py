"""Folders with a model of ours: their configuration, and the tensors that they must hold."""

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from ...errors import ConversionError
from ...model_folder import require_ours
from ...modeling_unimoe.configuration_unimoe import UniMoeConfig
from .checkpoint_writer import OutputTensor
from .meta_model import first_line, meta_model

# What transformers raises when it reads a configuration in which a field has the wrong type or an impossible value.
READING_ERRORS = (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, OSError)


def expected_tensors(config: UniMoeConfig) -> dict[str, torch.Tensor]:
    """The tensors, without memory, that a checkpoint of this configuration holds; a tied head is not among them."""
    state = dict(meta_model(config).state_dict())
    if config.text_config.tie_word_embeddings:
        state.pop("lm_head.weight")
    return state


def in_model_order(outputs: list[OutputTensor], config: UniMoeConfig) -> tuple[OutputTensor, ...]:
    """The tensors in the order of the model, so that those of a layer are beside each other.

    Raises:
        ConversionError: they are not what a model of this configuration consists of.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in expected_tensors(config).items()}
    made = {output.name: output.shape for output in outputs}
    if made != expected:
        differing = sorted(key for key in {*made, *expected} if made.get(key) != expected.get(key))[0]
        raise ConversionError(
            f"The output's {differing} would have shape {made.get(differing)} but the model needs "
            f"{expected.get(differing)}: the source does not hold what its configuration says."
        )
    by_name = {output.name: output for output in outputs}
    return tuple(by_name[key] for key in expected)


def read_our_config(folder: Path) -> UniMoeConfig:
    """The configuration of a folder with a model of ours.

    Raises:
        ConversionError: there is none, or a field is of the wrong type or impossible; the message names file and field.
    """
    require_ours(folder)
    try:
        return UniMoeConfig.from_pretrained(folder)
    except READING_ERRORS as error:
        raise ConversionError(
            f"{folder / 'config.json'} cannot be used: {first_line(error)}. Correct it or fetch it again."
        ) from error
