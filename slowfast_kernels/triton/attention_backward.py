"""Gradients of ``text_cross_attention`` in Triton: two passes over the scores, no atomics, the same bits every time.

Roofline: 10 * Nt * Hq * Ns * D tensor-core FLOPs where one pass could keep dK, dV and dQ; two passes multiply 14, and
need no sum between programs but that of a few float32 partials of dQ, in a fixed order. Built so:
  * ``_pack`` brings q and the gradient of the context into tiles of packed rows, which both passes read as they lie:
    what a row's index, stride or blindness means for its bytes is settled once. With them lie each row's lse, in
    base 2, and what its softmax's gradient subtracts, delta = sum(grad_context * context) - grad_lse.
  * ``_backward``'s programs are of two kinds, in one launch, so that one kind fills the gaps of the other:
    ``sequence_program`` and ``selected_program`` own slow tokens, ``queries_program`` packed rows.
  * ``_reduce`` adds up the parts of dQ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call_plan import CallPlan, described, nothing_to_attend
from ..calls import AttentionOptions, AttentionTensors, BackwardTensors, is_aligned, scale_of
from ..gradients import zero_attention_gradients
from ..heuristics.triton import (
    AttentionBackwardConfig,
    next_power_of_2,
    padded_head_dim,
    triton_attention_backward_config,
    triton_pieces_config,
)
from ._backward_keys import selected_program, sequence_program
from ._backward_queries import queries_program, store_rows
from ._common import TensorDescriptor, describe, gdc_launch_dependents, gdc_wait, on_device_of
from ._tiles import rows_of
from ._visible import NEVER, count_tokens, visible_rows

_LOG2E = tl.constexpr(1.4426950408889634)
_ROWS = 16  # packed rows of a program that moves rows


@triton.jit
def _store_bounds(bounds, step, num_rows, begin, end, STEP: tl.constexpr):
    """What each row of a step sees, and what its rows see together: the first and the last token that some row sees,
    and those between which every row that sees anything sees all."""
    row = step * STEP + tl.arange(0, STEP)
    tl.store(bounds + row, begin)
    tl.store(bounds + num_rows + row, end)
    of_step = bounds + 2 * num_rows + 4 * step
    tl.store(of_step, tl.min(begin, 0))
    tl.store(of_step + 1, tl.max(end, 0))
    tl.store(of_step + 2, tl.max(tl.where(end > 0, begin, 0), 0))
    tl.store(of_step + 3, tl.min(tl.where(end > 0, end, NEVER), 0))


@triton.jit(do_not_specialize=["num_text", "batch", "num_tiles"])
def _pack(
    q, grad_context, context, lse, grad_lse,  # gradients: None if zero
    text_rows, cu_text, cu_slow, slow_begin, slow_end, slow_pieces,
    packed,  # [2, Hkv, tiles, BLOCK_M, BLOCK_D]: q and the gradient of the context; 0 in rows that see nothing
    stats,  # float32 [2, Hkv, tiles, BLOCK_M]: lse in base 2, inf in rows that see nothing; delta
    bounds,  # int32: begin and end of the packed rows, four numbers of each step of them (``_store_bounds``); or None
    num_text, batch, num_tiles,
    q_row_stride, q_head_stride, context_row_stride, context_head_stride, lse_row_stride, lse_head_stride,
    grad_row_stride, grad_head_stride, grad_col_stride, grad_lse_row_stride, grad_lse_head_stride,
    HEADS_PER_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr,  # of a program
    SCAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    PARTS: tl.constexpr = BLOCK_M // ROWS
    tile = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    kv_head = tl.program_id(1)
    sequence, first_text, first_row, num_rows = rows_of(tile, cu_text, num_text, batch, HEADS_PER_KV, BLOCK_M, BLOCK_B)
    if num_rows == 0:
        return
    inside = part * ROWS + tl.arange(0, ROWS)
    is_row = first_row + inside < num_rows
    text = (first_text + (first_row + inside) // HEADS_PER_KV).to(tl.int64)
    head = (kv_head * HEADS_PER_KV + (first_row + inside) % HEADS_PER_KV).to(tl.int64)
    log = tl.load(lse + text * lse_row_stride + head * lse_head_stride, mask=is_row, other=float("-inf"))
    sees = log != float("-inf")
    row = tl.load(text_rows + text, mask=sees, other=0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    is_element = sees[:, None] & (col < D)[None, :]
    queries = tl.load(q + (row * q_row_stride + head * q_head_stride)[:, None] + col[None, :], is_element, other=0.0)
    upstream = tl.zeros((ROWS, BLOCK_D), queries.dtype)
    delta = tl.zeros((ROWS,), tl.float32)
    if grad_context is not None:
        at = (text * grad_row_stride + head * grad_head_stride)[:, None] + (col * grad_col_stride)[None, :]
        upstream = tl.load(grad_context + at, is_element, other=0.0)
        at = (text * context_row_stride + head * context_head_stride)[:, None] + col[None, :]
        of_context = tl.load(context + at, is_element, other=0.0)
        delta = tl.sum(upstream.to(tl.float32) * of_context.to(tl.float32), 1)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + text * grad_lse_row_stride + head * grad_lse_head_stride, mask=sees, other=0.0)

    num_packed = tl.num_programs(1).to(tl.int64) * num_tiles * BLOCK_M
    at = (kv_head * num_tiles + tile).to(tl.int64) * BLOCK_M + inside
    tl.store(packed + at[:, None] * BLOCK_D + col[None, :], queries)
    tl.store(packed + (num_packed + at)[:, None] * BLOCK_D + col[None, :], upstream)
    tl.store(stats + at, tl.where(sees, log * _LOG2E, float("inf")))
    tl.store(stats + num_packed + at, delta)
    if bounds is not None:
        PARTS_OF_STEP: tl.constexpr = STEP // ROWS
        if (part % PARTS_OF_STEP == 0) & (kv_head == 0):
            first_slow, last_slow = tl.load(cu_slow + sequence), tl.load(cu_slow + sequence + 1)
            num_slow = last_slow - first_slow
            if slow_pieces is not None:
                num_slow = count_tokens(slow_pieces, first_slow, last_slow, SCAN)
            of_step = first_row + part * ROWS + tl.arange(0, STEP)
            texts = first_text + of_step // HEADS_PER_KV
            begin, end = visible_rows(slow_begin, slow_end, texts, of_step < num_rows, num_slow)
            step = tile * (BLOCK_M // STEP) + part // PARTS_OF_STEP
            _store_bounds(bounds, step, num_tiles * BLOCK_M, begin, end, STEP)


@triton.jit(do_not_specialize=["num_text", "num_slow", "batch", "num_tiles", "num_splits", "num_owners"])
def _backward(
    packed, stats, bounds,  # as ``_pack`` left them
    packed_map,  # a descriptor of the packed rows of q and then of the gradient, or None
    keys, values,
    keys_map, values_map,  # descriptors of K and V as matrices, a row a token, or None
    cu_slow, text_rows, cu_text, slow_pieces,
    grad_q,  # [rows, Hq, D]; SPLIT: float32 partials [num_splits, Hkv, tiles, BLOCK_M, BLOCK_D]; None: not wanted
    grad_keys, grad_values,  # [Ns, Hkv, D] each, None: not wanted; not APART: keys' [Ns, Hkv, 2, D] holds both
    num_text, num_slow, batch, num_tiles, num_splits,
    num_owners,  # programs that own packed rows; the rest own slow tokens
    k_head_stride, v_head_stride, value_offset, softmax_scale,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, HQ: tl.constexpr, HEADS_PER_KV: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP_M: tl.constexpr, STEP_N: tl.constexpr,
    BLOCK_B: tl.constexpr, SPLIT: tl.constexpr, PEEL: tl.constexpr, SELECTS: tl.constexpr, WITH_Q: tl.constexpr,
    WITH_K: tl.constexpr, WITH_V: tl.constexpr, APART: tl.constexpr, SHIFT: tl.constexpr,
    SCAN: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    KV_HEADS: tl.constexpr = HQ // HEADS_PER_KV
    program = tl.program_id(0)
    if program < num_owners:  # those that take longer begin first; neighbours read the same K and V
        tile = program % num_tiles
        kv_head = program // num_tiles % KV_HEADS
        unit = program // num_tiles // KV_HEADS
    else:
        tile = 0
        kv_head = (program - num_owners) % KV_HEADS
        unit = (program - num_owners) // KV_HEADS
    num_rows = num_tiles * BLOCK_M  # packed rows of a head, with those that fill tiles
    num_packed = num_rows.to(tl.int64) * KV_HEADS
    mine = kv_head.to(tl.int64) * num_rows
    queries = packed + mine * BLOCK_D
    grads = queries + num_packed * BLOCK_D
    lse2 = stats + mine
    delta = lse2 + num_packed
    keys += kv_head.to(tl.int64) * k_head_stride
    if APART:
        values += kv_head.to(tl.int64) * v_head_stride
    else:
        values = keys + value_offset
    scale = softmax_scale * _LOG2E
    if WITH_Q:
        target = grad_q
        if SPLIT:
            target += (unit.to(tl.int64) * num_packed + mine) * BLOCK_D
        if program < num_owners:
            queries_program(
                tile, unit, kv_head, queries, grads, lse2, delta, bounds, keys, values, keys_map, values_map,
                kv_head * k_head_stride, kv_head * v_head_stride, cu_slow, text_rows, cu_text, slow_pieces, target,
                num_text, num_rows, num_splits, batch, softmax_scale, scale,
                K_STRIDE, V_STRIDE, HQ, HEADS_PER_KV, D, BLOCK_D, BLOCK_M, STEP_N, BLOCK_B,
                SPLIT, PEEL, SELECTS, SCAN, CHUNK, PDL,
            )  # fmt: skip
    if WITH_K or WITH_V:
        TENSORS: tl.constexpr = 1 if APART else 2  # that lie between a head and the next
        if WITH_K:
            grad_keys += kv_head * (TENSORS * D)
        if not APART:
            grad_values = grad_keys + D
        elif WITH_V:
            grad_values += kv_head * D
        of_queries, of_grads, first_queries, first_grads = queries, grads, None, None
        if packed_map is not None:
            of_queries, of_grads = packed_map, packed_map
            first_queries, first_grads = kv_head * num_rows, (KV_HEADS + kv_head) * num_rows
        if program >= num_owners:
            if SELECTS:
                selected_program(
                    unit, of_queries, of_grads, lse2, delta, first_queries, first_grads, bounds, keys, values,
                    cu_slow, cu_text, slow_pieces, grad_keys, grad_values,
                    num_slow, num_rows, batch, softmax_scale, scale, K_STRIDE, V_STRIDE, TENSORS * KV_HEADS * D,
                    HEADS_PER_KV, D, BLOCK_D, BLOCK_M, BLOCK_N, STEP_M, BLOCK_B, WITH_K, WITH_V, SHIFT, SCAN, CHUNK,
                    PDL,
                )  # fmt: skip
            else:
                sequence_program(
                    unit, of_queries, of_grads, lse2, delta, first_queries, first_grads, keys, values,
                    cu_slow, cu_text, grad_keys, grad_values,
                    num_slow, num_text, batch, softmax_scale, scale, K_STRIDE, V_STRIDE, TENSORS * KV_HEADS * D,
                    HEADS_PER_KV, D, BLOCK_D, BLOCK_M, BLOCK_N, STEP_M, BLOCK_B, WITH_K, WITH_V, SHIFT, PDL,
                )  # fmt: skip


@triton.jit(do_not_specialize=["num_text", "batch", "num_tiles", "num_splits"])
def _reduce(
    partials, stats, grad_q, text_rows, cu_text, num_text, batch, num_tiles, num_splits, softmax_scale,
    HQ: tl.constexpr, HEADS_PER_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The splits' partials in their order, scaled, to the rows of ``grad_q``."""
    PARTS: tl.constexpr = BLOCK_M // ROWS
    tile = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    kv_head = tl.program_id(1)
    _, first_text, first_row, num_rows = rows_of(tile, cu_text, num_text, batch, HEADS_PER_KV, BLOCK_M, BLOCK_B)
    inside = part * ROWS + tl.arange(0, ROWS)
    if PDL:
        gdc_wait()
    if num_rows > 0:
        num_packed = tl.num_programs(1).to(tl.int64) * num_tiles * BLOCK_M
        at = (kv_head * num_tiles + tile).to(tl.int64) * BLOCK_M + inside
        ptrs = partials + at[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        sees = tl.load(stats + at) != float("inf")
        dq = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for _ in tl.range(0, num_splits):
            dq += tl.load(ptrs, mask=sees[:, None], other=0.0)
            ptrs += num_packed * BLOCK_D
        packed = first_row + inside
        store_rows(grad_q, dq * softmax_scale, text_rows, first_text, packed, num_rows, kv_head, HQ, HEADS_PER_KV, D)


class AttentionBackward:
    """The launches of calls alike. There are text rows. ``config`` overrides the heuristics, for tuning."""

    def __init__(
        self,
        sample: BackwardTensors,
        softmax_scale: float | None,
        needs: tuple[bool, ...],
        config: AttentionBackwardConfig | None = None,
    ):
        inputs = sample.inputs
        q, slow_kv, pieces = inputs.q, inputs.slow_kv, inputs.slow_pieces
        (_, num_q_heads, head_dim), (num_slow, num_kv_heads) = q.shape, slow_kv.shape[:2]
        num_text, batch = inputs.text_rows.shape[0], inputs.cu_text.shape[0] - 1
        heads_per_kv, block_d = num_q_heads // num_kv_heads, padded_head_dim(head_dim)
        apart = inputs.slow_values is not None
        device = describe(q.device)
        self.needs = needs_q, needs_k, needs_v = needs[0], needs[1], needs[2] if apart else needs[1]
        self.config = config = config or triton_attention_backward_config(
            num_text, num_slow if pieces is None else num_slow * batch,  # each sequence may have all tokens
            batch, num_q_heads, num_kv_heads, head_dim, q.element_size(),
            device.num_sms, device.shared_bytes, needs_k or needs_v,
        )  # fmt: skip
        num_tiles = config.num_tiles(num_text, batch, heads_per_kv)
        num_owners = num_tiles * num_kv_heads * config.num_splits if needs_q else 0
        num_blocks = 0
        if needs_k or needs_v:  # a partial one a sequence too, where blocks are cut anew for each
            num_blocks = -(-num_slow // config.block_n) + (0 if inputs.selects else batch)
        self.grid = (num_owners + num_blocks * num_kv_heads,)
        self.row_grid = (num_tiles * config.block_m // _ROWS, num_kv_heads)
        self.num_rows, self.block_d = num_tiles * num_kv_heads * config.block_m, block_d  # packed ones of all heads
        self.step_m = min(config.step, config.block_m)
        self.has_bounds = inputs.slow_begin is not None or inputs.slow_end is not None
        self.maps_rows = device.tensor_maps and q.element_size() == 2 and 2 * self.num_rows < 2**31
        self.maps_tokens = (
            self.maps_rows and needs_q and not inputs.selects and block_d == head_dim
            and _has_map(inputs.keys) and _has_map(inputs.values)
        )  # fmt: skip
        self.scale = scale_of(q, softmax_scale)
        k_stride = v_stride = slow_kv.stride()
        value_offset = k_stride[2]
        if apart:
            v_stride, value_offset = inputs.slow_values.stride(), 0
        self.row_numbers = (num_text, batch, num_tiles)
        self.numbers = (
            num_text, num_slow, batch, num_tiles, config.num_splits, num_owners,
            k_stride[1], v_stride[1], value_offset, self.scale,
        )  # fmt: skip
        scan, chunk = triton_pieces_config(0 if pieces is None else pieces.shape[0])
        # A launch that reads what the one before it wrote starts early and waits by itself.
        self.dependent = {"launch_pdl": True} if device.dependent_launch else {}
        common = {
            "HEADS_PER_KV": heads_per_kv, "D": head_dim, "BLOCK_D": block_d, "BLOCK_M": config.block_m,
            "BLOCK_B": next_power_of_2(batch), "PDL": device.dependent_launch, "enable_fp_fusion": True,
        }  # fmt: skip
        self.pack_constants = common | {"STEP": self.step_m, "ROWS": _ROWS, "SCAN": scan, "num_warps": 4}
        self.reduce_constants = common | {"HQ": num_q_heads, "ROWS": _ROWS, "num_warps": 4}
        self.constants = common | {
            "K_STRIDE": k_stride[0], "V_STRIDE": v_stride[0], "HQ": num_q_heads, "BLOCK_N": config.block_n,
            "STEP_M": self.step_m, "STEP_N": config.step, "SPLIT": config.num_splits > 1, "PEEL": config.peel_tail,
            "SELECTS": inputs.selects, "WITH_Q": needs_q, "WITH_K": needs_k, "WITH_V": needs_v, "APART": apart,
            # The probabilities of a long video are among float16's subnormal numbers: taken times 2^15 they are not.
            "SHIFT": 15 if q.dtype == torch.float16 else 0, "SCAN": scan, "CHUNK": chunk,
            "num_warps": config.num_warps, "num_stages": config.num_stages,
        }  # fmt: skip

    @property
    def workspace(self) -> tuple[int, int, int, int]:
        """Elements: packed rows, in q's dtype; float32 statistics; int32 bounds; float32 partials of dQ."""
        num_splits, rows_of_head = self.config.num_splits, self.num_rows // self.row_grid[1]
        bounds = 2 * rows_of_head + 4 * (rows_of_head // self.step_m) if self.has_bounds else 0
        partials = num_splits * self.num_rows * self.block_d if self.needs[0] and num_splits > 1 else 0
        return 2 * self.num_rows * self.block_d, 2 * self.num_rows, bounds, partials

    def _maps(self, packed: Tensor, inputs: AttentionTensors) -> tuple:
        """Descriptors, or None, of all packed rows, of K and of V."""
        packed_map = keys_map = values_map = None
        if self.maps_rows:
            shape = [2 * self.num_rows, self.block_d]
            packed_map = TensorDescriptor(packed, shape, [self.block_d, 1], [self.step_m, self.block_d])
        if self.maps_tokens:
            block = [self.config.step, self.block_d]
            keys_map, values_map = (
                TensorDescriptor(x, [len(x), _columns(x)], [x.stride(0), 1], block)
                for x in (inputs.keys, inputs.values)
            )
        return packed_map, keys_map, values_map

    def describe(self, dtype: torch.dtype) -> CallPlan:
        packed, *words = self.workspace
        return CallPlan(
            tiles=asdict(self.config), num_splits=self.config.num_splits, grid=self.grid,
            workspace_bytes=packed * dtype.itemsize + 4 * sum(words),
        )  # fmt: skip

    def run(self, tensors: BackwardTensors) -> tuple[Tensor | None, ...]:
        """Gradients of q, slow_kv, slow_values."""
        inputs, (grad_context, grad_lse), (context, lse) = tensors.inputs, tensors.grads, tensors.results
        q, device = inputs.q, inputs.q.device
        grad_q = grad_kv = grad_values = None
        if self.needs[0]:
            make = torch.empty if inputs.text_rows.shape[0] == q.shape[0] else torch.zeros
            grad_q = make(q.shape, dtype=q.dtype, device=device)
        if self.needs[1]:
            grad_kv = torch.empty(inputs.slow_kv.shape, dtype=q.dtype, device=device)
        if self.needs[2] and inputs.slow_values is not None:
            grad_values = torch.empty(inputs.slow_values.shape, dtype=q.dtype, device=device)
        if self.grid[0] == 0:
            return grad_q, grad_kv, grad_values
        num_packed, num_stats, num_bounds, num_partials = self.workspace
        packed = torch.empty(num_packed, dtype=q.dtype, device=device)
        stats = torch.empty(num_stats, dtype=torch.float32, device=device)
        bounds = torch.empty(num_bounds, dtype=torch.int32, device=device) if num_bounds else None
        partials = torch.empty(num_partials, dtype=torch.float32, device=device) if num_partials else None
        _pack[self.row_grid](
            q, grad_context, context, lse, grad_lse, inputs.text_rows, inputs.cu_text, inputs.cu_slow,
            inputs.slow_begin, inputs.slow_end, inputs.slow_pieces, packed, stats, bounds,
            *self.row_numbers, *q.stride()[:2], *context.stride()[:2], *lse.stride(),
            *_strides(grad_context, 3), *_strides(grad_lse, 2), **self.pack_constants,
        )  # fmt: skip
        packed_map, keys_map, values_map = self._maps(packed, inputs)
        _backward[self.grid](
            packed, stats, bounds, packed_map, inputs.slow_kv, inputs.slow_values, keys_map, values_map,
            inputs.cu_slow, inputs.text_rows, inputs.cu_text, inputs.slow_pieces,
            grad_q if partials is None else partials, grad_kv, grad_values,
            *self.numbers, **self.constants, **self.dependent,
        )  # fmt: skip
        if partials is not None:
            _reduce[self.row_grid](
                partials, stats, grad_q, inputs.text_rows, inputs.cu_text, *self.row_numbers, self.config.num_splits,
                self.scale, **self.reduce_constants, **self.dependent,
            )  # fmt: skip
        return grad_q, grad_kv, grad_values


def _columns(x: Tensor) -> int:
    """Of K or V [Ns, Hkv, D] as a matrix, a row a token; head h begins at column h * its stride."""
    return (x.shape[1] - 1) * x.stride(1) + x.shape[2]


def _has_map(x: Tensor) -> bool:
    """Whether a descriptor takes that matrix: 16-byte rows, and coordinates of 32 bits."""
    return is_aligned(x) and len(x) > 0 and _columns(x) < 2**31


def _strides(x: Tensor | None, rank: int) -> tuple[int, ...]:
    return (0,) * rank if x is None else x.stride()


def prepare_text_cross_attention_backward(
    sample: BackwardTensors, options: AttentionOptions, needs: tuple[bool, ...]
) -> Callable:
    """A function of tensors alike: gradients of q, slow_kv and slow_values, None where ``needs`` says so."""
    if sample.inputs.text_rows.shape[0] == 0 or all(grad is None for grad in sample.grads):

        @described(nothing_to_attend)
        @on_device_of
        def zeros(tensors: BackwardTensors) -> tuple[Tensor | None, ...]:
            return zero_attention_gradients(tensors.inputs, needs)

        return zeros
    backward, dtype = AttentionBackward(sample, options.softmax_scale, needs), sample.inputs.q.dtype

    @described(lambda: backward.describe(dtype))
    @on_device_of
    def run(tensors: BackwardTensors) -> tuple[Tensor | None, ...]:
        return backward.run(tensors)

    return run
