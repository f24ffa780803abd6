"""Tiny models of every shape and the samples that each of them must handle, alone and in a left-padded batch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tiny
import torch

from unimoe import UniMoeForCausalLM

PAD = 0


@dataclass
class Sample:
    """One prompt; its media in the order of their placeholders."""

    name: str
    ids: list[int]
    media: dict[str, torch.Tensor] = field(default_factory=dict)

    def inputs(self) -> dict[str, torch.Tensor]:
        ids = torch.tensor([self.ids])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.media}


def collate(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Left-padded batch; media of all samples flat, one after the other."""
    length = max(len(sample.ids) for sample in samples)
    ids = torch.tensor([[PAD] * (length - len(s.ids)) + s.ids for s in samples])
    mask = torch.tensor([[0] * (length - len(s.ids)) + [1] * len(s.ids) for s in samples])
    names = dict.fromkeys(name for sample in samples for name in sample.media)
    media = {name: torch.cat([s.media[name] for s in samples if name in s.media]) for name in names}
    return {"input_ids": ids, "attention_mask": mask, **media}


def everything() -> UniMoeForCausalLM:
    return tiny.model()


def text_only() -> UniMoeForCausalLM:
    fields = ("vision_config", "speech_config", "audio_config", "image_connector", "speech_connector")
    ids = ("image_token_id", "video_token_id", "audio_token_id", "sound_token_id")
    return tiny.model(sound_connector=None, **dict.fromkeys(fields + ids))


def groups() -> UniMoeForCausalLM:
    return tiny.model(text=tiny.MOIIE_GROUPS)


def moiie() -> UniMoeForCausalLM:
    """All that MoIIE adds: groups, run ends as text, two scales; and biases of the routers."""
    text = {**tiny.MOIIE_GROUPS, "router_bias_update_rate": 0.01}
    connector = tiny.connector(input_size=64)
    return tiny.model(text, vision_scales=[1, 2], image_connector=connector, route_run_end_as_text=True)


def dynamic() -> UniMoeForCausalLM:
    routing = {"router_type": "dynamic", "router_top_p": 0.7, "num_null_experts": 1, "num_shared_experts": 2}
    return tiny.model(text={**routing, "shared_intermediate_size": 24})


def shared_tower() -> UniMoeForCausalLM:
    return tiny.model(audio_config=None)


TWINS: dict[str, Callable[[], UniMoeForCausalLM]] = {
    "everything": everything,
    "text-only": text_only,
    "groups": groups,
    "moiie": moiie,
    "dynamic": dynamic,
    "shared-tower": shared_tower,
}


def build(name: str) -> UniMoeForCausalLM:
    """The named twin in eval mode; it generates neither placeholders nor an early end."""
    model = TWINS[name]()
    for number, (buffer_name, buffer) in enumerate(model.named_buffers()):
        if buffer_name.endswith("choice_bias_C"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(number)))
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [tiny.IMAGE, tiny.VIDEO, tiny.AUDIO, tiny.SOUND, PAD]
    return model


def samples(name: str) -> list[Sample]:
    """Samples of different lengths and mixtures that the named twin can read."""
    text = [Sample("short text", [5, 6, 7]), Sample("long text", list(range(10, 31)))]
    if name == "text-only":
        return [*text, Sample("one token", [40])]
    mixed = [
        Sample("image", tiny.prompt(5, "image", 6), _media(name, 1, images=1)),
        Sample("two images", tiny.prompt("image", 7, 8, "image", 9), _media(name, 2, images=2)),
        Sample("video", tiny.prompt(11, 12, "video", 13), _media(name, 3, videos=1)),
        Sample("audio of two windows", [14, *audio_clip(windows=2), 15], _media(name, 4, windows=2)),
        Sample(
            "everything",
            tiny.prompt("audio", 16, "image", "video", 17),
            _media(name, 5, images=1, videos=1, windows=1),
        ),
    ]
    return text + mixed


@torch.no_grad()
def logits(model: UniMoeForCausalLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits


def audio_clip(windows: int) -> list[int]:
    """Placeholders of one clip: the speech features of all its windows, then their sound features."""
    return [tiny.AUDIO] * 3 * windows + [tiny.SOUND] * 2 * windows


def _media(name: str, seed: int, **counts: Any) -> dict[str, torch.Tensor]:
    media = tiny.media(seed, **counts)
    if name == "shared-tower" and "speech_features" in media:
        media["audio_features"] = media["speech_features"]
    return media
