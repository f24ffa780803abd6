"""The receipt of an assembly: which files went in, and what every tensor of the sparse model was made of."""

from dataclasses import dataclass

from ..publishing.saved_receipt import SavedReceipt, TensorRecord, source_lines


@dataclass
class AssemblySource:
    """The base, or what one expert or more were taken from.

    Args:
        experts: ids of the experts that are made of it; empty for the base.
        files: file name -> SHA-256 of the whole file.
        consumed: tensors that went into the model.
        dropped: the other tensors -> why they did not.
    """

    role: str
    name: str
    experts: list[int]
    files: dict[str, str]
    consumed: int
    dropped: dict[str, str]


@dataclass(kw_only=True)
class AssemblyReceipt(SavedReceipt):
    """What an assembly did."""

    experts: list[str]
    sparse_layers: list[int]
    experts_per_token: int
    router_init: str
    seed: int
    parameters_before: int
    parameters_after: int
    sources: list[AssemblySource]
    targets: dict[str, TensorRecord]
    notes: list[str]

    def lines(self) -> list[str]:
        """The receipt for a reader."""
        lines = []
        for source in self.sources:
            of = f" (experts {source.experts})" if source.experts else ""
            lines.append(f"{source.role:<11} {source.name}{of}: {source.consumed} tensors taken")
            lines += source_lines(source.files, source.dropped, indent=12)
        return [
            *lines,
            *(f"note        {note}" for note in self.notes),
            f"experts     {', '.join(f'{index} {name}' for index, name in enumerate(self.experts))}",
            f"sparse      layers {self.sparse_layers}, {self.experts_per_token} experts per token, "
            f"router {self.router_init}, seed {self.seed}",
            f"parameters  {self.parameters_before:,} -> {self.parameters_after:,} "
            f"({self.parameters_active:,} active per token)",
            f"written     {len(self.targets)} tensors, {self.written()}",
        ]
