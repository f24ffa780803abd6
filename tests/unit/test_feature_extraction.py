"""Audio front-ends against the original implementations' tensors, and their windows."""

from pathlib import Path

import numpy as np
import pytest
import tiny_media
from transformers import WhisperFeatureExtractor

from unimoe.processing.feature_extraction_unimoe import UniMoeFeatureExtractor
from unimoe.processing.media_policy_unimoe import MediaError

TOLERANCE = 1e-4


def test_log_mel_of_thirty_seconds_equals_whisper() -> None:
    wave = tiny_media.sound(3.0)
    ours = UniMoeFeatureExtractor(feature_size=128)(wave, return_tensors="np")["speech_features"]
    theirs = WhisperFeatureExtractor(feature_size=128)(wave, sampling_rate=16_000, return_tensors="np")
    assert ours.shape == (1, 128, 3000)
    np.testing.assert_allclose(ours, theirs["input_features"], atol=TOLERANCE, rtol=0)


def test_long_clips_become_windows_of_their_own_samples() -> None:
    extractor = UniMoeFeatureExtractor(sound=True, window_seconds=1.0)
    wave = tiny_media.sound(2.25)
    output = extractor([wave, wave[:100]], return_tensors="np")
    assert output["windows_per_clip"] == [3, 1]
    assert output["speech_features"].shape == (4, 80, 100)
    assert output["audio_features"].shape == (4, 98, 128)
    alone = extractor(wave[16_000:32_000], return_tensors="np")
    np.testing.assert_array_equal(output["speech_features"][1], alone["speech_features"][0])
    np.testing.assert_array_equal(output["audio_features"][1], alone["audio_features"][0])
    assert output["audio_padding_mask"].sum(axis=1).tolist() == [0, 0, 12_000, 15_900]


def test_encoder_choice_keeps_only_the_windows_of_its_clips() -> None:
    extractor = UniMoeFeatureExtractor(sound=True, window_seconds=1.0)
    clips = [tiny_media.sound(1.5, 1), tiny_media.sound(0.5, 2), tiny_media.sound(0.5, 3)]
    output = extractor(clips, encoders=["speech", "sound", "both"], return_tensors="np")
    both = extractor(clips, return_tensors="np")
    np.testing.assert_array_equal(output["speech_features"], both["speech_features"][[0, 1, 3]])
    np.testing.assert_array_equal(output["audio_features"], both["audio_features"][[2, 3]])
    assert "audio_features" not in extractor(clips[0], encoders=["speech"])
    with pytest.raises(ValueError, match="one of"):
        extractor(clips, encoders=["speech"])


def test_legacy_whisper_chunks_drop_one_sample_each() -> None:
    """Uni-MoE section 5.3: while more than one window remains, window + 1 samples are taken and the last is dropped."""
    extractor = UniMoeFeatureExtractor(window_seconds=1.0, legacy_whisper_chunks=True)
    assert [extractor.count_windows(n) for n in (1, 16_000, 16_001, 16_002, 32_002, 32_003)] == [1, 1, 1, 2, 2, 3]
    wave = tiny_media.sound(2.0)
    output = extractor(wave, return_tensors="np")["speech_features"]
    second = extractor(wave[16_001:], return_tensors="np")["speech_features"][0]
    np.testing.assert_array_equal(output[1], second)
    with pytest.raises(ValueError, match="sound=False"):
        UniMoeFeatureExtractor(sound=True, legacy_whisper_chunks=True)


def test_sound_branch_can_share_the_log_mel() -> None:
    extractor = UniMoeFeatureExtractor(sound=True, sound_features="mel", window_seconds=1.0)
    output = extractor(tiny_media.sound(), return_tensors="np")
    np.testing.assert_array_equal(output["audio_features"], output["speech_features"])
    assert "audio_padding_mask" not in output


def test_too_many_windows_are_refused() -> None:
    extractor = UniMoeFeatureExtractor(window_seconds=1.0, max_windows=2)
    with pytest.raises(MediaError, match=r"clip 1: it needs 3 windows; allowed are 2"):
        extractor([tiny_media.sound(0.5), tiny_media.sound(2.5)])


def test_settings_survive_saving(tmp_path: Path) -> None:
    extractor = UniMoeFeatureExtractor(sound=True, window_seconds=2.0, feature_size=128, max_windows=7)
    extractor.save_pretrained(tmp_path)
    again = UniMoeFeatureExtractor.from_pretrained(tmp_path)
    assert again.to_dict() == extractor.to_dict()
    assert again.window_samples == 32_000


@pytest.mark.parametrize(
    "settings",
    [{"speech": False}, {"sound_features": "mfcc"}, {"window_seconds": 0.0}, {"window_seconds": float("nan")}],
)
def test_impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="UniMoeFeatureExtractor"):
        UniMoeFeatureExtractor(**settings)
