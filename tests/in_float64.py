"""Arithmetic in float64 for code that asks for float32 here and there, so that rounding is far below any difference that
means something.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class InFloat64(TorchFunctionMode):
    """While it is entered, whoever asks torch for float32 gets float64."""

    def __enter__(self) -> Any:
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch.set_default_dtype(torch.float32)

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        wanted = tuple(torch.float64 if value is torch.float32 else value for value in args)
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*wanted, **named)


def collated(collator: Callable[[Any], dict[str, Any]], samples: Any) -> dict[str, Any]:
    """A batch as in float32, then with float64 in its place."""
    with torch._C.DisableTorchFunction():  # InFloat64 too
        torch.set_default_dtype(torch.float32)
        batch = collator(samples)
        torch.set_default_dtype(torch.float64)
    return {k: v.double() if getattr(v, "dtype", None) is torch.float32 else v for k, v in batch.items()}
