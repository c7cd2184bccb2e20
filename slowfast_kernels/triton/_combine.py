"""Parts of a text row's heads are added up in their order; for the fused op with the gate and the mix. In Triton.

Roofline: every part is read once, and the result written once, at memory speed. A program holds some heads of one row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..gate import Gate
from ..heuristics.triton import CombineConfig, next_power_of_2, padded_head_dim, triton_parts_at_a_time
from ._common import gate_of, gdc_wait
from ._deal import parts_of
from ._launch import Launch

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _sum_parts(
    partials, num_partials, first, stride, num_parts, is_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, SPARSE: tl.constexpr,
):  # fmt: skip
    """(sum, total, top) of the online softmax over parts of BLOCK_H rows, which begin at workspace rows ``first``."""
    cols = tl.arange(0, BLOCK_D)
    inside = is_head[:, None] & (cols < D)[None, :]
    lse_partials = partials + num_partials.to(tl.int64) * D
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    for first_part in tl.range(0, num_parts, BLOCK_S):
        part = first_part + tl.arange(0, BLOCK_S)
        is_part = part < num_parts
        row = part.to(tl.int64)[:, None] * stride + first[None, :]
        part_lse = tl.load(lse_partials + row, mask=is_part[:, None] & is_head[None, :], other=float("-inf"))
        ptrs = partials + row[:, :, None] * D + cols[None, None, :]
        is_part = is_part[:, None, None] & inside[None, :, :]
        if SPARSE:
            is_part = is_part & (part_lse != float("-inf"))[:, :, None]
        part_acc = tl.load(ptrs, mask=is_part, other=0.0)
        new_top = tl.maximum(top, tl.max(part_lse, 0))
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)
        w = tl.exp2(part_lse - origin[None, :])
        shrink = tl.exp2(top - origin)
        total = total * shrink + tl.sum(w, 0)
        acc = acc * shrink[:, None] + tl.sum(w[:, :, None] * part_acc, 0)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=["num_text", "batch", "num_splits", "num_partials"])
def _combine(
    partials,  # what _attention wrote
    cu_text, cu_slow,  # with DEAL
    out,  # context [Nt, Hq, D]; with ``state``: the mixed state [rows, C]
    lse,  # [Nt, Hq] or None
    state, text_rows, weight, bias, warm_up, value,  # None: combine only
    num_text, batch, num_splits, num_partials, state_row_stride,
    HQ: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr, GATE: tl.constexpr, TANH_WARM_UP: tl.constexpr, PDL: tl.constexpr,
    SPARSE: tl.constexpr,  # a part whose lse is -inf may not have been written
    DEAL_HEADS: tl.constexpr, DIRECT: tl.constexpr,  # as in _attention: without SPLIT only tiles that are in parts
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, DEAL_S: tl.constexpr,
):  # fmt: skip
    text = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    cols = tl.arange(0, BLOCK_D)
    is_head = head < HQ
    inside = is_head[:, None] & (cols < D)[None, :]
    element = head[:, None] * D + cols[None, :]
    if state is not None:
        # Nothing here comes from the launch before, so a dependent launch does it while that one still runs.
        row = tl.load(text_rows + text).to(tl.int64)
        c = tl.arange(0, BLOCK_C)
        state_row = state + row * state_row_stride
        x = tl.load(state_row + c, mask=c < HQ * D, other=0.0).to(tl.float32)
        g = gate_of(x, weight, bias, warm_up, value, text, c, HQ * D, GATE, TANH_WARM_UP)
        residual = tl.load(state_row + element, mask=inside, other=0.0)
    if PDL:
        gdc_wait()

    length = 0
    if DEAL_HEADS > 0:
        length = tl.load((partials + num_partials.to(tl.int64) * (D + 1)).to(tl.pointer_type(tl.int32)))
    if DIRECT:
        if length == 0:
            return
        first, stride, num_parts = parts_of(
            tl.program_id(0), head, length, cu_text, cu_slow, batch,
            HQ // DEAL_HEADS, DEAL_HEADS, BLOCK_M, BLOCK_N, BLOCK_B, True,
        )  # fmt: skip
        if num_parts == 0:
            return
        acc, total, top = _sum_parts(
            partials, num_partials, first, stride, num_parts, is_head, D, BLOCK_D, DEAL_S, BLOCK_H, False
        )
    elif DEAL_HEADS > 0:
        if length > 0:
            first, stride, num_parts = parts_of(
                tl.program_id(0), head, length, cu_text, cu_slow, batch,
                HQ // DEAL_HEADS, DEAL_HEADS, BLOCK_M, BLOCK_N, BLOCK_B, False,
            )  # fmt: skip
            acc, total, top = _sum_parts(
                partials, num_partials, first, stride, num_parts, is_head, D, BLOCK_D, DEAL_S, BLOCK_H, False
            )
        else:
            acc, total, top = _sum_parts(
                partials, num_partials, text * HQ + head, num_text.to(tl.int64) * HQ, num_splits, is_head,
                D, BLOCK_D, BLOCK_S, BLOCK_H, False,
            )  # fmt: skip
    else:
        acc, total, top = _sum_parts(
            partials, num_partials, text * HQ + head, num_text.to(tl.int64) * HQ, num_splits, is_head,
            D, BLOCK_D, BLOCK_S, BLOCK_H, SPARSE,
        )  # fmt: skip

    empty = total == 0
    total = tl.where(empty, 1.0, total)
    context = acc / total[:, None]
    if lse is not None:
        lse_row = tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2)
        tl.store(lse + text * HQ + head, lse_row, mask=is_head)
    if state is not None:
        mixed = (residual.to(tl.float32) + g * context).to(out.dtype.element_ty)
        mixed = tl.where(empty[:, None], residual, mixed)  # nothing to mix: the same bits, -0 and NaN too
        tl.store(out + row * (HQ * D) + element, mixed, mask=inside)
    else:
        tl.store(out + text * (HQ * D) + element, context.to(out.dtype.element_ty), mask=inside)


def combine_launch(
    config: CombineConfig, num_text: int, num_q_heads: int, head_dim: int, gate: Gate, *,
    sparse: bool, direct: bool, in_batch: dict[str, int],
) -> Launch:  # fmt: skip
    """Of partials, cu_text, cu_slow, out, lse, state, text_rows, ``gate.read_tensors``; num_text, batch, num_splits,
    num_partials, the stride of a row of the state.

    ``in_batch``: what the attention kernel was compiled for, of how a batch is dealt out. ``direct``: it wrote the
    context of tiles in one part. cu_text and cu_slow may be None where nothing is dealt out.
    """
    block_d = padded_head_dim(head_dim)
    is_dealt = in_batch["DEAL_HEADS"] > 0
    constants = {
        "HQ": num_q_heads, "D": head_dim, "BLOCK_D": block_d, "BLOCK_S": config.block_s, "BLOCK_H": config.block_h,
        "BLOCK_C": next_power_of_2(num_q_heads * head_dim), "GATE": gate.kind, "TANH_WARM_UP": gate.warm_up_tanh,
        "PDL": config.dependent, "SPARSE": sparse, "DIRECT": direct,
        "DEAL_S": triton_parts_at_a_time(config.block_h, block_d) if is_dealt else 0,
        **(in_batch if is_dealt else dict.fromkeys(in_batch, 0)),
        "num_warps": config.num_warps, "enable_fp_fusion": True,
    }  # fmt: skip
    grid = (num_text, -(-num_q_heads // config.block_h))
    return Launch(_combine, grid, constants, waits=config.dependent)
