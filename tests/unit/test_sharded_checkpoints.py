"""Weights are read part by part from one file or several; what does not fit is named, not cut to fit."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from torch import nn

from unimoe.errors import CheckpointError
from unimoe.trainers.saving.sharded_checkpoints import load_weights


def model(hidden: int = 8) -> nn.Module:
    torch.manual_seed(hidden)
    return nn.Sequential(nn.Linear(4, hidden), nn.Linear(hidden, 4))


@pytest.fixture(params=[1 << 30, 150], ids=["one-file", "several-files"])
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    save_torch_state_dict(model().state_dict(), tmp_path, max_shard_size=request.param)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if request.param > 150 else 3)
    return tmp_path


def test_every_tensor_is_read(saved: Path) -> None:
    target = model()
    for parameter in target.parameters():
        nn.init.zeros_(parameter)
    found = load_weights(saved, target)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert all(torch.equal(tensor, target.state_dict()[name]) for name, tensor in model().state_dict().items())


def test_a_missing_file_is_named(saved: Path) -> None:
    lost = sorted(saved.glob("*.safetensors"))[-1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"{lost.name} is missing: put it back"):
        load_weights(saved, model())


@pytest.mark.parametrize("hidden", [6, 10])
def test_weights_of_a_larger_or_smaller_model_are_refused(saved: Path, hidden: int) -> None:
    with pytest.raises(CheckpointError, match=rf"0\.weight in the shape \[8, 4\], but this run has \[{hidden}, 4\]"):
        load_weights(saved, model(hidden))
