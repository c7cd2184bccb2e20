"""Small tensors between host and GPU, without waiting for what is queued on the GPU.

A copy from or to pageable memory ends when the stream has come to it, so that one of a few bytes behind a prefill's
first kernels costs the host their time, and the GPU an idle gap of as long while the host catches up. Through pinned
memory copies are queued as kernels are.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

ON_HOST = {"device": "cpu"}  # what is made there to go to a device, whatever the default device is
_FILLING = np.zeros(16, np.uint8)  # as many bytes as a kernel reads at once: no tensor starts between two of them
_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32}


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``. Its pinned copy is kept by the allocator until the GPU has read it."""
    if device.type != "cuda" or x.device.type != "cpu" or not x.numel():
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def upload(arrays: Iterable[np.ndarray | None], device: torch.device) -> list[Tensor | None]:
    """As ``to_device``, all of them in one copy: its queueing costs the host more than these bytes. None stays None."""
    arrays = list(arrays)
    if device.type != "cuda":
        return [None if x is None else torch.from_numpy(x).to(device) for x in arrays]
    given = [x for x in arrays if x is not None]
    parts = [part for x in given for part in (x.ravel().view(np.uint8), _FILLING[: -x.nbytes % len(_FILLING)])]
    there = to_device(torch.from_numpy(np.concatenate(parts)), device).split([len(part) for part in parts])[::2]
    # .data counts its own writes alone: those of a caller to one tensor are none of what autograd keeps of another
    made = (x.view(_DTYPES[like.dtype]).view(like.shape).data for x, like in zip(there, given, strict=True))
    return [None if x is None else next(made) for x in arrays]


class Download:
    """Tensors on their way to the host; None stays None.

    They arrive after what was queued on their GPU before, and do not wait for what is queued after.
    """

    def __init__(self, *tensors: Tensor | None) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._tensors = [None if x is None else x.to("cpu", non_blocking=x.device.type == "cuda") for x in tensors]
        device = next((x.device for x in tensors if x is not None and x.device.type == "cuda"), None)
        if device is not None:
            self._arrived = torch.cuda.current_stream(device).record_event()

    def wait(self) -> list[Tensor | None]:
        """The tensors, on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensors
