"""Argument validation shared by the ops. A message names the argument, what came and what is wanted."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
    if isinstance(x, np.ndarray):
        return f"numpy {x.dtype}{list(x.shape)}"
    text = " ".join(repr(x).split())  # one line
    return f"{type(x).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


def fail(name: str, got: object, want: str) -> None:
    raise ValueError(f"{name}: got {describe(got) if isinstance(got, Tensor) else got}, want {want}")


def check_dense(name: str, x: Tensor, shape: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {describe(x)}, want a tensor {shape}")
    if x.is_nested:
        raise TypeError(f"{name}: got a nested tensor, want a dense tensor {shape}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: got a tensor of layout {x.layout}, want torch.strided (call .to_dense() on it first)")


def check_tensor(name: str, x: Tensor, rank: int | tuple[int, ...], shape: str) -> None:
    """``x`` is a tensor of that rank whose last dimension is contiguous."""
    check_dense(name, x, shape)
    ranks = (rank,) if isinstance(rank, int) else rank
    if x.dim() not in ranks:
        fail(name, x, f"shape {shape}")
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: got last-dimension stride {x.stride(-1)}, want 1 (call .contiguous() on it first)")


def check_float(name: str, x: Tensor) -> None:
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: got {x.dtype}, want float32, bfloat16 or float16 (float64 on backend='eager')")


def check_like(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    """Same dtype and device as the op's main tensor: nothing is cast or moved silently."""
    if x.dtype != reference.dtype:
        raise TypeError(f"{name}: got {x.dtype}, want {reference.dtype} (the dtype of {reference_name})")
    check_device(name, x, reference_name, reference)


def check_device(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    if x.device != reference.device:
        raise ValueError(f"{name}: got {describe(x)}, want {reference.device} (the device of {reference_name})")


def check_index(name: str, x: Tensor, shape: str, reference_name: str, reference: Tensor) -> None:
    check_tensor(name, x, 1, shape)
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: got {x.dtype}, want int32")
    check_device(name, x, reference_name, reference)


def as_int(name: str, value: object) -> int:
    """A Python int of its own from any integer (numpy's, a 0-d tensor); no caller's object is kept or changed."""
    if type(value) is int:
        return value
    if isinstance(value, torch.SymInt) or (torch.compiler.is_compiling() and isinstance(value, int)):
        return value  # a symbolic length: making it an int here would compile every length anew
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # several elements raise any of these
        raise TypeError(f"{name}: got {describe(value)}, want an integer") from None


def as_ints(name: str, values: object, what: str) -> list[int]:
    """A list of Python ints from any sequence, array or 1-d tensor of integers."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: got {describe(values)}, want {what}")
    if isinstance(values, (Tensor, np.ndarray)):
        if values.ndim != 1:
            raise TypeError(f"{name}: got {describe(values)}, want {what}")
        values = values.tolist()
    return [as_int(f"{name}[{i}]", value) for i, value in enumerate(values)]


def as_float(name: str, value: object) -> float:
    """A Python float of its own from any real number (numpy's, a 0-d tensor)."""
    if type(value) is float or isinstance(value, torch.SymFloat):
        return value
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{name}: got {describe(value)}, want a number")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: got {describe(value)}, want a number") from None


def check_finite(name: str, value: float) -> None:
    if not -math.inf < value < math.inf:  # NaN is not
        raise ValueError(f"{name}: got {value}, want a finite number")


def as_bool(name: str, value: object) -> bool:
    """A bool from a bool, or from 0 or 1; other values have a truth too, but not one that anybody meant."""
    if type(value) is bool:
        return value
    flag = bool(value) if isinstance(value, np.bool_) else as_int(name, value)
    if flag not in (0, 1):
        raise ValueError(f"{name}: got {describe(value)}, want True or False")
    return bool(flag)


def check_option(name: str, value: object, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name}: got {value!r}, want one of {', '.join(map(repr, options))}")


def reads_device_data(x: Tensor) -> bool:
    """Data-dependent checks run on CPU tensors always, on a GPU (where they sync) only under SLOWFAST_DEBUG=1."""
    return x.device.type == "cpu" or os.environ.get("SLOWFAST_DEBUG") == "1"


def check_prefix_sums(name: str, cu: Tensor, total_name: str, total: int) -> None:
    values = cu.tolist()
    if values[0] != 0 or values[-1] != total:
        raise ValueError(f"{name}: got a range {values[0]}..{values[-1]}, want 0..{total} ({total_name})")
    for i, (low, high) in enumerate(pairwise(values)):
        if low > high:
            raise ValueError(f"{name}: got {low} then {high} at index {i}, want a non-decreasing sequence")


def check_rows(name: str, rows: Tensor, limit_name: str, limit: int) -> None:
    if not rows.numel():
        return
    values = rows.tolist()  # for the few rows of a text, quicker than three tensor ops
    low, high = min(values), max(values)
    if low < 0 or high >= limit:
        raise ValueError(f"{name}: got row indices {low}..{high}, want 0..{limit - 1} (rows of {limit_name})")
    if len(set(values)) != len(values):
        raise ValueError(f"{name}: got a repeated row index, want distinct rows")
