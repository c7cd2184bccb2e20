"""warmup: everything that happens only the first time, before a CUDA graph capture in which it must not happen."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..dtypes import OP_DTYPES
from . import checks
from .fused import slowfast_cross_attention
from .gated_mix import gated_residual_mix


def warmup(
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    text_rows: Iterable[int] = (1, 16, 64, 256),
    batch_sizes: Iterable[int] = (1,),
    backend: str | None = None,
) -> None:
    """Run the attention and mix ops once for each class of shapes: Triton compiles, kernels load, counters are made.

    A capture of the same heads, dtype and row counts then finds nothing left to do. ``slowfast_pool`` uploads its plan
    the first time it sees a set of frame counts and strides: call it once with them.

    Args:
        num_q_heads, num_kv_heads, head_dim: Hq, Hkv and D of the model.
        dtype: of q, the slow KV cache and the state.
        device: default the current GPU, or the CPU without one.
        text_rows: numbers of text rows a sequence that will be used.
        batch_sizes: numbers of sequences that will be used.
        backend: as in the ops.

    Raises:
        TypeError: a number that is no integer, a dtype that is none of the ops'.
        ValueError: a number below 1, a device that does not exist.
        ValueError, NotImplementedError: as the ops do for such shapes.
    """
    heads = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    num_q_heads, num_kv_heads, head_dim = (_positive(name, checks.as_int(name, x)) for name, x in heads.items())
    text_rows = checks.as_ints("text_rows", text_rows, "integers, rows a sequence")
    batch_sizes = checks.as_ints("batch_sizes", batch_sizes, "integers, numbers of sequences")
    for name, numbers in (("text_rows", text_rows), ("batch_sizes", batch_sizes)):
        for i, number in enumerate(numbers):
            _positive(f"{name}[{i}]", number)
    if dtype not in OP_DTYPES:
        raise TypeError(f"dtype: got {checks.describe(dtype)}, want a torch.dtype of {checks.FLOAT_NAMES}")
    device = _device(device)
    channels = num_q_heads * head_dim
    make = {"dtype": dtype, "device": device}
    gating = (torch.zeros(1, channels, **make), torch.zeros(1, **make), torch.zeros(1, **make))
    with torch.no_grad():
        for batch in batch_sizes:
            for rows in text_rows:
                for slow in (32, 4096):  # one split and many
                    steps = torch.arange(batch + 1, dtype=torch.int32, device=device)
                    row_index = torch.arange(batch * rows, dtype=torch.int32, device=device)
                    state = torch.zeros(batch * rows, channels, **make)
                    q = state.view(-1, num_q_heads, head_dim)
                    slow_kv = torch.zeros(batch * slow, num_kv_heads, 2, head_dim, **make)
                    places = (steps * slow, row_index, steps * rows)
                    slowfast_cross_attention(state, q, slow_kv, *places, *gating, backend=backend)
                    gated_residual_mix(state, q, row_index, *gating, backend=backend)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _positive(name: str, number: int) -> int:
    if number < 1:
        checks.fail(name, number, ">= 1")
    return number


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (TypeError, RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: got {checks.describe(device)}, want a device of this machine ({reason})") from None
