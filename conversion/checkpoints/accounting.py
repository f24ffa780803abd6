"""Every tensor of the sources is accounted for, and every one of ours is made."""

from collections.abc import Iterable, Mapping

from ...errors import ConversionError
from .key_rules import KeyMap, Shape, Target
from .source_tensors import SourceTensors

_SHOWN = 8


def account(
    gathered: SourceTensors, key_map: KeyMap, expected: Mapping[str, Shape], made: Iterable[str] = ()
) -> dict[str, Target]:
    """Say what becomes of every tensor, and require that all of ours are made and nothing is left over.

    Args:
        expected: the shapes of our tensors.
        made: those of ours that the original does not have.

    Raises:
        ConversionError: a tensor is unknown, missing or of the wrong shape.
    """
    mapped = key_map.map(gathered.live)
    for original, reason in mapped.dropped.items():
        gathered.live[original].drop(reason)
    for target in mapped.targets.values():
        if target.name in expected:
            for original in target.sources:
                gathered.live[original].consume(target.name)
    unexpected = [f"{t.file}: {t.name}" for t in gathered.tensors if t.fate == "unexpected"]
    absent = [name for name in expected if name not in mapped.targets and name not in set(made)]
    missing = [f"{name} (of {_listed(key_map.originals(name))})" for name in absent]
    problems = [f"{len(unexpected)} unexpected tensor(s): {_listed(unexpected)}"] if unexpected else []
    if missing:
        problems.append(f"{len(missing)} tensor(s) of ours cannot be made: {_listed(missing)}")
    problems += [problem for target in mapped.targets.values() if (problem := _misfit(target, gathered, expected))]
    if problems:
        shown = "; ".join(problems[:_SHOWN]).rstrip(".")
        raise ConversionError(
            f"{shown}. Nothing was written. All parts of the model must be complete and belong together."
        )
    return mapped.targets


def _misfit(target: Target, gathered: SourceTensors, expected: Mapping[str, Shape]) -> str | None:
    """Why the tensors of a target do not make it, or None when they do."""
    try:
        shape = target.shape(gathered.shapes)
    except ConversionError as error:
        return str(error)
    wanted = expected.get(target.name, shape)
    if shape == wanted:
        return None
    return (
        f"{_listed(target.sources)} make {target.name} of shape {list(shape)}, but the configuration asks for "
        f"{list(wanted)}"
    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
