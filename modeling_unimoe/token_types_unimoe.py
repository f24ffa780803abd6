"""`mm_token_type_ids` that a caller gives: with input_ids they must agree with them, with inputs_embeds they must be known.

Neither is asked while compiling, because looking at values would break the graph. On CPUs an error says where the types
are wrong. On CUDA looking would make the host wait for the device in every forward pass: the device checks by itself
there, and stops with the short message.
"""

import torch

from .configuration_unimoe_text import MODALITIES, UniMoeTextConfig
from .errors_unimoe import ModalityError

_DISAGREE = "mm_token_type_ids differ from the modalities of the tokens in input_ids"
_FOLLOW = "they follow from the placeholder tokens, so leave them out, or give inputs_embeds to choose them"
_UNKNOWN = f"values that are none of the {len(MODALITIES)} modalities"


def require_agreeing_types(given: torch.Tensor | None, from_ids: torch.Tensor) -> None:
    """Raises ModalityError unless the types [B, S] that were given are those of the placeholder tokens, or none were."""
    if given is None or torch.compiler.is_compiling():
        return
    differing = given.to(from_ids.device) != from_ids
    if _checks_by_itself(differing):
        torch._assert_async(~differing.any(), f"{_DISAGREE}: {_FOLLOW}.")
    elif differing.any():
        row, position = differing.nonzero()[0].tolist()
        raise ModalityError(
            f"mm_token_type_ids say {int(given[row, position])} at row {row}, position {position}, where input_ids have "
            f"the token of a modality {int(from_ids[row, position])} ({MODALITIES[int(from_ids[row, position])]}): "
            f"{_FOLLOW}."
        )


def require_known_types(given: torch.Tensor | None) -> None:
    """Raises ModalityError unless the types are ids of modalities, or none were given."""
    if given is None or torch.compiler.is_compiling():
        return
    if _checks_by_itself(given):
        torch._assert_async(((given >= 0) & (given < len(MODALITIES))).all(), f"mm_token_type_ids hold {_UNKNOWN}.")
        return
    low, high = (int(bound) for bound in given.aminmax())
    if low < 0 or high >= len(MODALITIES):
        names = ", ".join(f"{index} {name}" for index, name in enumerate(MODALITIES))
        raise ModalityError(f"mm_token_type_ids hold values from {low} to {high}; there are {names}.")


def _checks_by_itself(tensor: torch.Tensor) -> bool:
    return tensor.device.type in ("cuda", "meta")  # meta: nothing to read


def require_no_need_of_types(config: UniMoeTextConfig) -> None:
    """For vLLM's backend, which hands in embeddings (with `attention_instances`) and never says what they are of.

    Raises:
        ModalityError: the decoder treats positions of media otherwise than text.
    """
    needs = {
        "expert groups by modality": len(config.router_groups) > 1,
        "partial LoRA on images": config.plora_config is not None,
        "mixers that read auxiliary inputs": config.mixer_config is not None,
    }
    if found := [need for need, is_there in needs.items() if is_there]:
        raise ModalityError(
            f"This model has {' and '.join(found)}, so it must get mm_token_type_ids, which this serving engine does not "
            "hand over: serve it with `unimoe serve` or `transformers serve`."
        )


__all__ = ["require_agreeing_types", "require_known_types", "require_no_need_of_types"]
