"""The pass that owns slow tokens: dK and dV of BLOCK_N tokens of a KV head, added up in registers and written once.

So no sum needs an atomic, tokens that nobody sees get their zeros on the way, and tokens that several sequences read,
or one twice, are rounded once. Where every row sees its whole sequence, a program owns tokens of one sequence. With
ranges or pieces it owns tokens as they lie in memory and walks what reads them, in the order of sequences and pieces, a
layer at a time: each token of the block has at most one number in one sequence, or -1, and a step of packed rows is
passed over, multiplied with masks, or multiplied without.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._block import load_tile
from ._common import gdc_wait
from ._tiles import rows_in_tiles, sequence_of, uniform
from ._visible import NEVER, count_tokens, load_pieces


@triton.jit
def _add_rows(
    dk, dv, k, v, queries, grads, lse2, delta, first_queries, first_grads, step, scale,
    number, begin, end,  # of tokens in their sequence, or -1; what each packed row sees, or None: all
    STEP: tl.constexpr, BLOCK_D: tl.constexpr, MASK: tl.constexpr, WITH_K: tl.constexpr, WITH_V: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """``dk``, before it is scaled, and ``dv``, times 2^SHIFT, with what STEP packed rows add to them.

    Rows that see nothing have lse2 inf. Scores are transposed: a token's row of them holds what only it is made of, so
    that poison in a token stays there.
    """
    row = step * STEP + tl.arange(0, STEP)
    if first_queries is not None:
        q = queries.load([first_queries + step * STEP, 0])
    else:
        element = tl.arange(0, STEP)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
        first = tl.cast(step * STEP, tl.int64) * BLOCK_D
        q = tl.load(queries + first + element)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    if first_grads is not None:
        grad = grads.load([first_grads + step * STEP, 0])
    else:
        grad = tl.load(grads + first + element)
    if WITH_K:
        grad_p = tl.dot(v, tl.trans(grad), input_precision="ieee")
    p = tl.exp2(scores * scale - (tl.load(lse2 + row) - SHIFT)[None, :])
    if MASK:
        seen = (number >= 0)[:, None]
        if begin is not None:
            seen = (number[:, None] >= tl.load(begin + row)[None, :]) & (number[:, None] < tl.load(end + row)[None, :])
        p = tl.where(seen, p, 0.0)
    if WITH_V:
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision="ieee")
    if WITH_K:
        unit: tl.constexpr = 0.5**SHIFT
        grad_scores = p * (grad_p * unit - (tl.load(delta + row) * unit)[None, :])
        if MASK:
            grad_scores = tl.where(seen, grad_scores, 0.0)
        dk = tl.dot(grad_scores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _pick(chosen, numbers, i):
    """The i-th of ``numbers`` that are ``chosen``."""
    upto = tl.cumsum(chosen.to(tl.int32), 0)
    return tl.sum(tl.where(chosen & (upto == i + 1), numbers, 0), 0)


@triton.jit
def _add_layer(
    dk, dv, k, v, queries, grads, lse2, delta, first_queries, first_grads, scale, number,
    bounds,  # of rows and steps (``_store_bounds``), or None: rows see all of their sequence
    first_step, last_step, num_packed,
    STEP: tl.constexpr, BLOCK_D: tl.constexpr, WITH_K: tl.constexpr, WITH_V: tl.constexpr,
    SHIFT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What all rows of one sequence add to tokens that have these numbers in it."""
    low, high = tl.min(tl.where(number >= 0, number, NEVER), 0), tl.max(number, 0)
    is_full = tl.min(number, 0) >= 0
    if bounds is None:
        end_of_plain = tl.where(is_full, last_step, first_step)
        for step in tl.range(first_step, end_of_plain):
            dk, dv = _add_rows(
                dk, dv, k, v, queries, grads, lse2, delta, first_queries, first_grads, step, scale, number, None, None,
                STEP, BLOCK_D, False, WITH_K, WITH_V, SHIFT,
            )  # fmt: skip
        for step in tl.range(end_of_plain, last_step):
            dk, dv = _add_rows(
                dk, dv, k, v, queries, grads, lse2, delta, first_queries, first_grads, step, scale, number, None, None,
                STEP, BLOCK_D, True, WITH_K, WITH_V, SHIFT,
            )  # fmt: skip
    else:
        begin, end = bounds, bounds + num_packed
        of_steps = end + num_packed
        for first in tl.range(first_step, last_step, CHUNK):
            step = first + tl.arange(0, CHUNK)
            is_step = step < last_step
            # The first and last token that some row sees; those between which every row that sees anything sees all.
            outer_low = tl.load(of_steps + 4 * step, mask=is_step, other=NEVER)
            outer_high = tl.load(of_steps + 4 * step + 1, mask=is_step, other=0)
            inner_low = tl.load(of_steps + 4 * step + 2, mask=is_step, other=NEVER)
            inner_high = tl.load(of_steps + 4 * step + 3, mask=is_step, other=0)
            is_seen = (outer_low <= high) & (outer_high > low)
            is_plain = is_seen & is_full & (inner_low <= low) & (inner_high > high)
            is_masked = is_seen & (is_plain == 0)
            for i in tl.range(0, tl.sum(is_plain.to(tl.int32), 0)):
                dk, dv = _add_rows(
                    dk, dv, k, v, queries, grads, lse2, delta, first_queries, first_grads, _pick(is_plain, step, i),
                    scale, number, None, None, STEP, BLOCK_D, False, WITH_K, WITH_V, SHIFT,
                )  # fmt: skip
            for i in tl.range(0, tl.sum(is_masked.to(tl.int32), 0)):
                dk, dv = _add_rows(
                    dk, dv, k, v, queries, grads, lse2, delta, first_queries, first_grads, _pick(is_masked, step, i),
                    scale, number, begin, end, STEP, BLOCK_D, True, WITH_K, WITH_V, SHIFT,
                )  # fmt: skip
    return dk, dv


@triton.jit
def _next_use(slow_pieces, piece, last_piece, first_token, last_token, SCAN: tl.constexpr):
    """(the first piece from ``piece`` on with tokens of the block, tokens of those before it); ``last_piece``: none."""
    found = last_piece
    before = 0
    while piece < found:
        candidate = piece + tl.arange(0, SCAN)
        start, tokens = load_pieces(slow_pieces, candidate, last_piece)
        is_use = (tokens > 0) & (start < last_token) & (start + tokens > first_token)
        found = tl.minimum(found, uniform(tl.min(tl.where(is_use, candidate, NEVER), 0)))
        before += tl.sum(tl.where(candidate < found, tokens, 0), 0)
        piece += SCAN
    return found, before


@triton.jit
def _is_in_piece(token, slow_pieces, piece, last_piece):
    """(whether tokens lie in the piece, where it starts); none past the last."""
    start = tl.load(slow_pieces + 2 * piece, mask=piece < last_piece, other=0)
    stop = tl.load(slow_pieces + 2 * piece + 1, mask=piece < last_piece, other=0)
    return (token >= start) & (token < stop), start


@triton.jit
def _sequences_of(first_token, last_token, cu_slow, batch, BLOCK_B: tl.constexpr):
    """(first, last) of the sequences that a run of tokens may hold tokens of."""
    b = tl.arange(0, BLOCK_B)
    ended = tl.load(cu_slow + b + 1, mask=b < batch, other=NEVER) <= first_token
    begun = tl.load(cu_slow + b, mask=b < batch, other=NEVER) < last_token
    return uniform(tl.sum(ended.to(tl.int32), 0)), uniform(tl.sum(begun.to(tl.int32), 0))


@triton.jit
def _next_layer(
    token, first_token, last_token, slow_pieces, piece, cu_slow, batch,
    BLOCK_B: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """(numbers of tokens in the sequence that ``piece`` is of, that sequence, the first piece that is not among them).

    From ``piece`` on, pieces of the sequence that hold tokens, until one holds a token for the second time.
    """
    b = tl.arange(0, BLOCK_B)
    passed = tl.load(cu_slow + b + 1, mask=b < batch, other=NEVER) <= piece
    sequence = uniform(tl.sum(passed.to(tl.int32), 0))
    stop = tl.load(cu_slow + sequence + 1)
    before = count_tokens(slow_pieces, tl.load(cu_slow + sequence), piece, SCAN)
    number = tl.full(token.shape, -1, tl.int32)
    is_free = True
    while is_free:
        is_mine, start = _is_in_piece(token, slow_pieces, piece, stop)
        number = tl.where(is_mine, token - start + before, number)
        following, tokens = _next_use(slow_pieces, piece + 1, stop, first_token, last_token, SCAN)
        before += count_tokens(slow_pieces, piece, piece + 1, SCAN) + tokens
        is_again, _ = _is_in_piece(token, slow_pieces, following, stop)
        is_free = (following < stop) & (uniform(tl.max((is_again & (number >= 0)).to(tl.int32), 0)) == 0)
        piece = following
    return number, sequence, piece


@triton.jit
def _store(grads, dx, first_token, is_token, is_col, factor, STRIDE: tl.constexpr):
    """``grads`` is at the head's token 0."""
    token, col = tl.arange(0, dx.shape[0]), tl.arange(0, dx.shape[1])
    ptrs = grads + first_token.to(tl.int64) * STRIDE + (token[:, None] * STRIDE + col[None, :])
    tl.store(ptrs, (dx * factor).to(grads.dtype.element_ty), mask=is_token[:, None] & is_col[None, :])


@triton.jit
def _clear_free(
    grads, block, cu_slow, batch, num_slow, is_col, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE: tl.constexpr
):
    """Zeros for the ``block``-th BLOCK_N of the tokens that no sequence has: before the first one, behind the last."""
    first_owned, last_owned = tl.load(cu_slow), tl.load(cu_slow + batch)
    token = block * BLOCK_N + tl.arange(0, BLOCK_N)
    token += tl.where(token < first_owned, 0, last_owned - first_owned)
    ptrs = grads + token.to(tl.int64)[:, None] * STRIDE + tl.arange(0, BLOCK_D)[None, :]
    tl.store(ptrs, 0.0, mask=(token < num_slow)[:, None] & is_col[None, :])


@triton.jit
def _load_tokens(x, first_token, is_token, is_col, STRIDE: tl.constexpr, MASK_COLS: tl.constexpr):
    token, col = tl.arange(0, is_token.shape[0]), tl.arange(0, is_col.shape[0])
    ptrs = x + (first_token + token).to(tl.int64)[:, None] * STRIDE + col[None, :]
    return load_tile(ptrs, is_token, is_col, True, MASK_COLS)


@triton.jit
def sequence_program(
    block, queries, grads, lse2, delta,  # of the head's packed rows
    first_queries, first_grads,  # None; or ``queries`` and ``grads`` are descriptors, where the head's rows begin there
    keys, values, cu_slow, cu_text, grad_keys, grad_values,  # the head's token 0
    num_slow, num_text, batch, softmax_scale, scale,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, GRAD_STRIDE: tl.constexpr,
    HEADS_PER_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STEP: tl.constexpr, BLOCK_B: tl.constexpr, WITH_K: tl.constexpr, WITH_V: tl.constexpr, SHIFT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Blocks of sequences that see all of their tokens; those that the grid's upper bound adds are of free tokens."""
    sequence, block = sequence_of(block, cu_slow, batch, 1, BLOCK_N, BLOCK_B)
    sequence, block = uniform(sequence), uniform(block)
    col = tl.arange(0, BLOCK_D)
    is_col = col < D
    if sequence >= batch:
        if WITH_K:
            _clear_free(grad_keys, block, cu_slow, batch, num_slow, is_col, BLOCK_N, BLOCK_D, GRAD_STRIDE)
        if WITH_V:
            _clear_free(grad_values, block, cu_slow, batch, num_slow, is_col, BLOCK_N, BLOCK_D, GRAD_STRIDE)
    else:
        first_token = tl.load(cu_slow + sequence) + block * BLOCK_N
        is_token = first_token + tl.arange(0, BLOCK_N) < tl.load(cu_slow + sequence + 1)
        first_row, last_row = 0, num_text * HEADS_PER_KV
        if BLOCK_B > 1:
            first_row, last_row = rows_in_tiles(sequence, cu_text, batch, HEADS_PER_KV, BLOCK_M, BLOCK_B)
        k = _load_tokens(keys, first_token, is_token, is_col, K_STRIDE, D != BLOCK_D)
        v = k
        if WITH_K:
            v = _load_tokens(values, first_token, is_token, is_col, V_STRIDE, D != BLOCK_D)
        if PDL:  # K and V are not from the launch before
            gdc_wait()
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for step in tl.range(first_row // STEP, tl.cdiv(last_row, STEP)):
            dk, dv = _add_rows(
                dk, dv, k, v, queries, grads, lse2, delta, first_queries, first_grads, step, scale,
                None, None, None, STEP, BLOCK_D, False, WITH_K, WITH_V, SHIFT,
            )  # fmt: skip
        if WITH_K:
            _store(grad_keys, dk, first_token, is_token, is_col, softmax_scale, GRAD_STRIDE)
        if WITH_V:
            _store(grad_values, dv, first_token, is_token, is_col, 0.5**SHIFT, GRAD_STRIDE)


@triton.jit
def selected_program(
    block, queries, grads, lse2, delta, first_queries, first_grads,  # as above
    bounds,  # as ``_add_layer`` has them
    keys, values, cu_slow, cu_text, slow_pieces, grad_keys, grad_values,
    num_slow,
    num_packed,  # rows of a head, with those that fill tiles
    batch, softmax_scale, scale,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, GRAD_STRIDE: tl.constexpr,
    HEADS_PER_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STEP: tl.constexpr, BLOCK_B: tl.constexpr, WITH_K: tl.constexpr, WITH_V: tl.constexpr, SHIFT: tl.constexpr,
    SCAN: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Blocks of tokens as they lie in memory, which rows may see in part, several times, or not at all."""
    first_token = block * BLOCK_N
    last_token = first_token + BLOCK_N
    token = first_token + tl.arange(0, BLOCK_N)
    is_token = token < num_slow
    is_col = tl.arange(0, BLOCK_D) < D
    k = _load_tokens(keys, first_token, is_token, is_col, K_STRIDE, D != BLOCK_D)
    v = k
    if WITH_K:
        v = _load_tokens(values, first_token, is_token, is_col, V_STRIDE, D != BLOCK_D)
    if PDL:
        gdc_wait()
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if slow_pieces is None:
        first_sequence, last_sequence = _sequences_of(first_token, last_token, cu_slow, batch, BLOCK_B)
        for sequence in tl.range(first_sequence, last_sequence):
            start = tl.load(cu_slow + sequence)
            is_mine = (token >= start) & (token < tl.load(cu_slow + sequence + 1))
            number = tl.where(is_mine, token - start, -1)
            first_row, last_row = rows_in_tiles(sequence, cu_text, batch, HEADS_PER_KV, BLOCK_M, BLOCK_B)
            dk, dv = _add_layer(
                dk, dv, k, v, queries, grads, lse2, delta, first_queries, first_grads, scale, number, bounds,
                first_row // STEP, tl.cdiv(last_row, STEP), num_packed,
                STEP, BLOCK_D, WITH_K, WITH_V, SHIFT, CHUNK,
            )  # fmt: skip
    else:
        last_piece = tl.load(cu_slow + batch)
        piece, _ = _next_use(slow_pieces, tl.load(cu_slow), last_piece, first_token, last_token, SCAN)
        while piece < last_piece:
            number, sequence, piece = _next_layer(
                token, first_token, last_token, slow_pieces, piece, cu_slow, batch, BLOCK_B, SCAN
            )
            first_row, last_row = rows_in_tiles(sequence, cu_text, batch, HEADS_PER_KV, BLOCK_M, BLOCK_B)
            dk, dv = _add_layer(
                dk, dv, k, v, queries, grads, lse2, delta, first_queries, first_grads, scale, number, bounds,
                first_row // STEP, tl.cdiv(last_row, STEP), num_packed,
                STEP, BLOCK_D, WITH_K, WITH_V, SHIFT, CHUNK,
            )  # fmt: skip
            piece, _ = _next_use(slow_pieces, piece, last_piece, first_token, last_token, SCAN)
    if WITH_K:
        _store(grad_keys, dk, first_token, is_token, is_col, softmax_scale, GRAD_STRIDE)
    if WITH_V:
        _store(grad_values, dv, first_token, is_token, is_col, 0.5**SHIFT, GRAD_STRIDE)
