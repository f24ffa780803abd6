"""The stand-in for CUDA itself: it judges devices as torch does, sees what waits for them, and computes what a CPU computes."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_stand_in import CUDA, CudaStandIn, CudaTensor
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

# Of a matrix x, and of a matrix y, a number n, indices i and a matrix of indices j, which are all on another device or not.
Call = Callable[..., Any]
CALLS: dict[str, Call] = {
    "add": lambda x, y, n, i, j: x + y,
    "add a number": lambda x, y, n, i, j: x + n,
    "concatenate": lambda x, y, n, i, j: torch.cat((x, y)),
    "choose": lambda x, y, n, i, j: torch.where(x > 0, x, y),
    "fill": lambda x, y, n, i, j: x.masked_fill(y > 0, n),
    "multiply matrices": lambda x, y, n, i, j: x @ y,
    "gather": lambda x, y, n, i, j: x.gather(1, j),
    "embed": lambda x, y, n, i, j: nn.functional.embedding(i, x),
    "add in place": lambda x, y, n, i, j: x.add_(y),
    "add at indices": lambda x, y, n, i, j: x.index_add(0, i, x),
    "scatter": lambda x, y, n, i, j: x.scatter_add(0, j, y),
    "stack": lambda x, y, n, i, j: torch.stack((x, y)),
    "divide a list": lambda x, y, n, i, j: torch._foreach_div([x, x], [y, y]),
}
SHAPES = ((3, 3), (3, 3), (), (3,), (3, 3))
DTYPES = (torch.float32, torch.float32, torch.float32, torch.int64, torch.int64)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("where", [("cuda:0", "cpu"), ("cpu", "cuda:0"), ("cuda:0", "cuda:0")])
def test_devices_go_together_where_torchs_fake_tensors_let_them(name: str, where: tuple[str, str]) -> None:
    def refusal(mode: Any) -> bool:
        with mode:
            x, *others = (
                torch.ones(shape, dtype=dtype, device=device)
                for shape, dtype, device in zip(SHAPES, DTYPES, (where[0], *[where[1]] * 4), strict=True)
            )
            try:
                CALLS[name](x, *others)
            except RuntimeError as error:
                if not re.search(r"\bcpu\b.*\bcuda:0\b|\bcuda:0\b.*\bcpu\b", str(error)):
                    raise
                return True
        return False

    assert refusal(CudaStandIn()) == refusal(FakeTensorMode())


WAITS: dict[str, tuple[Call, int]] = {
    "item": (lambda x: x.sum().item(), 1),
    "float": (lambda x: float(x.sum()), 1),
    "if": (lambda x: bool(x.any()), 1),
    "tolist": (lambda x: x.tolist(), 1),
    "cpu": (lambda x: x.cpu(), 1),
    "nonzero": (lambda x: x.nonzero(), 1),
    "mask": (lambda x: x[x > 0], 1),
    "set by mask": (lambda x: x.__setitem__(x > 0, x[0, 0]), 1),
    "list of indices": (lambda x: x[[0, 2]], 1),
    "equal": (lambda x: torch.equal(x, x), 1),
    "unique": (lambda x: x.unique(), 1),
    "from the host": (lambda x: torch.tensor([1.0, 2.0], device=x.device), 1),
    "new_tensor": (lambda x: x.new_tensor([1.0, 2.0]), 1),
    "to": (lambda x: torch.ones(2).to("cuda"), 1),
    "counted repeats": (lambda x: torch.arange(3, device="cuda").repeat_interleave(x[0].long().abs()), 1),
    "to, later": (lambda x: torch.ones(2).to("cuda", non_blocking=True), 0),
    "to where it is": (lambda x: x.to("cuda"), 0),
    "made there": (lambda x: x.new_zeros(3) + torch.arange(3, device="cuda"), 0),
    "known indices": (lambda x: x[x.argmax(dim=1)], 0),
    "checked there": (lambda x: torch._assert_async((x == x).all(), "NaN"), 0),
    "scattered": (lambda x: x.masked_scatter(x > 0, x), 0),
    "one number": (lambda x: x * torch.tensor(2.0), 0),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", WAITS)
def test_what_waits_for_the_device_is_seen(name: str, inference: bool) -> None:
    call, expected = WAITS[name]
    with CudaStandIn() as cuda, torch.inference_mode(inference):
        x = torch.randn(3, 3, device="cuda")
        call(x)
    assert sum(cuda.waits.values()) == expected
    assert cuda.waits.keys() <= {"elsewhere"}


def test_a_step_has_the_cpus_values_and_stays_on_the_device() -> None:
    torch.manual_seed(0)
    x, on_cpu = torch.randn(4, 8), nn.Sequential(nn.Conv1d(1, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(18, 5))
    moved = nn.Sequential(nn.Conv1d(1, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(18, 5))
    moved.load_state_dict(on_cpu.state_dict())

    def step(model: nn.Module, x: torch.Tensor) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=True)
        model(x[:, None]).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()

    step(on_cpu, x)
    with CudaStandIn() as cuda:
        moved.to("cuda")
        x = x.to("cuda")
        cuda.waits.clear()
        step(moved, x)
        assert not cuda.waits
        for name, parameter in moved.named_parameters():
            assert isinstance(parameter, CudaTensor)
            assert parameter.device == parameter.grad.device == CUDA
            torch.testing.assert_close(parameter.twin, on_cpu.get_parameter(name).detach())
        moved.to(torch.bfloat16)
        assert {(p.device, p.dtype) for p in moved.parameters()} == {(CUDA, torch.bfloat16)}


def test_waits_are_put_down_to_the_function_that_caused_them() -> None:
    from unimoe.trainers.steps.objective import columns_to_keep

    with CudaStandIn() as cuda:
        columns_to_keep(torch.full((2, 5), 7, device="cuda"))
    assert cuda.ours() == {"objective.py:columns_to_keep": 2}
    assert cuda.ours() == {}
