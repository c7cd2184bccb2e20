"""The pass that owns packed rows: dQ of a tile, from a share of the slow tokens that its rows see."""

from __future__ import annotations

import triton
import triton.language as tl

from ._block import add_to_dq, differentiate_block
from ._common import gdc_wait
from ._tiles import rows_of
from ._visible import visible_share, visit_visible


@triton.jit
def store_rows(
    grad_q, dq, text_rows, first_text, packed, num_rows, kv_head,
    HQ: tl.constexpr, HEADS_PER_KV: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Rows ``packed`` of a sequence into ``grad_q`` [rows, Hq, D]."""
    is_row = packed < num_rows
    row = tl.load(text_rows + first_text + packed // HEADS_PER_KV, mask=is_row, other=0).to(tl.int64)
    col = tl.arange(0, dq.shape[1])
    ptrs = grad_q + ((row * HQ + kv_head * HEADS_PER_KV + packed % HEADS_PER_KV) * D)[:, None] + col[None, :]
    tl.store(ptrs, dq.to(grad_q.dtype.element_ty), mask=is_row[:, None] & (col < D)[None, :])


@triton.jit
def queries_program(
    tile, split, kv_head, queries, grads, lse2, delta,  # of the head's packed rows
    bounds, keys, values,  # the head's token 0
    keys_map, values_map, k_col, v_col,  # descriptors, in which the head's columns begin there; or None
    cu_slow, text_rows, cu_text, slow_pieces,
    grad_q,  # [rows, Hq, D]; SPLIT: the head's float32 partials of this split [tiles, BLOCK_M, BLOCK_D]
    num_text,
    num_packed,  # rows of a head, with those that fill tiles
    num_splits, batch, softmax_scale, scale,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, HQ: tl.constexpr, HEADS_PER_KV: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, STEP: tl.constexpr, BLOCK_B: tl.constexpr, SPLIT: tl.constexpr,
    PEEL: tl.constexpr, SELECTS: tl.constexpr, SCAN: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    sequence, first_text, first_row, num_rows = rows_of(tile, cu_text, num_text, batch, HEADS_PER_KV, BLOCK_M, BLOCK_B)
    if PDL:
        gdc_wait()
    if num_rows > 0:
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        first = tl.cast(tile * BLOCK_M, tl.int64) * BLOCK_D
        col = tl.arange(0, BLOCK_D)
        element = tl.arange(0, BLOCK_M)[:, None] * BLOCK_D + col[None, :]
        q = tl.load(queries + first + element)
        grad = tl.load(grads + first + element)
        top = tl.load(lse2 + row)
        total = tl.load(delta + row)
        token = tl.arange(0, STEP)
        k_token, v_token = token, token
        if K_STRIDE * STEP >= 2**31:
            k_token = token.to(tl.int64)
        if V_STRIDE * STEP >= 2**31:
            v_token = token.to(tl.int64)
        k_tile = k_token[:, None] * K_STRIDE + col[None, :]
        v_tile = v_token[:, None] * V_STRIDE + col[None, :]
        is_col = col < D
        MASK_COLS: tl.constexpr = D != BLOCK_D
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        first_slow = tl.load(cu_slow + sequence)
        last_slow = tl.load(cu_slow + sequence + 1)
        if SELECTS:
            begin, end = None, None
            if bounds is not None:
                begin = tl.load(bounds + row)
                end = tl.load(bounds + num_packed + row)
            first_block, last_block = visible_share(
                begin, end, first_slow, last_slow, slow_pieces, split, num_splits, STEP, SPLIT, SCAN
            )
            dq, total, top = visit_visible(
                dq, total, top, q, grad, keys, values, k_tile, v_tile, is_col, scale, begin, end,
                first_slow, last_slow, slow_pieces, first_block, last_block,
                K_STRIDE, V_STRIDE, STEP, MASK_COLS, SPLIT, PEEL, SCAN, CHUNK,
            )  # fmt: skip
        else:
            num_slow = last_slow - first_slow
            num_blocks = tl.cdiv(num_slow, STEP)
            share, extra = num_blocks // num_splits, num_blocks % num_splits
            lo = (split * share + tl.minimum(split, extra)) * STEP
            hi = tl.minimum(lo + (share + (split < extra).to(tl.int32)) * STEP, num_slow)
            full = lo + (hi - lo) // STEP * STEP
            keys += (first_slow + lo).to(tl.int64) * K_STRIDE
            values += (first_slow + lo).to(tl.int64) * V_STRIDE
            if keys_map is not None:
                for start in tl.range(lo, full, STEP):
                    k = keys_map.load([first_slow + start, k_col])
                    v = values_map.load([first_slow + start, v_col])
                    dq = add_to_dq(dq, total, top, q, grad, k, v, scale, None)
                keys += (full - lo).to(tl.int64) * K_STRIDE
                values += (full - lo).to(tl.int64) * V_STRIDE
            else:
                for _ in tl.range(lo, full, STEP):
                    dq = differentiate_block(
                        dq, total, top, q, grad, keys, values, k_tile, v_tile, STEP, is_col, scale, None, None, None,
                        STEP, False, MASK_COLS,
                    )  # fmt: skip
                    keys += K_STRIDE * STEP
                    values += V_STRIDE * STEP
            for _ in tl.range(full, hi, STEP):
                dq = differentiate_block(
                    dq, total, top, q, grad, keys, values, k_tile, v_tile, hi - full, is_col, scale, None, None, None,
                    STEP, True, MASK_COLS,
                )  # fmt: skip
        if SPLIT:
            tl.store(grad_q + first + element, dq, mask=(top != float("inf"))[:, None])
        else:
            packed = first_row + tl.arange(0, BLOCK_M)
            store_rows(
                grad_q, dq * softmax_scale, text_rows, first_text, packed, num_rows, kv_head, HQ, HEADS_PER_KV, D
            )
