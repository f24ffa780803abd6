"""Model inputs of images, videos and audio clips, and the tokens that stand for each of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch

from .chat_unimoe import MEDIA_KINDS, MediaItem, media_keys
from .media_audio_unimoe import load_audio
from .media_policy_unimoe import MediaError, MediaPolicy, OptionError, PlaceholderError
from .media_unimoe import load_image
from .media_video_unimoe import load_video
from .placeholders_unimoe import Run

IMAGE, VIDEO, SPEECH, SOUND = 1, 2, 3, 4  # mm_token_type_ids; the order of MODALITIES in the configuration
IMAGE_ASPECT_RATIOS = ("square", "pad")


def process_media(
    processor: Any, media: list[MediaItem], options: dict[str, Any], policy: MediaPolicy
) -> tuple[dict[str, Any], dict[str, list[list[Run]]]]:
    """Model inputs of all media, and for each medium, by kind, the tokens that stand for it."""
    tensors: dict[str, Any] = {}
    for item in media:
        if item.value is None:
            raise MediaError(item.kind, f"the item has none; give it under {media_keys(item.kind)}", item.where)
    images, videos, audio = ([item for item in media if item.kind == kind] for kind in MEDIA_KINDS)
    if images:
        pictures = [load_image(item.value, policy, item.where) for item in images]
        tensors["pixel_values"] = image_pixels(processor, pictures, **options.get("images_kwargs", {}))
    if videos:
        frames_of, settings = _part(processor, "video_processor", "videos"), options.get("videos_kwargs", {})
        count, rule = settings.get("num_frames"), settings.get("sampling") or frames_of.sampling
        count = frames_of.num_frames if count is None else count
        clips = [load_video(item.value, count, rule, policy, item.where) for item in videos]
        tensors |= frames_of(clips, return_tensors="pt", **settings)
    counts: list[int] = []
    if audio:
        extractor = _part(processor, "feature_extractor", "audio")
        asked = options.get("sampling_rate")
        rates = [asked if item.sampling_rate is None else item.sampling_rate for item in audio]
        waves = [
            load_audio(item.value, extractor.sampling_rate, rate, policy, item.where)
            for item, rate in zip(audio, rates, strict=True)
        ]
        features = extractor(waves, encoders=[item.encoder for item in audio], return_tensors="pt")
        counts = features.pop("windows_per_clip")
        tensors |= features
    if options.get("return_tensors") == "np":
        tensors = {name: tensor.numpy() for name, tensor in tensors.items()}
    return tensors, waiting_runs(processor, media, iter(counts))


def image_pixels(processor: Any, pictures: list[PIL.Image.Image], **settings: Any) -> Any:
    """Pixels of pictures [n, 3, H, W] as the processor's `image_aspect_ratio`, `image_antialias` and image processor make
    them.

    Raises:
        PlaceholderError: the processor has no image processor.
        OptionError: the image processor has no mean to pad pictures with, or no height and width to stretch them to.
    """
    image_processor = _part(processor, "image_processor", "images")
    if processor.image_aspect_ratio == "pad":
        mean = settings.get("image_mean") or getattr(image_processor, "image_mean", None)
        if mean is None:
            name = type(image_processor).__name__
            raise OptionError(
                f"image_aspect_ratio is 'pad', but the {name} has no image_mean: set it, or use 'square'."
            )
        pictures = [padded_to_square(picture, mean) for picture in pictures]
    if not processor.image_antialias:
        size = settings.get("size") or getattr(image_processor, "size", None) or {}
        if "height" not in size or "width" not in size:
            raise OptionError(
                f"image_antialias is false, but the {type(image_processor).__name__} has the size {dict(size)}: give it a "
                "height and a width, to which pictures are stretched."
            )
        pictures = [stretched(picture, size["height"], size["width"]) for picture in pictures]
    return image_processor(images=pictures, return_tensors="pt", **settings)["pixel_values"]


def padded_to_square(picture: PIL.Image.Image, mean: float | Sequence[float]) -> PIL.Image.Image:
    """An RGB picture in the middle of the smallest square that holds it, on the colour that becomes nearly 0.

    Args:
        mean: of the image processor, in 0..1 for every channel or for each; the colour is int(255 * mean).
    """
    width, height = picture.size
    if width == height:
        return picture
    means = [mean] * 3 if isinstance(mean, int | float) else mean
    red, green, blue = (int(255 * value) for value in means)
    side = max(width, height)
    square = PIL.Image.new("RGB", (side, side), (red, green, blue))
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


def stretched(picture: PIL.Image.Image, height: int, width: int) -> PIL.Image.Image:
    """An RGB picture of this size, bilinear without smoothing: where it shrinks, pixels in between are passed over.

    As torchvision's `Resize(..., antialias=False)` on uint8 tensors, with which MoAI's demo reads pictures.
    """
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)
    return PIL.Image.fromarray(resized[0].round().byte().permute(1, 2, 0).contiguous().numpy())


def waiting_runs(processor: Any, media: list[MediaItem], windows: Iterator[int]) -> dict[str, list[list[Run]]]:
    """Per kind, the runs of tokens that stand for each medium; `windows` gives the windows of each audio clip."""
    waiting: dict[str, list[list[Run]]] = {kind: [] for kind in MEDIA_KINDS}
    for item in media:
        if item.kind == "image":
            runs = [(processor.image_token_id, processor.image_tokens, IMAGE)]
        elif item.kind == "video":
            runs = [(processor.video_token_id, processor.video_tokens, VIDEO)]
        else:
            count = next(windows)
            speech = (processor.audio_token_id, count * processor.speech_tokens, SPEECH)
            sound = (processor.sound_token_id, count * processor.sound_tokens, SOUND)
            runs = {"speech": [speech], "sound": [sound], "both": [speech, sound]}[item.encoder]
        runs = [run for run in runs if run[1] > 0]
        if not runs:
            branch = f" with encoder={item.encoder!r}" if item.kind == "audio" else ""
            raise PlaceholderError(f"{item.where}: this processor takes no {item.kind}{branch} (0 tokens for it).")
        waiting[item.kind].append(runs)
    return waiting


def _part(processor: Any, name: str, what: str) -> Any:
    part = getattr(processor, name, None)
    if part is None:
        raise PlaceholderError(f"This processor has no {name}, so it takes no {what}: leave them out.")
    return part


def check_token_counts(processor: Any) -> None:
    """Raises a PlaceholderError unless a processor's token counts are sane and fit its feature extractor."""
    for name in ("image_tokens", "video_tokens", "speech_tokens", "sound_tokens"):
        value = getattr(processor, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 65_536:
            raise PlaceholderError(f"UniMoeProcessor: {name} is {value!r}; use a whole number from 0 to 65536.")
    extractor = getattr(processor, "feature_extractor", None)
    for branch in ("speech", "sound"):
        tokens = getattr(processor, f"{branch}_tokens")
        made = extractor is not None and getattr(extractor, branch)
        if extractor is not None and made != (tokens > 0):
            has = f"the feature extractor {'makes' if made else 'does not make'} {branch} features"
            raise PlaceholderError(f"UniMoeProcessor: {branch}_tokens is {tokens}, but {has}.")
