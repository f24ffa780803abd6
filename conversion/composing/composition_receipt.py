"""The receipt of a composition: which parts went in, and what every tensor was made of."""

from dataclasses import dataclass

from ..publishing.saved_receipt import SavedReceipt, TensorRecord, source_lines


@dataclass
class PartRecord:
    """A part: `files` maps names to the SHA-256 of whole files, `dropped` tensors to why they were not taken."""

    role: str
    name: str
    facts: str
    licence: dict[str, str]
    files: dict[str, str]
    consumed: int
    dropped: dict[str, str]


@dataclass(kw_only=True)
class CompositionReceipt(SavedReceipt):
    """What a composition did."""

    seed: int
    parameters: int
    parameters_new: int
    features: dict[str, int]
    parts: list[PartRecord]
    targets: dict[str, TensorRecord]
    notes: list[str]

    def lines(self) -> list[str]:
        """The receipt for a reader."""
        lines = []
        for part in self.parts:
            lines.append(f"{part.role:<16} {part.name}: {part.consumed} tensors taken")
            lines += source_lines(part.files, part.dropped, indent=17)
        return [
            *lines,
            *(f"{'note':<16} {note}" for note in self.notes),
            f"{'parameters':<16} {self.parameters:,}, {self.parameters_new:,} of them new (seed {self.seed})",
            f"{'written':<16} {len(self.targets)} tensors, {self.written()}",
        ]
