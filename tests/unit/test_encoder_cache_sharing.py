"""Two processes that fill one encoder cache at the same time."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_training
import torch

from unimoe.trainers.caches.encoder_cache import EncoderCache
from unimoe.trainers.caches.tensor_store import TensorStore
from unimoe.trainers.data.conversations import ConversationDataset
from unimoe.trainers.saving.folder_lock import exclusive

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Child:
    """A function in a process of its own, started at once; its result is an int of one byte."""

    def __init__(self, do: Callable[[], int]) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            result = 255
            try:
                result = do()
            finally:
                os._exit(result)

    def result(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    def fill(writer: int) -> int:
        store = TensorStore(tmp_path)
        for turn in range(30):
            with store.writing():
                for key in (f"{writer}-{turn}", f"both-{turn}"):
                    if key not in store:
                        store.add(key, {"states": torch.full((4,), float(turn))})
        return 0

    assert [child.result() for child in [Child(lambda: fill(0)), Child(lambda: fill(1))]] == [0, 0]
    store = TensorStore(tmp_path)
    for turn in range(30):
        for writer in ("0", "1", "both"):
            states = store.get(f"{writer}-{turn}")
            assert states is not None
            assert torch.equal(states["states"], torch.full((4,), float(turn)))


def test_a_medium_is_encoded_by_one_of_two_runs(tmp_path: Path) -> None:
    """Both see an empty cache before either may write; what the first computes the second only reads."""
    processor = tiny_training.processor()
    model = tiny_training.model(processor)
    samples = ConversationDataset.from_samples(tiny_training.samples(tmp_path, 2), media_root=tmp_path).samples
    caches = [EncoderCache(tmp_path / "cache", model, processor, batch_size=1) for _ in range(2)]
    folders = {caches[0]._store(kind).folder for kind in ("image", "audio")}
    assert all(caches[1]._missing(samples).values())
    read_end, write_end = os.pipe()

    def hold() -> int:
        image, audio = sorted(folders)
        with exclusive(image), exclusive(audio):
            os.write(write_end, b"x")
            signal.pause()
        return 0

    holder = Child(hold)
    assert os.read(read_end, 1) == b"x"
    children = [Child(lambda cache=cache: cache.build(samples, progress=False)) for cache in caches]
    os.kill(holder.pid, signal.SIGKILL)
    assert holder.result() == -signal.SIGKILL
    computed = [child.result() for child in children]
    assert sum(computed) == 4  # 2 pictures, 2 clips
    fresh = EncoderCache(tmp_path / "cache", model, processor)
    assert fresh.build(samples, progress=False) == 0
    own = EncoderCache(tmp_path / "own", model, processor, batch_size=1)
    assert own.build(samples, progress=False) == 4
    for sample in samples:
        expected = own.states(sample)
        found = fresh.states(sample)
        assert found.keys() == expected.keys()
        assert all(torch.equal(*pair) for name in expected for pair in zip(found[name], expected[name], strict=True))
