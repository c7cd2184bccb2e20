"""A launch of calls alike: what Triton compiled for the first is kept, and later ones hand it their addresses.

``kernel[grid](...)`` binds and specialises every argument at each launch, which takes the host longer than the rest of
a call does. Of calls alike only addresses are new, and of these Triton compiles by one thing: whether they are
multiples of 16.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import KernelInterface

try:
    from triton import knobs
except ImportError:  # before Triton 3.4
    knobs = None

_MOST = 64  # compiled forms kept a launch; a prepared call's signature leaves it one


class Launch:
    """``kernel[grid](*tensors, *numbers, **constants)``, the kernel's arguments in this order.

    ``waits``: a dependent launch, which may start while the one before it on its stream runs, and waits by itself.

    Its tensors are of the same dtypes at every call, its numbers of the same types. Kept is only what was compiled for
    NVIDIA GPUs: for others Triton compiles by more of a tensor than its address. Everything else goes through Triton as
    it would without this class: interpreted kernels, and launches under hooks that see or change arguments.
    """

    def __init__(
        self, kernel: KernelInterface, grid: Sequence[int], constants: Mapping[str, object], *, waits: bool = False
    ):
        self.kernel, self.grid = kernel, (*grid, 1, 1)[:3]
        self.constants = dict(constants, launch_pdl=True) if waits else constants
        self._kept: dict[tuple, tuple[Callable, tuple]] = {}

    def __call__(
        self, tensors: Sequence[Tensor | None], numbers: tuple = (), addresses: Sequence[int | None] | None = None
    ) -> None:
        """On the current stream of the current device, which is that of the tensors.

        ``addresses``: those of the tensors, where they are known.
        """
        if addresses is None:
            addresses = [None if x is None else x.data_ptr() for x in tensors]
        settings = _settings(self.kernel)
        if settings is None:
            self._through_triton(tensors, numbers)
            return
        aligned = tuple([x if x is None else x % 16 == 0 for x in addresses])
        key = (tensors[0].device.index, settings, numbers, aligned)
        kept = self._kept.get(key)
        if kept is not None:
            run, constants = kept
            run(*addresses, *numbers, *constants)
            return
        compiled = self._through_triton(tensors, numbers)
        if isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
            if len(self._kept) >= _MOST:
                self._kept.clear()
            self._kept[key] = (compiled[self.grid], self._constants_of(compiled, len(tensors) + len(numbers)))

    def _through_triton(self, tensors: Sequence[Tensor | None], numbers: tuple) -> CompiledKernel | None:
        return self.kernel[self.grid](*tensors, *numbers, **self.constants)

    def _constants_of(self, compiled: CompiledKernel, num_given: int) -> tuple:
        """What ``compiled`` takes behind the given arguments: from Triton 3.3 on all constants, before that none."""
        return tuple([self.constants[name] for name in list(compiled.src.signature)[num_given:]])


def _settings(kernel: KernelInterface) -> object | None:
    """What Triton reads of its surroundings at each launch and compiles by; None: a hook must see the launch."""
    if getattr(kernel, "pre_run_hooks", None):
        return None
    if knobs is None:
        return os.environ.get("TRITON_DEBUG", "0")
    if getattr(knobs.runtime, "add_stages_inspection_hook", None) is not None:
        return None
    compilation = knobs.compilation
    return (
        knobs.runtime.debug,
        getattr(compilation, "instrumentation_mode", ""),
        getattr(compilation, "fpsan_homomorphic_casts", False),
    )
