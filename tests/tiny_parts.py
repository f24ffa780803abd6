"""Tiny parts of every kind that `unimoe convert compose` puts together, as folders and files."""

from pathlib import Path
from typing import Any

import tiny
import tiny_media
import torch
from transformers import (
    BertConfig,
    BertModel,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileNetV2ImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from unimoe.conversion.released.export_unimoe import BEATS_FILE, export_unimoe

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8}
VISION_KINDS = ("clip", "siglip", "dinov2", "mobilenet")
PROMPT = ["<|startoftranscript|>", "<|notimestamps|>"]


def language_model(folder: Path, metaspace: bool = False, extra_words: int = 0, **config: Any) -> LlamaForCausalLM:
    """A LLaMA, with as many more rows than its tokenizer has words."""
    tokenizer = tiny_media.plain_tokenizer(metaspace)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=len(tokenizer) + extra_words, **config)).eval()
    _save(model, folder, tokenizer, licence="mit")
    return model


def llava(folder: Path) -> LlavaForConditionalGeneration:
    """A LLaVA 1.5, whose vocabulary has rows to spare."""
    tokenizer = tiny_media.plain_tokenizer(metaspace=True)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    text = LlamaConfig(**TEXT, vocab_size=len(tokenizer) + 10)
    image = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tiny.vision_config(), text_config=text, image_token_index=image)
    ).eval()
    _save(model, folder, tokenizer, tiny_media.image_processor())
    return model


def vision_tower(kind: str, folder: Path) -> Any:
    """ "clip" with its text half, "siglip", "dinov2" or "mobilenet" with its classifier; pictures of 16 or 32 pixels."""
    torch.manual_seed(0)
    sizes = {**VISION, "image_size": 16, "intermediate_size": 48}
    pictures: Any = tiny_media.image_processor()
    model: Any
    if kind == "clip":
        text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        model = CLIPModel(CLIPConfig(vision_config=tiny.vision_config().to_dict(), text_config=text))
    elif kind == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**sizes))
    elif kind == "dinov2":
        model = Dinov2Model(Dinov2Config(**{name: sizes[name] for name in (*VISION, "image_size")}))
    else:
        model = MobileNetV2ForImageClassification(MobileNetV2Config(image_size=64, depth_multiplier=0.35))
        pictures = MobileNetV2ImageProcessorPil(
            size={"shortest_edge": 70}, crop_size={"height": 64, "width": 64}, do_center_crop=True
        )
    _save(model.eval(), folder, pictures, licence="apache-2.0")
    return model


def speech_tower(folder: Path, seconds: int = 2) -> WhisperForConditionalGeneration:
    tokenizer = tiny_media.plain_tokenizer()
    tokenizer.add_tokens(PROMPT, special_tokens=True)
    torch.manual_seed(0)
    fields = {**tiny.speech_config().to_dict(), "max_source_positions": 50 * seconds, "vocab_size": len(tokenizer)}
    model = WhisperForConditionalGeneration(WhisperConfig(**fields)).eval()
    _save(model, folder, tokenizer, WhisperFeatureExtractor(chunk_length=seconds), licence="mit")
    return model


def beats(folder: Path) -> tuple[Path, Path]:
    """BEATs, and sizes of a tiny Q-Former (JSON)."""
    absent = dict.fromkeys(("speech_config", "speech_connector"))
    text = {"router_aux_loss_coef": 0.0}
    tiny.model(text, video_num_frames=8, **absent).save_pretrained(folder / "ours")
    export_unimoe(folder / "ours", folder / "released")
    return folder / "released" / BEATS_FILE, folder / "released" / "qformer_config.json"


def qformer(file: Path, queries: int) -> Blip2QFormerModel:
    """Weights of a Q-Former of the sizes of `beats`, under the names that BLIP-2 has."""
    torch.manual_seed(3)
    sizes = tiny.connector("qformer")["qformer_config"]
    model = Blip2QFormerModel(Blip2QFormerConfig(**sizes))
    state = {f"qformer.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({**state, "query_tokens": torch.ones(1, queries, 32)}, file)
    return model


def text_encoder(folder: Path) -> None:
    _save(BertModel(BertConfig(**{**TEXT, "vocab_size": 40})), folder)


def _save(model: Any, folder: Path, *beside: Any, licence: str | None = None) -> None:
    model.save_pretrained(folder)
    for part in beside:
        part.save_pretrained(folder)
    if licence is not None:
        (folder / "README.md").write_text(f"---\nlicense: {licence}\n---\n", encoding="utf-8")


def every_part(folder: Path) -> Path:
    """A folder of parts, by kind."""
    language_model(folder / "llama")
    llava(folder / "llava")
    for kind in VISION_KINDS:
        vision_tower(kind, folder / kind)
    speech_tower(folder / "whisper")
    beats(folder / "beats")
    return folder


def beats_of(parts: Path) -> dict[str, Path]:
    """What `Ingredients` wants to know of the BEATs in such a folder."""
    released = parts / "beats" / "released"
    return {"beats": released / "BEATs.pt", "qformer_config": released / "qformer_config.json"}
