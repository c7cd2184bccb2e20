"""What a user sees of running calls: log lines, statistics, ranges in a profile. Costs nothing where it is off.

SLOWFAST_LOG=1 logs a line for each new signature of an op: shapes, backend, and why this one. SLOWFAST_LOG=2 logs
before each call the statistics of every tensor that enters it too, and waits for the GPU to do so; calls that a CUDA
graph records and calls under a function transform get none. Lines go to the logger "slowfast_kernels", and from there
to stderr unless the program has given that logger handlers before the import.

SLOWFAST_NVTX=1 puts an NVTX range around each call, forward and backward, for profilers outside of PyTorch. Both are
read once, at import: calls are wrapped when they are prepared, so that one that is not observed has nothing to look at.
PyTorch's own profilers (torch.profiler, emit_nvtx) need no variable.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .messages import describe, kind_of

logger = logging.getLogger("slowfast_kernels")


def _setting(name: str, most: int) -> int:
    value = os.environ.get(name) or "0"
    allowed = [str(i) for i in range(most + 1)]
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r} in the environment, want one of {', '.join(allowed)}")
    return int(value)


def _nvtx_setting() -> bool:
    if not _setting("SLOWFAST_NVTX", 1):
        return False
    if not hasattr(torch._C, "_nvtx"):
        warnings.warn(f"SLOWFAST_NVTX=1: torch {torch.__version__} is built without NVTX", RuntimeWarning, stacklevel=2)
        return False
    return True


LOG = _setting("SLOWFAST_LOG", 2)
NVTX = _nvtx_setting()
IS_ON = bool(LOG) or NVTX


def _start_logging() -> None:
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False  # else a program with handlers at the root would have every line twice


if LOG:
    _start_logging()


# ------------------------------------------------------------------------------------------------------- log

_MOST_LINES = 4096  # kept, so as not to say one twice
_said: set[str] = set()


def log_once(line: str) -> None:
    """A signature is more than what a line shows of it (strides, alignment), and caches forget: say it once."""
    if line in _said:
        return
    if len(_said) >= _MOST_LINES:
        _said.clear()
    _said.add(line)
    logger.info(line)


def listed(names: tuple[str, ...], tensors: tuple[Tensor | None, ...]) -> str:
    """ "q float32[1, 28, 128], ... on cpu", without those that are None."""
    given = [(name, x) for name, x in zip(names, tensors, strict=True) if x is not None]
    devices = " and ".join(dict.fromkeys(str(x.device) for _, x in given))
    return ", ".join(f"{name} {kind_of(x)}" for name, x in given) + f" on {devices}"


def statistics(x: Tensor) -> str:
    """Smallest and largest number, NaN left out, and how many elements are NaN and infinite. Waits for a GPU."""
    with torch.no_grad():
        if not x.numel():
            return "no elements"
        if not x.is_floating_point():
            return f"min {x.min().item()}, max {x.max().item()}"
        is_nan = x.isnan()
        num_nan, num_inf = int(is_nan.sum()), int(x.isinf().sum())
        numbers = x[~is_nan] if num_nan else x
        if not numbers.numel():
            return f"NaN {num_nan} (all), Inf 0"
        return f"min {numbers.min().item():.6g}, max {numbers.max().item():.6g}, NaN {num_nan}, Inf {num_inf}"


def log_statistics(op: str, names: tuple[str, ...], tensors: tuple[Tensor | None, ...]) -> None:
    if torch._C._are_functorch_transforms_active():
        return
    if any(x is not None and x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing():
        return
    for name, x in zip(names, tensors, strict=True):
        if x is not None:
            logger.info("%s: %s %s: %s", op, name, describe(x), statistics(x))


# ---------------------------------------------------------------------------------------------------- ranges


def _emits_nvtx() -> bool:
    """PyTorch's emit_nvtx is on, which makes a range of whatever it knows of."""
    return torch._C._autograd._profiler_type().name == "NVTX"


def observed(call: Callable, op: str, names: tuple[str, ...], range_name: str) -> Callable:
    """``call``, a function of a tuple of tensors called ``names`` and of what else it takes, with what the environment
    asks for around it."""
    if not IS_ON:
        return call

    @functools.wraps(call)
    def seen(tensors, *rest):
        if LOG > 1:
            log_statistics(op, names, tensors)
        if not NVTX or _emits_nvtx():
            return call(tensors, *rest)
        torch.cuda.nvtx.range_push(range_name)
        try:
            return call(tensors, *rest)
        finally:
            torch.cuda.nvtx.range_pop()

    return seen
