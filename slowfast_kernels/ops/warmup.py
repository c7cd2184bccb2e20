"""warmup: everything that happens only the first time, before a CUDA graph capture in which it must not happen."""

from __future__ import annotations

from collections.abc import Iterable

import torch

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
        ValueError, NotImplementedError: as the ops do for such shapes.
    """
    heads = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    num_q_heads, num_kv_heads, head_dim = (checks.as_int(name, value) for name, value in heads.items())
    text_rows = checks.as_ints("text_rows", text_rows, "integers, rows a sequence")
    batch_sizes = checks.as_ints("batch_sizes", batch_sizes, "integers, numbers of sequences")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
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
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
