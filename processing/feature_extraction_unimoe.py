"""Audio front-ends: Whisper's log-mel spectrogram for the speech tower and Kaldi filter banks for the sound tower.

Both cut a clip into windows of equal length; every window gives one row of features. No torchaudio.
"""

import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature

from .media_audio_unimoe import load_audio
from .media_policy_unimoe import DEFAULT_POLICY, MediaError, MediaPolicy

ENCODER_CHOICES = ("both", "speech", "sound")
# BEATs normalises its filter banks by these figures of AudioSet (arXiv 2212.09058).
FBANK_MEAN, FBANK_STD = 15.41663, 6.55582


class UniMoeFeatureExtractor(SequenceFeatureExtractor):
    """Turns clips into windows of features for one or both audio branches.

    Args:
        speech: make `speech_features` (log-mel, [n_windows, num_mel_bins, frames]).
        sound: make `audio_features` and `audio_padding_mask` ([n_windows, samples], True = padding).
        sound_features: "fbank" (BEATs: Kaldi filter banks [n_windows, frames, sound_mel_bins]) or "mel" (the speech
            branch's log-mel, for models whose sound connector reads the speech tower; no padding mask then).
        feature_size: mel bins of the log-mel spectrogram, 80 or 128 for Whisper.
        sampling_rate: Hz; clips at other rates are resampled.
        window_seconds: length of a window; the last one of a clip is padded (log-mel: zeros; fbank: its last sample).
        max_windows: a longer clip is refused; None: no limit but that of the media policy.
        legacy_whisper_chunks: cut as Uni-MoE does for Whisper: while more than one window remains take one sample more
            than a window and drop it. Only without the sound branch.
    """

    model_input_names = ["speech_features", "audio_features", "audio_padding_mask"]

    def __init__(
        self,
        speech: bool = True,
        sound: bool = False,
        sound_features: str = "fbank",
        feature_size: int = 80,
        sampling_rate: int = 16_000,
        window_seconds: float = 30.0,
        n_fft: int = 400,
        hop_length: int = 160,
        sound_mel_bins: int = 128,
        max_windows: int | None = None,
        legacy_whisper_chunks: bool = False,
        padding_value: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if not speech and not sound:
            raise ValueError("UniMoeFeatureExtractor: speech and sound are both False; switch at least one on.")
        if sound_features not in ("fbank", "mel"):
            raise ValueError(f"UniMoeFeatureExtractor: sound_features is {sound_features!r}; use 'fbank' or 'mel'.")
        if legacy_whisper_chunks and sound:
            raise ValueError("UniMoeFeatureExtractor: legacy_whisper_chunks cuts for Whisper only; set sound=False.")
        if not 0 < window_seconds <= 120 or window_seconds * sampling_rate < max(n_fft, 400):
            raise ValueError(f"UniMoeFeatureExtractor: window_seconds is {window_seconds}; use 0.025 to 120.")
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.speech, self.sound, self.sound_features = speech, sound, sound_features
        self.window_seconds, self.max_windows = window_seconds, max_windows
        self.n_fft, self.hop_length, self.sound_mel_bins = n_fft, hop_length, sound_mel_bins
        self.legacy_whisper_chunks = legacy_whisper_chunks
        self.return_attention_mask = False
        self.padding_side = None  # windows have one length; a side would only contradict the tokenizer's in pipelines

    @property
    def window_samples(self) -> int:
        """Samples per window."""
        return round(self.window_seconds * self.sampling_rate)

    def count_windows(self, samples: int) -> int:
        """How many windows a clip of so many samples (at `sampling_rate`) is cut into."""
        if samples < 1:
            raise ValueError(f"A clip of {samples} samples has no windows.")
        step = self.window_samples + int(self.legacy_whisper_chunks)
        return max(1, -(-samples // step))

    def __call__(
        self,
        raw_speech: np.ndarray | Sequence[Any],
        sampling_rate: int | None = None,
        encoders: Sequence[str] | None = None,
        return_tensors: str | None = None,
        policy: MediaPolicy = DEFAULT_POLICY,
        **kwargs: Any,
    ) -> BatchFeature:
        """Features of one clip or a list of clips.

        Args:
            raw_speech: a clip or a list of clips; each an array [samples] or anything `load_audio` reads.
            sampling_rate: of the arrays, Hz; default: this extractor's.
            encoders: per clip "both", "speech" or "sound"; a branch holds only the windows of clips that use it.

        Returns:
            `speech_features`, `audio_features`, `audio_padding_mask` (as far as made; windows of all clips in order)
            and `windows_per_clip`, a list of ints. An absent branch has no key.
        """
        unknown = set(kwargs) - {"padding", "return_attention_mask", "truncation", "max_length", "device"}
        if unknown:
            raise TypeError(f"UniMoeFeatureExtractor got unknown arguments: {sorted(unknown)}.")
        clips = [load_audio(c, self.sampling_rate, sampling_rate, policy) for c in _as_list(raw_speech)]
        encoders = ["both"] * len(clips) if encoders is None else list(encoders)
        if len(encoders) != len(clips) or not set(encoders) <= set(ENCODER_CHOICES):
            raise ValueError(f"encoders must hold one of {ENCODER_CHOICES} per clip ({len(clips)}), got {encoders}.")
        counts = [self.count_windows(len(clip)) for clip in clips]
        self._check_counts(counts)
        speech = self._windows_of("speech", clips, encoders) if self.speech else []
        sound = self._windows_of("sound", clips, encoders) if self.sound else []
        data: dict[str, Any] = {}
        if speech:
            data["speech_features"] = self._log_mel(speech)
        if sound and self.sound_features == "mel":
            data["audio_features"] = self._log_mel(sound)
        elif sound:
            data["audio_features"], data["audio_padding_mask"] = self._fbank(sound)
        features = BatchFeature(data, tensor_type=return_tensors)
        features["windows_per_clip"] = counts
        return features

    def fetch_audio(self, audio: Any, sampling_rate: int | None = None) -> list[np.ndarray] | np.ndarray:
        """Clips decoded under the default media policy; pipelines call this instead of opening files themselves."""
        rate = self.sampling_rate if sampling_rate is None else sampling_rate
        if rate < 1:
            raise MediaError("audio", f"its sampling rate is {rate} Hz; give a positive one, or None")
        if isinstance(audio, list | tuple) and not _is_clip(audio):
            return [load_audio(clip, rate) for clip in audio]
        return load_audio(audio, rate)

    def _check_counts(self, counts: Iterable[int]) -> None:
        for index, count in enumerate(counts):
            if self.max_windows is not None and count > self.max_windows:
                seconds = self.max_windows * self.window_seconds
                raise MediaError(
                    "audio",
                    f"it needs {count} windows; allowed are {self.max_windows} ({seconds:g} s)",
                    f"clip {index}",
                )

    def _windows_of(self, branch: str, clips: list[np.ndarray], encoders: Sequence[str]) -> list[np.ndarray]:
        """Windows [<= window_samples] of the clips that use a branch."""
        step = self.window_samples + int(self.legacy_whisper_chunks)
        chosen = (clip for clip, encoder in zip(clips, encoders, strict=True) if encoder in ("both", branch))
        return [clip[i : i + step][: self.window_samples] for clip in chosen for i in range(0, len(clip), step)]

    def _log_mel(self, windows: list[np.ndarray]) -> np.ndarray:
        """[n, feature_size, window_samples // hop_length] float32, as Whisper computes it (arXiv 2212.04356, 2.2)."""
        filters = _whisper_filters(self.n_fft, self.sampling_rate, self.feature_size)
        hann = np.hanning(self.n_fft + 1)[:-1]
        # Filled in place: many small pieces joined at the end would stay with the process for long.
        features = np.empty((len(windows), self.feature_size, self.window_samples // self.hop_length), np.float32)
        for index, window in enumerate(windows):
            samples = np.pad(window.astype(np.float64), (0, self.window_samples - len(window)))
            samples = np.pad(samples, self.n_fft // 2, mode="reflect")
            frames = np.lib.stride_tricks.sliding_window_view(samples, self.n_fft)[:: self.hop_length][:-1]
            power = np.abs(np.fft.rfft(frames * hann)) ** 2
            log_mel = np.log10(np.maximum(power @ filters, 1e-10)).T
            features[index] = (np.maximum(log_mel, log_mel.max() - 8.0) + 4.0) / 4.0
        return features

    def _fbank(self, windows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """BEATs features [n, frames, sound_mel_bins] float32 and the mask [n, window_samples], True on padding."""
        features, masks = [], []
        for window in windows:
            padded = np.pad(window, (0, self.window_samples - len(window)), mode="edge")
            banks = kaldi_fbank(padded, self.sampling_rate, self.sound_mel_bins)
            features.append((banks - FBANK_MEAN) / (2 * FBANK_STD))
            masks.append(np.arange(self.window_samples) >= len(window))
        return np.stack(features).astype(np.float32, copy=False), np.stack(masks)


def kaldi_fbank(samples: np.ndarray, sampling_rate: int, mel_bins: int) -> np.ndarray:
    """Kaldi's log mel filter banks [frames, mel_bins] float32 of samples [n] in -1..1.

    Frames of 25 ms every 10 ms (only whole ones), mean removed, pre-emphasis 0.97, Povey window, power spectrum padded
    to a power of two, triangular filters on Kaldi's mel scale from 20 Hz to half the rate, natural logarithm.

    In torch's float32, like the original: frames of constant padding hold nothing but rounding noise, which the
    logarithm makes visible, so a more exact computation would differ from what BEATs was trained on.
    """
    length, shift = int(sampling_rate * 0.025), int(sampling_rate * 0.010)
    n_fft = 1 << (length - 1).bit_length()
    scaled = torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32)) * 2**15  # Kaldi's 16-bit integer scale
    frames = scaled.unfold(0, length, shift)
    frames = frames - frames.mean(dim=1, keepdim=True)
    previous = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    frames = (frames - 0.97 * previous) * torch.hann_window(length, periodic=False).pow(0.85)
    power = torch.fft.rfft(frames, n=n_fft).abs().pow(2)
    banks = power @ torch.from_numpy(_kaldi_filters(n_fft, sampling_rate, mel_bins)).float()
    return banks.clamp_min(torch.finfo(torch.float32).eps).log().numpy()


@lru_cache(maxsize=8)
def _kaldi_filters(n_fft: int, sampling_rate: int, mel_bins: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the lowest of 128 filters are empty at this FFT size, in the original too
        return mel_filter_bank(
            num_frequency_bins=1 + n_fft // 2,
            num_mel_filters=mel_bins,
            min_frequency=20.0,
            max_frequency=sampling_rate / 2,
            sampling_rate=sampling_rate,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        )


@lru_cache(maxsize=8)
def _whisper_filters(n_fft: int, sampling_rate: int, mel_bins: int) -> np.ndarray:
    return mel_filter_bank(
        num_frequency_bins=1 + n_fft // 2,
        num_mel_filters=mel_bins,
        min_frequency=0.0,
        max_frequency=sampling_rate / 2,
        sampling_rate=sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )


def _is_clip(audio: Any) -> bool:
    """Whether a list or tuple is one clip (numbers, or an `(array, rate)` pair) rather than several."""
    if isinstance(audio, tuple) and len(audio) == 2 and np.ndim(audio[0]) > 0 and np.ndim(audio[1]) == 0:
        return True
    return len(audio) > 0 and isinstance(audio[0], int | float | np.number)


def _as_list(audio: Any) -> list[Any]:
    if isinstance(audio, list | tuple) and not _is_clip(audio):
        return list(audio)
    return [audio]
