"""Which backend runs a call: what each supports, and the measured crossovers between those that do."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..dtypes import HALF_DTYPES, KERNEL_DTYPES
from .cuda import HOPPER_HEAD_DIMS

BACKENDS = ("cuda", "triton", "cpu", "eager")


class OpCall(NamedTuple):
    """What a backend needs to know of a call to say whether it supports it."""

    op: str
    device_type: str
    dtype: torch.dtype
    capability: tuple[int, int] | None = None
    head_dim: int = 0
    num_text: int = 0  # of the mix
    aligned: bool = True  # 16-byte rows and base addresses
    apart: bool = False  # K and V are two tensors
    positive_scale: bool = True
    has_sm90_kernels: bool = True  # the extension was built for sm_90a
    backward: bool = False  # its gradients
    backward_drawback: str | None = None  # of attention: why Triton's gradients are better than CUDA's


class BackendChoice(NamedTuple):
    backend: str
    rejected: dict[str, str]  # the faster backends that were passed over, and why


_BACKWARD_KERNELS: dict[str, tuple[str, ...]] = {  # ops that have one
    "cuda": ("text_cross_attention", "slowfast_pool", "gated_residual_mix"),
    "triton": ("text_cross_attention", "slowfast_pool", "gated_residual_mix"),
    "cpu": ("text_cross_attention", "slowfast_pool", "gated_residual_mix"),
}


def unsupported_reason(backend: str, call: OpCall) -> str | None:
    """The limit of ``backend`` that ``call`` exceeds, with the way out; None if it supports the call."""
    if backend == "eager":
        return None
    if call.dtype not in KERNEL_DTYPES:
        return f"dtype {call.dtype} (float32, bfloat16, float16 only); use backend='eager'"
    if backend == "cpu" and call.device_type != "cpu":
        return f"tensors on {call.device_type}; use backend='triton' or 'cuda'"
    if backend == "cuda" and call.device_type != "cuda":
        return f"tensors on {call.device_type}; use backend='cpu'"
    if call.backward and call.op not in _BACKWARD_KERNELS[backend]:
        return "its gradients have no kernel there; use backend='eager'"
    attends = call.op in ("text_cross_attention", "slowfast_cross_attention")
    if backend == "triton" and attends and call.device_type == "cpu" and call.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 matrices wrongly; use backend='eager', float32 or float16"
    if backend == "triton" and attends and call.head_dim > 256:
        return f"head dimension {call.head_dim} (<= 256 only); use backend='eager'"
    if backend == "cuda" and attends:
        return _hopper_limit(call)
    return None


def _hopper_limit(call: OpCall) -> str | None:
    """What keeps an attention call from the Hopper kernel (TMA and wgmma, sm_90a)."""
    limit = None
    if call.capability != (9, 0):
        limit = f"the CUDA attention is for compute capability 9.0 (Hopper), this GPU has {call.capability}"
    elif not call.has_sm90_kernels:
        limit = "the extension was built without sm_90a (reinstall with SLOWFAST_CUDA_ARCHS='80;90a')"
    elif call.dtype not in HALF_DTYPES:
        limit = f"the CUDA attention takes bfloat16 and float16, not {call.dtype}"
    elif call.head_dim not in HOPPER_HEAD_DIMS:
        limit = (
            f"the CUDA attention takes head dimensions {' and '.join(map(str, HOPPER_HEAD_DIMS))}, not {call.head_dim}"
        )
    elif not call.aligned:
        limit = "the CUDA attention takes tensors whose rows and base addresses are multiples of 16 bytes"
    elif not call.positive_scale:
        limit = "the CUDA attention takes a positive softmax_scale"
    return limit and f"{limit}; use backend='triton'"


MIX_ROWS_FOR_TRITON = 4096  # 8192 rows of 3584 on an H100: 59.9 us, CUDA 66.5; 1024 rows: 8.06, CUDA 8.11
# Its gradients: 256 rows 8.85 us, Triton 7.70; 1024 18.0 and 15.5; 2048 31.7 and 30.7; 4096 56.1 and 59.0.
MIX_BACKWARD_ROWS_FOR_CUDA = 4096


def _slower_reason(backend: str, call: OpCall) -> str | None:
    """Why a backend that supports a call is passed over for the next one, by measured crossover or for its memory."""
    if backend == "cuda" and call.op == "gated_residual_mix":
        if not call.backward and call.num_text >= MIX_ROWS_FOR_TRITON:
            return f"Triton's mix is faster from {MIX_ROWS_FOR_TRITON} rows on"
        if call.backward and call.num_text < MIX_BACKWARD_ROWS_FOR_CUDA:
            return f"Triton's gradients of the mix are faster below {MIX_BACKWARD_ROWS_FOR_CUDA} rows"
    if backend == "cuda" and call.op == "text_cross_attention" and call.backward:
        return call.backward_drawback
    return None


def choose_backend(call: OpCall, unavailable: dict[str, str | None]) -> BackendChoice:
    """The fastest backend that is here and supports the call, in the order cuda, triton, cpu, eager.

    Args:
        call: shapes and types.
        unavailable: for each backend, why this machine cannot run it, or None (``_extension.unavailable_reason``).
    """
    rejected: dict[str, str] = {}
    for backend in BACKENDS:
        reason = unavailable[backend] or unsupported_reason(backend, call)
        if reason is None and unavailable["triton"] is None:
            reason = _slower_reason(backend, call)
        if reason is None and backend == "triton" and call.device_type == "cpu":
            reason = "the interpreter is for testing; ask for it by name"
        if reason is None:
            return BackendChoice(backend, rejected)
        rejected[backend] = reason
    raise AssertionError("eager supports every call")
