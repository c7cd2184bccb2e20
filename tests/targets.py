"""Backends x dtypes that this machine tests. One test body serves all of them, on a CPU and on a GPU.

A backend that cannot run here is left out, and ``test_dispatch.py`` skips one test with the reason of
``sk.backends()`` and the number of cases that this hides. The cpu backend is never left out: without the extension its
tests fail and say how to build it.
SLOWFAST_TEST_BACKENDS="triton" or "eager,cpu" narrows the list; ``child.py`` sets it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pytest
import torch
from hypothesis import currently_in_test_context, reject

import slowfast_kernels as sk
from slowfast_kernels.dtypes import HALF_DTYPES, KERNEL_DTYPES
from slowfast_kernels.heuristics.backends import BACKENDS

HAS_GPU = torch.cuda.is_available()
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETER, reason="run by test_the_interpreter_agrees_with_eager")
DEVICE = torch.device("cuda" if HAS_GPU and not INTERPRETER else "cpu")
REPEATS = 5 if DEVICE.type == "cpu" else 100  # of a call that must give the same bits
if INTERPRETER:
    REPEATS = 1
HALF = HALF_DTYPES
UNAVAILABLE = {name: f"{name} is {capability}" for name, capability in sk.backends().items() if not capability}
_WANTED = os.environ.get("SLOWFAST_TEST_BACKENDS", ",".join(BACKENDS)).split(",")


@dataclass(frozen=True)
class Target:
    backend: str
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"{self.backend}-{str(self.dtype).removeprefix('torch.')}"

    def run(self, op, *args, **options):
        """``op`` on this backend; skips where the cuda backend names a limit of its own (others have none).

        Among random examples only the one that is beyond the limit is passed over.
        """
        try:
            return op(*args, **options, backend=self.backend)
        except NotImplementedError as limit:
            if self.backend == "cuda":
                if currently_in_test_context() and self.dtype in HALF:
                    reject()
                pytest.skip(str(limit))
            raise


class Targets(list):
    """Parameters for ``parametrize``; ``left_out`` counts those that this machine lacks, by backend."""

    def __init__(self, params: Iterable, left_out: Mapping[str, int]) -> None:
        super().__init__(params)
        self.left_out = Counter(left_out)

    def without(self, backend: str) -> Targets:
        kept = (param for param in self if param.values[0].backend != backend)
        return Targets(kept, {name: count for name, count in self.left_out.items() if name != backend})


def _targets(backends: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> Targets:
    params, left_out = [], Counter()
    for backend in backends:
        if backend not in _WANTED:
            continue
        device = torch.device("cpu") if backend == "cpu" else DEVICE
        if backend in UNAVAILABLE and backend != "cpu":
            left_out[backend] = len(dtypes)
            continue
        for dtype in dtypes:
            interpreted = backend == "triton" and device.type == "cpu"  # slow, and wrong in bfloat16
            if dtype == torch.float32 or not interpreted:
                target = Target(backend, dtype, device)
                params.append(pytest.param(target, id=str(target)))
            else:
                left_out[backend] += 1
    return Targets(params, left_out)


ALL = _targets(BACKENDS, KERNEL_DTYPES)
KERNELS = _targets(tuple(backend for backend in BACKENDS if backend != "eager"), KERNEL_DTYPES)
FLOAT32 = _targets(BACKENDS, (torch.float32,))


def on_gpu(*dtypes: torch.dtype) -> list:
    """The GPU's backends, for modules that are skipped without one: each of their cases then counts as skipped."""
    backends = [backend for backend in BACKENDS if backend in ("triton", "cuda") and backend in _WANTED]
    targets = [
        Target(backend, dtype, torch.device("cuda")) for backend in backends for dtype in dtypes or KERNEL_DTYPES
    ]
    marks = {backend: [pytest.mark.skip(reason=reason)] for backend, reason in UNAVAILABLE.items()}
    return [pytest.param(target, id=str(target), marks=marks.get(target.backend, [])) for target in targets]
