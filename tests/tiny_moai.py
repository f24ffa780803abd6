"""Tiny models with mixers and partial LoRA, and samples with aux."""

from typing import Any

import tiny
import torch
import twins

from unimoe import UniMoeForCausalLM

MIXER = {
    "layers": [0, 2],
    "rank": 8,
    "num_heads": 2,
    "num_latents": 3,
    "compressor_depth": 2,
    "compressor_heads": 2,
    "compressor_head_dim": 8,
}
PLORA = {"rank": 4, "alpha": 8, "dropout": 0.1}


def model(text: dict[str, Any] | None = None, seed: int = 0, **mixer: Any) -> UniMoeForCausalLM:
    """A sparse model (MoIIE's groups) with mixers and partial LoRA that is no longer zero; in eval mode."""
    fields = {**tiny.MOIIE_GROUPS, "mixer_config": {**MIXER, **mixer}, "plora_config": PLORA, **(text or {})}
    made = tiny.model(fields, seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".plora." in name and "_b." in name:
                parameter.normal_(std=0.2)
    made.generation_config.eos_token_id = None
    made.generation_config.suppress_tokens = [tiny.IMAGE, tiny.VIDEO, tiny.AUDIO, tiny.SOUND, twins.PAD]
    return made


def sample(seed: int = 0, aux_tokens: int = 5, text: int = 6, has_map: bool = True) -> dict[str, torch.Tensor]:
    """One prompt with an image; no aux for 0 tokens."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 90, (text,), generator=generator).tolist()
    ids = torch.tensor([[*words[:2], *[tiny.IMAGE] * 4, *words[2:]]])
    pixels = torch.randn(1, 3, 16, 16, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if aux_tokens:
        inputs["aux_input_ids"] = torch.randint(3, 90, (1, aux_tokens), generator=generator)
        inputs["aux_attention_mask"] = torch.ones(1, aux_tokens, dtype=torch.long)
    if aux_tokens and has_map:
        inputs["aux_pixel_values"] = torch.randn(1, 3, 16, 16, generator=generator)
    return inputs


def text_sample() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 6, 7]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A left-padded batch; samples without aux, or without a map, have zeros in their places."""
    batch = {
        "input_ids": _padded([one["input_ids"][0] for one in samples], twins.PAD),
        "attention_mask": _padded([one["attention_mask"][0] for one in samples], 0),
        "pixel_values": torch.cat([one["pixel_values"] for one in samples if "pixel_values" in one]),
    }
    nothing = torch.zeros(0, dtype=torch.long)
    if any("aux_input_ids" in one for one in samples):
        texts = [one["aux_input_ids"][0] if "aux_input_ids" in one else nothing for one in samples]
        batch["aux_input_ids"] = _padded(texts, twins.PAD)
        mask = _padded([torch.ones_like(text) for text in texts], 0)
        batch["aux_pixel_values"] = torch.cat(
            [one.get("aux_pixel_values", torch.zeros(1, 3, 16, 16)) for one in samples]
        )
        maps = torch.tensor([[int("aux_pixel_values" in one)] for one in samples]).expand(-1, 4)
        batch["aux_attention_mask"] = torch.cat((mask, maps), dim=1)
    return batch


def _padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=value) for row in rows])
