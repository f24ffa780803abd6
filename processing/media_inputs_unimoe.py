"""Model inputs of images, videos and audio clips, and the tokens that stand for each of them."""

from collections.abc import Iterator
from typing import Any

from .chat_unimoe import MEDIA_KINDS, MediaItem
from .media_audio_unimoe import load_audio
from .media_policy_unimoe import MediaPolicy, PlaceholderError
from .media_unimoe import load_image
from .media_video_unimoe import load_video
from .placeholders_unimoe import Run

IMAGE, VIDEO, SPEECH, SOUND = 1, 2, 3, 4  # mm_token_type_ids; the order of MODALITIES in the configuration


def process_media(
    processor: Any, media: list[MediaItem], options: dict[str, Any], policy: MediaPolicy
) -> tuple[dict[str, Any], dict[str, list[list[Run]]]]:
    """Model inputs of all media, and for each medium, by kind, the tokens that stand for it."""
    tensors: dict[str, Any] = {}
    images, videos, audio = ([item for item in media if item.kind == kind] for kind in MEDIA_KINDS)
    if images:
        pictures = [load_image(item.value, policy, item.where) for item in images]
        image_processor = _part(processor, "image_processor", "images")
        pixels = image_processor(images=pictures, return_tensors="pt", **options.get("images_kwargs", {}))
        tensors["pixel_values"] = pixels["pixel_values"]
    if videos:
        frames_of, settings = _part(processor, "video_processor", "videos"), options.get("videos_kwargs", {})
        count, rule = (
            settings.get("num_frames") or frames_of.num_frames,
            settings.get("sampling") or frames_of.sampling,
        )
        clips = [load_video(item.value, count, rule, policy, item.where) for item in videos]
        tensors |= frames_of(clips, return_tensors="pt", **settings)
    counts: list[int] = []
    if audio:
        extractor = _part(processor, "feature_extractor", "audio")
        rates = [item.sampling_rate or options.get("sampling_rate") for item in audio]
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
