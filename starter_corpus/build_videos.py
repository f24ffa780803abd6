"""Builds the videos: an icon that moves over a background, eight frames of 64 pixels each, as h264 in mp4.

Start place, size, speed, mirroring and background are random, so that a single frame says little about the direction.
"""

from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from .build_images import HELDOUT_VIDEO_ARTIST, TRAIN_ARTISTS, Icons
from .concepts import CONCEPTS
from .corpus import mean_brightness, random_background
from .records import Row, make_row, rng_for

FRAMES = 8
FRAME_SIZE = 64
FRAMES_PER_SECOND = 8
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
DIRECTION_QUESTION = "Which way does it move?"
OBJECT_QUESTION = "What moves in the video?"
# In units of the room that the icon has: short paths around widely scattered middles (partly outside the picture), so
# that the place in one frame says little about the direction. Longer paths inside the picture would give it away.
MIDDLE_OF_PATH = (-0.2, 1.2)
PATH_LENGTH = (0.5, 0.75)
TRAIN_CLIPS = 420
HELDOUT_CLIPS = 120


def moving_icon(icon: Image.Image, direction: str, rng: np.random.Generator) -> list[Image.Image]:
    """Draws the clip.

    Args:
        icon: a drawing with transparency.
        direction: one of `DIRECTIONS`.

    Returns:
        `FRAMES` RGB pictures of `FRAME_SIZE` x `FRAME_SIZE`.
    """
    icon = icon.convert("RGBA")
    if rng.random() < 0.5:
        icon = icon.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = int(rng.integers(26, 38))
    icon = icon.resize((side, side), Image.Resampling.BILINEAR)
    background = random_background(rng, FRAME_SIZE, avoid_brightness=mean_brightness(icon))
    room = FRAME_SIZE - side
    middle = float(rng.uniform(*MIDDLE_OF_PATH)) * room
    distance = float(rng.uniform(*PATH_LENGTH)) * room
    across = float(rng.uniform(0, room))
    x_step, y_step = DIRECTIONS[direction]
    ramp = np.linspace(-0.5, 0.5, FRAMES) * (x_step + y_step)
    frames = []
    for position in middle + distance * ramp:
        place = (round(position), round(across)) if x_step else (round(across), round(position))
        frame = background.copy()
        frame.paste(icon, place, icon)
        frames.append(frame)
    return frames


def write_video(path: Path, frames: list[Image.Image]) -> None:
    """Encodes frames as h264 in mp4; the same frames give the same bytes."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        # without assembler code: with it, the same frames give other bytes from time to time
        options = {"crf": "20", "preset": "veryslow", "x264-params": "threads=1:asm=0"}
        stream = container.add_stream("libx264", rate=Fraction(FRAMES_PER_SECOND), options=options)
        stream.width = stream.height = FRAME_SIZE
        stream.pix_fmt = "yuv420p"
        without_encoder_notes = av.BitStreamFilterContext("filter_units=remove_types=6", stream)  # 0.7 kB per clip
        for frame in [*(av.VideoFrame.from_image(frame) for frame in frames), None]:
            for packet in stream.encode(frame):
                container.mux(without_encoder_notes.filter(packet))
        container.mux(without_encoder_notes.filter(None))


def build_videos(out: Path, icons: Icons) -> list[Row]:
    """Writes all clips and returns two samples of each (paths relative to `out`).

    Args:
        icons: the drawings by (word, artist); the held-out artist's are used for the held-out clips only.
    """
    rows = []
    for split, clips in (("train", TRAIN_CLIPS), ("heldout", HELDOUT_CLIPS)):
        artists = TRAIN_ARTISTS if split == "train" else (HELDOUT_VIDEO_ARTIST,)
        words = [concept.word for concept in CONCEPTS if any((concept.word, artist) in icons for artist in artists)]
        for number in range(clips):
            rng = rng_for("video", split, str(number))
            word = words[number % len(words)]
            direction = tuple(DIRECTIONS)[(number + number // len(words)) % len(DIRECTIONS)]
            able = [artist for artist in artists if (word, artist) in icons]
            artist = able[int(rng.integers(len(able)))]
            drawings = icons[word, artist]
            name = f"{split}{number:03d}_{word}_{direction}"
            path = f"videos/{name}.mp4"
            write_video(out / path, moving_icon(drawings[int(rng.integers(len(drawings)))], direction, rng))
            source = {"set": artist, "clip": number}
            for task, question, answer in (
                ("video_direction", DIRECTION_QUESTION, direction),
                ("video_object", OBJECT_QUESTION, word),
            ):
                rows.append(
                    make_row(f"{task}-{name}", "video", task, split, question, answer, source, ("video", path))
                )
    return rows
