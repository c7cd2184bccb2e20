"""The CPU backend: allocates results and hands addresses and strides to the C++ kernels of ``csrc/cpu``.

Arguments have been validated by ``ops``. float32, bfloat16 and float16 in and out, float32 inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._extension import extension
from .gate import Gate
from .heuristics import cpu_num_splits
from .params import DTYPE_CODES, NO_GATE, address, gate_arguments
from .pool_plan import PoolPlan


def pool(frames: Tensor, plan: PoolPlan, norm_eps: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """frames [F, H * W, C] -> slow [Ns, C], cu_slow, fast [Nf, C], cu_fast (prefix sums int32 [B + 1])."""
    items, entries, cu_slow, cu_fast = plan.tables(frames.device)
    channels = frames.shape[-1]
    slow = frames.new_empty(plan.num_slow, channels)
    fast = frames.new_empty(plan.num_fast, channels)
    extension().cpu_pool(
        frames.data_ptr(),
        items.data_ptr(),
        entries.data_ptr(),
        slow.data_ptr(),
        fast.data_ptr(),
        frames.stride(0),
        frames.stride(1),
        channels,
        plan.grid[1],
        plan.spatial_stride,
        plan.num_items,
        *plan.cells,
        -1.0 if norm_eps is None else norm_eps,
        DTYPE_CODES[frames.dtype],
        torch.get_num_threads(),
    )
    return slow, cu_slow.clone(), fast, cu_fast.clone()


def _cross_attention(
    q: Tensor,
    slow_kv: Tensor,
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    context: Tensor | None,
    lse: Tensor | None,
    state: Tensor | None,
    out: Tensor | None,
    gate_arguments: tuple,
    softmax_scale: float,
    num_splits: int,
) -> None:
    threads = torch.get_num_threads()
    num_text, num_slow, batch = text_rows.shape[0], slow_kv.shape[0], cu_slow.shape[0] - 1
    num_q_heads, num_kv_heads = q.shape[1], slow_kv.shape[1]
    kv_token_stride, kv_head_stride, kv_pair_stride, _ = slow_kv.stride()
    extension().cpu_cross_attention(
        q.data_ptr(),
        slow_kv.data_ptr(),
        cu_slow.data_ptr(),
        text_rows.data_ptr(),
        cu_text.data_ptr(),
        address(context),
        address(lse),
        address(state),
        address(out),
        *gate_arguments,
        q.stride(0),
        q.stride(1),
        kv_token_stride,
        kv_head_stride,
        kv_pair_stride,
        0 if state is None else state.stride(0),
        num_text,
        num_slow,
        batch,
        num_q_heads,
        num_kv_heads,
        q.shape[2],
        softmax_scale,
        DTYPE_CODES[q.dtype],
        num_splits or cpu_num_splits(batch, num_text, num_slow, num_q_heads, num_kv_heads, threads),
        threads,
    )


def text_cross_attention(
    q: Tensor,
    slow_kv: Tensor,
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    softmax_scale: float,
    return_lse: bool,
    num_splits: int,
) -> tuple[Tensor, Tensor | None]:
    """context [Nt, Hq, D] and, if asked, lse [Nt, Hq] float32."""
    context = q.new_empty(text_rows.shape[0], *q.shape[1:])
    lse = q.new_empty(context.shape[:2], dtype=torch.float32) if return_lse else None
    _cross_attention(
        q, slow_kv, cu_slow, text_rows, cu_text, context, lse, None, None, NO_GATE, softmax_scale, num_splits
    )
    return context, lse


def gated_residual_mix(
    state: Tensor,
    context: Tensor,
    text_rows: Tensor,
    gate: Gate,
) -> Tensor:
    """state [rows, C] with ``g * context`` [Nt, C] added on the text rows; a new tensor."""
    rows, channels = state.shape
    out, value = state.new_empty(rows, channels), gate.float_value
    extension().cpu_gated_mix(
        state.data_ptr(),
        context.data_ptr(),
        text_rows.data_ptr(),
        out.data_ptr(),
        *gate_arguments(gate, value),
        rows,
        text_rows.shape[0],
        channels,
        state.stride(0),
        context.stride(0),
        DTYPE_CODES[state.dtype],
        torch.get_num_threads(),
    )
    return out


def slowfast_cross_attention(
    state: Tensor,
    q: Tensor,
    slow_kv: Tensor,
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    gate: Gate,
    softmax_scale: float,
    num_splits: int,
) -> Tensor:
    """Attention, gate and mix in one call; the context never leaves float32. A new tensor."""
    all_rows_are_text = text_rows.shape[0] == state.shape[0]
    out = state.new_empty(state.shape) if all_rows_are_text else state.clone(memory_format=torch.contiguous_format)
    value = gate.float_value
    arguments = gate_arguments(gate, value)
    _cross_attention(
        q, slow_kv, cu_slow, text_rows, cu_text, None, None, state, out, arguments, softmax_scale, num_splits
    )
    return out
