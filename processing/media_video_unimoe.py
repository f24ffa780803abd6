"""Opens videos: a few frames spread over the whole clip, through PyAV.

Work is bounded: the packets are listed without decoding, the frames wanted are chosen by their time stamps, and at
most `MediaLimits.max_decoded_frames` frames are decoded, by seeking when the clip is longer than that.
"""

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import torch

from .media_container_unimoe import duration, open_container
from .media_policy_unimoe import DEFAULT_POLICY, MediaError, MediaPolicy, refuse_on_failure
from .media_unimoe import load_image, open_media

SAMPLING_RULES = ("uniform", "unimoe")


def sample_indices(total: int, num_frames: int, sampling: str = "uniform") -> list[int]:
    """Which of `total` frames to take.

    "uniform" spreads from the first to the last frame; "unimoe" is Uni-MoE's rule i * floor(total / num_frames), which
    stops short of the end. Short clips repeat frames. Raises ValueError on a rule of another name.
    """
    if sampling not in SAMPLING_RULES:
        raise ValueError(f"sampling must be one of {SAMPLING_RULES}, got {sampling!r}.")
    if sampling == "unimoe":
        return [i * (total // num_frames) for i in range(num_frames)]
    return [int(index) for index in np.rint(np.linspace(0, total - 1, num_frames))]


def load_video(
    value: Any,
    num_frames: int = 8,
    sampling: str = "uniform",
    policy: MediaPolicy = DEFAULT_POLICY,
    where: str = "",
) -> list[PIL.Image.Image]:
    """`num_frames` RGB frames of a clip.

    Args:
        value: bytes, path or allowed URL of a video; or its frames: an array or tensor [F, H, W, 3] or [F, 3, H, W],
            or a sequence of anything that `load_image` reads.

    Raises:
        MediaError: not a readable video, or outside of the limits on seconds, frames and pixels.
        MissingPackageError: PyAV (`unimoe[video]`) is missing.
    """
    if isinstance(value, np.ndarray | torch.Tensor) and value.ndim != 4:
        raise MediaError("video", f"an array of shape {tuple(value.shape)} is no [F, H, W, 3] or [F, 3, H, W]", where)
    if isinstance(value, np.ndarray | torch.Tensor | list | tuple):
        if not 1 <= len(value) <= policy.limits.max_video_frames:
            allowed = policy.limits.max_video_frames
            raise MediaError("video", f"it has {len(value)} frames; allowed are 1 to {allowed}", where)
        chosen = sample_indices(len(value), num_frames, sampling)
        images = {i: load_image(value[i], policy, f"{where}, frame {i}".lstrip(", ")) for i in set(chosen)}
        return [images[i] for i in chosen]
    with open_media(value, "video", policy, where) as stream:
        return _read_frames(stream, num_frames, sampling, policy, where)


def _read_frames(
    stream: BinaryIO, num_frames: int, sampling: str, policy: MediaPolicy, where: str
) -> list[PIL.Image.Image]:
    with refuse_on_failure("video", where, "the video is damaged or cannot be decoded"):
        with open_container(stream, "video", where) as container:
            if not container.streams.video:
                raise MediaError("video", "the file has no picture track", where)
            track = container.streams.video[0]
            _check_video(track.width, track.height, duration(container, track), policy, where)
            times = _presentation_times(container, track, policy, where)
        # A container that was read to its end is opened again: not every format can seek back to packet 0.
        with open_container(stream, "video", where) as container:
            track = container.streams.video[0]
            wanted = [times[i] for i in sample_indices(len(times), num_frames, sampling)]
            pick = _pick_in_one_pass if len(times) <= policy.limits.max_decoded_frames else _pick_by_seeking
            frames = pick(container, track, wanted, policy, where)
    if not frames:
        raise MediaError("video", "no frame of it can be decoded", where)
    return frames


def _check_video(width: int, height: int, seconds: float, policy: MediaPolicy, where: str) -> None:
    limits = policy.limits
    if width < 1 or height < 1 or width * height > limits.max_video_pixels:
        allowed = limits.max_video_pixels
        raise MediaError("video", f"its frames have {width} x {height} pixels; allowed are 1 to {allowed}", where)
    if seconds > limits.max_video_seconds:
        raise MediaError("video", f"it lasts {seconds:.0f} s; allowed are {limits.max_video_seconds:g} s", where)


def _presentation_times(container: Any, track: Any, policy: MediaPolicy, where: str) -> list[int]:
    """Time stamps of all frames in the order shown, from packet headers alone (works for variable frame rates)."""
    times: list[int] = []
    for packet in container.demux(track):
        if packet.size == 0:
            continue
        times.append(packet.pts if packet.pts is not None else len(times))
        if len(times) > policy.limits.max_video_frames:
            raise MediaError("video", f"it has over {policy.limits.max_video_frames} frames", where)
    if not times:
        raise MediaError("video", "it has no frames", where)
    times = sorted(times)
    if track.time_base is not None:
        _check_video(track.width, track.height, float((times[-1] - times[0]) * track.time_base), policy, where)
    return times


def _pick_in_one_pass(
    container: Any, track: Any, wanted: Sequence[int], policy: MediaPolicy, where: str
) -> list[PIL.Image.Image]:
    """The first frame at or after each wanted time; the last one where the clip ends early."""
    picked: list[PIL.Image.Image] = []
    last = None
    for position, frame in enumerate(_decode(container, track, policy, where)):
        time = frame.pts if frame.pts is not None else position
        last = frame
        image = None
        while len(picked) < len(wanted) and time >= wanted[len(picked)]:
            image = image or frame.to_image()
            picked.append(image)
        if len(picked) == len(wanted):
            return picked
    if last is not None:
        picked += [last.to_image()] * (len(wanted) - len(picked))
    return picked


def _pick_by_seeking(
    container: Any, track: Any, wanted: Sequence[int], policy: MediaPolicy, where: str
) -> list[PIL.Image.Image]:
    """Each wanted frame from its preceding key frame on, within an equal share of the decoding budget."""
    share = max(1, policy.limits.max_decoded_frames // len(wanted))
    picked = []
    for time in wanted:
        container.seek(time, stream=track, backward=True)
        nearest = None
        for decoded, frame in enumerate(_decode(container, track, policy, where), start=1):
            nearest = frame
            if frame.pts is None or frame.pts >= time or decoded >= share:
                break
        if nearest is not None:
            picked.append(nearest.to_image())
        elif picked:
            picked.append(picked[-1])
    return picked + picked[-1:] * (len(wanted) - len(picked))


def _decode(container: Any, track: Any, policy: MediaPolicy, where: str) -> Iterator[Any]:
    for count, frame in enumerate(container.decode(track), start=1):
        if count > policy.limits.max_decoded_frames + 1:
            return
        # The stream may announce small frames and hold big ones.
        _check_video(frame.width, frame.height, 0.0, policy, where)
        yield frame
