"""From a call to the backend that runs it. The choice itself is ``heuristics.backends.choose_backend``."""

from __future__ import annotations

import importlib
import warnings
from array import array
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.nn import Parameter

from .. import _extension, environment
from ..heuristics.backends import BACKENDS, BackendChoice, OpCall, choose_backend, unsupported_reason
from .checks import has_tangent, named

_requested: ContextVar[str | None] = ContextVar("slowfast_backend", default=None)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run every op of the block on one backend ("cuda", "triton", "cpu", "eager"; None: automatic).

    An op's own ``backend=`` argument wins over this, and this over the environment variable SLOWFAST_BACKEND.

    Raises:
        ValueError: an unknown name. A backend that cannot run raises when an op is called, naming the limit.
    """
    check_backend_name(name)
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def check_backend_name(name: str | None) -> None:
    if name is not None and not (isinstance(name, str) and name in BACKENDS):
        raise ValueError(f"backend: got {named(name)}, want one of {', '.join(BACKENDS)} or None (automatic)")


def backend_for(call: OpCall, device: torch.device, backend: str | None) -> str:
    """The backend that runs ``call``.

    Raises:
        ValueError: an unknown backend name.
        NotImplementedError: the backend that was asked for cannot run this call; the message names the limit.
    """
    return _resolve(call, device, requested_backend(backend))


def requested_backend(backend: str | None) -> str | None:
    """The name that a call, an enclosing ``use_backend`` or the environment asks for, in this order."""
    return backend or _requested.get() or environment.BACKEND.get() or None


class SignatureCache(dict):
    """What checks and dispatch found for a call's signature: a decode step's next call is like its last.

    Kept small, since a new sequence length is a new signature.
    """

    SIZE = 2048

    def remember(self, key: tuple, value):
        if len(self) >= self.SIZE:
            self.clear()
        self[key] = value
        return value


def signature(tensors: tuple[Tensor | None, ...]) -> tuple[Hashable, bytes] | None:
    """All that checks and dispatch look at but data, and ``params.addresses_of`` the tensors; None if an argument has
    no such thing (the checks then say so)."""
    return read_plain(tensors) or _signature_by_parts(tensors)


def _signature_by_parts(tensors: tuple[Tensor | None, ...]) -> tuple[tuple, bytes] | None:
    """The last of a tensor is whether it begins at a multiple of 16 bytes, as TMA and vector loads need it; None for
    freed memory. A layout other than strided has no strides, or no address.
    """
    facts, addresses = [], array("Q")
    try:
        for x in tensors:
            if x is None:
                facts.append(None)
                addresses.append(0)
                continue
            begin = x.data_ptr()
            facts.append((x.shape, x.stride(), x.dtype, x.device, begin % 16 == 0 if begin else None))
            addresses.append(begin)
    except (AttributeError, TypeError, RuntimeError):
        return None
    return tuple(facts), addresses.tobytes()


@lru_cache(maxsize=1)
def tensor_reader() -> Callable[[tuple], tuple[bytes, bytes] | None] | None:
    """What reads a call's tensors in one pass of C++; None before torch 2.10 and without the extension."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if exchange is None or _extension.missing_reason() is not None:
        return None
    return _extension.extension().tensor_reader(exchange, Tensor, Parameter)


def read_plain(tensors: tuple[Tensor | None, ...]) -> tuple[bytes, bytes] | None:
    """``signature``, of tensors that are all plain: exactly Tensor or Parameter, and their memory is what they are.

    None: not all are, or there is no ``tensor_reader``.
    """
    read = tensor_reader()
    return None if read is None else read(tensors)


@lru_cache(maxsize=1024)
def _resolve(call: OpCall, device: torch.device, name: str | None) -> str:
    backend = choice_for(call, device, name).backend
    if backend == "eager" and name is None:
        _warn_of_missing_extension(call)
    return backend


def choice_for(call: OpCall, device: torch.device, name: str | None) -> BackendChoice:
    """The backend that ``name`` asks for (None: the fastest), with what speaks against each faster one.

    Raises:
        ValueError, NotImplementedError: as ``backend_for``.
    """
    check_backend_name(name)
    unavailable = {b: _extension.unavailable_reason(b, device) for b in BACKENDS}
    if name is None:
        return choose_backend(call, unavailable)
    limits = {b: unavailable[b] or unsupported_reason(b, call) for b in BACKENDS[: BACKENDS.index(name) + 1]}
    limit = limits.pop(name)
    if limit is not None:
        raise NotImplementedError(f"backend={name!r} cannot run {call.op}: {limit}")
    return BackendChoice(name, {b: reason or f"{name!r} was asked for" for b, reason in limits.items()})


def why(choice: BackendChoice, backend: str | None) -> str:
    """What made a call's ``backend`` argument, with what is around it, this choice."""
    if requested_backend(backend) is None:
        if choice.backend == "eager":
            return "no kernel here runs this call"
        return "the fastest that is here and runs this call"
    if backend:
        return f"asked for by backend={backend!r}"
    if _requested.get():
        return f"asked for by use_backend({choice.backend!r})"
    return f"asked for by SLOWFAST_BACKEND={choice.backend}"


_has_warned = False


def _warn_of_missing_extension(call: OpCall) -> None:
    """Once a process: an automatic choice is PyTorch's own ops, and would be a kernel if the extension were there."""
    global _has_warned
    reason, kernels = _extension.missing_reason(), "cpu" if call.device_type == "cpu" else "cuda"
    if _has_warned or reason is None or unsupported_reason(kernels, call._replace(has_sm90_kernels=True)):
        return
    _has_warned = True
    warnings.warn(
        f"{call.op} runs on PyTorch's own ops, several times slower than backend {kernels!r}: {reason}. "
        "SLOWFAST_BACKEND=eager asks for them, and for silence",
        RuntimeWarning,
        stacklevel=2,
    )


def backend_module(name: str) -> ModuleType:
    return importlib.import_module(f"slowfast_kernels.{name}")


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def is_watched() -> bool:
    """PyTorch's dispatcher must see every call, whatever its tensors are."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing()


def needs_torch_op(*tensors: Tensor | None) -> bool:
    """True where PyTorch's dispatcher must see the call: torch.compile, traces, subclasses, modes, and tensors whose
    memory is not what they are (meta, lazily negated, all zero without storage).

    Otherwise the backend is called directly, which spares tens of microseconds a call.
    """
    if torch.compiler.is_compiling() or is_watched():
        return True
    for x in tensors:
        if x is None:
            continue
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            if x.is_meta or x.is_neg() or x._is_zerotensor():
                return True
        elif isinstance(x, Tensor):
            return True
    return False


def is_differentiated(tensors: tuple[Tensor | None, ...]) -> bool:
    """Autograd follows the call."""
    if torch.is_grad_enabled():
        for x in tensors:  # in half the time of any()
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def follows_gradients(tensors: tuple[Tensor | None, ...]) -> bool:
    """A backward pass may come, which reads results of the forward: they are kept."""
    return is_differentiated(tensors) and not needs_formula(*tensors)


def needs_formula(*tensors: Tensor | None) -> bool:
    """True where only PyTorch's own ops can carry what travels with a tensor: forward-mode tangents, torch.func.

    The op is then the eager formula, on whatever backend was asked for, as its backward is.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(map(has_tangent, tensors))


def refuse_tangents(*tensors: Tensor | None) -> None:
    """For a registered op's implementation: PyTorch hands it dual tensors and would drop their tangents.

    torch.func.jvp takes the tangents off before it comes here, so inside it every registered op is refused.

    Raises:
        NotImplementedError: a tensor has a tangent, or may have had one.
    """
    if forward_ad._current_level >= 0 and (eager_transforms.JVP_NESTING > 0 or any(map(has_tangent, tensors))):
        raise NotImplementedError(
            "torch.ops.slowfast has no forward-mode derivatives; the functions of slowfast_kernels have them"
        )
