"""Seconds by stage, on a GPU too: what a block takes, but for what methods take that are called inside of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from threading import Lock

import torch

_LOCK = Lock()
_WATCHED: dict[tuple[int, str], list] = {}  # by owner and method: blocks that watch it, and what the instance had
_STAGES: ContextVar[dict[tuple[int, str], Callable]] = ContextVar("stages", default={})  # noqa: B039  never changed


def _timed(plain: Callable, key: tuple[int, str]) -> Callable:
    def timed(*args, **kwargs):
        with _STAGES.get().get(key, nullcontext)():
            return plain(*args, **kwargs)

    return timed


class Stopwatch:
    """Adds up seconds by the name of a stage, each second in one; and asks for the memory of a GPU.

    Args:
        device: waited for where a stage begins and where it ends.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._inside = [0.0]  # seconds of the stages inside each that is open
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def now(self) -> float:
        """Seconds of a clock, when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds what its block takes, but for stages inside of it."""
        begin = self.now()
        self._inside.append(0.0)
        yield
        seconds = self.now() - begin
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds - self._inside.pop()
        self._inside[-1] += seconds

    @contextmanager
    def method(self, owner: object, method: str, name: str) -> Iterator[None]:
        """While the block lasts, each call of ``owner``'s ``method`` in this thread is a stage.

        Threads may watch one owner at the same time: its method is replaced while any of them does.
        """
        key = (id(owner), method)
        with _LOCK:
            if key not in _WATCHED:
                _WATCHED[key] = [0, vars(owner).get(method)]
                setattr(owner, method, _timed(getattr(owner, method), key))
            _WATCHED[key][0] += 1
        before = _STAGES.get()
        token = _STAGES.set(before | {key: partial(self.stage, name)})
        try:
            yield
        finally:
            _STAGES.reset(token)
            with _LOCK:
                _WATCHED[key][0] -= 1
                if not _WATCHED[key][0]:
                    _, own = _WATCHED.pop(key)
                    if own is None:
                        delattr(owner, method)
                    else:
                        setattr(owner, method, own)

    def peak_memory(self) -> int | None:
        """Most bytes of tensors since the start; None: not on a GPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
