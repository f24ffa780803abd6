"""A stand-in for a CUDA device on machines without one: tensors that say they are on it, and a list of what waits for it.

Such a tensor wraps one on the CPU, on which every operation is carried out. Before that its devices are checked by the rule
of torch's FakeTensorMode. The mode itself goes through no model in a build without CUDA: convolutions, random numbers and
autograd look for a guard of the device; and without values it ends where code looks at one. Here such code goes on, and is
written down as a wait for the device: a value or a size that the host needs, and every blocking copy either way.

It shows devices, dtypes, shapes and waits. Values are those of CPU kernels, and nothing is known of CUDA's: neither their
results, nor which of them are chosen, nor waits inside of one, nor autocast.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import unimoe

CUDA = torch.device("cuda", 0)
CPU, META = torch.device("cpu"), torch.device("meta")
_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)
_IN_PARTS = torch._C.DispatchKey.CompositeImplicitAutograd
_NEEDS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
_SUBSCRIPTS = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
_MAKE_SUBCLASS = torch.Tensor._make_wrapper_subclass
_GET_DEVICE = torch.Tensor.device.__get__  # type: ignore[attr-defined]
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_OURS = f"{Path(unimoe.__file__).parent}/"
_THEIRS = f"{Path(transformers.__file__).parent}/"


class CudaTensor(torch.Tensor):
    """A tensor of the stand-in. To C++ it is on "meta", whose kernels touch no memory and whose gradients need no stream."""

    twin: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, twin: torch.Tensor) -> "CudaTensor":
        made = _MAKE_SUBCLASS(cls, twin.shape, twin.stride(), twin.storage_offset(), dtype=twin.dtype, device=META)
        made.twin = twin
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"CudaTensor({self.twin})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} was called on a tensor of the stand-in outside of `CudaStandIn`.")


class CudaStandIn:
    """A context in which "cuda" is a device.

    Attributes: waits, how often the host waited for the device, by place: "file:function" of ours, or "transformers/file:
        function"; "elsewhere" is the test itself.
    """

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()

    def ours(self) -> dict[str, int]:
        """The waits since the last call without those of transformers."""
        ours = {place: count for place, count in self.waits.items() if not place.startswith("transformers/")}
        self.waits.clear()
        return ours

    def __enter__(self) -> "CudaStandIn":
        self._stack = ExitStack()
        # Whether grouped_mm can be used depends on it; and subclasses, such as quantised weights, are made in C++.
        self._stack.enter_context(patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)))
        self._stack.enter_context(patch.object(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state()))
        self._stack.enter_context(patch.object(torch.cuda, "set_rng_state", lambda s, device: torch.set_rng_state(s)))
        self._stack.enter_context(patch.object(torch.Tensor, "_make_wrapper_subclass", _make_wrapper_subclass))
        self._stack.enter_context(_Operations(self.waits))
        self._stack.enter_context(_Names())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


class _Names(TorchFunctionMode):
    """Calls the device "meta" wherever C++ is told of it: that there is no CUDA would be an error there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args = tuple(map(_renamed, args))
        kwargs = {name: _renamed(value) for name, value in (kwargs or {}).items()}
        if func == _GET_DEVICE:
            device = func(*args)
            return CUDA if device == META else device
        if func is torch.Tensor.cuda:
            return args[0].to(META)
        if func is torch.Tensor.tolist:
            return args[0].cpu().tolist()
        if func in _FROM_DATA:  # to C++ there are no values on "meta"
            return self._from_data(func, args, kwargs)
        if func == _SET_DATA and isinstance(args[0], CudaTensor):
            args[0].twin = args[1].twin
        if func in _SUBSCRIPTS and isinstance(args[0], CudaTensor):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(map(_index, parts)), *args[2:])
        if types and torch._C._is_torch_function_enabled():
            with self:  # in functions that a subclass brings along the device has its name too
                return types[0].__torch_function__(func, types, args, kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _from_data(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        device = kwargs.pop("device", None)
        if func is torch.Tensor.new_tensor:
            like, *args = args
            func, device = torch.tensor, device or (META if isinstance(like, CudaTensor) else like.device)
            kwargs.setdefault("dtype", like.dtype)
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


def _make_wrapper_subclass(*args: Any, **kwargs: Any) -> torch.Tensor:
    return _MAKE_SUBCLASS(*args, **{name: _renamed(value) for name, value in kwargs.items()})


def _renamed(leaf: Any) -> Any:
    is_name = isinstance(leaf, str) and leaf.partition(":")[0] == "cuda"
    return META if is_name or (isinstance(leaf, torch.device) and leaf.type == "cuda") else leaf


def _index(part: Any) -> Any:
    """Lists in a subscript become tensors of the device, as they would in C++."""
    return torch.tensor(part).to(META) if isinstance(part, list) else part


class _Operations(TorchDispatchMode):
    """Checks the devices of every operation, writes down its wait, and carries it out on the CPU."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        if any(type(t) not in (torch.Tensor, torch.nn.Parameter, CudaTensor) for t in tensors):
            return NotImplemented  # a subclass takes itself apart, and its parts come here
        if _consists_of_others(func):
            with self:  # without autograd such operations come here whole
                return func._op_dk(_IN_PARTS, *args, **kwargs)
        target = CUDA if kwargs.get("device") == META else kwargs.get("device")
        if target != CUDA and not any(isinstance(t, CudaTensor) for t in tensors):
            return func(*args, **kwargs)
        device = target or common_device(func, args, tensors)
        if _waits(func, args, kwargs, device):
            self.waits[_place(sys._getframe(1))] += 1
        on_cpu = {
            name: CPU if name == "device" and value is not None else _twin(value) for name, value in kwargs.items()
        }
        results = _ON_CPU.get(func, func)(*map(_twin, args), **on_cpu)
        if device != CUDA:
            return results
        given = {id(t.twin): t for t in tensors if isinstance(t, CudaTensor)}  # results of operations in place

        def paired(twin: torch.Tensor) -> torch.Tensor:
            return given[id(twin)] if id(twin) in given else CudaTensor(twin)

        return _mapped(paired, torch.Tensor, results)


def _mapped(function: Callable[[Any], Any], kind: type, value: Any) -> Any:
    """The value with the function applied to what is of this kind, in lists and tuples too."""
    if isinstance(value, kind):
        return function(value)
    return type(value)(_mapped(function, kind, part) for part in value) if type(value) in (list, tuple) else value


def _twin(value: Any) -> Any:
    return _mapped(lambda tensor: tensor.twin, CudaTensor, value)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@functools.cache
def _consists_of_others(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _IN_PARTS)


def common_device(func: Any, args: Any, tensors: list[torch.Tensor]) -> torch.device:
    """Where the results of an operation are.

    Raises RuntimeError where its tensors are not together: a CPU's may be among those of CUDA if it is a single number, or
    an index, or the source or target of a copy.
    """
    if func in _COPIES or func in _INDEXING:
        return args[0].device
    devices = {t.device for t in tensors if t.dim() or t.device != CPU} or {CPU}
    if len(devices) > 1:
        raise RuntimeError(f"{func} got tensors on {' and '.join(sorted(map(str, devices)))}.")
    return devices.pop()


def _integer_histogram(x: torch.Tensor, *args: Any) -> torch.Tensor:
    """CPUs have none."""
    return torch.histc(x.float(), *args).to(x.dtype)


def _waits(func: Any, args: Any, kwargs: dict[str, Any], device: torch.device) -> bool:
    if func in _COPIES:
        source = args[0] if func is _aten._to_copy.default else args[1]
        return source.device != device and source.numel() > 0 and not kwargs.get("non_blocking")
    if func in _INDEXING:
        indices = [index for index in args[1] if index is not None]
        return any(index.device != device or index.dtype == torch.bool for index in indices)
    if func is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
        return False
    return not _NEEDS_VALUES.isdisjoint(func.tags)


_ON_CPU = {_aten.histc.default: _integer_histogram}


def _place(frame: FrameType | None) -> str:
    """The innermost function on the stack that is the package's or transformers'."""
    while frame is not None:
        # The function around comprehensions, of which some Pythons make functions.
        file, function = (
            frame.f_code.co_filename,
            frame.f_code.co_qualname.partition(".<locals>")[0].rpartition(".")[2],
        )
        if file.startswith(_THEIRS):
            return f"transformers/{Path(file).name}:{function}"
        if file.startswith(_OURS) and not file.startswith(f"{_OURS}tests/"):
            return f"{Path(file).name}:{function}"
        frame = frame.f_back
    return "elsewhere"
