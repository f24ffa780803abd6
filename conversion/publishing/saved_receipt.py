"""What the receipts of all conversions have in common."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ..checkpoints.checkpoint_reader import dtype_name, read_json
from ..checkpoints.checkpoint_writer import OutputTensor

RECEIPT_FILE = "receipt.json"
_LINES, _LINE_LENGTH = 200, 500


def saved_summary(folder: Path) -> list[str] | None:
    """What the receipt in a model's folder says to a reader; None where there is none with a summary.

    It may be a stranger's: its lines are cut to a size and hold nothing that a terminal would obey.
    """
    path = folder / RECEIPT_FILE
    lines = read_json(path).get("summary") if path.is_file() else None
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        return None
    return ["".join(c if c.isprintable() else "?" for c in line[:_LINE_LENGTH]) for line in lines[:_LINES]]


def source_lines(files: Mapping[str, str], dropped: Mapping[str, str], indent: int) -> list[str]:
    """Of a source, for a reader: its files (name -> SHA-256), and how many tensors (name -> why) were left for what reason."""
    reasons = Counter(dropped.values()).most_common()
    lines = [f"{digest[:16]}… {file}" for file, digest in files.items()]
    lines += [f"{count} left: {reason}" for reason, count in reasons]
    return [" " * indent + line for line in lines]


@dataclass
class TensorRecord:
    """One tensor that was written; `made_of` in the order of its memory, `sha256` of its bytes as stored."""

    shape: list[int]
    dtype: str
    made_of: list[str]
    sha256: str

    @classmethod
    def of(cls, output: OutputTensor, made_of: Iterable[str], digest: str, **more: Any) -> Self:
        """`more` are the fields that a receipt adds."""
        return cls(list(output.shape), dtype_name(output.dtype), list(made_of), digest, **more)


@dataclass(kw_only=True)
class SavedReceipt:
    """A receipt that is saved as JSON beside the model that it is about.

    Args:
        out: name of the folder.
        dtype: of most tensors that were written.
        parameters_active: those that one token goes through.
        tensors_read_back: those whose bytes on disk are what was written; all of them.
    """

    out: str
    dtype: str
    parameters_active: int
    bytes_written: int = 0
    seconds_writing: float = 0.0
    tensors_read_back: int = 0

    def lines(self) -> list[str]:
        """The receipt for a reader."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """All fields, and under "summary" what a reader sees of them."""
        return {"summary": self.lines(), **dataclasses.asdict(self)}

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def written(self) -> str:
        """How much was written and how fast, for a reader."""
        rate = self.bytes_written / max(self.seconds_writing, 1e-3) / 1e6
        amount = f"{self.bytes_written / 1e6:,.1f} MB {self.dtype} in {self.seconds_writing:.1f} s ({rate:,.0f} MB/s)"
        return f"{amount}; {self.tensors_read_back} tensors read back, bit-equal"
