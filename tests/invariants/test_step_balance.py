"""An optimizer step is the same however it is cut into batches: cross entropy and every loss of the routers."""

from pathlib import Path

import pytest
import torch
from step_gradients import CASES, STEP, step_gradients


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp(min=1e-12))


@pytest.mark.parametrize("case", CASES)
def test_accumulated_gradients_are_those_of_one_batch(tmp_path: Path, case: str) -> None:
    whole, losses = step_gradients(tmp_path / "whole", case, STEP, 1)
    parts, losses_of_parts = step_gradients(tmp_path / "parts", case, STEP // 4, 4)
    assert whole.keys() == parts.keys()
    assert any("mlp.gate" in name for name in whole)
    assert {name: gap(parts[name], whole[name]) for name in whole if gap(parts[name], whole[name]) > 1e-6} == {}
    assert losses_of_parts == pytest.approx(losses, rel=1e-5)
    assert losses["aux_loss"] > 0.1
