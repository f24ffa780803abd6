"""Hostile media: bombs, cuts, polyglots, odd audio, forged videos. Only `MediaError` may come out."""

import io
import random
import struct
import sys
import time
import wave
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny_media
from refusals import QUICK, refused

from unimoe.processing.media_audio_unimoe import load_audio
from unimoe.processing.media_policy_unimoe import (
    MediaError,
    MediaLimits,
    MediaPolicy,
    MissingPackageError,
    UniMoeError,
)
from unimoe.processing.media_unimoe import load_image
from unimoe.processing.media_video_unimoe import load_video

# Images


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(side: int, pixels: bytes = b"", extra: bytes = b"") -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def animation(kind: str, frames: int = 200) -> bytes:
    pictures = [PIL.Image.new("RGB", (64, 64), (i, 0, 255 - i)) for i in range(frames)]
    stream = io.BytesIO()
    pictures[0].save(stream, kind, save_all=True, append_images=pictures[1:])
    return stream.getvalue()


@pytest.mark.parametrize("side", [9_000, 13_000, 20_000, 2**31 - 1])
def test_decompression_bombs_are_refused_by_their_header(side: int) -> None:
    rows = min(side, 500)
    pixels = zlib.compress(bytes(rows * (min(side, 20_000) * 3 + 1)), 9)
    with refused("pixels|not a readable image", "image"):
        load_image(png(side, pixels))


def test_frame_bombs_of_big_frames_are_refused_and_only_one_frame_is_decoded() -> None:
    gif = bytearray(animation("GIF", 3))
    gif[6:10] = struct.pack("<HH", 60_000, 60_000)
    with refused("pixels", "image"):
        load_image(bytes(gif))
    for kind in ("GIF", "WEBP", "PNG"):
        data = animation(kind)
        start = time.perf_counter()
        image = load_image(data)
        assert image.size == (64, 64)
        assert time.perf_counter() - start < QUICK


def test_compressed_text_chunks_do_not_unpack() -> None:
    bomb = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000), 9))
    with refused("image", "image"):
        load_image(png(8, zlib.compress(bytes(8 * 25)), bomb))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_images_cut_at_twenty_places(kind: str) -> None:
    data = tiny_media.encoded_picture(kind, height=64, width=64)
    assert load_image(data).size == (64, 64)
    for place in range(20):
        with refused("bytes|not a readable image|damaged", "image"):
            load_image(data[: len(data) * place // 21])


@pytest.mark.parametrize("junk", [bytes(range(40, 56)) + b"\0\0", b"\0" * 8 + b"\xff" * 8 + b"\0\0"])
def test_the_signature_of_archives_stands_in_pictures_by_chance(junk: bytes) -> None:
    assert load_image(tiny_media.encoded_picture("JPEG") + b"PK\5\6" + junk).size == (24, 20)


def test_polyglots_and_files_that_are_no_images(tmp_path: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("page.html", "<script>")
    with refused("also a ZIP archive", "image at here"):
        load_image(tiny_media.encoded_picture("JPEG") + archive.getvalue(), where="here")
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><image href='http://127.0.0.1/'/></svg>"
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    for name, content in (("a.png", svg), ("b.jpg", eps), ("c.png", b"GIF"), ("d.png", archive.getvalue())):
        (tmp_path / name).write_bytes(content)
        with refused("not a readable image|ZIP", "image"):
            load_image(tmp_path / name)
    (tmp_path / "sound.wav").write_bytes(tiny_media.encoded_picture())
    with refused(r"ends in \.wav is no image", "image"):
        load_image(tmp_path / "sound.wav")
    with refused(r"ends in \.png is no audio", "audio"):
        load_audio(tmp_path / "a.png")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((5, 4, 7), np.uint8),
        np.zeros((2, 2, 2, 2), np.uint8),
        np.full((4, 4, 3), np.nan),
        np.full((4, 4, 3), -1.0),
        np.full((4, 4, 3), 300, np.int64),
        np.zeros((4, 4, 3), complex),
        np.array([[["a"] * 3]]),
        np.broadcast_to(np.uint8(0), (100_000, 100_000, 3)),
    ],
)
def test_arrays_that_are_no_images(array: np.ndarray) -> None:
    with refused("shape|values|real numbers|pixels", "image"):
        load_image(array)


# Audio


def wav_header(rate: int, channels: int, samples: int, bits: int = 16) -> bytes:
    size, block = samples * channels * bits // 8, channels * bits // 8
    layout = struct.pack("<HHIIHH", 1, channels, rate, rate * block & 0xFFFFFFFF, block, bits)
    body = b"WAVEfmt " + struct.pack("<I", 16) + layout + b"data" + struct.pack("<I", size & 0xFFFFFFFF)
    return b"RIFF" + struct.pack("<I", (len(body) + size) & 0xFFFFFFFF) + body


@pytest.mark.parametrize(("rate", "channels"), [(1, 1), (0, 1), (384_000, 1), (16_000, 64), (16_000, 0), (2**31, 1)])
def test_absurd_sampling_rates_and_channels(rate: int, channels: int) -> None:
    with refused("sampling rate|channels|damaged|empty", "audio"):
        load_audio(wav_header(rate, channels, 1000) + bytes(2000 * max(1, channels)))
    with refused("sampling rate|channels|empty", "audio"):
        load_audio(np.zeros((max(1, 1000 * (channels > 0)), channels), np.float32), sampling_rate=rate)


@pytest.mark.parametrize("rate", [float("nan"), 16_000.5, "16000", True, -16_000, np.float32("inf"), [16_000]])
def test_sampling_rates_that_are_no_numbers(rate: Any) -> None:
    with refused("sampling rate", "audio"):
        load_audio(tiny_media.sound(0.1), sampling_rate=rate)


def test_ten_hours_are_refused_without_reading_them(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    samples = 10 * 3600 * 8000
    with path.open("wb") as file:
        file.write(wav_header(8000, 1, samples))
        file.truncate(44 + 2 * samples)  # sparse: takes no disk
    with refused("it lasts 36000 s; allowed are 3600 s", "audio"):
        load_audio(path)
    with refused("it lasts 36000 s", "audio"):
        load_audio(np.broadcast_to(np.float32(0), (samples,)), sampling_rate=8000)


@pytest.mark.parametrize(
    "samples",
    [
        np.array([0.0, np.nan, 0.0]),
        np.array([0.0, -np.inf]),
        np.array([1e300]),
        np.array([], np.float32),
        np.zeros((0, 2)),
        np.zeros((2, 2, 2)),
        np.float32(1.0).reshape(()),
        np.array(["a"]),
        np.zeros(9, np.uint64),
        [],
        ["a", "b"],
        [[1.0], [2.0, 3.0]],
    ],
)
def test_samples_that_are_no_sound(samples: Any) -> None:
    with refused("NaN|empty|shape|samples are|numbers|type", "audio"):
        load_audio(samples)


def test_integer_samples_do_not_overflow() -> None:
    extremes = np.array([-32768, 32767, -32768], np.int16)
    assert np.abs(load_audio(extremes)).max() <= 1.0
    assert np.abs(load_audio(np.array([-(2**31), 2**31 - 1], np.int32))).max() <= 1.0


def test_non_finite_samples_in_files() -> None:
    soundfile = pytest.importorskip("soundfile")
    stream = io.BytesIO()
    samples = tiny_media.sound()
    samples[7] = np.nan
    soundfile.write(stream, samples, 16_000, format="WAV", subtype="FLOAT")
    with refused("NaN or infinite", "audio"):
        load_audio(stream.getvalue())


def test_wav_files_need_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = tiny_media.sound()
    expected = load_audio(tiny_media.wav(samples))
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    np.testing.assert_allclose(load_audio(tiny_media.wav(samples)), expected, atol=1e-7)
    for width in (1, 3, 4):
        stream = io.BytesIO()
        with wave.open(stream, "wb") as file:
            file.setparams((1, width, 16_000, 0, "NONE", ""))
            if width == 1:
                file.writeframes(((samples * 127).round() + 128).astype(np.uint8).tobytes())
            else:
                wide = (samples.astype(np.float64) * (2**31 - 1)).astype("<i4").view(np.uint8).reshape(-1, 4)
                file.writeframes(wide[:, 4 - width :].tobytes())
        np.testing.assert_allclose(load_audio(stream.getvalue()), samples, atol=2e-2 if width == 1 else 1e-5)
    with refused("damaged", "audio"):
        load_audio(tiny_media.wav(samples)[:30])
    with pytest.raises(ImportError, match=r"unimoe\[audio\]"):
        load_audio(b"fLaC" + bytes(100))


def test_a_missing_package_is_one_of_our_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "soxr", None)
    for load, extra in (
        (lambda: load_video(b"\0\0\0\x20ftypisom"), "video"),
        (lambda: load_audio(b"\0\0\0\x20ftypisom"), "video"),
        (lambda: load_audio(np.zeros(100, np.float32), 16_000, 8000), "audio"),
    ):
        with pytest.raises(MissingPackageError, match=rf"unimoe\[{extra}\]") as caught:
            load()
        assert isinstance(caught.value, UniMoeError)


# Videos


def test_videos_beyond_the_limits() -> None:
    data = tiny_media.video(60)
    for limit, reason in (
        ({"max_video_seconds": 1.0}, "it lasts 2 s; allowed are 1 s"),
        ({"max_video_frames": 59}, "over 59 frames"),
        ({"max_video_pixels": 1000}, "32 x 32 pixels"),
        ({"max_file_bytes": 100}, "bytes"),
    ):
        with refused(reason, "video"):
            load_video(data, policy=MediaPolicy(limits=MediaLimits(**limit)))


def test_no_more_frames_are_decoded_than_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    from unimoe.processing import media_video_unimoe

    decoded = []
    check = media_video_unimoe._check_video
    monkeypatch.setattr(media_video_unimoe, "_check_video", lambda *a: (decoded.append(a[0]), check(*a)))
    data = tiny_media.video(3000, size=16)
    budget = 40
    frames = load_video(data, policy=MediaPolicy(limits=MediaLimits(max_decoded_frames=budget)))
    assert len(frames) == 8
    assert len(decoded) <= budget + 1 + 2  # two of the checks are those of the header


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x" * 300,
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        b"\0\0\0\x20ftypisom" + bytes(100),
        b"\x1aE\xdf\xa3" + bytes(100),
        b"RIFF\0\0\0\0AVI " + bytes(100),
    ],
)
def test_files_that_are_no_videos(data: bytes) -> None:
    with refused("bytes|not a readable video|damaged|no picture track|no frame", "video"):
        load_video(data)
    with pytest.raises(MediaError):
        load_audio(data)


def test_references_to_other_files_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Playlists and QuickTime references name other files; a fake extension must not get them opened."""
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(tiny_media.video(5))
    for name, text in (
        ("a.mp4", f"#EXTM3U\n#EXTINF:1,\n{secret}\n"),
        ("b.mp4", f"ffconcat version 1.0\nfile {secret}\n"),
    ):
        (tmp_path / name).write_text(text)
        with refused("not a readable video", "video"):
            load_video(tmp_path / name)


@pytest.mark.parametrize("frames", [[], [b"x"], [None], np.zeros((0, 4, 4, 3)), np.zeros((4, 4)), 7, None, {}])
def test_values_that_are_no_videos(frames: Any) -> None:
    with refused("frames|shape|type|readable", "video" if not isinstance(frames, list) or not frames else "image"):
        load_video(frames)


# Mutations


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 2, 8, 64])):
        at = rng.randrange(len(changed))
        action = rng.randrange(4)
        if action == 0:
            changed[at] = rng.randrange(256)
        elif action == 1:
            del changed[at : at + rng.randrange(1, 40)]
        elif action == 2:
            changed[at:at] = rng.randbytes(rng.randrange(1, 40))
        else:
            changed[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\x80"])
        if not changed:
            break
    return bytes(changed)


def encoded_sound(container: str) -> bytes:
    soundfile = pytest.importorskip("soundfile")
    stream = io.BytesIO()
    soundfile.write(stream, tiny_media.sound(0.2), 16_000, format=container)
    return stream.getvalue()


MUTATED: dict[str, tuple[Callable[[], bytes], Callable[[bytes], Any], int]] = {
    **{k: (lambda k=k: tiny_media.encoded_picture(k), load_image, 150) for k in ("PNG", "JPEG", "WEBP", "GIF", "BMP")},
    **{k: (lambda k=k: encoded_sound(k), load_audio, 150) for k in ("WAV", "FLAC", "OGG", "MP3", "AIFF")},
    "MP4": (lambda: tiny_media.video(6, track=True), load_video, 100),
    "MP4 sound": (lambda: tiny_media.video(6, track=True), load_audio, 100),
    "WebM": (lambda: tiny_media.video(6, "webm", "libvpx"), load_video, 100),
    "AVI": (lambda: tiny_media.video(6, "avi", "mpeg4"), load_video, 100),
}


@pytest.mark.parametrize("kind", MUTATED)
def test_mutated_files_raise_nothing_but_media_errors(kind: str) -> None:
    """1,900 files in all; whatever still decodes must obey the limits."""
    make, load, count = MUTATED[kind]
    original, rng = make(), random.Random(kind)
    limits = MediaLimits(
        max_image_pixels=10_000, max_audio_seconds=5.0, max_video_pixels=10_000, max_video_seconds=60.0
    )
    refusals = 0
    for _ in range(count):
        try:
            value = load(mutated(original, rng), policy=MediaPolicy(limits=limits))
        except MediaError:
            refusals += 1
            continue
        if isinstance(value, np.ndarray):
            assert np.isfinite(value).all()
            assert 1 <= len(value) <= 5 * 16_000
        else:
            assert all(f.width * f.height <= 10_000 for f in (value if isinstance(value, list) else [value]))
    assert refusals > 0
