"""Videos as a fixed number of frames, each prepared exactly as an image for the same vision tower.

Works on PIL and NumPy, so neither torchvision nor torchcodec is needed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, PILImageResampling
from transformers.processing_utils import VideosKwargs

from .media_policy_unimoe import DEFAULT_POLICY, MediaPolicy
from .media_video_unimoe import SAMPLING_RULES, load_video

try:
    from transformers.video_processing_utils import VideoProcessorMixin
except ImportError:  # an older transformers, whose only video base class needs torchvision
    from transformers.image_processing_utils import BaseImageProcessor

    class VideoProcessorMixin(BaseImageProcessor):  # type: ignore[no-redef]
        """The little of transformers' mixin that is used here."""

        def __call__(self, videos: Any, **kwargs: Any) -> BatchFeature:  # type: ignore[override]
            return self.preprocess(videos, **kwargs)

        def to_dict(self) -> dict[str, Any]:
            settings = super().to_dict()
            settings.pop("image_processor_type", None)
            return {**settings, "video_processor_type": type(self).__name__}


# What makes pixels out of a picture; shared by name with transformers' image processors.
_PIXEL_SETTINGS = (
    "do_convert_rgb",
    "do_resize",
    "size",
    "default_to_square",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_pad",
)


class UniMoeVideoKwargs(VideosKwargs, total=False):
    """Settings of `UniMoeVideoProcessor` beyond those of every video processor."""

    sampling: str | None


class UniMoeVideoProcessor(VideoProcessorMixin, PilBackend):
    """Makes `pixel_values_videos` [n_videos, num_frames, 3, height, width], float32.

    Settings: those of an image processor (size, crop, mean, ...), `num_frames` (8), and `sampling`: "uniform" takes
    frames from the first to the last, "unimoe" follows Uni-MoE (frame i * floor(total / num_frames)).
    """

    valid_kwargs = UniMoeVideoKwargs  # type: ignore[assignment]
    model_input_names = ["pixel_values_videos"]
    do_convert_rgb = True
    do_resize = True
    size: Any = {"height": 224, "width": 224}
    resample = PILImageResampling.BICUBIC
    do_center_crop = False
    crop_size: Any = None
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    num_frames = 8
    sampling = "uniform"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.sampling not in SAMPLING_RULES:
            raise ValueError(f"UniMoeVideoProcessor: sampling is {self.sampling!r}; use one of {SAMPLING_RULES}.")
        if not 1 <= self.num_frames <= 1024:
            raise ValueError(f"UniMoeVideoProcessor: num_frames is {self.num_frames}; use 1 to 1024.")

    @classmethod
    def from_image_processor(cls, image_processor: Any, **kwargs: Any) -> "UniMoeVideoProcessor":
        """A video processor whose frames get the same pixels as images do; kwargs as in the constructor."""
        settings: dict[str, Any] = {name: getattr(image_processor, name, None) for name in _PIXEL_SETTINGS}
        settings = {name: value for name, value in settings.items() if value is not None}
        # An absent setting of the image processor must not fall back to a default of this class.
        for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad"):
            settings.setdefault(name, False)
        for name in ("size", "crop_size"):
            if name in settings:
                settings[name] = {k: v for k, v in dict(settings[name]).items() if v is not None}
        return cls(**{**settings, **kwargs})

    def preprocess(  # type: ignore[override]
        self,
        videos: Any,
        num_frames: int | None = None,
        sampling: str | None = None,
        return_tensors: str | None = None,
        policy: MediaPolicy = DEFAULT_POLICY,
        **kwargs: Any,
    ) -> BatchFeature:
        """Frames of one video or a list of videos.

        Args:
            videos: a path, bytes, array [F, H, W, 3] or list of frames (one video), or a list of these.
            num_frames, sampling: override the settings of this processor.

        Raises:
            MediaError: see `load_video`.
        """
        ignored = {"do_sample_frames", "return_metadata", "video_metadata", "device"}
        if unknown := {name for name, value in kwargs.items() if value is not None} - ignored:
            raise TypeError(f"UniMoeVideoProcessor got unknown arguments: {sorted(unknown)}.")
        count, rule = num_frames or self.num_frames, sampling or self.sampling
        clips = [load_video(video, count, rule, policy, f"video {i}") for i, video in enumerate(_as_list(videos))]
        pixels = [np.stack(self._frames_to_pixels(clip)) for clip in clips]
        return BatchFeature({"pixel_values_videos": pixels}, tensor_type=return_tensors)

    def fetch_videos(self, video_url_or_urls: Any, sample_indices_fn: Any = None) -> Any:
        """Videos are opened by `preprocess` itself, under its media policy; this returns its argument."""
        return video_url_or_urls

    def _frames_to_pixels(self, frames: Sequence[PIL.Image.Image]) -> list[np.ndarray]:
        arrays = {id(frame): frame for frame in frames}  # short clips repeat frames: prepare each once
        prepared = {
            key: self._preprocess(
                images=[self.process_image(frame, do_convert_rgb=True)],
                do_resize=self.do_resize,
                size=self.size,
                resample=self.resample,
                do_center_crop=self.do_center_crop,
                crop_size=self.crop_size,
                do_rescale=self.do_rescale,
                rescale_factor=self.rescale_factor,
                do_normalize=self.do_normalize,
                image_mean=self.image_mean,
                image_std=self.image_std,
                do_pad=False,
                pad_size=None,
                return_tensors=None,
            )["pixel_values"][0]
            for key, frame in arrays.items()
        }
        return [np.asarray(prepared[id(frame)], dtype=np.float32) for frame in frames]


def _as_list(videos: Any) -> list[Any]:
    """A list of videos from one video or several; a list of single pictures is one video."""
    if isinstance(videos, np.ndarray | torch.Tensor):
        return list(videos) if videos.ndim == 5 else [videos]
    if isinstance(videos, list | tuple) and not _is_frame_list(videos):
        return list(videos)
    return [videos]


def _is_frame_list(videos: Sequence[Any]) -> bool:
    return bool(len(videos)) and all(
        isinstance(v, PIL.Image.Image) or (isinstance(v, np.ndarray | torch.Tensor) and v.ndim <= 3) for v in videos
    )
