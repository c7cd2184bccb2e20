"""Tensors that are kept between calls are made outside of whatever the first call happened to run in.

Made under a function transform, a fake-tensor mode or inference mode they would be that mode's own, and a later call
would read a tensor without memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def plain_tensors() -> Iterator[None]:
    """What is made in this block has memory of its own, and belongs to no mode."""
    with torch._C._DisableFuncTorch(), _disable_current_modes(), torch.inference_mode(False):
        yield
