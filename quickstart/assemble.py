"""Puts the quickstart's parts together, as `unimoe convert compose` does; its choices are those of a small model."""

from pathlib import Path

import torch

from ..conversion.composing.compose import plan_composition, run_composition
from ..conversion.composing.composition import ComposeOptions, Ingredients
from ..modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from .language import COMPACT_CHAT_TEMPLATE, compact_decoder

# Pictures of 128 pixels become 2 x 2 embeddings and so does every frame of a video; windows of 3 seconds become 8
# embeddings in either audio branch. The sound connector is a small one behind the speech tower.
CHOICES = {
    "image_size": 128,
    "vision_token_grid": 2,
    "separate_video_connector": True,
    "video_frames": 8,
    "video_pooling": "none",
    "window_seconds": 3,
    "speech_tokens": 8,
    "speech_queries": "prompt",
    "sound_connector": "mlp",
    "sound_tokens": 8,
    "output_norm": True,
}


def assemble_dense(out: Path, language_model: Path | None, vision_tower: Path, speech_tower: Path, seed: int) -> None:
    """Write a dense model of a decoder, pretrained towers and fresh connectors, with its processor.

    Args:
        language_model: folder of a pretrained one; None makes a compact decoder, beside `out`.
    """
    template = "chatml"
    if language_model is None:
        language_model, template = out.with_name("decoder"), COMPACT_CHAT_TEMPLATE
        torch.manual_seed(seed)
        decoder, tokenizer = compact_decoder()
        decoder.save_pretrained(language_model)
        tokenizer.save_pretrained(language_model)
    ingredients = Ingredients(str(language_model), vision_tower=str(vision_tower), speech_tower=str(speech_tower))
    options = ComposeOptions(**CHOICES, chat_template=template, seed=seed)  # type: ignore[arg-type]
    run_composition(plan_composition(ingredients, options), out, progress=False)


def connector_start_scale(model: UniMoeForCausalLM) -> float:
    """Make connected features start at the scale of word embeddings; returns that scale (root mean square)."""
    rms = model.model.language_model.embed_tokens.weight.detach().float().square().mean().sqrt()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_connector.output_norm.weight"):
                parameter.fill_(rms)
    return float(rms)
