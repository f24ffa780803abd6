"""Ranks that share one start of Python: forked, once all modules are loaded, which takes longer than most runs."""

import os
import signal
import socket
from collections.abc import Callable


def run_ranks(ranks: int, work: Callable[[], None]) -> bool:
    """Do the same work as so many ranks; whether all of them came to its end. One that does not ends the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = set()
    for rank in range(ranks):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            work()
            os._exit(0)
        running.add(child)
    while running:
        child, status = os.wait()
        running.discard(child)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            return False
    return True
