"""Writing the corpus's audio: 16 kHz mono, trimmed, as Ogg Opus files whose bytes depend on their content only.

Opus takes half of Vorbis' bytes here: a Vorbis file carries about 4 kB of code books, more than a spoken word.
"""

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 16_000
SPEECH_COMPRESSION = 0.95  # libsndfile's scale from 0 (largest) to 1; about 18 kbit/s
SOUND_COMPRESSION = 0.935
SHORTEST_SECONDS = 0.4
FADE_SECONDS = 0.01
PEAK = 0.7

Waveform = NDArray[np.float32]


def to_corpus_rate(wave: NDArray[np.floating], rate: int) -> Waveform:
    """Mono `wave` [samples] or [samples, channels] at `rate` Hz -> float32 [samples] at 16 kHz."""
    import soxr

    mono = wave if wave.ndim == 1 else wave.mean(axis=1)
    mono = mono.astype(np.float32)
    return mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE).astype(np.float32)


def trim_silence(wave: Waveform, threshold: float = 0.01, margin_seconds: float = 0.05) -> Waveform:
    """Cuts what is quieter than `threshold` of the peak off both ends, but for a margin."""
    loud = np.flatnonzero(np.abs(wave) > threshold * np.abs(wave).max())
    if loud.size == 0:
        return wave
    margin = round(margin_seconds * SAMPLE_RATE)
    return wave[max(0, loud[0] - margin) : loud[-1] + 1 + margin]


def write_audio(path: Path, wave: Waveform, seconds: float, compression: float) -> float:
    """Cuts `wave` at `seconds`, evens out its loudness, fades its end, pads very short ones and writes it.

    Returns:
        The length written in seconds.
    """
    import soundfile

    wave = wave[: round(seconds * SAMPLE_RATE)].copy()
    wave *= PEAK / max(float(np.abs(wave).max()), 1e-6)
    fade = min(round(FADE_SECONDS * SAMPLE_RATE), len(wave))
    wave[len(wave) - fade :] *= np.linspace(1, 0, fade, dtype=np.float32)
    wave = np.pad(wave, (0, max(0, round(SHORTEST_SECONDS * SAMPLE_RATE) - len(wave))))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=compression)
    path.write_bytes(with_fixed_serial(path.read_bytes(), zlib.crc32(path.name.encode())))
    return len(wave) / SAMPLE_RATE


def with_fixed_serial(ogg: bytes, serial: int) -> bytes:
    """Replaces the random stream number of an Ogg file, so that building twice gives the same bytes."""
    data = bytearray(ogg)
    start = 0
    while start < len(data):
        segments = data[start + 26]
        end = start + 27 + segments + sum(data[start + 27 : start + 27 + segments])
        struct.pack_into("<II", data, start + 14, serial, struct.unpack_from("<I", data, start + 18)[0])
        struct.pack_into("<I", data, start + 22, 0)
        struct.pack_into("<I", data, start + 22, _ogg_checksum(bytes(data[start:end])))
        start = end
    return bytes(data)


def _checksum_table() -> list[int]:
    table = []
    for value in range(256):
        register = value << 24
        for _ in range(8):
            register = ((register << 1) ^ (0x04C11DB7 if register & 0x80000000 else 0)) & 0xFFFFFFFF
        table.append(register)
    return table


_TABLE = _checksum_table()


def _ogg_checksum(page: bytes) -> int:
    register = 0
    for byte in page:
        register = ((register << 8) & 0xFFFFFFFF) ^ _TABLE[(register >> 24) ^ byte]
    return register
