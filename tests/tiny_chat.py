"""Conversations with media, and what a processor makes of them."""

from typing import Any

import tiny_media

from unimoe.processing.processing_unimoe import UniMoeProcessor


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def an_image(seed: int = 0) -> dict[str, Any]:
    return {"type": "image", "image": tiny_media.picture(seed)}


def a_video(seed: int = 0) -> dict[str, Any]:
    return {"type": "video", "video": [tiny_media.picture(seed), tiny_media.picture(seed + 1)]}


def a_clip(seconds: float = 0.5, **keys: Any) -> dict[str, Any]:
    return {"type": "audio", "audio": tiny_media.sound(seconds), **keys}


MIXED = [
    [user(an_image(), a_clip(1.5), "What is in the picture?"), assistant("A cat"), user("More?"), assistant("A dog")],
    [user("Who?"), assistant("Me")],
    [user(a_video(), an_image(1), "a", an_image(2), a_clip(0.2)), assistant("Two <image>")],
]


def chat(processor: UniMoeProcessor, conversation: Any, **options: Any) -> Any:
    return processor.apply_chat_template(
        conversation,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **{"add_generation_prompt": True, **options},
    )
