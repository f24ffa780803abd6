"""Builds the sounds: recordings of drums, instruments and noises; every recording belongs to one split only."""

import io
import re
import subprocess
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .audio_files import SOUND_COMPRESSION, Waveform, to_corpus_rate, trim_silence, write_audio
from .records import Row, make_row, rng_for
from .soundfont import read_notes

QUESTION = "What sound is this?"
SECONDS = 3.0
SUSTAIN_SECONDS = 1.6  # a shorter note is prolonged to this
NOTE_SECONDS = 2.0
HELDOUT_SHARE = 0.3
MOST_PER_CLASS = 26
SAME_RECORDING_CORRELATION = 0.8


@dataclass(frozen=True)
class SoundClass:
    """Which recordings carry a label: regular expressions over whole file or note names, per source ("" = none)."""

    label: str
    sonic_pi: str = ""
    kenney: str = ""
    fluid: str = ""


SOUND_CLASSES = (
    SoundClass(
        "bass drum",
        r"bd_.*|drum_bass_.*|drum_heavy_kick",
        "",
        r"(Std|Power|Room|Elec|808) Kick ?\d?|RmPwr.*|Orch Bass.*",
    ),
    SoundClass("snare drum", r"sn_.*|drum_snare_.*|elec_(hi_|mid_|lo_)?snare", "", r".*(Snr|Snare).*"),
    SoundClass("hi-hat", r"hat_.*|drum_cymbal_(closed|pedal)", "", r"Hi-Hat.*|808 .* Hat"),
    SoundClass(
        "cymbal",
        r"drum_(splash|cymbal_hard|cymbal_soft|cymbal_open).*|ride_.*|elec_cymbal",
        "",
        r"(Splash|China|Ride|BellRide|Crsh).*",
    ),
    SoundClass("tabla", r"tabla_.*"),
    SoundClass("drum loop", r"arovane_beat_.*|loop_(?!amen_full).*"),
    SoundClass("ambient drone", r"ambi_.*|tbd_pad_.*"),
    SoundClass("robot", r"mehackit_robot\d|glitch_robot\d"),
    SoundClass("piano", fluid=r"P200 Piano .*"),
    SoundClass("guitar", fluid=r"(Nylon|Steel|Jazz Guitar) .*"),
    SoundClass("violin", fluid=r"Violin .*"),
    SoundClass("flute", fluid=r"(Flute|Piccolo) [A-G]#?\d"),
    SoundClass("saxophone", fluid=r"(Alto|Tenor) [A-G]#?\d"),
    SoundClass("organ", fluid=r"Church Organ .*"),
    SoundClass("harp", fluid=r"Harp .*"),
    SoundClass("xylophone", fluid=r"Xylophone .*"),
    SoundClass("coin", kenney=r"coin\d"),
    SoundClass("jump", kenney=r"jump\d|phaseJump1"),
    SoundClass("laser", kenney=r"laser\d"),
    SoundClass("game over", kenney=r"(gameover|lose)\d"),
)


@dataclass
class Recording:
    """One recording: where it comes from, its name there and its samples at 16 kHz."""

    source: str
    name: str
    wave: Waveform


def build_sounds(out: Path, files: dict[str, Path], unpacked: Path) -> list[Row]:
    """Writes all sounds; returns the samples (paths relative to `out`)."""
    banks = {
        "sonic-pi": _read_sonic_pi(files["sonic-pi"]),
        "kenney": _read_kenney(files["kenney"]),
        "fluid": _read_fluid(files["fluid"], unpacked),
    }
    rows = []
    for sound_class in SOUND_CLASSES:
        recordings = _recordings_of(sound_class, banks)
        for recording, split in zip(recordings, split_recordings(recordings), strict=True):
            name = re.sub(r"[^a-z0-9]+", "-", f"{sound_class.label}_{recording.source}_{recording.name}".lower())
            path = f"sounds/{name}.ogg"
            write_audio(out / path, recording.wave, SECONDS, SOUND_COMPRESSION)
            source = {"set": recording.source, "recording": recording.name}
            rows.append(
                make_row(
                    f"sound-{name}", "sound", "sound", split, QUESTION, sound_class.label, source, ("audio", path)
                )
            )
    return rows


def _recordings_of(sound_class: SoundClass, banks: dict[str, dict[str, Waveform]]) -> list[Recording]:
    patterns = {"sonic-pi": sound_class.sonic_pi, "kenney": sound_class.kenney, "fluid": sound_class.fluid}
    found = [
        Recording(source, name, trim_silence(wave))
        for source, pattern in patterns.items()
        for name, wave in sorted(banks[source].items())
        if pattern and re.fullmatch(pattern, name)
    ]
    order = rng_for("sounds", sound_class.label).permutation(len(found))
    return [found[index] for index in order[:MOST_PER_CLASS]]


def split_recordings(recordings: list[Recording]) -> list[str]:
    """Assigns each recording to a split; recordings that are copies of each other go to the same one.

    Returns:
        "train" or "heldout" per recording. About `HELDOUT_SHARE` of them are held out, at least one.
    """
    groups = _group_copies(recordings)
    wanted = max(1, round(HELDOUT_SHARE * len(recordings)))
    splits = ["train"] * len(recordings)
    for group in groups:
        if wanted >= len(group):
            wanted -= len(group)
            for index in group:
                splits[index] = "heldout"
    return splits


def _group_copies(recordings: list[Recording]) -> list[list[int]]:
    groups: list[list[int]] = []
    for index, recording in enumerate(recordings):
        for group in groups:
            if any(same_recording(recording.wave, recordings[other].wave) for other in group):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def same_recording(first: Waveform, second: Waveform) -> bool:
    """Whether two waveforms are copies: their normalised cross-correlation peaks above a threshold at some shift."""
    length = min(len(first), len(second), 32_000)
    first, second = first[:length], second[:length]
    size = 1 << (2 * length - 1).bit_length()
    spectrum = np.fft.rfft(first, size) * np.conj(np.fft.rfft(second, size))
    peak = float(np.abs(np.fft.irfft(spectrum, size)).max())
    return peak > SAME_RECORDING_CORRELATION * float(np.linalg.norm(first) * np.linalg.norm(second) + 1e-9)


def _read_sonic_pi(package: Path) -> dict[str, Waveform]:
    waves = {}
    with tarfile.open(package) as archive:
        for member in archive.getmembers():
            if member.name.endswith(".flac") and (file := archive.extractfile(member)) is not None:
                waves[Path(member.name).stem] = _decode(file.read())
    return waves


def _read_kenney(wheel: Path) -> dict[str, Waveform]:
    folder = "arcade/resources/assets/sounds/"
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(folder) and name.endswith(".wav")]
        return {Path(name).stem: _decode(archive.read(name)) for name in names}


def _read_fluid(package: Path, folder: Path) -> dict[str, Waveform]:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["dpkg-deb", "--extract", str(package), str(folder)], check=True)
    notes = read_notes(folder / "usr/share/sounds/sf2/FluidR3_GM.sf2")
    wanted = [re.compile(sound_class.fluid) for sound_class in SOUND_CLASSES if sound_class.fluid]
    return {
        name: to_corpus_rate(note.sustained(SUSTAIN_SECONDS)[: round(NOTE_SECONDS * note.rate)], note.rate)
        for name, note in notes.items()
        if any(pattern.fullmatch(name) for pattern in wanted)
    }


def _decode(data: bytes) -> Waveform:
    import soundfile

    wave, rate = soundfile.read(io.BytesIO(data), always_2d=True)
    return to_corpus_rate(wave[: round((SECONDS + 1) * rate)], rate)
