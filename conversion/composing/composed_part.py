"""One part of a composed model: where it came from, and which of our tensors it gives."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ...errors import ConversionError
from ..checkpoints.bitsandbytes_tensors import refuse_other_quantisation
from ..checkpoints.checkpoint_reader import Checkpoint
from ..checkpoints.key_rules import Shape
from ..dense.licences import licence_metadata

# Counts batches in training and is read by nothing; older checkpoints do not hold it.
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Made:
    """One tensor of ours before it is written: its shape, what makes it, and what it is made of, for the receipt."""

    shape: Shape
    pieces: tuple[Callable[[], torch.Tensor], ...]
    made_of: tuple[str, ...]


@dataclass
class ComposedPart:
    """A part.

    Args:
        role: "language model", "vision tower", "image projector", "speech tower", "sound tower" or "Q-Former".
        name: as the user gave it, a folder, a file or a Hub id.
        path: the folder or file itself.
        facts: what it is, in a few words.
        files: what was read.
        tensors: our names -> what they are made of.
        dropped: stored names -> why they are not taken.
    """

    role: str
    name: str
    path: Path
    facts: str
    files: tuple[Path, ...]
    tensors: dict[str, Made] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def is_hub_id(self) -> bool:
        return not Path(self.name).expanduser().exists()

    @property
    def public_name(self) -> str:
        """The Hub id, or the name of a folder or file without where it was."""
        return self.name if self.is_hub_id else self.path.resolve().name

    @property
    def licence(self) -> dict[str, str]:
        """What its model card says, see `licence_metadata`; a file has none."""
        return licence_metadata(self.path) if self.path.is_dir() else {}

    @property
    def stored(self) -> int:
        """How many stored tensors went into ours."""
        return len({name for made in self.tensors.values() for name in made.made_of})


def taken(
    checkpoint: Checkpoint,
    prefix: str,
    expected: Mapping[str, Shape],
    what: str,
    older_names: Mapping[str, str] | None = None,
) -> dict[str, Made]:
    """The tensors of a module, found in a checkpoint whatever it puts before their names.

    Args:
        prefix: what our names start with.
        expected: names below the prefix -> shapes.
        what: the module, for messages.
        older_names: what some of these are called in older files, see `older_names`.

    Raises:
        ConversionError: the checkpoint lacks one, or holds it in another shape.
    """
    refuse_other_quantisation(checkpoint.tensors, str(checkpoint.folder))
    schemes = [{name: name for name in expected}, {name: (older_names or {}).get(name, name) for name in expected}]
    stored = max((_with_prefix(checkpoint.tensors, scheme) for scheme in schemes), key=_found_in(checkpoint))
    made = {}
    for name, shape in expected.items():
        found = stored[name]
        if found in checkpoint.tensors:
            _require_shape(checkpoint, found, shape, what)
            made[prefix + name] = Made(shape, (partial(checkpoint.read, found),), (found,))
        elif name.endswith(_COUNTER):
            made[prefix + name] = Made(shape, (partial(torch.zeros, shape, dtype=torch.int64),), ("zero",))
        else:
            raise ConversionError(
                f"{checkpoint.folder} does not hold {name}, which its config.json asks for in {what}. Fetch all of its "
                "files; weights under other names become readable by loading and saving them with transformers once."
            )
    return made


def older_names(model: PreTrainedModel) -> dict[str, str]:
    """What the tensors of a model are called in files of older releases of transformers, which most of the Hub holds."""
    state = dict(model.state_dict())
    ours = {id(tensor): name for name, tensor in state.items()}
    reverted = revert_weight_conversion(model, state)
    return {ours[id(tensor)]: name for name, tensor in reverted.items() if id(tensor) in ours}


def left_over(checkpoint: Checkpoint, parts: Iterable[Made], reason: str) -> dict[str, str]:
    """The tensors of a checkpoint that nothing is made of -> the reason."""
    used = {name for made in parts for name in made.made_of}
    return {name: reason for name in checkpoint.tensors if name not in used}


def _with_prefix(stored: Iterable[str], scheme: Mapping[str, str]) -> dict[str, str]:
    """The names of a scheme with what a checkpoint puts before them: of all that fits the first, what fits the most."""
    names, wanted = set(stored), list(scheme.values())
    candidates = {name.removesuffix(first) for first in wanted[:1] for name in names if _ends(name, first)}
    begin = max(sorted(candidates), key=lambda begin: sum(begin + name in names for name in wanted), default="")
    return {name: begin + older for name, older in scheme.items()}


def _found_in(checkpoint: Checkpoint) -> Callable[[Mapping[str, str]], int]:
    return lambda names: sum(name in checkpoint.tensors for name in names.values())


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _require_shape(checkpoint: Checkpoint, name: str, shape: Shape, what: str) -> None:
    found = tuple(checkpoint.tensors[name].shape)
    if found != tuple(shape):
        raise ConversionError(
            f"{checkpoint.tensors[name].file}: {name} has shape {list(found)}, but {what} needs {list(shape)}. Give parts "
            "that belong together."
        )


__all__ = ["ComposedPart", "Made", "left_over", "older_names", "taken"]
