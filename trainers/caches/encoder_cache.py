"""States of the frozen towers, computed once per medium and kept on disk.

Several runs may share a cache: while one computes states of a kind, the others wait, and then find them. Training from cached states skips the towers, which cost most of a small model's step. What is stored is exactly what
the model's `*_encoder_states` inputs take. For "mlp" connectors with `num_tokens` the states are stored already pooled
to that many positions: the connector pools first, and pooling twice changes nothing.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers.utils import logging

from ...errors import DataError
from ...modeling_unimoe.modeling_unimoe import UniMoeForCausalLM
from ...processing.media_audio_unimoe import load_audio
from ...processing.media_inputs_unimoe import image_pixels
from ...processing.media_policy_unimoe import MediaError, MediaPolicy
from ...processing.media_unimoe import load_image, open_media
from ...processing.media_video_unimoe import load_video
from ..data.conversations import MEDIA_KINDS, Sample, media_items, media_value
from .tensor_store import TensorStore

logger = logging.get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Augment = Callable[[Any, np.random.Generator], Any]


class EncoderCache:
    """Tower states by medium.

    Args:
        folder: where states are kept. Every kind of medium gets a sub-folder named after everything that its states
            depend on (tower weights, processor settings, augmentation, dtype), so stale states are never read.
        model: its towers and connectors say what to store; it is not changed.
        variants: kind ("image", "video", "audio") -> differently augmented copies per medium.
        augment: kind -> function (medium, rng) -> medium, for all copies. Images are PIL images with their alpha
            channel, videos lists of PIL frames, audio float32 arrays at the feature extractor's rate.
        dtype: of the stored states: "float32", "bfloat16" or "float16".
        batch_size: media per forward pass of a tower (videos: 1 with all its frames).
    """

    def __init__(
        self,
        folder: str | Path,
        model: UniMoeForCausalLM,
        processor: Any,
        variants: Mapping[str, int] | None = None,
        augment: Mapping[str, Augment] | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
    ) -> None:
        self.folder = Path(folder)
        self.model = model
        self.processor = processor
        self.augment = dict(augment or {})
        self.dtype = DTYPES[dtype]
        self.batch_size = batch_size
        self.variants = {kind: (variants or {}).get(kind, 1) if kind in self.augment else 1 for kind in MEDIA_KINDS}
        self.pooled = _pooled_lengths(model)
        self._stores: dict[str, TensorStore] = {}
        self._digests: dict[Any, str] = {}
        self._unreadable: dict[Any, MediaError] = {}

    def build(self, samples: Iterable[Sample], progress: bool = True, skip_unreadable: bool = False) -> int:
        """Compute what is missing, after other processes that do so now; may be interrupted and called again.

        Args:
            skip_unreadable: leave out media that cannot be read; `states` raises for the samples that they belong to.

        Returns:
            The number of states computed.

        Raises:
            MediaError: a medium cannot be read.
            CheckpointError: nothing can be written to the folder.
        """
        samples = list(samples)
        if skip_unreadable:
            self._note_unreadable(samples)
            samples = [sample for sample in samples if self.can_read(sample)]
        missing = self._missing(samples)
        total = sum(map(len, missing.values()))
        bar = tqdm(total=total, desc="Encoding media", unit="item", disable=not progress or not total)
        with bar, _eval_mode(self.model):
            return sum(self._build_kind(kind, items, bar, skip_unreadable) for kind, items in missing.items())

    def _build_kind(self, kind: str, items: dict[str, Any], bar: Any, skip_unreadable: bool) -> int:
        store = self._store(kind)
        with store.writing():
            left = {key: value for key, value in items.items() if key not in store}
            bar.update(len(items) - len(left))  # somebody else computed them meanwhile
            for batch in _batches(left, 1 if kind == "video" else self.batch_size):
                media = self._open_all(kind, batch, skip_unreadable)
                encoded = self._encode(kind, list(media.values())) if media else []
                for key, states in zip(media, encoded, strict=True):
                    store.add(key, {name: tensor.to("cpu", self.dtype) for name, tensor in states.items()})
                bar.update(len(batch))
        return len(left)

    def states(self, sample: Sample, variant: int = 0) -> dict[str, list[torch.Tensor]]:
        """States of a sample's media, each in the order of its placeholders.

        Returns:
            "image": one [P, C] per image, "video": one [F, P, C] per video, "speech" and "sound": one [windows, T, C]
            per audio item that uses the branch.

        Raises:
            DataError: a medium was not built.
            MediaError: a medium cannot be read.
        """
        found: dict[str, list[torch.Tensor]] = {}
        for item in media_items(sample):
            wanted = item.get("encoder") or "both"
            for name, tensor in self._stored(sample, item, variant).items():
                if wanted in ("both", name):
                    found.setdefault(name, []).append(tensor)
        return found

    def audio_windows(self, sample: Sample) -> list[int]:
        """Number of windows of every audio item of a sample. Raises as `states` does."""
        clips = [item for item in media_items(sample) if item["type"] == "audio"]
        return [len(next(iter(self._stored(sample, item, 0).values()))) for item in clips]

    def can_read(self, sample: Sample) -> bool:
        """Whether no medium of a sample has turned out to be unreadable."""
        return not any(self._name(media_value(item)) in self._unreadable for item in media_items(sample))

    def statistics(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation [C] (float32) of the stored states of "image", "video", "speech" or "sound"."""
        kind = "audio" if name in ("speech", "sound") else name
        return self._store(kind).statistics(name)

    def _stored(self, sample: Sample, item: dict[str, Any], variant: int) -> dict[str, torch.Tensor]:
        kind, value = item["type"], media_value(item)
        if self._name(value) in self._unreadable:
            raise self._unreadable[self._name(value)]
        states = self._store(kind).get(self._key(kind, value, variant % self.variants[kind]))
        if states is None:
            raise DataError(
                f"Sample {sample['id']}: the {kind} {value!r} is not in the encoder cache {self.folder}: call build() with "
                "this sample first."
            )
        return states

    def _note_unreadable(self, samples: Iterable[Sample]) -> None:
        """Remember the files that cannot even be opened."""
        for sample in samples:
            for item in media_items(sample):
                try:
                    self._key(item["type"], media_value(item), 0)
                except MediaError as error:
                    self._unreadable[self._name(media_value(item))] = error

    def _missing(self, samples: Iterable[Sample]) -> dict[str, dict[str, Any]]:
        missing: dict[str, dict[str, Any]] = {}
        for sample in samples:
            for item in media_items(sample):
                kind, value = item["type"], media_value(item)
                for variant in range(self.variants[kind]):
                    key = self._key(kind, value, variant)
                    if key not in self._store(kind):
                        missing.setdefault(kind, {})[key] = value
        return missing

    def _store(self, kind: str) -> TensorStore:
        if kind not in self._stores:
            fingerprint = _fingerprint(
                self.model, self.processor, kind, self.pooled, self.augment.get(kind), self.dtype
            )
            self._stores[kind] = TensorStore(self.folder / f"{kind}-{fingerprint[:16]}")
        return self._stores[kind]

    def _name(self, value: Any) -> Any:
        return value if isinstance(value, str) else id(value)

    def _key(self, kind: str, value: Any, variant: int) -> str:
        name = self._name(value)
        if name not in self._digests:
            self._digests[name] = _content_digest(kind, value, self.processor.media_policy)
        return f"{self._digests[name]}-{variant}"

    def _open_all(self, kind: str, batch: list[tuple[str, Any]], skip_unreadable: bool) -> dict[str, Any]:
        media = {}
        for key, value in batch:
            try:
                media[key] = self._open(kind, value, key)
            except MediaError as error:
                if not skip_unreadable:
                    raise
                self._unreadable[self._name(value)] = error
        return media

    def _open(self, kind: str, value: Any, key: str) -> Any:
        """A medium as its augmentation and its front-end take it."""
        augment = self.augment.get(kind)
        rng = np.random.default_rng(int(hashlib.sha256(key.encode()).hexdigest()[:16], 16))
        policy = self.processor.media_policy
        if kind == "image":
            image = load_image(value, policy, str(value), "RGB" if augment is None else "RGBA")
            return image if augment is None else augment(image, rng)
        if kind == "video":
            front = self.processor.video_processor
            medium: Any = load_video(value, front.num_frames, front.sampling, policy, str(value))
        else:
            medium = load_audio(value, self.processor.feature_extractor.sampling_rate, None, policy, str(value))
        return medium if augment is None else augment(medium, rng)

    @torch.no_grad()
    def _encode(self, kind: str, media: list[Any]) -> list[dict[str, torch.Tensor]]:
        base, device = self.model.model, self.model.device
        if kind == "image":
            pixels = image_pixels(self.processor, media)
            states = {"image": base.encode_image(pixels.to(device)).split(1)}
            return [{"image": self._pool("image", item[0])} for item in states["image"]]
        if kind == "video":
            pixels = self.processor.video_processor(media, return_tensors="pt")["pixel_values_videos"]
            return [{"video": self._pool("video", item)} for item in base.encode_video(pixels.to(device))]
        features = self.processor.feature_extractor(media, return_tensors="pt")
        windows = features.pop("windows_per_clip")
        branches = _encode_audio(self.model, features.to(device))
        split = {name: self._pool(name, states).split(windows) for name, states in branches.items()}
        return [{name: clips[i] for name, clips in split.items()} for i in range(len(media))]

    def _pool(self, name: str, states: torch.Tensor) -> torch.Tensor:
        length = self.pooled.get(name)
        if length is None:
            return states
        leading = states.shape[:-2]
        flat = states.reshape(-1, *states.shape[-2:]).float().transpose(1, 2)
        return nn.functional.adaptive_avg_pool1d(flat, length).transpose(1, 2).reshape(*leading, length, -1)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _encode_audio(model: UniMoeForCausalLM, features: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    base, branches = model.model, {}
    if base.speech_connector is not None:
        branches["speech"] = base.encode_speech(features["speech_features"])
    if base.sound_connector is not None and base.audio_tower is not None:
        branches["sound"] = base.encode_sound(features["audio_features"], features.get("audio_padding_mask"))
    elif base.sound_connector is not None:
        windows = features["speech_features"] if "speech_features" in features else features["audio_features"]
        branches["sound"] = branches["speech"] if "speech" in branches else base.encode_speech(windows)
    return branches


def _pooled_lengths(model: UniMoeForCausalLM) -> dict[str, int]:
    return {
        name: connector.num_tokens
        for name, connector in model.config.connectors.items()
        if connector is not None and connector.type == "mlp" and connector.num_tokens is not None
    }


def _fingerprint(
    model: UniMoeForCausalLM,
    processor: Any,
    kind: str,
    pooled: dict[str, int],
    augment: Augment | None,
    dtype: torch.dtype,
) -> str:
    base, config, digest = model.model, model.config, hashlib.sha256()
    towers = {"audio": [base.speech_tower, base.audio_tower]}.get(kind, [base.vision_tower])
    parts = {"image": "image_processor", "video": "video_processor", "audio": "feature_extractor"}
    settings = {
        "front_end": getattr(processor, parts[kind]).to_dict(),
        "vision": [config.vision_feature_layer, config.vision_feature_select_strategy, config.vision_token_grid],
        "branches": [base.speech_connector is not None, base.sound_connector is not None],
        "pooled": {name: pooled.get(name) for name in {"audio": ("speech", "sound")}.get(kind, (kind,))},
        "augment": None if augment is None else f"{augment.__module__}.{augment.__qualname__}",
        "dtype": str(dtype),
    }
    if kind == "image" and processor.image_aspect_ratio != "square":
        settings["image_aspect_ratio"] = processor.image_aspect_ratio
    if kind == "image" and not processor.image_antialias:
        settings["image_antialias"] = False
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for tower in (tower for tower in towers if tower is not None):
        digest.update(json.dumps(tower.config.to_diff_dict(), sort_keys=True, default=str).encode())
        for name, tensor in sorted(tower.state_dict().items()):
            digest.update(name.encode())
            digest.update(
                tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                if tensor.dim()
                else b""
            )
    return digest.hexdigest()


def _content_digest(kind: str, value: Any, policy: MediaPolicy) -> str:
    if isinstance(value, str | bytes):
        with open_media(value, kind, policy, value if isinstance(value, str) else "") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:32]  # type: ignore[arg-type]
    if isinstance(value, list) and value and isinstance(value[0], str | bytes):  # a video's frames
        frames = (_content_digest("image", frame, policy) for frame in value)
        return hashlib.sha256("".join(frames).encode()).hexdigest()[:32]
    array = np.asarray(value)
    return hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).hexdigest()[:32]


def _batches(items: Mapping[str, Any], size: int) -> Iterator[list[tuple[str, Any]]]:
    pairs = list(items.items())
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]
