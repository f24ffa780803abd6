"""Frames: which ones, and the same pixels as images get."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny_media
from transformers import CLIPImageProcessorPil, MobileNetV2ImageProcessorPil, SiglipImageProcessorPil

from unimoe.processing.media_audio_unimoe import load_audio
from unimoe.processing.media_policy_unimoe import MediaError, MediaLimits, MediaPolicy
from unimoe.processing.media_video_unimoe import load_video, sample_indices
from unimoe.processing.video_processing_unimoe import UniMoeVideoProcessor


def brightness(frames: list[PIL.Image.Image]) -> np.ndarray:
    return np.array([np.asarray(frame).mean() for frame in frames])


def test_sampling_rules() -> None:
    assert sample_indices(30, 8) == [0, 4, 8, 12, 17, 21, 25, 29]
    assert sample_indices(30, 8, "unimoe") == [0, 3, 6, 9, 12, 15, 18, 21]
    assert sample_indices(8, 8) == sample_indices(8, 8, "unimoe") == list(range(8))
    assert sample_indices(2, 4) == [0, 0, 1, 1]
    assert sample_indices(1, 3) == [0, 0, 0]
    with pytest.raises(ValueError, match="sampling must be one of"):
        sample_indices(30, 8, "random")


@pytest.mark.parametrize("kind", [CLIPImageProcessorPil, SiglipImageProcessorPil, MobileNetV2ImageProcessorPil])
def test_frames_get_the_pixels_of_images(kind: type) -> None:
    image_processor = kind()
    frames = [PIL.Image.fromarray(tiny_media.picture(seed, 300, 260)) for seed in range(3)]
    expected = image_processor(frames, return_tensors="np")["pixel_values"]
    processor = UniMoeVideoProcessor.from_image_processor(image_processor, num_frames=3)
    output = processor([frames, frames[::-1]], return_tensors="np")["pixel_values_videos"]
    assert output.shape == (2, 3, *expected.shape[1:])
    assert output.dtype == np.float32
    np.testing.assert_array_equal(output[0], expected)
    np.testing.assert_array_equal(output[1], expected[::-1])


@pytest.mark.parametrize(
    ("container", "codec"), [("mp4", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4"), ("matroska", "ffv1")]
)
def test_frames_of_a_file_cover_the_whole_clip(container: str, codec: str) -> None:
    data = tiny_media.video(30, container, codec)
    expected = 255 * np.array(sample_indices(30, 8)) / 29
    np.testing.assert_allclose(brightness(load_video(data)), expected, atol=6)
    expected = 255 * np.array(sample_indices(30, 8, "unimoe")) / 29
    np.testing.assert_allclose(brightness(load_video(data, sampling="unimoe")), expected, atol=6)


def test_seeking_finds_the_frames_that_a_full_pass_finds() -> None:
    data = tiny_media.video(400, gop=40)
    full = brightness(load_video(data))
    seek = MediaPolicy(limits=MediaLimits(max_decoded_frames=399))
    np.testing.assert_array_equal(brightness(load_video(data, policy=seek)), full)
    # A budget too small for the distance between key frames gives earlier frames, in order, and no more work.
    hurried = brightness(load_video(data, policy=MediaPolicy(limits=MediaLimits(max_decoded_frames=16))))
    assert len(hurried) == 8
    assert (np.diff(hurried) > 0).all()
    assert (hurried <= full + 2).all()


def test_short_clips_repeat_frames() -> None:
    assert len(load_video(tiny_media.video(1))) == 8
    frames = load_video([tiny_media.picture(1), tiny_media.picture(2)], num_frames=4)
    assert frames[0] is frames[1]
    assert frames[2] is frames[3]


def test_all_forms_of_a_video_agree(tmp_path: Path) -> None:
    data = tiny_media.video(10)
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    frames = load_video(data, num_frames=4)
    array = np.stack([np.asarray(frame) for frame in frames])
    forms = [path, str(path), data, frames, array, array.transpose(0, 3, 1, 2), list(array)]
    processor = UniMoeVideoProcessor.from_image_processor(tiny_media.image_processor(), num_frames=4)
    outputs = [processor(form, return_tensors="np")["pixel_values_videos"] for form in forms]
    for output in outputs:
        np.testing.assert_array_equal(output, outputs[0])
    np.testing.assert_array_equal(processor(forms[2:5], return_tensors="np")["pixel_values_videos"][1], outputs[0][0])


def test_a_video_gives_its_sound_track() -> None:
    data = tiny_media.video(25, track=True)
    samples = load_audio(data)
    assert samples.dtype == np.float32
    assert abs(len(samples) / 16_000 - 1.0) < 0.1
    spectrum = np.abs(np.fft.rfft(samples))
    assert abs(spectrum.argmax() * 16_000 / len(samples) - 440) < 2
    np.testing.assert_array_equal(load_audio(data), samples)
    with pytest.raises(MediaError, match="no sound track"):
        load_audio(tiny_media.video(5))


def test_settings_survive_saving(tmp_path: Path) -> None:
    processor = UniMoeVideoProcessor.from_image_processor(
        tiny_media.image_processor(), num_frames=3, sampling="unimoe"
    )
    again = UniMoeVideoProcessor(**processor.to_dict())
    assert again.to_dict() == processor.to_dict()
    assert (again.num_frames, again.sampling) == (3, "unimoe")
    clip = list(np.stack([tiny_media.picture(seed) for seed in range(7)]))
    np.testing.assert_array_equal(
        again(clip, return_tensors="np")["pixel_values_videos"],
        processor(clip, return_tensors="np")["pixel_values_videos"],
    )


@pytest.mark.parametrize("settings", [{"num_frames": 0}, {"num_frames": 5000}, {"sampling": "some"}])
def test_impossible_settings_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="UniMoeVideoProcessor"):
        UniMoeVideoProcessor(**settings)
