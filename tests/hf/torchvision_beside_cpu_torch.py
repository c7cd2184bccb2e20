"""To be imported before transformers and timm: lets PyPI's torchvision import beside a CPU build of torch.

That torchvision is built for CUDA, so its library does not load there, and then it fails over operators that have no
schema. transformers and timm use its Python code alone.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

if find_spec("torchvision") is not None:
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
