"""Text rows attend to slow tokens: packed grouped-query attention, split over the slow tokens, in Triton.

Roofline: a decoded token reads K and V once (Ns * Hkv * 2 * D elements at memory speed); from about 64 text rows on,
4 * Nt * Hq * Ns * D tensor-core FLOPs rule. Built so:
  * A tile's rows are (text row, query head of the KV head) pairs, so that K and V are read once a KV head and not once
    a query head; they are read in place from [Ns, Hkv, 2, D], and q by text row index.
  * The grid comes from shapes alone (the prefix sums stay on the device): a tile finds its own sequence.
  * ``num_splits`` programs share one tile's slow tokens. Each writes a normalised float32 partial and its base-2
    log-sum-exp; ``_combine`` adds them in a fixed order and, for the fused op, forms the gate and mixes, so that a
    whole layer's slow path is two launches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call_plan import CallPlan, described, nothing_to_attend
from ..calls import AttentionOptions, AttentionTensors, FusedOptions, FusedTensors, scale_of
from ..gate import Gate
from ..heuristics import (
    AttentionConfig,
    next_power_of_2,
    padded_head_dim,
    triton_attention_config,
    triton_combine_config,
)
from ._common import describe, gate_of, gdc_launch_dependents, gdc_wait, on_device_of
from .gated_mix import copied_or_empty, launch_mix

_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sequence_of(tile, cu_text, batch, HEADS_PER_KV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr):
    """(sequence, tile within it) of a grid tile; sequence == BLOCK_B for the tiles that the upper bound adds."""
    b = tl.arange(0, BLOCK_B)
    begin = tl.load(cu_text + b, mask=b < batch, other=0)
    end = tl.load(cu_text + b + 1, mask=b < batch, other=0)
    tiles = tl.cdiv((end - begin) * HEADS_PER_KV, BLOCK_M)
    before = tl.cumsum(tiles, 0) <= tile
    return tl.sum(before.to(tl.int32), 0), tile - tl.sum(tl.where(before, tiles, 0), 0)


@triton.jit
def _load_tile(ptrs, rows, cols, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """Rows and columns that are off are never read (a neighbour's rows may hold NaN) and give 0."""
    if MASK_ROWS and MASK_COLS:
        return tl.load(ptrs, mask=rows[:, None] & cols[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=rows[:, None], other=0.0)
    elif MASK_COLS:
        return tl.load(ptrs, mask=cols[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _prefetch(tile, tokens_left, STRIDE: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr):
    """Ask L2 for the first rows of ``tile`` [tokens_left, D], a 128-byte line each time."""
    LINE: tl.constexpr = 1024 // tile.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = triton.next_power_of_2(triton.cdiv(D, LINE))
    token = tl.minimum(tl.arange(0, TOKENS), tokens_left - 1).to(tl.int64)
    lines = tile + token[:, None] * STRIDE + tl.minimum(tl.arange(0, LINES) * LINE, D - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _attend_block(
    acc, total, top, q, keys, values, kv_tile, tokens_left, cols, scale,
    BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr,
):  # fmt: skip
    """One online-softmax step over BLOCK_N slow tokens; ``scale`` > 0 takes scores to base 2."""
    live = tl.arange(0, BLOCK_N) < tokens_left
    k = _load_tile(keys + kv_tile, live, cols, MASK_ROWS, MASK_COLS)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASK_ROWS:
        scores = tl.where(live[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    v = _load_tile(values + kv_tile, live, cols, MASK_ROWS, MASK_COLS)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_top


@triton.jit(do_not_specialize=["num_text", "batch", "num_splits"])
def _attention(
    q, slow_kv, cu_slow, text_rows, cu_text,
    out,  # SPLIT: float32 workspace, partials [num_splits, Nt, Hq, D] then lse [num_splits, Nt, Hq]; else context
    lse,  # [Nt, Hq] or None
    num_text, batch, num_splits,
    q_row_stride, q_head_stride, kv_head_stride, kv_pair_stride, softmax_scale,
    KV_STRIDE: tl.constexpr,  # elements a token: a constant turns the loop's addresses into immediates
    NEGATIVE: tl.constexpr,  # softmax_scale < 0
    HEADS_PER_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr, SPLIT: tl.constexpr, PEEL: tl.constexpr, PDL: tl.constexpr,
    PREFETCH: tl.constexpr,
):  # fmt: skip
    # Tiles that read the same K and V are neighbours in the grid: the first brings them to L2, the rest hit.
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_q_heads = tl.num_programs(1) * HEADS_PER_KV
    if PDL:
        gdc_launch_dependents()

    if BLOCK_B == 1:
        sequence, first_text, num_rows = 0, 0, num_text * HEADS_PER_KV
    else:
        sequence, tile = _sequence_of(tile, cu_text, batch, HEADS_PER_KV, BLOCK_M, BLOCK_B)
        if sequence >= batch:
            return
        first_text = tl.load(cu_text + sequence)
        num_rows = (tl.load(cu_text + sequence + 1) - first_text) * HEADS_PER_KV
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = packed < num_rows
    text = first_text + packed // HEADS_PER_KV
    head = kv_head * HEADS_PER_KV + packed % HEADS_PER_KV
    row = tl.load(text_rows + text, mask=is_row, other=0).to(tl.int64)

    first_slow = tl.load(cu_slow + sequence)
    num_slow = tl.load(cu_slow + sequence + 1) - first_slow
    # Blocks are dealt out evenly; the masked block is always the last one of the last split.
    num_blocks = tl.cdiv(num_slow, BLOCK_N)
    share, extra = num_blocks // num_splits, num_blocks % num_splits
    lo = (split * share + tl.minimum(split, extra)) * BLOCK_N
    hi = tl.minimum(lo + (share + (split < extra).to(tl.int32)) * BLOCK_N, num_slow)
    keys = slow_kv + (first_slow + lo).to(tl.int64) * KV_STRIDE + kv_head.to(tl.int64) * kv_head_stride
    values = keys + kv_pair_stride
    if PREFETCH and lo < hi:  # the loop's first loads wait until q is here, two dependent reads from now
        _prefetch(keys, hi - lo, KV_STRIDE, D, 2 * BLOCK_N)
        _prefetch(values, hi - lo, KV_STRIDE, D, 2 * BLOCK_N)
    token = tl.arange(0, BLOCK_N)
    if KV_STRIDE * BLOCK_N >= 2**31:
        token = token.to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    kv_tile = token[:, None] * KV_STRIDE + cols[None, :]
    step: tl.constexpr = KV_STRIDE * BLOCK_N

    is_col = cols < D
    q_ptrs = q + (row * q_row_stride + head.to(tl.int64) * q_head_stride)[:, None] + cols[None, :]
    query = tl.load(q_ptrs, mask=is_row[:, None] & is_col[None, :], other=0.0)
    # The running maximum is taken before scaling, which needs a positive scale (and -inf * 0 is NaN).
    if NEGATIVE:
        query = -query
    scale = tl.maximum(tl.abs(softmax_scale) * _LOG2E, 1e-30)

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    MASK_COLS: tl.constexpr = D != BLOCK_D
    if PEEL:
        # Tensor cores are the limit: keep masks out of the loop.
        full = lo + (hi - lo) // BLOCK_N * BLOCK_N
        for _ in tl.range(lo, full, BLOCK_N):
            acc, total, top = _attend_block(
                acc, total, top, query, keys, values, kv_tile, BLOCK_N, is_col, scale, BLOCK_N, False, MASK_COLS
            )
            keys += step
            values += step
        for _ in tl.range(full, hi, BLOCK_N):
            acc, total, top = _attend_block(
                acc, total, top, query, keys, values, kv_tile, hi - full, is_col, scale, BLOCK_N, True, MASK_COLS
            )
    else:
        # Loads are the limit: masks are free, and a tail outside the pipelined loop would wait for memory alone.
        for start in tl.range(lo, hi, BLOCK_N):
            acc, total, top = _attend_block(
                acc, total, top, query, keys, values, kv_tile, hi - start, is_col, scale, BLOCK_N, True, MASK_COLS
            )
            keys += step
            values += step

    # total == 0 only where no slow token was seen; a NaN must stay one.
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    lse2 = tl.where(empty, float("-inf"), top + tl.log2(total))
    out_row = text.to(tl.int64) * num_q_heads + head
    if SPLIT:
        out_row += split.to(tl.int64) * num_text * num_q_heads
        tl.store(out + num_splits.to(tl.int64) * num_text * num_q_heads * D + out_row, lse2, mask=is_row)
    elif lse is not None:
        tl.store(lse + out_row, lse2 * _LN2, mask=is_row)
    out_ptrs = out + out_row[:, None] * D + cols[None, :]
    tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=is_row[:, None] & is_col[None, :])


@triton.jit(do_not_specialize=["num_text", "num_splits"])
def _combine(
    partials,  # what _attention wrote with SPLIT
    out,  # context [Nt, Hq, D]; with ``state``: the mixed state [rows, C]
    lse,  # [Nt, Hq] or None
    state, text_rows, weight, bias, warm_up, value,  # None: combine only
    num_text, num_splits, state_row_stride,
    HQ: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr, GATE: tl.constexpr, TANH_WARM_UP: tl.constexpr, PDL: tl.constexpr,
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
        residual = tl.load(state_row + element, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()

    stride = num_text.to(tl.int64) * HQ  # heads a split
    lse_partials = partials + num_splits * stride * D
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    for first in tl.range(0, num_splits, BLOCK_S):
        split = first + tl.arange(0, BLOCK_S)
        is_split = split < num_splits
        slot = split.to(tl.int64)[:, None] * stride + text * HQ + head[None, :]
        part_lse = tl.load(lse_partials + slot, mask=is_split[:, None] & is_head[None, :], other=float("-inf"))
        ptrs = partials + slot[:, :, None] * D + cols[None, None, :]
        part = tl.load(ptrs, mask=is_split[:, None, None] & inside[None, :, :], other=0.0)
        new_top = tl.maximum(top, tl.max(part_lse, 0))
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)
        w = tl.exp2(part_lse - origin[None, :])
        shrink = tl.exp2(top - origin)
        total = total * shrink + tl.sum(w, 0)
        acc = acc * shrink[:, None] + tl.sum(w[:, :, None] * part, 0)
        top = new_top

    empty = total == 0
    total = tl.where(empty, 1.0, total)
    context = acc / total[:, None]
    if lse is not None:
        lse_row = tl.where(empty, float("-inf"), (top + tl.log2(total)) * _LN2)
        tl.store(lse + text * HQ + head, lse_row, mask=is_head)
    if state is not None:
        tl.store(out + row * (HQ * D) + element, (residual + g * context).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + text * (HQ * D) + element, context.to(out.dtype.element_ty), mask=inside)


_NO_GATE = Gate("none", None, None, None, False, None)


class Attention:
    """The launches of calls alike: tiles, splits and what kernels are compiled for. There is at least one text row.

    ``config`` overrides the heuristics, for tuning.
    """

    def __init__(
        self,
        sample: AttentionTensors | FusedTensors,
        softmax_scale: float | None = None,
        num_splits: int = 0,
        config: AttentionConfig | None = None,
    ):
        q, slow_kv = sample.q, sample.slow_kv
        (_, num_q_heads, head_dim), num_kv_heads, kv_stride = q.shape, slow_kv.shape[1], slow_kv.stride()
        num_text, batch = sample.text_rows.shape[0], sample.cu_text.shape[0] - 1
        heads_per_kv = num_q_heads // num_kv_heads
        self.device, self.num_text, self.batch = describe(q.device), num_text, batch
        self.num_q_heads, self.head_dim = num_q_heads, head_dim
        self.config = config = config or triton_attention_config(
            num_text, slow_kv.shape[0], batch, num_q_heads, num_kv_heads, head_dim, q.element_size(),
            self.device.num_sms, num_splits, self.device.shared_bytes,
        )  # fmt: skip
        self.combine = triton_combine_config(
            num_text, num_q_heads, head_dim, config.num_splits, self.device.num_sms, self.device.dependent_launch
        )
        self.grid = (config.num_tiles(num_text, batch, heads_per_kv), num_kv_heads, config.num_splits)
        self.kernel = _attention[self.grid]
        scale = scale_of(q, softmax_scale)
        self.numbers = (
            num_text, batch, config.num_splits, q.stride(0), q.stride(1), kv_stride[1], kv_stride[2], scale,
        )  # fmt: skip
        self.constants = {
            "KV_STRIDE": kv_stride[0], "NEGATIVE": scale < 0, "HEADS_PER_KV": heads_per_kv,
            "D": head_dim, "BLOCK_D": padded_head_dim(head_dim),
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_B": next_power_of_2(batch),
            "SPLIT": config.num_splits > 1, "PEEL": config.peel_tail,
            "PREFETCH": self.device.prefetch and not config.peel_tail,
            "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True,
        }  # fmt: skip

    def describe(self) -> CallPlan:
        """The workspace is what ``_partials`` makes."""
        tiles, floats = asdict(self.config), 0
        if self.config.num_splits > 1:
            tiles |= {f"combine_{name}": value for name, value in asdict(self.combine).items()}
            floats = self.config.num_splits * self.num_text * self.num_q_heads * (self.head_dim + 1)
        return CallPlan(tiles=tiles, num_splits=self.config.num_splits, grid=self.grid, workspace_bytes=4 * floats)

    def describe_with_mix(self, dtype: torch.dtype) -> CallPlan:
        """Without splits the context lies in memory between the two launches."""
        plan = self.describe()
        if self.config.num_splits > 1:
            return plan
        return replace(plan, workspace_bytes=self.num_text * self.num_q_heads * self.head_dim * dtype.itemsize)

    def attend(self, tensors: AttentionTensors | FusedTensors, context: Tensor, lse: Tensor | None) -> None:
        """Into ``context`` [Nt, Hq, D] and ``lse`` [Nt, Hq]."""
        if self.config.num_splits == 1:
            self._launch(tensors, context, lse, dependent=False)
        else:
            partials = self._partials(tensors)
            self._combine(partials, context, lse)

    def attend_and_mix(self, tensors: FusedTensors, gate: Gate) -> Tensor:
        """The fused op's result, in two launches (three where rows that are no text rows must be copied)."""
        state, q = tensors.state, tensors.q
        out = copied_or_empty(state, self.num_text)
        if self.config.num_splits > 1:
            self._combine(self._partials(tensors), out, None, state, tensors.text_rows, gate)
            return out
        context = torch.empty((self.num_text, *q.shape[1:]), dtype=q.dtype, device=q.device)
        dependent = self.device.dependent_launch
        self._launch(tensors, context, None, dependent)
        launch_mix(out, state, context.flatten(1), tensors.text_rows, gate, dependent)
        return out

    def _launch(
        self, tensors: AttentionTensors | FusedTensors, out: Tensor, lse: Tensor | None, dependent: bool
    ) -> None:
        """``dependent``: the launch after this one may start early (it waits for this one's results by itself)."""
        self.kernel(
            tensors.q, tensors.slow_kv, tensors.cu_slow, tensors.text_rows, tensors.cu_text, out, lse,
            *self.numbers, PDL=dependent, **self.constants,
        )  # fmt: skip

    def _partials(self, tensors: AttentionTensors | FusedTensors) -> Tensor:
        heads = self.config.num_splits * self.num_text * self.num_q_heads
        partials = torch.empty(heads * (self.head_dim + 1), dtype=torch.float32, device=tensors.q.device)
        self._launch(tensors, partials, None, self.combine.dependent)
        return partials

    def _combine(
        self, partials: Tensor, out: Tensor, lse: Tensor | None,
        state: Tensor | None = None, text_rows: Tensor | None = None, gate: Gate = _NO_GATE,
    ) -> None:  # fmt: skip
        config, channels = self.combine, self.num_q_heads * self.head_dim
        options = {"launch_pdl": True} if config.dependent else {}
        _combine[self.num_text, -(-self.num_q_heads // config.block_h)](
            partials, out, lse, state, text_rows, gate.weight, gate.bias, gate.warm_up, gate.float_value,
            self.num_text, self.config.num_splits, None if state is None else state.stride(0),
            HQ=self.num_q_heads, D=self.head_dim, BLOCK_D=padded_head_dim(self.head_dim), BLOCK_S=config.block_s,
            BLOCK_H=config.block_h, BLOCK_C=next_power_of_2(channels), GATE=gate.kind,
            TANH_WARM_UP=gate.warm_up_tanh, PDL=config.dependent, num_warps=config.num_warps, enable_fp_fusion=True,
            **options,
        )  # fmt: skip


def prepare_text_cross_attention(sample: AttentionTensors, options: AttentionOptions) -> Callable:
    """A function of tensors alike: context [Nt, Hq, D] and, if asked, lse [Nt, Hq] float32."""
    shape = (sample.text_rows.shape[0], *sample.q.shape[1:])
    attention = Attention(sample, options.softmax_scale, options.num_splits) if shape[0] else None

    @described(nothing_to_attend if attention is None else attention.describe)
    @on_device_of
    def run(tensors: AttentionTensors) -> tuple[Tensor, Tensor | None]:
        q = tensors.q
        context = torch.empty(shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(shape[:2], dtype=torch.float32, device=q.device) if options.return_lse else None
        if attention is not None:
            attention.attend(tensors, context, lse)
        return context, lse

    return run


def prepare_cross_attention(sample: FusedTensors, options: FusedOptions) -> Callable:
    """A function of tensors alike: attention, gate and mix."""
    if sample.text_rows.shape[0] == 0:
        return described(nothing_to_attend)(on_device_of(lambda tensors: copied_or_empty(tensors.state, 0)))
    attention, dtype = Attention(sample, options.softmax_scale, options.num_splits), sample.q.dtype

    @described(lambda: attention.describe_with_mix(dtype))
    @on_device_of
    def run(tensors: FusedTensors) -> Tensor:
        return attention.attend_and_mix(tensors, tensors.gate(options))

    return run
