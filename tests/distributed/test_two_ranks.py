"""Two processes over gloo make the same step as one."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import step_gradients
import torch
from safetensors.torch import load_file


def torchrun(*arguments: str) -> None:
    """Run a script on two ranks; what it says on an error is shown."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    run = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize(("case", "accumulation"), [("one-group", 1), ("two-groups", 2)])
def test_two_ranks_make_the_gradients_of_one(tmp_path: Path, case: str, accumulation: int) -> None:
    batch_size = step_gradients.STEP // 2 // accumulation
    torchrun(step_gradients.__file__, str(tmp_path), case, str(batch_size), str(accumulation))
    expected, losses = step_gradients.step_gradients(tmp_path / "one", case, step_gradients.STEP, 1)
    for rank in range(2):
        found = load_file(tmp_path / f"gradients-{rank}.safetensors")
        logged = {name.removeprefix("logged."): float(found.pop(name)) for name in list(found) if "logged." in name}
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.norm()), msg=name)
        assert logged == pytest.approx(losses, rel=1e-4)
