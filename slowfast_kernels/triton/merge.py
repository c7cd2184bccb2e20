"""Two attentions of the same queries over different tokens, merged by their log-sum-exps, in Triton.

context = (e^a A + e^b B) / (e^a + e^b) and lse = log(e^a + e^b), with the larger exponent taken out. Roofline: two
contexts are read and one is written, at memory speed. A head that saw nothing on one side (lse -inf) gets the other
side's bits, whatever its own context holds; nothing on both sides is context 0 and lse -inf.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call_plan import CallPlan, described
from ..calls import MergeOptions, MergeTensors
from ..heuristics.triton import next_power_of_2
from ._common import on_device_of
from ._launch import Launch

_ELEMENTS = 4096  # of a program's block of heads: 16 a thread, in flight together


@triton.jit
def _merge(
    context_a, lse_a, context_b, lse_b,  # [Nt, Hq, D] and [Nt, Hq]; the last dimension is contiguous
    context, lse,  # contiguous
    num_heads, HQ,
    a_row_stride, a_head_stride, b_row_stride, b_head_stride,
    lse_a_row_stride, lse_a_head_stride, lse_b_row_stride, lse_b_head_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)  # text row and head
    is_head = index < num_heads
    text, head = index // HQ, index % HQ
    cols = tl.arange(0, BLOCK_D)
    inside = is_head[:, None] & (cols < D)[None, :]
    a = tl.load(lse_a + text * lse_a_row_stride + head * lse_a_head_stride, mask=is_head, other=0.0)
    b = tl.load(lse_b + text * lse_b_row_stride + head * lse_b_head_stride, mask=is_head, other=0.0)
    of_a = tl.load(context_a + (text * a_row_stride + head * a_head_stride)[:, None] + cols[None, :], inside, other=0.0)
    of_b = tl.load(context_b + (text * b_row_stride + head * b_head_stride)[:, None] + cols[None, :], inside, other=0.0)

    nothing = float("-inf")
    top = tl.where(a > b, a, b)
    top = tl.where(a != a, a, top)  # a NaN stays one
    origin = tl.where(top == nothing, 0.0, top)
    weight_a, weight_b = tl.exp(a - origin), tl.exp(b - origin)
    total = weight_a + weight_b
    mixed = (weight_a / total)[:, None] * of_a.to(tl.float32) + (weight_b / total)[:, None] * of_b.to(tl.float32)
    mixed = mixed.to(of_a.dtype)
    mixed = tl.where((b == nothing)[:, None], of_a, tl.where((a == nothing)[:, None], of_b, mixed))
    mixed = tl.where((top == nothing)[:, None], tl.zeros_like(mixed), mixed)
    merged = tl.where(b == nothing, a, tl.where(a == nothing, b, origin + tl.log(total)))
    tl.store(context + index[:, None] * D + cols[None, :], mixed, mask=inside)
    tl.store(lse + index, merged, mask=is_head)


def prepare_merge_attention(sample: MergeTensors, options: MergeOptions) -> Callable:
    """A function of tensors alike: context [Nt, Hq, D] and lse [Nt, Hq] float32."""
    context_a, lse_a, context_b, lse_b = sample
    (num_text, num_q_heads, head_dim), dtype = context_a.shape, context_a.dtype
    block_d = next_power_of_2(head_dim)
    block_h = max(1, _ELEMENTS // block_d)
    num_heads = num_text * num_q_heads
    strides = (*context_a.stride()[:2], *context_b.stride()[:2], *lse_a.stride(), *lse_b.stride())
    numbers, grid = (num_heads, num_q_heads, *strides), (-(-num_heads // block_h),)
    constants = {"D": head_dim, "BLOCK_D": block_d, "BLOCK_H": block_h, "num_warps": 4, "enable_fp_fusion": True}
    launch = Launch(_merge, grid, constants)

    @described(lambda: CallPlan(tiles={"block_h": block_h, "num_warps": 4}, grid=grid))
    @on_device_of
    def run(tensors: MergeTensors, addresses: bytes | None = None) -> tuple[Tensor, Tensor]:
        device = tensors[0].device
        context = torch.empty((num_text, num_q_heads, head_dim), dtype=dtype, device=device)
        lse = torch.empty((num_text, num_q_heads), dtype=torch.float32, device=device)
        if num_heads:
            launch((*tensors, context, lse), numbers)
        return context, lse

    return run
