"""The random numbers of a process: those of Python, NumPy, torch, and torch on its accelerator."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.random.get_rng_state()}
    if torch.accelerator.is_available():
        state[_accelerator()] = torch.get_device_module().get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["torch"])
    if torch.accelerator.is_available() and _accelerator() in state:
        torch.get_device_module().set_rng_state(state[_accelerator()])


def _accelerator() -> str:
    return torch.accelerator.current_accelerator().type
