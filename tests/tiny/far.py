"""An accelerator to test with: its tensors are on a device of their own, and computed on the CPU.

As on a GPU, what is on it meets nothing that is not: an operation on tensors of two devices is an
error, but for scalars and indices. As on MPS, it may be without float64. Torch has one place for
such a device in a process, and looks for devices when it first differentiates, so use `on_far`,
which takes a new process for it.
"""

import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

ANY_DEVICE = ("aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::set_")
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
FACTORIES = (
    "empty.memory_format",
    "empty_strided",
    "copy_",
    "_copy_from",
    "_to_copy",
    "zeros",
    "ones",
    "full",
    "arange",
    "arange.start",
    "arange.start_step",
    "eye",
    "eye.m",
    "scalar_tensor",
)


class _Device:
    """What the device is like in this process."""

    has_float64 = True
    operations = 0


class _Module(_DummyBackendModule):  # type: ignore[misc]
    """What ``torch.far`` is."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, _: object) -> Tensor:
        return torch.empty(0)

    def set_rng_state(self, _state: Tensor, _: object) -> None: ...


class Far(Tensor):
    """A tensor that says that it is on the device, about one on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Far":
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="far:0",
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = Far(self.inner.clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU what is asked of the device, if it may be."""
    tensors: list[Tensor] = []

    def near(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
        return value.inner if isinstance(value, Far) else value

    args, kwargs = _mapped(near, args), {key: _mapped(near, each) for key, each in kwargs.items()}
    far = [tensor for tensor in tensors if isinstance(tensor, Far)]
    name = func._schema.name
    _Device.operations += bool(far)
    _require_together(name, tensors)
    wanted = kwargs.get("device")
    if wanted is not None:
        is_far = torch.device(wanted).type == "far"
        kwargs = {**kwargs, "device": torch.device("cpu")} if is_far else kwargs
    else:
        is_far = isinstance(tensors[0], Far) if name in ANY_DEVICE else bool(far)
    if name == "aten::_to_copy" and not is_far and kwargs.get("dtype") == torch.float64:
        _refuse_float64()  # MPS may convert before it copies
    known = {id(tensor.inner): tensor for tensor in far}
    found = func(*args, **kwargs)

    def to_far(value: Any) -> Any:
        if not isinstance(value, Tensor) or not is_far:
            return value
        if id(value) in known:  # written in place
            return known[id(value)]
        if value.dtype == torch.float64:
            _refuse_float64()
        return Far(value)

    return found if name == "aten::_local_scalar_dense" else _mapped(to_far, found)


def _require_together(name: str, tensors: list[Tensor]) -> None:
    near = any(t.ndim for t in tensors if not isinstance(t, Far))
    is_apart = near and any(isinstance(t, Far) for t in tensors)
    if is_apart and name not in ANY_DEVICE and not _takes_indices(name, tensors):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")


def _takes_indices(name: str, tensors: list[Tensor]) -> bool:
    return name in INDEXED and isinstance(tensors[0], Far)


def _refuse_float64() -> None:
    if not _Device.has_float64:
        raise TypeError("the device has no float64")


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Change a value, or all that a list or tuple holds: operators know no other containers."""
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(change, each) for each in value])
    return change(value)


def on_far(do: Callable[[Path], object], folder: Path, *, has_float64: bool = True) -> None:
    """Call `do(folder)` in a process that has the device ``"far"``; fail with what it raised.

    Fails too if nothing was done on the device.

    Parameters
    ----------
    do : callable
        A function of a module.
    folder : Path
    has_float64 : bool
    """
    file = inspect.getsourcefile(do)
    own = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "tiny.far", file, do.__name__, folder, str(int(has_float64))],
        capture_output=True,
        text=True,
        cwd=own,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _run_alone(file: str, name: str, folder: str, has_float64: str) -> None:
    _begin(has_float64=bool(int(has_float64)))
    spec = importlib.util.spec_from_file_location("on_far", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, name)(Path(folder))
    assert _Device.operations, "nothing was done on the device"


def _begin(has_float64: bool) -> None:
    """Let torch know the device, for the rest of the process."""
    _setup_privateuseone_for_python_backend("far", _Module())
    _Device.has_float64 = has_float64
    library = torch.library.Library("aten", "IMPL")
    for each in FACTORIES:
        library.impl(each, _kernel(each), "PrivateUse1")
    _Device.library = library  # type: ignore[attr-defined]  # kept, or it is undone


def _kernel(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    func = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return lambda *args, **kwargs: _run(func, args, kwargs)


if __name__ == "__main__":
    from tiny import far  # as tests know it, not as __main__

    far._run_alone(*sys.argv[1:])
