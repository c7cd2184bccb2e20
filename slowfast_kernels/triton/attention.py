"""Text rows attend to slow tokens: packed grouped-query attention, split over the slow tokens, in Triton.

Roofline: a decoded token reads K and V once (Ns * Hkv * 2 * D elements at memory speed); from about 64 text rows on,
4 * Nt * Hq * Ns * D tensor-core FLOPs rule. Built so:
  * A tile's rows are (text row, query head of the KV head) pairs, so that K and V are read once a KV head and not once
    a query head; they are read in place from [Ns, Hkv, 2, D], and q by text row index.
  * The grid comes from shapes alone (the prefix sums stay on the device): a tile finds its own sequence.
  * ``num_splits`` programs share one tile's slow tokens. Each writes a normalised float32 partial and its base-2
    log-sum-exp; ``_combine`` adds them in a fixed order and, for the fused op, forms the gate and mixes, so that a
    whole layer's slow path is two launches.
  * Splits are cut for even lengths. Where a batch has others, programs find it out and share blocks anew (``_deal``).
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
from ..heuristics.triton import (
    AttentionConfig,
    DealConfig,
    next_power_of_2,
    padded_head_dim,
    triton_attention_config,
    triton_combine_config,
    triton_deal_config,
    triton_pieces_config,
)
from ._block import attend_block
from ._combine import LN2, combine_launch
from ._common import describe, gdc_launch_dependents, on_device_of, prefetch
from ._deal import work_of
from ._launch import Launch
from ._tiles import sequence_of, uniform
from ._visible import count_tokens, share_of, visible_rows, visible_share, visit_visible
from .gated_mix import copied_or_empty, mix_launch

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _prefetch(tile, tokens_left, STRIDE: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr):
    """Ask L2 for the first rows of ``tile`` [tokens_left, D], a 128-byte line each time."""
    LINE: tl.constexpr = 1024 // tile.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = triton.next_power_of_2(triton.cdiv(D, LINE))
    token = tl.minimum(tl.arange(0, TOKENS), tokens_left - 1).to(tl.int64)
    lines = tile + token[:, None] * STRIDE + tl.minimum(tl.arange(0, LINES) * LINE, D - 1)[None, :]
    prefetch(lines)


@triton.jit
def _store_nothing(
    out, lse, partials, text, head, is_row, split, num_text, num_partials, num_q_heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr, WRITE_EMPTY: tl.constexpr,
):  # fmt: skip
    """The result of a tile whose rows see nothing, or nothing of this split."""
    out_row = text.to(tl.int64) * num_q_heads + head
    if SPLIT:
        lse = partials + num_partials.to(tl.int64) * D
        tl.store(lse + split.to(tl.int64) * num_text * num_q_heads + out_row, float("-inf"), mask=is_row)
    else:
        if lse is not None:
            tl.store(lse + out_row, float("-inf"), mask=is_row)
        if WRITE_EMPTY:
            cols = tl.arange(0, BLOCK_D)
            tl.store(out + out_row[:, None] * D + cols[None, :], 0.0, mask=is_row[:, None] & (cols < D)[None, :])


@triton.jit
def _store_partial(partials, num_partials, partial, acc, lse2, is_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``partial`` of the workspace: normalised sums and their log-sum-exp in base 2."""
    cols = tl.arange(0, BLOCK_D)
    tl.store(partials + num_partials.to(tl.int64) * D + partial, lse2, mask=is_row)
    tl.store(partials + partial[:, None] * D + cols[None, :], acc, mask=is_row[:, None] & (cols < D)[None, :])


@triton.jit
def _store_context(out, lse, out_row, acc, lse2, is_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    if lse is not None:
        tl.store(lse + out_row, lse2 * LN2, mask=is_row)
    cols = tl.arange(0, BLOCK_D)
    out_ptrs = out + out_row[:, None] * D + cols[None, :]
    tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=is_row[:, None] & (cols < D)[None, :])


_NUMBERS = ["num_text", "batch", "num_splits", "num_partials", "num_tiles", "even_tiles", "num_slots", "max_parts"]


@triton.jit(do_not_specialize=_NUMBERS)
def _attention(
    q,
    keys, values,  # [Ns, Hkv, D] each; values None: they lie value_offset elements behind the keys, at the same strides
    cu_slow,  # of tokens; with ``slow_pieces`` of pieces
    text_rows, cu_text,
    slow_begin, slow_end,  # [Nt], or None: rows see their sequence from its start, and to its end
    slow_pieces,  # [P, 2], or None
    out,  # context [Nt, Hq, D], or None: all of it is in parts
    lse,  # [Nt, Hq] or None
    partials,  # or None; float32 [num_partials, D], then their lse, then with DEAL the length of parts as an int32
    num_text, batch, num_splits,
    num_partials,  # rows of the workspace; of the plan they are [num_splits, Nt, Hq]
    num_tiles, even_tiles, num_slots, max_parts,  # of a deal
    q_row_stride, q_head_stride, k_head_stride, v_head_stride, value_offset, softmax_scale,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,  # elements a token: constants make the loop's addresses immediates
    NEGATIVE: tl.constexpr,  # softmax_scale < 0
    HEADS_PER_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr, SPLIT: tl.constexpr, PEEL: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
    DEAL_HEADS: tl.constexpr,  # KV heads of a batch that may be dealt out, whose grid has one dimension; else 0
    WRITE_EMPTY: tl.constexpr,  # the context of tiles that see nothing too; not where who reads it looks at lse first
    SCAN: tl.constexpr, CHUNK: tl.constexpr,  # pieces that are counted, and that are walked, at a time
):  # fmt: skip
    # Tiles that read the same K and V are neighbours in the grid: the first brings them to L2, the rest hit.
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    num_q_heads = tl.num_programs(1) * HEADS_PER_KV
    DEAL: tl.constexpr = DEAL_HEADS > 0
    if PDL:
        gdc_launch_dependents()

    if DEAL:
        num_q_heads *= DEAL_HEADS
        sequence, tile, kv_head, first_block, last_block, split, slot, length = work_of(
            tile, tl.num_programs(0), cu_text, cu_slow, batch, num_tiles, num_splits, even_tiles, num_slots, max_parts,
            HEADS_PER_KV, DEAL_HEADS, BLOCK_M, BLOCK_N, BLOCK_B, not SPLIT,
        )  # fmt: skip
        if tl.program_id(0) == 0:
            tl.store((partials + num_partials.to(tl.int64) * (D + 1)).to(tl.pointer_type(tl.int32)), length)
        if sequence >= batch:
            return
        first_text = tl.load(cu_text + sequence)
        num_rows = (tl.load(cu_text + sequence + 1) - first_text) * HEADS_PER_KV
    elif BLOCK_B == 1:
        sequence, first_text, num_rows = 0, 0, num_text * HEADS_PER_KV
    else:
        sequence, tile = sequence_of(tile, cu_text, batch, HEADS_PER_KV, BLOCK_M, BLOCK_B)
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
    last_slow = tl.load(cu_slow + sequence + 1)
    if (slow_begin is None and slow_end is None) and slow_pieces is None:
        # Blocks are dealt out evenly; the masked block is always the last one of the last split.
        num_slow = last_slow - first_slow
        if not DEAL:
            first_block, last_block = share_of(split, num_splits, tl.cdiv(num_slow, BLOCK_N))
        lo, hi = first_block * BLOCK_N, tl.minimum(last_block * BLOCK_N, num_slow)
        if DEAL:
            hi = uniform(hi)
        first_token = (first_slow + lo).to(tl.int64)
    else:
        begin, end = None, None
        if slow_begin is not None or slow_end is not None:
            num_slow = last_slow - first_slow
            if slow_pieces is not None:
                num_slow = count_tokens(slow_pieces, first_slow, last_slow, SCAN)
            begin, end = visible_rows(slow_begin, slow_end, text, is_row, num_slow)
        first_block, last_block = visible_share(
            begin, end, first_slow, last_slow, slow_pieces, split, num_splits, BLOCK_N, SPLIT, SCAN
        )
        if first_block >= last_block:
            _store_nothing(
                out, lse, partials, text, head, is_row, split, num_text, num_partials, num_q_heads,
                D, BLOCK_D, SPLIT, WRITE_EMPTY,
            )  # fmt: skip
            return
        lo, hi, first_token = 0, 0, 0
    keys += first_token * K_STRIDE + kv_head.to(tl.int64) * k_head_stride
    if values is None:
        values = keys + value_offset
    else:
        values += first_token * V_STRIDE + kv_head.to(tl.int64) * v_head_stride
    if PREFETCH and lo < hi:  # the loop's first loads wait until q is here, two dependent reads from now
        _prefetch(keys, hi - lo, K_STRIDE, D, 2 * BLOCK_N)
        _prefetch(values, hi - lo, V_STRIDE, D, 2 * BLOCK_N)
    token = tl.arange(0, BLOCK_N)
    k_token, v_token = token, token
    if K_STRIDE * BLOCK_N >= 2**31:
        k_token = token.to(tl.int64)
    if V_STRIDE * BLOCK_N >= 2**31:
        v_token = token.to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    k_tile = k_token[:, None] * K_STRIDE + cols[None, :]
    v_tile = v_token[:, None] * V_STRIDE + cols[None, :]

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
    if (slow_begin is not None or slow_end is not None) or slow_pieces is not None:
        acc, total, top = visit_visible(
            acc, total, top, query, None, keys, values, k_tile, v_tile, is_col, scale, begin, end,
            first_slow, last_slow, slow_pieces, first_block, last_block,
            K_STRIDE, V_STRIDE, BLOCK_N, MASK_COLS, SPLIT, PEEL, SCAN, CHUNK,
        )  # fmt: skip
        if end is not None:  # blocks without masks were multiplied for rows that see nothing too
            acc = tl.where((end > 0)[:, None], acc, 0.0)
            total = tl.where(end > 0, total, 0.0)
    elif PEEL:
        # Tensor cores are the limit: keep masks out of the loop.
        full = lo + (hi - lo) // BLOCK_N * BLOCK_N
        for _ in tl.range(lo, full, BLOCK_N):
            acc, total, top = attend_block(
                acc, total, top, query, keys, values, k_tile, v_tile, BLOCK_N, is_col, scale, None, None, None,
                BLOCK_N, False, MASK_COLS,
            )  # fmt: skip
            keys += K_STRIDE * BLOCK_N
            values += V_STRIDE * BLOCK_N
        for _ in tl.range(full, hi, BLOCK_N):
            acc, total, top = attend_block(
                acc, total, top, query, keys, values, k_tile, v_tile, hi - full, is_col, scale, None, None, None,
                BLOCK_N, True, MASK_COLS,
            )  # fmt: skip
    else:
        # Loads are the limit: masks are free, and a tail outside the pipelined loop would wait for memory alone.
        for start in tl.range(lo, hi, BLOCK_N):
            acc, total, top = attend_block(
                acc, total, top, query, keys, values, k_tile, v_tile, hi - start, is_col, scale, None, None, None,
                BLOCK_N, True, MASK_COLS,
            )  # fmt: skip
            keys += K_STRIDE * BLOCK_N
            values += V_STRIDE * BLOCK_N

    # total == 0 only where no slow token was seen; a NaN must stay one.
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    lse2 = tl.where(empty, float("-inf"), top + tl.log2(total))
    out_row = text.to(tl.int64) * num_q_heads + head
    if SPLIT:
        partial = out_row + split.to(tl.int64) * num_text * num_q_heads
        if DEAL:
            in_slot = slot.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            partial = tl.where(length > 0, in_slot, partial)
        _store_partial(partials, num_partials, partial, acc, lse2, is_row, D, BLOCK_D)
    elif DEAL:
        if slot >= 0:
            in_slot = slot.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            _store_partial(partials, num_partials, in_slot, acc, lse2, is_row, D, BLOCK_D)
        else:
            _store_context(out, lse, out_row, acc, lse2, is_row, D, BLOCK_D)
    else:
        _store_context(out, lse, out_row, acc, lse2, is_row, D, BLOCK_D)


_NO_GATE = Gate("none", None, None, None, False, None)


class Attention:
    """The launches of calls alike: tiles, splits and what kernels are compiled for. There is at least one text row.

    ``gate``: of the fused op, whose ``sample`` has a state: ``attend_and_mix`` is called, else ``attend``. ``config``
    overrides the heuristics, for tuning, and with it ``deal``.
    """

    def __init__(
        self,
        sample: AttentionTensors | FusedTensors,
        softmax_scale: float | None = None,
        num_splits: int = 0,
        gate: Gate | None = None,
        config: AttentionConfig | None = None,
        deal: DealConfig | None = None,
    ):
        q, slow_kv, pieces = sample.q, sample.slow_kv, sample.slow_pieces
        (_, num_q_heads, head_dim), (num_slow, num_kv_heads) = q.shape, slow_kv.shape[:2]
        k_stride = v_stride = slow_kv.stride()
        value_offset = k_stride[2]
        if sample.slow_values is not None:
            v_stride, value_offset = sample.slow_values.stride(), 0
        num_text, batch = sample.text_rows.shape[0], sample.cu_text.shape[0] - 1
        if pieces is not None:  # each sequence may have all tokens
            num_slow *= batch
        scan, chunk = triton_pieces_config(0 if pieces is None else pieces.shape[0])
        heads_per_kv = num_q_heads // num_kv_heads
        device = describe(q.device)
        selects = sample.selects
        self.num_text, self.num_q_heads, self.head_dim = num_text, num_q_heads, head_dim
        if config is None:
            config = triton_attention_config(
                num_text, num_slow, batch, num_q_heads, num_kv_heads, head_dim, q.element_size(),
                device.num_sms, num_splits, device.shared_bytes,
            )  # fmt: skip
            if num_splits == 0 and not selects:
                deal = triton_deal_config(config, num_text, num_slow, batch, num_q_heads, num_kv_heads, device.num_sms)
        self.config, self.deal = config, deal
        self.is_split = config.num_splits > 1
        self.combine = triton_combine_config(
            num_text, num_q_heads, head_dim, config.num_splits, device.num_sms, device.dependent_launch
        )
        num_tiles = config.num_tiles(num_text, batch, heads_per_kv)
        self.grid = (num_tiles, num_kv_heads, config.num_splits)
        self.num_partials = num_text * num_q_heads * config.num_splits if self.is_split else 0  # workspace rows
        deal_numbers = (0, 0, 0, 0)
        if deal is not None:
            self.grid = (deal.num_programs,)
            self.num_partials = max(self.num_partials, deal.max_parts * config.block_m)
            deal_numbers = (num_tiles, deal.even_tiles, deal.num_slots, deal.max_parts)
        scale = scale_of(q, softmax_scale)
        self.numbers = (
            num_text, batch, config.num_splits, self.num_partials, *deal_numbers, q.stride(0), q.stride(1),
            k_stride[1], v_stride[1], value_offset, scale,
        )  # fmt: skip
        self.may_be_empty = selects or batch > 1 or num_slow == 0  # rows without a slow token
        # The launch after this one may start early: it waits for this one's results by itself.
        combines = self.is_split or deal is not None
        dependent = self.combine.dependent if combines else gate is not None and device.dependent_launch
        in_batch = {
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_B": next_power_of_2(batch),
            "DEAL_HEADS": 0 if deal is None else num_kv_heads,
        }  # fmt: skip
        constants = {
            "K_STRIDE": k_stride[0], "V_STRIDE": v_stride[0], "NEGATIVE": scale < 0, "HEADS_PER_KV": heads_per_kv,
            "D": head_dim, "BLOCK_D": padded_head_dim(head_dim), **in_batch,
            "SPLIT": self.is_split, "PEEL": config.peel_tail, "PDL": dependent,
            "PREFETCH": device.prefetch and not (selects or config.peel_tail), "SCAN": scan, "CHUNK": chunk,
            "WRITE_EMPTY": gate is None and not self.is_split,  # else who reads the context looks at lse first
            "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True,
        }  # fmt: skip
        self.first = Launch(_attention, self.grid, constants)
        state_stride = None if gate is None else sample.state.stride(0)
        if combines:
            gate_here = gate if gate is not None and self.is_split else _NO_GATE
            self.second = combine_launch(
                self.combine, num_text, num_q_heads, head_dim, gate_here,
                sparse=selects, direct=not self.is_split, in_batch=in_batch,
            )  # fmt: skip
            self.second_numbers = (
                num_text, batch, config.num_splits, self.num_partials, state_stride if self.is_split else None,
            )  # fmt: skip
        if gate is not None and not self.is_split:
            channels = num_q_heads * head_dim
            self.mix = mix_launch(num_text, channels, gate, dependent)
            self.mix_numbers = (state_stride, channels, num_q_heads if self.may_be_empty else 0)

    def describe(self) -> CallPlan:
        """The workspace is what ``_workspace`` makes."""
        tiles, notes = asdict(self.config), ()
        if self.is_split or self.deal is not None:
            tiles |= {f"combine_{name}": value for name, value in asdict(self.combine).items()}
        if self.deal is not None:
            notes = ("where lengths are uneven, the device deals out blocks instead",)
        return CallPlan(
            tiles=tiles, num_splits=self.config.num_splits, grid=self.grid,
            workspace_bytes=4 * self._workspace_words(), notes=notes,
        )  # fmt: skip

    def describe_with_mix(self, dtype: torch.dtype) -> CallPlan:
        """Without splits the context, and if some may be empty their lse, lie in memory between the two launches."""
        plan = self.describe()
        if self.is_split:
            return plan
        head_bytes = self.head_dim * dtype.itemsize + (4 if self.may_be_empty else 0)
        context_bytes = self.num_text * self.num_q_heads * head_bytes
        return replace(plan, workspace_bytes=plan.workspace_bytes + context_bytes)

    def attend(self, tensors: AttentionTensors | FusedTensors, context: Tensor, lse: Tensor | None) -> None:
        """Into ``context`` [Nt, Hq, D] and ``lse`` [Nt, Hq]."""
        partials = self._workspace(tensors)
        self._attend(tensors, None if self.is_split else context, None if self.is_split else lse, partials)
        if partials is not None:
            self._combine(tensors, partials, context, lse)

    def attend_and_mix(self, tensors: FusedTensors, gate: Gate) -> Tensor:
        """The fused op's result, in two launches; one more where rows that are no text rows must be copied, and one
        where tiles may be in parts and the context not."""
        state, q = tensors.state, tensors.q
        out = copied_or_empty(state, self.num_text)
        if self.is_split:
            partials = self._workspace(tensors)
            self._attend(tensors, None, None, partials)
            self._combine(tensors, partials, out, None, state, tensors.text_rows, gate)
            return out
        context = torch.empty((self.num_text, *q.shape[1:]), dtype=q.dtype, device=q.device)
        lse = None
        if self.may_be_empty:
            lse = torch.empty(context.shape[:2], dtype=torch.float32, device=q.device)
        self.attend(tensors, context, lse)
        self.mix((state, context, tensors.text_rows, out, *gate.read_tensors, lse), self.mix_numbers)
        return out

    def _attend(
        self, tensors: AttentionTensors | FusedTensors, out: Tensor | None, lse: Tensor | None, partials: Tensor | None
    ) -> None:
        arguments = (
            tensors.q, tensors.slow_kv, tensors.slow_values, tensors.cu_slow, tensors.text_rows, tensors.cu_text,
            tensors.slow_begin, tensors.slow_end, tensors.slow_pieces, out, lse, partials,
        )  # fmt: skip
        self.first(arguments, self.numbers)

    def _workspace_words(self) -> int:
        """Parts and their lse; and the length that the device gave them."""
        return self.num_partials * (self.head_dim + 1) + (self.deal is not None)

    def _workspace(self, tensors: AttentionTensors | FusedTensors) -> Tensor | None:
        words = self._workspace_words()
        return torch.empty(words, dtype=torch.float32, device=tensors.q.device) if words else None

    def _combine(
        self, tensors: AttentionTensors | FusedTensors, partials: Tensor, out: Tensor, lse: Tensor | None,
        state: Tensor | None = None, text_rows: Tensor | None = None, gate: Gate = _NO_GATE,
    ) -> None:  # fmt: skip
        cu = (None, None) if self.deal is None else (tensors.cu_text, tensors.cu_slow)
        self.second((partials, *cu, out, lse, state, text_rows, *gate.read_tensors), self.second_numbers)


def prepare_text_cross_attention(sample: AttentionTensors, options: AttentionOptions) -> Callable:
    """A function of tensors alike: context [Nt, Hq, D] and, if asked, lse [Nt, Hq] float32."""
    shape = (sample.text_rows.shape[0], *sample.q.shape[1:])
    attention = Attention(sample, options.softmax_scale, options.num_splits) if shape[0] else None

    @described(nothing_to_attend if attention is None else attention.describe)
    @on_device_of
    def run(tensors: AttentionTensors, addresses: bytes | None = None) -> tuple[Tensor, Tensor | None]:
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

        @described(nothing_to_attend)
        @on_device_of
        def copied(tensors: FusedTensors, addresses: bytes | None = None) -> Tensor:
            return copied_or_empty(tensors.state, 0)

        return copied
    gate, dtype = sample.gate(options), sample.q.dtype
    attention = Attention(sample, options.softmax_scale, options.num_splits, gate)

    @described(lambda: attention.describe_with_mix(dtype))
    @on_device_of
    def run(tensors: FusedTensors, addresses: bytes | None = None) -> Tensor:
        return attention.attend_and_mix(tensors, tensors.gate(options))

    return run
