"""What external vision models saw in an image ("aux", MoAI), as inputs of the model.

An image item of a message may carry it: {"type": "image", "image": ..., "aux": {"text": "The image includes ...", "map":
a picture of its segments}}, or the text alone, "aux": "...". A sample has one aux: the texts of its images one after the
other, and one map at most. A processor with a function `perceive` (PIL images -> the same mappings) looks itself at the
images that carry none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import torch

from .chat_unimoe import MediaItem, read_messages
from .media_inputs_unimoe import image_pixels
from .media_policy_unimoe import ConversationError, MediaPolicy
from .media_unimoe import load_image
from .placeholders_unimoe import pad

AUX_MAPS = ("picture", "released")


@dataclass
class Aux:
    """The aux of one sample: its text, and a picture of its segments or None."""

    text: str
    map: PIL.Image.Image | None = None


def aux_inputs(
    processor: Any,
    conversations: Sequence[Sequence[MediaItem]],
    policy: MediaPolicy,
    return_tensors: str | None = None,
) -> dict[str, Any]:
    """`aux_input_ids` and `aux_attention_mask` [B, L], padded on the left, and `aux_pixel_values` [B, 3, H, W] if there
    are maps; the mask then has their places too. Empty where no image carries aux.

    Raises:
        ConversationError: aux of a wrong form, or two maps in one conversation.
    """
    found = [_aux_of(media, policy) for media in _perceived(processor, conversations, policy)]
    if not any(found):
        return {}
    tokenizer = processor.tokenizer
    texts = ([] if aux is None else tokenizer.encode(aux.text, split_special_tokens=True) for aux in found)
    batch = pad([{"input_ids": ids} for ids in texts], processor.padding_id, "left", None)
    inputs = {
        "aux_input_ids": torch.tensor(batch["input_ids"], dtype=torch.long),  # also where all texts are empty
        "aux_attention_mask": torch.tensor(batch["attention_mask"], dtype=torch.long),
    }
    maps = [None if aux is None else aux.map for aux in found]
    if any(maps):
        inputs["aux_pixel_values"] = map_pixels(processor, maps)
        has_map = torch.tensor([[int(one is not None)] for one in maps])
        places = has_map.expand(-1, processor.image_tokens)
        inputs["aux_attention_mask"] = torch.cat((inputs["aux_attention_mask"], places), dim=1)
    return {name: tensor.numpy() for name, tensor in inputs.items()} if return_tensors == "np" else inputs


def aux_of_conversations(processor: Any, conversations: Sequence[Any]) -> dict[str, Any]:
    """`aux_inputs` of conversations as messages; None stands for a text without any."""
    policy = processor.media_policy
    return aux_inputs(
        processor, [[] if one is None else read_messages(one, policy.limits)[1] for one in conversations], policy
    )


def map_pixels(processor: Any, maps: Sequence[PIL.Image.Image | None]) -> torch.Tensor:
    """[n, 3, H, W] pixels of pictures of segments, zeros for None.

    As photos, or with `aux_maps="released"` as the released code makes them: values of 0..1 in float16, normalised as if
    they were 0..255. That leaves next to nothing of the picture, but is what MoAI-7B was trained on.
    """
    some = next(one for one in maps if one is not None)
    if processor.aux_maps == "released":
        pixels = [None if one is None else _released_pixels(processor.image_processor, one) for one in maps]
    else:
        made = image_pixels(processor, [some if one is None else one for one in maps])
        pixels = [None if one is None else row for one, row in zip(maps, made, strict=True)]
    blank = torch.zeros_like(next(row for row in pixels if row is not None))
    return torch.stack([blank if row is None else row for row in pixels])


def spread_rows(inputs: Mapping[str, torch.Tensor], rows: Sequence[int], count: int) -> dict[str, torch.Tensor]:
    """The inputs of some samples as those of `count`, the others without aux."""
    spread = {}
    for name, values in inputs.items():
        spread[name] = values.new_zeros((count, *values.shape[1:]))
        spread[name][list(rows)] = values
    return spread


def _perceived(
    processor: Any, conversations: Sequence[Sequence[MediaItem]], policy: MediaPolicy
) -> Sequence[Sequence[MediaItem]]:
    """The media, with aux on every image; of maps that were perceived, the first of a conversation without one stays."""
    perceive = getattr(processor, "perceive", None)
    places = [
        (row, column)
        for row, media in enumerate(conversations)
        for column, item in enumerate(media)
        if item.kind == "image" and item.aux is None
    ]
    if perceive is None or not places:
        return conversations
    told = [list(media) for media in conversations]
    images = [load_image(told[row][column].value, policy, told[row][column].where) for row, column in places]
    for (row, column), aux in zip(places, perceive(images), strict=True):
        has_map = any(isinstance(item.aux, Mapping) and item.aux.get("map") is not None for item in told[row])
        told[row][column] = replace(told[row][column], aux={"text": aux["text"]} if has_map else aux)
    return told


def _aux_of(media: Sequence[MediaItem], policy: MediaPolicy) -> Aux | None:
    texts, maps = [], []
    for item in (item for item in media if item.aux is not None):
        aux = {"text": item.aux} if isinstance(item.aux, str) else item.aux
        if not isinstance(aux, Mapping) or not isinstance(aux.get("text", ""), str) or set(aux) - {"text", "map"}:
            raise ConversationError(f"{item.where}: 'aux' must be a text, or {{'text': ..., 'map': a picture}}.")
        if len(aux.get("text", "")) > policy.limits.max_text_characters:
            raise ConversationError(
                f"{item.where}: its aux text has over {policy.limits.max_text_characters} characters; shorten it."
            )
        texts.append(aux.get("text", ""))
        if aux.get("map") is not None:
            maps.append(load_image(aux["map"], policy, f"{item.where}, aux map"))
    if len(maps) > 1:
        raise ConversationError(f"{media[0].where}: a conversation may have one aux map, got {len(maps)}.")
    return Aux(" ".join(texts), *maps) if texts else None


def _released_pixels(image_processor: Any, picture: PIL.Image.Image) -> torch.Tensor:
    size = (image_processor.size["width"], image_processor.size["height"])
    values = np.asarray(picture.convert("RGB").resize(size, PIL.Image.Resampling.NEAREST)) / 255
    colours = torch.from_numpy(values).permute(2, 0, 1).half().float()
    mean, std = (torch.tensor(v)[:, None, None] * 255 for v in (image_processor.image_mean, image_processor.image_std))
    return (colours - mean) / std


__all__ = ["AUX_MAPS", "aux_inputs", "aux_of_conversations", "map_pixels", "spread_rows"]
