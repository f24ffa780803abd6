"""Reads the recorded notes out of a SoundFont 2 file (SoundFont 2.04 specification, sections 5 to 7)."""

import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError
from .audio_files import Waveform

_HEADER = struct.Struct("<20sIIIIIBbHH")
_LEFT, _RIGHT = 4, 2


@dataclass(frozen=True)
class Note:
    """One recorded note: float32 `wave` [samples] at `rate` Hz; it may be sustained by repeating `loop`."""

    name: str
    wave: Waveform
    rate: int
    loop: tuple[int, int]

    def sustained(self, seconds: float) -> Waveform:
        """The note, prolonged to `seconds` by repeating its loop while it fades, as a sampler does."""
        start, end = self.loop
        wanted = round(seconds * self.rate)
        if len(self.wave) >= wanted or end - start < 16:
            return self.wave
        repeats = -(-(wanted - end) // (end - start))
        wave = np.concatenate([self.wave[:end], np.tile(self.wave[start:end], max(0, repeats))])[:wanted]
        fade_start = min(end, len(wave))
        fade = np.linspace(1, 0.05, len(wave) - fade_start, dtype=np.float32)
        wave[fade_start:] *= fade
        return wave


def read_notes(path: Path) -> dict[str, Note]:
    """All notes by name; the two channels of a stereo note ("... (L)", "... (R)") become one.

    Raises:
        DataError: the file is not a SoundFont with 16-bit samples.
    """
    data = path.read_bytes()
    if data[:4] != b"RIFF" or data[8:12] != b"sfbk":
        raise DataError(f"{path} is not a SoundFont 2 file; fetch the pinned package again")
    chunks = _find_chunks(data)
    pcm = np.frombuffer(data, dtype="<i2", offset=chunks["smpl"][0], count=chunks["smpl"][1] // 2)
    start, size = chunks["shdr"]
    headers = [_HEADER.unpack_from(data, start + offset) for offset in range(0, size - _HEADER.size, _HEADER.size)]
    notes: dict[str, Note] = {}
    for index, (raw_name, begin, end, loop_begin, loop_end, rate, _, _, link, kind) in enumerate(headers):
        name = raw_name.split(b"\0")[0].decode("latin-1").strip()
        wave = pcm[begin:end].astype(np.float32) / np.float32(32768)
        if kind == _RIGHT:
            continue
        if kind == _LEFT and link < len(headers) and link != index:
            other = headers[link]
            right = pcm[other[1] : other[2]].astype(np.float32) / np.float32(32768)
            shared = min(len(wave), len(right))
            wave = (wave[:shared] + right[:shared]) / np.float32(2)
        name = re.sub(r"\s*\(L\)$", "", name)
        notes[name] = Note(name, wave, rate, (loop_begin - begin, min(loop_end - begin, len(wave))))
    return notes


def _find_chunks(data: bytes) -> dict[str, tuple[int, int]]:
    """Position and size of the sub-chunks, by name."""
    chunks: dict[str, tuple[int, int]] = {}
    position = 12
    while position + 8 <= len(data):
        size = struct.unpack_from("<I", data, position + 4)[0]
        inner, end = position + 12, position + 8 + size
        while inner + 8 <= end:
            inner_size = struct.unpack_from("<I", data, inner + 4)[0]
            chunks[data[inner : inner + 4].decode("latin-1")] = (inner + 8, inner_size)
            inner += 8 + inner_size + (inner_size & 1)
        position = end + (size & 1)
    return chunks
