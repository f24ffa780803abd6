"""Named tensors on disk, by key."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..saving.folder_lock import exclusive

INDEX_FILE = "index.json"
ITEMS_PER_SHARD = 256


class TensorStore:
    """Named tensors by key: safetensors shards that are only ever added, and an index that is written after them.

    Any number of processes may read; one at a time writes, within `writing`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index: dict[str, dict[str, str]] = {}
        self._pending: dict[str, dict[str, torch.Tensor]] = {}
        self._loaded: dict[str, dict[str, torch.Tensor]] = {}
        self._statistics: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._read_index()

    def _read_index(self) -> None:
        with suppress(FileNotFoundError):
            self._index = json.loads((self.folder / INDEX_FILE).read_text(encoding="utf-8"))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wait until no other process writes here and see what they left; what the block adds is on disk at its end.

        Raises:
            CheckpointError: nothing can be written there.
        """
        with exclusive(self.folder, waits=True):
            self._read_index()
            # Shards are named by the length of the index: a state twice would let two of them have one name.
            self._pending = {key: states for key, states in self._pending.items() if key not in self._index}
            yield
            self.flush()

    def __contains__(self, key: str) -> bool:
        return key in self._index or key in self._pending

    def add(self, key: str, states: dict[str, torch.Tensor]) -> None:
        """Keep a state that is not there yet; within `writing`."""
        self._pending[key] = {name: tensor.contiguous().clone() for name, tensor in states.items()}
        if len(self._pending) >= ITEMS_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        if not self._pending:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        shard = f"states-{len(self._index):08d}.safetensors"
        tensors = {f"{key}/{name}": t for key, states in self._pending.items() for name, t in states.items()}
        save_file(tensors, self.folder / shard)
        for key, states in self._pending.items():
            self._index[key] = dict.fromkeys(states, shard)
        temporary = self.folder / f"{INDEX_FILE}.new"
        temporary.write_text(json.dumps(self._index), encoding="utf-8")
        temporary.replace(self.folder / INDEX_FILE)
        self._loaded |= self._pending
        self._pending = {}
        self._statistics = {}

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        if key not in self._loaded and key in self._index:
            self._load_shard(next(iter(self._index[key].values())))
        return self._loaded.get(key, self._pending.get(key))

    def _load_shard(self, shard: str) -> None:
        # The tensors are views of the mapped file, so memory is used for what is read.
        with safe_open(self.folder / shard, "pt") as file:
            for full_name in file.keys():  # noqa: SIM118 - not a mapping
                key, _, name = full_name.rpartition("/")
                self._loaded.setdefault(key, {})[name] = file.get_tensor(full_name)

    def statistics(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if name not in self._statistics:
            keys = sorted(key for key, names in self._index.items() if name in names)
            # 512 media are plenty for two moments.
            chosen = keys[:: max(1, len(keys) // 512)]
            flat = torch.cat([self.get(key)[name].flatten(0, -2).float() for key in chosen])
            self._statistics[name] = flat.mean(0), flat.std(0)
        return self._statistics[name]
