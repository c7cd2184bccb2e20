"""Python's side of csrc/params.h: the codes of its enums, and tensors as the addresses that a Params struct holds."""

from __future__ import annotations

import torch
from torch import Tensor

from .gate import GATE_CODES, Gate

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType
NO_GATE = (0, 0, 0, 0, 0, 0, False)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def gate_arguments(gate: Gate, value: Tensor | None) -> tuple:
    """GateParams; the weight is [C] or [1, C], so it is one run of C elements if its last dimension is contiguous.

    ``value`` is ``gate.float_value``, which the caller holds while the kernel is launched.
    """
    tensors = (gate.weight, gate.bias, gate.warm_up)
    dtype = next((x.dtype for x in tensors if x is not None), torch.float32)
    return *map(address, (*tensors, value)), DTYPE_CODES[dtype], GATE_CODES[gate.kind], gate.warm_up_tanh
