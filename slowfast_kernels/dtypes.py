"""Which floating-point types there are: those of the kernels, with their codes, and what ops take besides."""

from __future__ import annotations

import torch

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of DType in csrc/params.h
KERNEL_DTYPES = tuple(DTYPE_CODES)
HALF_DTYPES = tuple(dtype for dtype in KERNEL_DTYPES if dtype.itemsize == 2)
OP_DTYPES = (*KERNEL_DTYPES, torch.float64)  # float64: the eager backend's alone
