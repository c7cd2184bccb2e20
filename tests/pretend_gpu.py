"""A GPU that is pretended on a CPU, to see what a host waits for.

Tensors that are said to lie on it compute where they are, on the CPU, but say of themselves that they are on ``GPU``.
What would make a host wait for a real one raises ``Waited``: reading values, copies that block, shapes that depend on
data. So does an operation of one tensor there and one here. Asynchronous copies to the host arrive with the event that
is waited for, and hold nonsense until then.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)
READS = {"item", "tolist", "numpy", "cpu", "equal", "allclose", "is_nonzero"}
READS |= {"__bool__", "__int__", "__float__", "__index__", "__contains__"}
READS |= {"nonzero", "argwhere", "masked_select", "unique", "bincount", "repeat_interleave"}  # their shapes are data
NONSENSE = -(2**40)


class Waited(AssertionError):
    """The host would have waited for the GPU."""


class PretendGPU(TorchFunctionMode):
    """``calls``: functions of tensors there, as they were queued; "wait" where the host waited on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self._there: dict[int, object] = {}  # storages, kept, so that no other gets the address of one
        self._pinned: dict[int, object] = {}
        self._arriving: list[tuple[Tensor, Tensor]] = []

    def put(self, tensors: Iterable[Tensor]) -> None:
        """Say that these lie on the GPU."""
        for x in tensors:
            storage = x.untyped_storage()
            self._there[storage._cdata] = storage

    def has(self, x: object) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage()._cdata in self._there

    def run(self, function, *args, **kwargs):
        """A function whose kernels are the GPU's own: nothing that it does waits."""
        with torch._C.DisableTorchFunction():
            self.calls.append(function.__name__)
            result = function(*args, **kwargs)
            self.put(x for x in pytree.tree_leaves(result) if isinstance(x, Tensor))
        return result

    def record_event(self):
        arriving, self._arriving = self._arriving, []

        def synchronize() -> None:
            with torch._C.DisableTorchFunction():
                self.calls.append("wait")
                for target, source in arriving:
                    target.copy_(source)

        return SimpleNamespace(synchronize=synchronize)

    # ------------------------------------------------------------------------------------------ torch's functions

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunction():
            return self._call(function, args, kwargs)

    def _call(self, function, args, kwargs):
        name = getattr(function, "__name__", str(function))
        leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in leaves if self.has(x)]
        if name == "__get__" and there:
            if function == Tensor.is_cpu.__get__:
                return False
            return GPU if function == Tensor.device.__get__ else function(*args)
        if name == "to" and (moved := self._moved(*args, **kwargs)) is not None:
            return moved
        args = tuple(torch.device("cpu") if isinstance(x, torch.device) and x == GPU else x for x in args)
        if name == "pin_memory" and not there:
            pinned = args[0].clone()
            self._pinned[pinned.untyped_storage()._cdata] = pinned.untyped_storage()
            return pinned
        is_made_there = kwargs.get("device") is not None and torch.device(kwargs["device"]) == GPU
        if is_made_there:
            if name in ("tensor", "as_tensor"):
                raise Waited(f"torch.{name}(..., device={GPU}) copies from pageable memory")
            kwargs["device"] = "cpu"
        if there:
            self.calls.append(name)
            here = [x for x in leaves if x.dim() and not self.has(x)]
            if here:
                raise Waited(f"{name}: {len(here)} tensors of the host beside {len(there)} of the GPU")
            if name in READS:
                raise Waited(f"{name} of a tensor on the GPU")
            if name in ("__getitem__", "__setitem__") and _reads(args[1]):
                raise Waited(f"{name} by {args[1]}")
        result = function(*args, **kwargs)
        if there or is_made_there:
            self.put(x for x in pytree.tree_leaves(result) if isinstance(x, Tensor))
        return result

    def _moved(self, x: Tensor, *args, non_blocking: bool = False, **kwargs) -> Tensor | None:
        """What ``x.to`` makes where it is a copy between GPU and host."""
        target = kwargs.get("device", args[0] if args else None)
        if not isinstance(target, torch.device | str) or (torch.device(target) == GPU) == self.has(x):
            return None
        copy = x.clone()
        self.calls.append("download" if self.has(x) else "upload")
        if x.numel() and not non_blocking:
            raise Waited(f"to({target}) blocks")
        if self.has(x):
            self._arriving.append((copy.fill_(NONSENSE), x))
            return copy
        if x.numel() and x.untyped_storage()._cdata not in self._pinned:
            raise Waited(f"to({target}) from pageable memory")
        self.put([copy])
        return copy


def _reads(index: object) -> bool:
    """Lists are uploaded, and of masks the number of entries is counted."""
    indices = index if isinstance(index, tuple) else (index,)
    return any(isinstance(i, list) or (isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)) for i in indices)


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU, which is torch.cuda's current one; its mode is not entered yet."""
    pretended = PretendGPU()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: pretended)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return pretended
