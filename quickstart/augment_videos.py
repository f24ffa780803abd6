"""More videos out of few: tower states of training clips played backwards, mirrored and transposed."""

from typing import Any

import numpy as np
import torch

REVERSED = {"left": "right", "right": "left", "up": "down", "down": "up"}
MIRRORED = {"left": "right", "right": "left", "up": "up", "down": "down"}
TRANSPOSED = {"left": "up", "up": "left", "right": "down", "down": "right"}


def vary_videos(
    sample: dict[str, Any], states: dict[str, list[torch.Tensor]], rng: np.random.Generator
) -> tuple[dict[str, Any], dict[str, list[torch.Tensor]]]:
    """Play training videos backwards, mirror and transpose them, each half of the time; directions turn along.

    420 clips are few enough to be learned by heart. Mirroring the map of tower states is not quite the same as
    mirroring the frames, and close enough.
    """
    if "video" not in states:
        return sample, states
    direction = sample["messages"][-1]["content"][0]["text"]
    backwards, mirrored, transposed = rng.random(3) < 0.5
    videos = []
    for frames_FPC in states["video"]:
        side = round(frames_FPC.shape[1] ** 0.5)
        frames_FYXC = frames_FPC.unflatten(1, (side, side))
        if backwards:
            frames_FYXC = frames_FYXC.flip(0)
        if mirrored:
            frames_FYXC = frames_FYXC.flip(2)
        if transposed:
            frames_FYXC = frames_FYXC.transpose(1, 2)
        videos.append(frames_FYXC.flatten(1, 2))
    if sample["task"] == "video_direction":
        for happened, turn in ((backwards, REVERSED), (mirrored, MIRRORED), (transposed, TRANSPOSED)):
            direction = turn[direction] if happened else direction
        turned = {"role": "assistant", "content": [{"type": "text", "text": direction}]}
        sample = {**sample, "messages": [*sample["messages"][:-1], turned]}
    return sample, {**states, "video": videos}
