"""Starting a recipe on several ranks with torchrun, and losing one of them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from unimoe.trainers.parallel.settings import Parallel


def torchrun(ranks: int) -> list[str]:
    """The launcher, on a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    return [*launcher, "--master_port", str(port)]


def train_command(file: Path, parallel: Parallel) -> list[str]:
    return [*torchrun(parallel.ranks), "-m", "unimoe", "train", str(file)]


def losses(stage: Path) -> list[float]:
    lines = (stage / "losses.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def kill_rank_after_a_checkpoint(command: list[str], checkpoints: Path, log: Path, rank: int = 1) -> None:
    """Start a run, kill a rank once there is a checkpoint; the others end within a minute, and the rank is named."""
    with log.open("w") as stream:
        run = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=log.parent, start_new_session=True)
        try:
            _wait_for_checkpoint(checkpoints, run, log)
            os.kill(_process_of(rank, run.pid), signal.SIGKILL)
            died = time.monotonic()
            assert run.wait(timeout=60) != 0
            assert time.monotonic() - died < 60
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)
    assert re.search(rf"rank\s*:\s*{rank} ", log.read_text(encoding="utf-8"))


def _process_of(rank: int, launcher: int) -> int:
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def _wait_for_checkpoint(checkpoints: Path, run: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 300
    while not any(checkpoints.glob("checkpoint-*/COMPLETE")):
        assert run.poll() is None, log.read_text(encoding="utf-8")[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
