"""A tiny model, its processor and a tiny data set whose every answer can be learned, for tests of training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tiny
import tiny_media
import torch

from unimoe import UniMoeForCausalLM
from unimoe.processing.processing_unimoe import UniMoeProcessor

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30), "white": (240, 240, 240)}
PITCHES = {"low": 200.0, "high": 1500.0}


def processor() -> UniMoeProcessor:
    return tiny_media.processor(video_tokens=4)


def model(processor: UniMoeProcessor, sparse: bool = False, seed: int = 0, **text: Any) -> UniMoeForCausalLM:
    """A decoder of 3 layers with CLIP, Whisper and BEATs towers, for the placeholders of a processor."""
    fields: dict[str, Any] = {"vocab_size": len(processor.tokenizer), "initializer_range": 0.08, **text}
    fields |= {"bos_token_id": 1, "eos_token_id": processor.tokenizer.eos_token_id}
    if not sparse:
        fields |= {"num_experts": 0, "sparse_layers": []}
    ids = {f"{name}_token_id": getattr(processor, f"{name}_token_id") for name in ("image", "video", "audio", "sound")}
    torch.manual_seed(seed)
    return UniMoeForCausalLM(tiny.config(fields, **ids)).eval()


def samples(folder: Path, per_modality: int = 8) -> list[dict[str, Any]]:
    """Pictures of a colour, speech and sounds of a pitch, videos that get brighter or darker, text."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    made = []
    for index in range(per_modality):
        colour = list(COLOURS)[index % len(COLOURS)]
        pixels = np.array(COLOURS[colour]) + rng.integers(-15, 15, (20, 24, 3))
        PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
        made.append(sample("image", index, {"type": "image", "path": f"{index}.png"}, "What is it?", colour))
        pitch = list(PITCHES)[index % len(PITCHES)]
        wave = 0.4 * np.sin(2 * np.pi * PITCHES[pitch] * np.arange(6000) / 16_000 + index)
        (folder / f"{index}.wav").write_bytes(tiny_media.wav(wave.astype(np.float32)))
        clip = {"type": "audio", "path": f"{index}.wav"}
        made.append(sample("speech", index, clip, "Who speaks?", pitch))
        made.append(sample("sound", index, clip, "What sounds?", pitch))
        made.append(sample("text", index, None, f"Say {colour}.", colour))
    return made


def write_jsonl(folder: Path, per_modality: int = 8) -> Path:
    file = folder / "train.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples(folder, per_modality)), encoding="utf-8")
    return file


def write_start(folder: Path, per_modality: int, name: str = "model") -> Path:
    """A folder with data and with a dense model that knows nothing, in a folder of that name."""
    made = processor()
    write_jsonl(folder, per_modality)
    model(made).save_pretrained(folder / name)
    made.save_pretrained(folder / name)
    return folder


def sample(modality: str, index: int, medium: dict[str, Any] | None, question: str, answer: str) -> dict[str, Any]:
    asked: list[dict[str, Any]] = [{"type": "text", "text": question}]
    return {
        "id": f"{modality}-{index}",
        "modality": modality,
        "task": modality,
        "split": "train",
        "messages": [
            {"role": "user", "content": ([medium] if medium else []) + asked},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
    }
