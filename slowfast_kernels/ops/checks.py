"""Argument validation shared by the ops. A message names the argument, what came and what is wanted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import environment, numbers
from ..dtypes import OP_DTYPES
from ..eager import integers
from ..messages import describe, named, shortened

FLOAT_NAMES = "float32, bfloat16 or float16 (float64 on backend='eager')"


def fail(name: str, got: object, want: str) -> None:
    raise ValueError(f"{name}: got {describe(got) if isinstance(got, Tensor) else shortened(str(got))}, want {want}")


def check_dense(name: str, x: Tensor, shape: str) -> None:
    """``x`` is a tensor of numbers that lie in memory, one after another or at strides."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {describe(x)}, want a tensor {shape}")
    if x.is_nested:
        raise TypeError(f"{name}: got a nested tensor, want a dense tensor {shape}")
    if isinstance(x, torch.masked.MaskedTensor):
        raise TypeError(f"{name}: got a masked tensor, want a plain tensor {shape} (call .get_data() on it first)")
    if isinstance(x, torch.nn.parameter.UninitializedTensorMixin):
        raise TypeError(f"{name}: got an uninitialized parameter, want a tensor {shape} (run its lazy module once)")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: got a tensor of layout {x.layout}, want torch.strided (call .to_dense() on it first)")
    if _is_freed(x):
        raise ValueError(f"{name}: got {describe(x)} whose memory was freed, want a tensor {shape} that holds numbers")


def _is_freed(x: Tensor) -> bool:
    """Its storage was resized to nothing, as sharding does to parameters between calls."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    try:
        if x.data_ptr() != 0:
            return False
    except RuntimeError:  # a function transform's wrapper: the tensor inside has the memory
        return False
    needs_none = x.is_meta or not x.numel() or x._is_zerotensor() or torch._is_functional_tensor(x)
    return not needs_none


def check_tensor(name: str, x: Tensor, rank: int | tuple[int, ...], shape: str) -> None:
    """``x`` is a tensor of that rank whose last dimension is contiguous; under a transform, where it goes to the eager
    formula, strides are the transform's (a batch dimension may lie last) and do not matter.
    """
    check_dense(name, x, shape)
    ranks = (rank,) if isinstance(rank, int) else rank
    if x.dim() not in ranks:
        fail(name, x, f"shape {shape}")
    strided = x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1
    if strided and not torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise ValueError(f"{name}: got last-dimension stride {x.stride(-1)}, want 1 (call .contiguous() on it first)")


def check_float(name: str, x: Tensor) -> None:
    if x.dtype not in OP_DTYPES:
        raise TypeError(f"{name}: got {x.dtype}, want {FLOAT_NAMES}")


def check_like(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    """Same dtype and device as the op's main tensor: nothing is cast or moved silently."""
    if x.dtype != reference.dtype:
        raise TypeError(f"{name}: got {x.dtype}, want {reference.dtype} (the dtype of {reference_name})")
    check_device(name, x, reference_name, reference)


def check_device(name: str, x: Tensor, reference_name: str, reference: Tensor) -> None:
    if x.device != reference.device:
        raise ValueError(f"{name}: got {describe(x)}, want {reference.device} (the device of {reference_name})")


def check_index(name: str, x: Tensor, shape: str, reference_name: str, reference: Tensor, *, rank: int = 1) -> None:
    check_tensor(name, x, rank, shape)
    if x.dtype != torch.int32:
        raise TypeError(f"{name}: got {x.dtype}, want int32")
    check_device(name, x, reference_name, reference)


def as_int(name: str, value: object) -> int:
    """A Python int of its own (``numbers.as_int``), of the 64 bits that a registered op can carry."""
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, torch.SymInt) or (torch.compiler.is_compiling() and type(value) is int):
        return value  # a symbolic length: making it an int here would compile every length anew
    number = numbers.as_int(name, value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name}: got {describe(number)}, want an integer of 64 bits")
    return number


def as_ints(name: str, values: object, what: str) -> list[int]:
    """A list of Python ints from any iterable in an order, array or 1-d tensor of integers."""
    unordered = isinstance(values, (str, bytes, Set, Mapping)) or not isinstance(values, Iterable)
    if unordered or (isinstance(values, (Tensor, np.ndarray)) and values.ndim != 1):
        raise TypeError(f"{name}: got {describe(values)}, want {what}")
    if isinstance(values, (Tensor, np.ndarray)):
        try:
            values = integers(values) if isinstance(values, Tensor) else values.tolist()
        except (RuntimeError, NotImplementedError):  # no memory, or not one number after another
            raise TypeError(f"{name}: got {describe(values)} without numbers to read, want {what}") from None
    return [as_int(f"{name}[{i}]", value) for i, value in enumerate(values)]


def as_float(name: str, value: object) -> float:
    """A finite Python float of its own (``numbers.as_float``); nothing whose derivative would be lost in it."""
    if isinstance(value, torch.SymFloat):
        return value
    if isinstance(value, Tensor) and carries_derivative(value):
        raise TypeError(f"{name}: got a tensor that is differentiated, want a number: no derivative is formed for it")
    return numbers.as_float(name, value, "a number (finite)")


def carries_derivative(x: Tensor) -> bool:
    """Autograd, a forward-mode level or a function transform follows ``x``, and would lose it in a Python number."""
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return True
    return has_tangent(x)


def has_tangent(x: Tensor | None) -> bool:
    if forward_ad._current_level < 0 or not isinstance(x, Tensor):
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def check_finite(name: str, value: float) -> None:
    if not -math.inf < value < math.inf:  # NaN is not
        raise ValueError(f"{name}: got {value}, want a finite number")


def as_bool(name: str, value: object) -> bool:
    """``numbers.as_bool``; an integer that is no flag is out of range, as any other number of an op's."""
    if type(value) is bool:
        return value
    try:
        return numbers.as_bool(name, value)
    except numbers.NotAFlag as error:
        raise ValueError(str(error)) from None


def check_option(name: str, value: object, options: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}: got {named(value)}, want one of {', '.join(map(repr, options))}")


def reads_device_data(x: Tensor) -> bool:
    """Data-dependent checks run on CPU tensors always, on a GPU (where they sync) only under SLOWFAST_DEBUG=1."""
    return x.is_cpu or is_debugging()


def is_debugging() -> bool:
    return environment.DEBUG.get() == "1"


def check_prefix_sums(name: str, cu: Tensor, total_name: str, total: int) -> None:
    values = integers(cu)
    if values[0] != 0 or values[-1] != total:
        raise ValueError(f"{name}: got a range {values[0]}..{values[-1]}, want 0..{total} ({total_name})")
    if values == sorted(values):  # the few numbers of every call
        return
    for i, (low, high) in enumerate(pairwise(values)):
        if low > high:
            raise ValueError(f"{name}: got {low} then {high} at index {i}, want a non-decreasing sequence")


def check_pieces(name: str, pieces: Tensor, total_name: str, total: int) -> None:
    values = integers(pieces.flatten())
    for i, (begin, end) in enumerate(zip(values[::2], values[1::2], strict=True)):
        if not 0 <= begin <= end <= total:
            raise ValueError(f"{name}[{i}]: got {begin}..{end}, want 0 <= begin <= end <= {total} ({total_name})")


def check_rows(name: str, rows: Tensor, limit_name: str, limit: int) -> None:
    if not rows.numel():
        return
    if not limit:
        raise ValueError(f"{name}: got {rows.numel()} row indices, want none ({limit_name} has no rows)")
    values = integers(rows)  # for the few rows of a text, quicker than three tensor ops
    low, high = min(values), max(values)
    if low < 0 or high >= limit:
        raise ValueError(f"{name}: got row indices {low}..{high}, want 0..{limit - 1} (rows of {limit_name})")
    if len(set(values)) != len(values):
        raise ValueError(f"{name}: got a repeated row index, want distinct rows")


_DATA_CHECKS = {"prefix_sums": check_prefix_sums, "pieces": check_pieces, "rows": check_rows}


class DataRule(NamedTuple):
    """What lies in one of an op's tensors: "prefix_sums" up to ``total``, "pieces" of or "rows" among so many."""

    kind: str
    name: str
    total_name: str
    total: int

    def check(self, tensors: tuple) -> None:
        """
        Raises:
            ValueError: it does not.
        """
        _DATA_CHECKS[self.kind](self.name, getattr(tensors, self.name), self.total_name, self.total)
