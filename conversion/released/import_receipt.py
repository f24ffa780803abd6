"""The receipt of an import: what became of every tensor that was there, and what every tensor of ours is made of."""

from collections import Counter
from dataclasses import dataclass, field

from ..publishing.saved_receipt import SavedReceipt, TensorRecord


@dataclass
class SourceRecord:
    """One tensor of a source file. `fate` is "consumed" (then `note` is our tensor) or "dropped" (then the reason)."""

    shape: list[int]
    dtype: str
    fate: str
    note: str


@dataclass
class TargetRecord(TensorRecord):
    """One tensor of ours. `lora_merged`: how many of the originals that it is made of LoRA was merged into."""

    lora_merged: int = 0


@dataclass(kw_only=True)
class ImportReceipt(SavedReceipt):
    """What an import did.

    Args:
        variant, evidence: what was recognised and by what.
        sources: file -> tensor -> its record.
        targets: tensor of ours -> its record.
        notes: what the reader should know beyond tensors.
        adapter: name of the folder that LoRA was left in, or None where it was merged.
    """

    variant: str
    evidence: list[str]
    parameters: int
    sources: dict[str, dict[str, SourceRecord]]
    targets: dict[str, TargetRecord]
    notes: list[str] = field(default_factory=list)
    adapter: str | None = None

    def lines(self) -> list[str]:
        """The receipt for a reader."""
        lines = [f"variant     {self.variant}", *(f"            {line}" for line in self.evidence)]
        for file, records in self.sources.items():
            fates = Counter(record.fate for record in records.values())
            lines.append(f"read        {file}: {', '.join(f'{n} {fate}' for fate, n in sorted(fates.items()))}")
        reasons = Counter(r.note for records in self.sources.values() for r in records.values() if r.fate == "dropped")
        lines += [f"dropped     {count}: {reason}" for reason, count in reasons.most_common()]
        merged = sum(record.lora_merged for record in self.targets.values())
        lora = f"; LoRA merged into {merged} weights" if merged else ""
        lines.append(f"produced    {len(self.targets)} tensors, all that the model has{lora}")
        if self.adapter is not None:
            lines.append(f"adapter     {self.adapter}")
        lines.append(f"parameters  {self.parameters:,} ({self.parameters_active:,} active per token)")
        return [*lines, f"written     {self.written()}", *(f"note        {note}" for note in self.notes)]
