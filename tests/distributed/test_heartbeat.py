"""A rank that falls silent makes the others stop, also those that wait for it in a collective."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from unimoe.trainers.parallel.heartbeat import EXIT_CODE

_RANK = """
import os, signal, sys
import torch.distributed as dist
from unimoe.trainers.parallel.heartbeat import heartbeat

dist.init_process_group("gloo")
with heartbeat(float(sys.argv[1])):
    dist.barrier()
    if sys.argv[2] == "hangs" and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()
print("done", flush=True)
"""


@pytest.mark.parametrize("fate", ["hangs", "finishes"])
def test_a_silent_rank_ends_the_others(fate: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", _RANK, "3", fate]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, env=environment, **pipes))  # type: ignore[call-overload]
    try:
        output, errors = ranks[0].communicate(timeout=120)
        if fate == "hangs":
            assert ranks[0].returncode == EXIT_CODE, errors
            assert "Rank 1 has not been heard of for 3 seconds" in errors
        else:
            assert (ranks[0].returncode, output.strip()) == (0, "done"), errors
            assert ranks[1].wait(timeout=60) == 0
    finally:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
