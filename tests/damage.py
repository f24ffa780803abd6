"""Ways to damage the files of a checkpoint, for tests of what is refused, and a look at what a refusal leaves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what torch.save wrote."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def cut(path: Path, dropped: int) -> None:
    """Leave out the last bytes."""
    path.write_bytes(path.read_bytes()[:-dropped])


def write_pickle_with_code(path: Path, name: str) -> Path:
    """A pickled tensor of this name that is code; it would leave a file "ran" beside it. Returns the path."""

    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (path.with_name("ran"),))

    torch.save({name: Payload()}, path)
    return path


def on_a_bad_disk(write: Callable[..., list[Path]]) -> Callable[..., list[Path]]:
    """A function that writes shards, followed by one flipped bit in the first."""

    def write_and_flip(*arguments: Any, **options: Any) -> list[Path]:
        shards = write(*arguments, **options)
        content = bytearray(shards[0].read_bytes())
        content[-1] ^= 1
        shards[0].write_bytes(content)
        return shards

    return write_and_flip


def left_behind(folder: Path, *known: str) -> list[str]:
    """What lies in a folder beside the known."""
    return sorted(path.name for path in folder.iterdir() if path.name not in known)
