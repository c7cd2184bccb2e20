"""Every choice that depends on shapes, in one place: backends, tiles, splits. Pure Python, printable, tested on a CPU.

A choice is a function of shapes, dtype and GPU alone, never of data on the device, so nothing here syncs and a CUDA
graph captured for a shape stays right for new data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# ---------------------------------------------------------------------------------------------- backends

BACKENDS = ("cuda", "triton", "cpu", "eager")
HALF_DTYPES = (torch.bfloat16, torch.float16)
FLOAT_DTYPES = (torch.float32, *HALF_DTYPES)


class OpCall(NamedTuple):
    """What a backend needs to know of a call to say whether it supports it."""

    op: str
    device_type: str
    dtype: torch.dtype
    capability: tuple[int, int] | None = None
    head_dim: int = 0
    num_q_heads: int = 0
    num_kv_heads: int = 0
    num_text: int = 0
    num_slow: int = 0
    batch: int = 1
    aligned: bool = True  # 16-byte rows


class BackendChoice(NamedTuple):
    backend: str
    rejected: dict[str, str]  # the faster backends that were passed over, and why


def unsupported_reason(backend: str, call: OpCall) -> str | None:
    """The limit of ``backend`` that ``call`` exceeds, with the way out; None if it supports the call."""
    if backend == "eager":
        return None
    if call.dtype not in FLOAT_DTYPES:
        return f"dtype {call.dtype} (float32, bfloat16, float16 only); use backend='eager'"
    if backend == "cpu" and call.device_type != "cpu":
        return f"tensors on {call.device_type}; use backend='triton' or 'cuda'"
    if backend == "cuda" and call.device_type != "cuda":
        return f"tensors on {call.device_type}; use backend='cpu'"
    attends = call.op in ("text_cross_attention", "slowfast_cross_attention")
    if backend == "triton" and attends and call.head_dim > 256:
        return f"head dimension {call.head_dim} (<= 256 only); use backend='eager'"
    if backend == "cuda" and attends:
        return "no CUDA attention kernel in this build; use backend='triton'"
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
        if reason is None and backend == "triton" and call.device_type == "cpu":
            reason = "the interpreter is for testing; ask for it by name"
        if reason is None:
            return BackendChoice(backend, rejected)
        rejected[backend] = reason
    raise AssertionError("eager supports every call")
