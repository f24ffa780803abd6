"""Text in images by `rapidocr`, whose package brings its models (PP-OCR, the family that MoAI used): no download.

pip install 'unimoe[perception]'
"""

import logging
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from ..media_policy_unimoe import MissingPackageError, OptionError
from .interface import Images
from .limits import best
from .results import TextLine

PACKAGE = "rapidocr"
_DEVICE_OPTIONS: dict[str, dict[str, Any]] = {"cpu": {}, "cuda": {"EngineConfig.onnxruntime.use_cuda": True}}


class RapidOcrReader:
    """Reads lines of text.

    Args:
        min_score: lines below are left out; what is told is decided later, by `Verbalization`.
        max_lines: per image, those of highest score.
        max_characters: longer lines are cut.
        detection_side: images are enlarged until their shorter side has so many pixels before lines are looked for. 320
            is four times as fast as rapidocr's own 736 and does for text that fills much of a small image.
        device: "cpu", or "cuda" with onnxruntime's package for GPUs.
        threads: of onnxruntime; None: OMP_NUM_THREADS where that is set, and otherwise as many as onnxruntime likes.
        legacy: hand over red and blue swapped, as the original does by mistake.
    """

    def __init__(
        self,
        min_score: float = 0.5,
        max_lines: int = 100,
        max_characters: int = 200,
        detection_side: int = 736,
        device: str = "cpu",
        threads: int | None = None,
        legacy: bool = False,
    ) -> None:
        if device.partition(":")[0] not in _DEVICE_OPTIONS:
            raise OptionError(f"rapidocr runs on {' or '.join(_DEVICE_OPTIONS)}, not on {device!r}.")
        self.min_score = min_score
        self.max_lines = max_lines
        self.max_characters = max_characters
        self.detection_side = detection_side
        self.device = device.partition(":")[0]
        self.threads = int(os.environ.get("OMP_NUM_THREADS", "-1")) if threads is None else threads
        self.legacy = legacy
        self._engine: Any = None

    def identity(self) -> dict[str, Any]:
        """Package, version and settings.

        Raises:
            MissingPackageError: rapidocr is not installed.
        """
        settings = {"min_score": self.min_score, "max_lines": self.max_lines, "max_characters": self.max_characters}
        more = {"detection_side": self.detection_side, "legacy": self.legacy}
        return {"adapter": PACKAGE, "version": _version(), **settings, **more}

    def read(self, images: Images) -> list[tuple[TextLine, ...]]:
        """Lines per image; an image without text gives none. Raises MissingPackageError as `identity` does."""
        engine = self._loaded()
        return [self._lines(engine(self._array(image))) for image in images]

    def _array(self, image: Any) -> np.ndarray:
        array = np.asarray(image.convert("RGB"))
        # The models expect blue, green, red.
        return array if self.legacy else np.ascontiguousarray(array[..., ::-1])

    def _lines(self, found: Any) -> tuple[TextLine, ...]:
        if found.txts is None:
            return ()
        lines = []
        for text, score, corners in zip(found.txts, found.scores, found.boxes, strict=True):
            if score >= self.min_score and text:
                points = tuple((float(x), float(y)) for x, y in corners)
                lines.append(TextLine(text[: self.max_characters], float(score), points))
        return best(lines, lambda line: line.score, self.max_lines)

    def _loaded(self) -> Any:
        if self._engine is None:
            _version()
            from onnxruntime import get_available_providers
            from rapidocr import RapidOCR

            if self.device == "cuda" and "CUDAExecutionProvider" not in get_available_providers():
                raise OptionError("onnxruntime finds no GPU: install onnxruntime-gpu, or read on the CPU.")
            # Its logger writes to the terminal, about every image without text too.
            options = {
                "Global.log_level": "critical",
                "Global.text_score": self.min_score,
                "Det.limit_side_len": self.detection_side,
                "EngineConfig.onnxruntime.intra_op_num_threads": self.threads,
                **_DEVICE_OPTIONS[self.device],
            }
            self._engine = RapidOCR(params=options)
            logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)
        return self._engine


def _version() -> str:
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        raise MissingPackageError(
            "Reading text in images needs rapidocr, which brings its own models: pip install 'unimoe[perception]'."
        ) from None
