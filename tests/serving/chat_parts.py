"""What the tests of servers say to them: parts of messages in OpenAI's form, and a way to ask."""

import base64
import socket
from pathlib import Path
from typing import Any

import tiny_media
import tiny_training


def data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


IMAGE = {"type": "image_url", "image_url": {"url": data_url(tiny_media.encoded_picture(), "image/png")}}
WAV = base64.b64encode(tiny_media.wav(tiny_media.sound())).decode()
AUDIO = {"type": "input_audio", "input_audio": {"data": WAV, "format": "wav"}}
QUESTION = {"type": "text", "text": "What is it?"}


def many_questions() -> list[Any]:
    """Sixteen, of four kinds: two texts, a picture, a sound."""
    texts = [f"{word} {number}" for word in ("red", "low") for number in range(2)]
    parts = [{"type": "text", "text": text} for text in texts]
    return [
        *texts,
        *([part] for part in parts),
        *([IMAGE, part] for part in parts),
        *([AUDIO, part] for part in parts),
    ]


def save_model(folder: Path) -> None:
    processor = tiny_training.processor()
    tiny_training.model(processor, sparse=True).save_pretrained(folder)
    processor.save_pretrained(folder)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ask(client: Any, model: Path, content: Any, **options: Any) -> str:
    answer = client.chat.completions.create(
        model=str(model), messages=[{"role": "user", "content": content}], **{"max_tokens": 6, **options}
    )
    return str(answer.choices[0].message.content)


def ask_streaming(client: Any, model: Path, content: Any, **options: Any) -> str:
    pieces = client.chat.completions.create(
        model=str(model), messages=[{"role": "user", "content": content}], stream=True, **{"max_tokens": 6, **options}
    )
    return "".join(piece.choices[0].delta.content or "" for piece in pieces)


def own_answer(folder: Path, content: Any) -> str:
    """What the model itself generates; ours serves it without a space at its beginning."""
    from unimoe import UniMoeForCausalLM, UniMoeProcessor

    model, processor = UniMoeForCausalLM.from_pretrained(folder), UniMoeProcessor.from_pretrained(folder)
    items = [{"type": "text", "text": content}] if isinstance(content, str) else [_ours(item) for item in content]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": items}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        load_audio_from_video=True,
    )
    output = model.generate(**inputs, max_new_tokens=6)
    return str(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def _ours(item: dict[str, Any]) -> dict[str, Any]:
    kind = item["type"].partition("_")[0]
    if kind == "input":
        return {"type": "audio", "audio": base64.b64decode(WAV)}
    return item if kind == "text" else {"type": kind, "url": item[item["type"]]["url"]}
