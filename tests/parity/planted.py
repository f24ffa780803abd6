"""A check that notices nothing checks nothing: each must fail when one golden value is changed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import GoldenCase, GoldenMismatchError, changeable_copy, discover, leave_for_lack_of_data
from safetensors.torch import load_file, save_file


def require_noticed(
    check: Callable[[GoldenCase], None],
    needs: pytest.MarkDecorator,
    pattern: str,
    folder: Path,
    *also: str,
    **how: Any,
) -> None:
    """Fail unless a check names the tensor in which one value was changed; arguments as of `_planted_error`."""
    case, name = _planted_error(pattern, needs, folder, *also, **how)
    with pytest.raises(GoldenMismatchError, match=re.escape(name)):
        check(case)


def _planted_error(
    pattern: str,
    check: pytest.MarkDecorator,
    folder: Path,
    *also: str,
    index: Callable[[GoldenCase], int] | None = None,
    size: float = 1e-3,
    fits: Callable[[GoldenCase, str], bool] = lambda case, name: True,
) -> tuple[GoldenCase, str]:
    """A copy of the first case that serves a check, with one changed value, and the name of the tensor that holds it.

    Args:
        pattern, also: shell patterns of tensors that the case must hold; the first that fits `pattern`, and is not
            empty, is changed.
        check: the `pytest.mark.golden` of the check's tests.
        folder: where the copy goes.
        index: says which value, counted in row-major order; None draws one.
        size: of the change of a float, as a share of the largest value.
        fits: whether the check compares a tensor of a case.
    """
    found = (
        (GoldenCase(case.path, ledger=None), name)
        for case in discover(pattern, *also, *check.args, **check.kwargs)
        for name in case.names(pattern)
        if fits(case, name) and case._load(name, "io").numel()
    )
    case, name = next(found, (None, ""))
    if case is None:
        leave_for_lack_of_data()
    changeable_copy(case.path, folder)
    file = folder / "io.safetensors"
    tensors = load_file(file)
    values = tensors[name].clone().flatten()
    place = index(case) if index is not None else _drawn(values.numel(), len(name))
    if values.is_floating_point():
        values[place] += size * float(values.abs().max()) or 1.0  # gradients of idle experts are all zero
    else:
        values[place] = ~values[place] if values.dtype == torch.bool else values[place] + 1
    save_file({**tensors, name: values.view_as(tensors[name])}, file)
    return GoldenCase(folder, ledger=None), name


def _drawn(count: int, seed: int) -> int:
    return int(torch.randint(count, (), generator=torch.Generator().manual_seed(seed)))
