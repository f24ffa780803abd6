"""A tiny model of ours and a tiny text model on disk, and a small benchmark in LLaVA's form for them."""

import json
from pathlib import Path
from typing import Any

import tiny_llama
import tiny_media
import tiny_training


def save_multimodal(folder: Path) -> Path:
    processor = tiny_training.processor()
    tiny_training.model(processor, sparse=True).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_text_only(folder: Path) -> Path:
    tokenizer = tiny_media.plain_tokenizer()
    tiny_llama.llama(vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_mmbench(root: Path, items: int = 6, broken: tuple[int, ...] = (), missing: tuple[int, ...] = ()) -> Path:
    """MMBench in Uni-MoE's form; two questions share a picture."""
    folder = root / "mmbench"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(items):
        picture = folder / "images" / f"{number // 2}.png"
        if number not in missing and not picture.exists():
            picture.write_bytes(tiny_media.encoded_picture(seed=number // 2))
        name = f"{number // 2}.png"
        if number in missing or number in broken:
            name = f"{'missing' if number in missing else 'broken'}{number}.png"
        if number in broken:
            (folder / "images" / name).write_text("no picture", encoding="utf-8")
        records.append(record(f"m{number}", f"Which is number {number}?", name, "AB"[number % 2]))
    (folder / "MMBench1.1.json").write_text(json.dumps(records), encoding="utf-8")
    return root


def record(key: str, question: str, image: str, answer: str) -> dict[str, Any]:
    value = f"<image>\n{question}\nOptions:\nA.cat\nB.dog\nAnswer the question using a single word or phrase."
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": ""}]
    return {"id": key, "image": [image], "answer": [answer], "category": ["x"], "conversations": turns}


def write_scienceqa(root: Path, items: int = 5) -> Path:
    folder = root / "scienceqa_text"
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {"id": str(i), "conversations": [{"from": "human", "value": f"Which {i}?\nA. cat\nB. dog"}, {"from": "gpt", "value": "AB"[i % 2]}]}
        for i in range(items)
    ]  # fmt: skip
    (folder / "bunny_test_CQM-A.json").write_text(json.dumps(records), encoding="utf-8")
    return root
