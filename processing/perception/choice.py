"""Which vision models look at images for a model: the options of `unimoe perceive`, and a file in the model's folder.

A model with mixers answers well where it is told what the models saw that it was trained with. Training from a cache of
`unimoe perceive`, and converting MoAI, leave their names in the model's folder; chat and serve take them from there.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...package_errors import DataError
from .perceiver import ORIGINAL_SIDE, Perceiver
from .verbalize import DEFAULT, ORIGINAL, Verbalization

if TYPE_CHECKING:
    from .ocr_rapidocr import RapidOcrReader

PERCEPTION_FILE = "perception.json"
RULES = "rules"


@dataclass(frozen=True)
class PerceiverChoice:
    """Models by Hub id or folder; None, or false, skips the task.

    Fields: `names`, what `detect` looks for, None: a model's own, or the original's; `relate`, a model for scene graphs, or
    "rules" about where boxes are; `text`, whether rapidocr reads; `text_side`, see `RapidOcrReader`; `original`: as MoAI
    did, with its faults.
    """

    segment: str | None = None
    detect: str | None = None
    names: tuple[str, ...] | None = None
    relate: str | None = None
    text: bool = False
    text_side: int = 736
    original: bool = False

    @property
    def rules(self) -> Verbalization:
        """How `unimoe perceive` puts one image's results into words; elsewhere the processor decides (`rules_for`)."""
        return ORIGINAL if self.original else DEFAULT

    def perceiver(self, device: str = "cpu", dtype: str = "float32", batch_size: int = 8) -> Perceiver:
        """The adapters; their models are loaded when the first image comes.

        Raises:
            OptionError: no such device or dtype.
        """
        options = {"device": device, "dtype": dtype, "batch_size": batch_size}
        stretch = ORIGINAL_SIDE if self.original else None
        return Perceiver(
            self._segmenter(options), self._detector(options), self._relator(options), self._reader(), stretch
        )

    def lines(self) -> list[str]:
        """For a reader: a line per task."""
        said = {"segments": self.segment, "objects": self.detect, "relations": self.relate}
        lines = [f"{task}: {name}" for task, name in said.items() if name is not None]
        return [*lines, "text: rapidocr"] if self.text else lines

    def card_text(self) -> str:
        """For the card of a model that reads what they see, as Markdown."""
        models = "\n".join(f"- {line}" for line in self.lines())
        return (
            f"The mixers read what other vision models see in an image:\n\n{models}\n\n"
            f"`{PERCEPTION_FILE}` names them, and `unimoe chat` and `unimoe serve` have them look. In code, "
            "`unimoe.processing.perception.on_the_fly.perceive_images(processor, perceiver)` does, or every image item carries "
            'what was seen as "aux"; without, the model answers from the picture alone.'
        )

    def save(self, folder: Path) -> None:
        """Write `perception.json` into a folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / PERCEPTION_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def of_folder(cls, folder: str | Path) -> "PerceiverChoice | None":
        """What the file in a folder says; None without a file. Raises DataError if it is damaged."""
        file = Path(folder) / PERCEPTION_FILE
        if not file.is_file():
            return None
        try:
            return cls._checked(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"{file} is damaged ({error}): correct it, or remove it and name the vision models as options."
            ) from error

    @classmethod
    def _checked(cls, said: Any) -> "PerceiverChoice":
        kinds = {"text": bool, "original": bool, "text_side": int, "names": list | None}
        if not isinstance(said, dict):
            raise TypeError("no mapping")
        for field, value in said.items():
            texts = value if isinstance(value, list) else [value]
            if not isinstance(value, kinds.get(field, str | None)) or not all(
                str(text).isprintable() for text in texts
            ):
                raise TypeError(f"{field} is {value!r}")
        names = said.get("names")
        return cls(**{**said, "names": None if names is None else tuple(map(str, names))})

    def _segmenter(self, options: dict[str, Any]) -> Any:
        if self.segment is None:
            return None
        from .segmentation_transformers import TransformersSegmenter

        return TransformersSegmenter(self.segment, **options)

    def _detector(self, options: dict[str, Any]) -> Any:
        if self.detect is None:
            return None
        from .detection_transformers import TransformersDetector

        return TransformersDetector(self.detect, self.names, **options)

    def _relator(self, options: dict[str, Any]) -> Any:
        if self.relate is None:
            return None
        if self.relate == RULES:
            from .spatial_relations import SpatialRules

            return SpatialRules()
        from .scene_graph_psgtr import PsgtrRelator

        return PsgtrRelator(self.relate, legacy=self.original, **options)

    def _reader(self) -> "RapidOcrReader | None":
        if not self.text:
            return None
        from .ocr_rapidocr import RapidOcrReader

        return RapidOcrReader(detection_side=self.text_side, legacy=self.original)


def original_models() -> PerceiverChoice:
    """What looked at images for MoAI, as far as it is on the Hub: its scene graphs came from a PSGTR that is not."""
    from . import detection_transformers, segmentation_transformers

    segment, detect = segmentation_transformers.ORIGINAL_MODEL, detection_transformers.ORIGINAL_MODEL
    return PerceiverChoice(segment, detect, text=True, original=True)
