"""What chance, the majority answer and linear probes reach on the held-out items: every accuracy is read beside them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from ..processing.media_unimoe import load_image
from ..starter_corpus.corpus import compose_image
from ..trainers.caches.encoder_cache import EncoderCache
from .evaluate import TASKS, truth_of
from .probes import ProbeData, probe_accuracy
from .stages import IMAGE_VARIANTS

PIXEL_GRID = 16
AUDIO_BINS = 8
Samples = list[dict[str, Any]]


def heldout_baselines(
    training: Samples, heldout: Samples, train_cache: EncoderCache, test_cache: EncoderCache
) -> dict[str, dict[str, Any]]:
    """Per task: chance, majority, n, classes, probe_accuracy (None for text) and, for images, pixel_probe_accuracy."""
    rows = {}
    for task in TASKS:
        train = [sample for sample in training if sample["task"] == task]
        test = [sample for sample in heldout if sample["task"] == task]
        if not test:
            continue
        counts = Counter(map(truth_of, test))
        classes = len({truth_of(sample) for sample in [*train, *test]})
        row = {"chance": 1 / classes, "majority": counts.most_common(1)[0][1] / len(test), "n": len(test)}
        row |= {"classes": classes, "probe_accuracy": None}
        if task != "text":
            variants = IMAGE_VARIANTS if task == "image" else 1
            row["probe_accuracy"] = probe_accuracy(
                _tower_features(task, train, train_cache, variants), _tower_features(task, test, test_cache, 1)
            )
        if task == "image":
            row["pixel_probe_accuracy"] = probe_accuracy(_pixels(train, composed=False), _pixels(test, composed=True))
        rows[task] = row
    return rows


def _tower_features(task: str, samples: Samples, cache: EncoderCache, variants: int) -> ProbeData:
    shapes: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
        "image": ("image", lambda states_PC: states_PC.flatten()),
        "speech": ("speech", lambda states_WTC: _bins(states_WTC[0])),
        "sound": ("speech", lambda states_WTC: _bins(states_WTC[0])),
        "video_direction": ("video", lambda states_FPC: states_FPC.flatten()),
        "video_object": ("video", lambda states_FPC: states_FPC.mean(dim=(0, 1))),
    }
    modality, shape = shapes[task]
    rows = [(sample, variant) for sample in samples for variant in range(variants)]
    features = [shape(cache.states(sample, variant)[modality][0].float()) for sample, variant in rows]
    return ProbeData(torch.stack(features), [truth_of(s) for s, _ in rows], [_origin(s) for s, _ in rows])


def _bins(states_TC: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.adaptive_avg_pool1d(states_TC.T[None], AUDIO_BINS).flatten()


def _pixels(samples: Samples, composed: bool) -> ProbeData:
    """16 x 16 RGB pixels; training icons are composed onto backgrounds as the towers saw them."""
    import numpy as np

    rows, features = [], []
    for index, sample in enumerate(samples):
        picture = load_image(sample["messages"][0]["content"][0]["path"], mode="RGB" if composed else "RGBA")
        for variant in range(1 if composed else IMAGE_VARIANTS):
            shown = picture if composed else compose_image(picture, np.random.default_rng([index, variant]))
            small = shown.resize((PIXEL_GRID, PIXEL_GRID), Image.Resampling.BOX)
            features.append(torch.from_numpy(np.asarray(small, dtype=np.float32).copy()).flatten() / 255)
            rows.append(sample)
    return ProbeData(torch.stack(features), list(map(truth_of, rows)), list(map(_origin, rows)))


def _origin(sample: dict[str, Any]) -> str:
    source = sample["source"]
    return str(source.get("voice") or source.get("recording") or source.get("clip") or source.get("set"))
