"""Waveforms to features against golden data: Whisper's log-mel and BEATs' filter banks, windows and padding masks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import GoldenCase
from planted import require_noticed

from unimoe.processing.feature_extraction_unimoe import FBANK_MEAN, FBANK_STD, UniMoeFeatureExtractor, kaldi_fbank

SAMPLING_RATE = 16_000
# Filter banks of sound are logarithms, of nearly empty bands too, where the last bits of a Fourier transform show: from
# the same formula in float64, golden values themselves differ by up to 2.7e-5 of the largest. Whisper's log-mel is cut
# off well above that.
FBANK: dict[str, Any] = {"rtol": 4e-5, "scale": "largest"}
LOG_MEL: dict[str, Any] = {"scale": "largest"}


def hears_speech(case: GoldenCase) -> bool:
    return "_whisper_feature_extractor" in case.config


BATCH = ("wave.[0-9]*", "batch.features_mask", "batch.input_features")
REQUIREMENTS = {
    "log_mel": pytest.mark.golden(*BATCH, where=hears_speech),
    "sound_windows": pytest.mark.golden(*BATCH, "batch.padding_masks"),
    "sound_clips": pytest.mark.golden("beats.wave[0-9]*", "beats.fbank[0-9]*"),
    "sound_batch": pytest.mark.golden("beats.batch_wave", "beats.batch_padding_mask", "beats.batch_fbank"),
    "checkpoint_waveforms": pytest.mark.golden("waveforms", "padding_masks", "input_features"),
}


@REQUIREMENTS["log_mel"]
def test_log_mel(golden_case: GoldenCase) -> None:
    check_log_mel(golden_case)


@REQUIREMENTS["sound_windows"]
def test_sound_windows(golden_case: GoldenCase) -> None:
    check_sound_windows(golden_case)


@REQUIREMENTS["sound_clips"]
def test_sound_clips(golden_case: GoldenCase) -> None:
    check_sound_clips(golden_case)


@REQUIREMENTS["sound_batch"]
def test_sound_batch(golden_case: GoldenCase) -> None:
    check_sound_batch(golden_case)


@REQUIREMENTS["checkpoint_waveforms"]
def test_checkpoint_waveforms(golden_case: GoldenCase) -> None:
    check_checkpoint_waveforms(golden_case)


@pytest.mark.parametrize(
    ("check", "tensor"),
    [
        ("log_mel", "batch.input_features"),
        ("log_mel", "whisper.mel"),
        ("sound_windows", "batch.input_features"),
        ("sound_windows", "batch.padding_masks"),
        ("sound_clips", "beats.fbank0"),
        ("sound_batch", "beats.batch_fbank"),
        ("checkpoint_waveforms", "input_features"),
    ],
)
def test_one_changed_golden_value_is_noticed(check: str, tensor: str, tmp_path: Path) -> None:
    # The changed value, the seventh, is in the first window that is in use, or in the one of "whisper.mel".
    wave = {"batch": "wave.0", "whisper": "wave.1"}.get(tensor.partition(".")[0], "*")
    source = tensor.replace("fbank", "wave") if check == "sound_clips" else "*"

    def seventh(case: GoldenCase) -> int:
        used = torch.nonzero(case.input("batch.features_mask").flatten() > 0) if wave == "wave.0" else [0]
        values = case.input(tensor)
        return 7 + int(used[0]) * (values[0, 0].numel() if wave == "wave.0" else 0)

    require_noticed(
        globals()[f"check_{check}"], REQUIREMENTS[check], tensor, tmp_path, wave, source, index=seventh, size=1e-2
    )


def check_log_mel(case: GoldenCase) -> None:
    settings = case.config["_whisper_feature_extractor"]
    extractor = UniMoeFeatureExtractor(
        feature_size=settings["feature_size"],
        window_seconds=settings["chunk_length"],
        n_fft=settings["n_fft"],
        hop_length=settings["hop_length"],
    )
    numbers, clips = waves(case)
    windows = extractor(clips, return_tensors="pt")["speech_features"]
    check_used_slots(case, "batch.input_features", numbers, windows, LOG_MEL)
    if 1 in numbers:
        case.check_if_present("whisper.mel", windows[numbers.index(1)], **LOG_MEL)


def check_sound_windows(case: GoldenCase) -> None:
    samples = case.input("batch.padding_masks").shape[-1]
    extractor = UniMoeFeatureExtractor(speech=False, sound=True, window_seconds=samples / SAMPLING_RATE)
    numbers, clips = waves(case)
    output = extractor(clips, return_tensors="pt")
    check_used_slots(case, "batch.input_features", numbers, output["audio_features"][:, None], FBANK)
    check_used_slots(case, "batch.padding_masks", numbers, output["audio_padding_mask"][:, None], {})


def check_sound_clips(case: GoldenCase) -> None:
    for name in case.names("beats.wave[0-9]*"):
        banks = torch.from_numpy(kaldi_fbank(case.input(name)[0].numpy(), SAMPLING_RATE, 128))
        features = (banks - FBANK_MEAN) / (2 * FBANK_STD)
        case.check_if_present(name.replace("wave", "fbank"), features[None], **FBANK)


def check_sound_batch(case: GoldenCase) -> None:
    padding = case.input("beats.batch_padding_mask")
    clips = [wave[~mask].numpy() for wave, mask in zip(case.input("beats.batch_wave"), padding, strict=True)]
    extractor = UniMoeFeatureExtractor(speech=False, sound=True, window_seconds=padding.shape[1] / SAMPLING_RATE)
    output = extractor(clips, return_tensors="pt")
    case.check("beats.batch_fbank", output["audio_features"], **FBANK)
    case.check("beats.batch_padding_mask", output["audio_padding_mask"])


def check_checkpoint_waveforms(case: GoldenCase) -> None:
    padding, expected = case.input("padding_masks"), case.input("input_features")
    clips = [
        wave[~mask.flatten()].numpy() for wave, mask in zip(case.input("waveforms"), padding.flatten(1), strict=True)
    ]
    extractor = UniMoeFeatureExtractor(speech=False, sound=True, window_seconds=padding.shape[-1] / SAMPLING_RATE)
    features: Any = extractor(clips, return_tensors="pt")["audio_features"]
    case.check("input_features", features.view_as(expected), **FBANK)


def waves(case: GoldenCase) -> tuple[list[int], list[np.ndarray]]:
    """The numbers of the waveforms that are there, and the waveforms."""
    numbers = sorted(int(name.partition(".")[2]) for name in case.names("wave.[0-9]*"))
    return numbers, [case.input(f"wave.{number}").numpy() for number in numbers]


def check_used_slots(
    case: GoldenCase, name: str, numbers: list[int], windows: torch.Tensor, tolerance: dict[str, Any]
) -> None:
    """Compare the slots of a batch whose waveform is there: number n belongs to the n-th slot that is in use."""
    expected = case.input(name)
    actual = expected.clone()
    slots = torch.nonzero(case.input("batch.features_mask") > 0).tolist()
    for number, window in zip(numbers, windows, strict=True):
        row, column = slots[number]
        actual[row, column] = window.to(expected.dtype)
    case.check(name, actual, **tolerance)
