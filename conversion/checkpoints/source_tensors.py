"""The tensors of a released model's files: what was read, what the original ends up with, and what became of each."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch

from .bitsandbytes_tensors import refuse_other_quantisation
from .checkpoint_reader import Checkpoint, TensorInfo, quantisation_notes
from .key_rules import Shape


class TensorReader(Protocol):
    """What gives a tensor by its name."""

    def read(self, name: str) -> torch.Tensor: ...


@dataclass
class SourceTensor:
    """One tensor of one file and what became of it; `note` names our tensors, or says why it was dropped."""

    file: str
    name: str
    info: TensorInfo
    checkpoint: TensorReader = field(repr=False)
    fate: Literal["consumed", "dropped", "unexpected"] = "unexpected"
    note: str = ""

    def drop(self, reason: str) -> None:
        self.fate, self.note = "dropped", reason

    def consume(self, ours: str) -> None:
        """Note that a tensor of ours is made of it; of a fused one several are."""
        noted = self.note.split(", ") if self.fate == "consumed" else []
        self.note = ", ".join(dict.fromkeys([*noted, ours]))
        self.fate = "consumed"

    def read(self) -> torch.Tensor:
        return self.checkpoint.read(self.name)


@dataclass
class SourceTensors:
    """Everything that was read.

    Args:
        tensors: every tensor of every file.
        live: original name -> the tensor that the original ends up with.
        notes: what a reader should know of the files.
    """

    tensors: list[SourceTensor] = field(default_factory=list)
    live: dict[str, SourceTensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[Path]:
        """Every file that was opened."""
        return sorted({tensor.info.file for tensor in self.tensors})

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: tensor.info.shape for name, tensor in self.live.items()}

    def read(self, original: str) -> torch.Tensor:
        return self.live[original].read()

    def put(self, original: str, tensor: SourceTensor) -> None:
        """Lay a tensor over what is there."""
        if original in self.live:
            self.live[original].drop(f"replaced by {tensor.file}, as the original does")
        self.live[original] = tensor

    def add_file(self, label: str, checkpoint: Checkpoint) -> list[SourceTensor]:
        """Take up the tensors of a file or folder. Raises ConversionError when they were quantised in a way not read here."""
        refuse_other_quantisation(checkpoint.tensors, f"The {label}")
        self.notes += quantisation_notes(checkpoint, label)
        labels = {file: f"{label}/{file.name}" for file in checkpoint.files}
        added = [SourceTensor(labels[info.file], name, info, checkpoint) for name, info in checkpoint.tensors.items()]
        self.tensors += added
        return added
