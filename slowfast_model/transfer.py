"""Small tensors between host and GPU, without waiting for what is queued on the GPU.

A copy from or to pageable memory ends when the stream has come to it, so that one of a few bytes behind a prefill's
first kernels costs the host their time, and the GPU an idle gap of as long while the host catches up. Through pinned
memory copies are queued as kernels are.
"""

from __future__ import annotations

import torch
from torch import Tensor

ON_HOST = {"device": "cpu"}  # what is made there to go to a device, whatever the default device is


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``. Its pinned copy is kept by the allocator until the GPU has read it."""
    if device.type != "cuda" or x.device.type != "cpu" or not x.numel():
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


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
