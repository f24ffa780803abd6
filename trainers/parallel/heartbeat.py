"""Signs of life between ranks: when one dies, the others say so and stop, instead of waiting for it in a collective.

A launcher that watches its processes (torchrun) ends the others by itself, those on its own machine. This works wherever
the ranks run and whatever they wait for: every rank renews a counter in the process group's store from a thread of its
own, and looks at those of the others.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

EXIT_CODE = 75  # as in sysexits.h: a failure that goes away when the run is started again
_FINISHED = "finished"


@contextmanager
def heartbeat(silence_seconds: float) -> Iterator[None]:
    """Watch the other ranks while the block runs; 0 does not.

    A rank that is not heard of for so long, or whose store is gone, makes this process log the reason and exit with
    `EXIT_CODE`, from whatever it is doing.
    """
    if not silence_seconds or not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        yield
        return
    watch = _Watch(silence_seconds)
    watch.start()
    try:
        yield
    finally:
        watch.stop()


class _Watch:
    def __init__(self, silence_seconds: float) -> None:
        self.silence = silence_seconds
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        # A connection of its own: the group's is held while it waits.
        group_store: Any = torch.distributed.distributed_c10d._get_default_store()
        self.store = group_store.clone()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._beat(0)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        heard = {rank: ("", time.monotonic()) for rank in range(self.ranks) if rank != self.rank}
        pause = min(5.0, self.silence / 4)
        count = 0
        try:
            while not self._over.wait(pause):
                count += 1
                self._beat(count)
                for rank, (last, since) in heard.items():
                    now = self._read(rank)
                    if now != last:
                        heard[rank] = (now, time.monotonic())
                    elif now != _FINISHED and time.monotonic() - since > self.silence:
                        self._exit(f"Rank {rank} has not been heard of for {self.silence:.0f} seconds")
            self._say(_FINISHED)
        except RuntimeError as error:  # torch.distributed's errors of a store are RuntimeErrors
            if not self._over.is_set():
                self._exit(f"The ranks' store does not answer, so the process that holds it is gone ({error})")

    def _beat(self, count: int) -> None:
        self._say(str(count))

    def _say(self, what: str) -> None:
        self.store.set(f"heartbeat/{self.rank}", what)

    def _read(self, rank: int) -> str:
        key = f"heartbeat/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _exit(self, reason: str) -> None:
        logger.error(
            f"{reason}: it has died or hangs. Rank {self.rank} stops as well; start the same command again to go on from "
            "the newest checkpoint."
        )
        os._exit(EXIT_CODE)  # the main thread may wait in a collective, where no exception reaches it
