"""Which blocks of slow tokens a tile of the attention kernel visits, where rows see ranges or sequences are in pieces.

Row i sees tokens begin[i] <= j < end[i] of its sequence, counted along its pieces. What the rows of a tile see together
falls into segments, runs of tokens without a hole; tokens between segments are never read. A segment is cut into
blocks, anew at the start of each piece, and blocks are numbered through: splits share the numbers out. A block that
every row sees whole needs no mask, and those of a run of tokens are neighbours (``_unmasked``), so that a tile's blocks
go through two loops, one without masks and one with. Both are plain loops over block numbers: in pieces a block finds
its own by comparing its number with those of CHUNK pieces in registers, and loads stay in flight across pieces.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._block import attend_block, differentiate_block

NEVER = tl.constexpr(2**31 - 1)  # past every token


@triton.jit
def visible_rows(slow_begin, slow_end, text, is_row, num_slow):
    """(begin, end) of each row, clamped to its sequence; a row that sees nothing has (NEVER, 0)."""
    begin = tl.zeros(text.shape, tl.int32)
    end = begin + num_slow
    if slow_begin is not None:
        begin = tl.maximum(tl.load(slow_begin + text, mask=is_row, other=0), 0)
    if slow_end is not None:
        end = tl.minimum(tl.load(slow_end + text, mask=is_row, other=0), num_slow)
    sees = is_row & (begin < end)
    return tl.where(sees, begin, NEVER), tl.where(sees, end, 0)


@triton.jit
def _next_segment(position, begin, end):
    """The first segment from ``position`` on, which no segment crosses; some row sees a token there or later."""
    low = tl.min(tl.where(end > position, begin, NEVER), 0)
    high = tl.max(tl.where(begin <= low, end, 0), 0)
    farther = tl.max(tl.where(begin <= high, end, 0), 0)
    while farther > high:
        high = farther
        farther = tl.max(tl.where(begin <= high, end, 0), 0)
    return low, high


@triton.jit
def load_pieces(slow_pieces, piece, last_piece):
    """(first token in memory, tokens) of pieces; 0 tokens past the last piece."""
    is_piece = piece < last_piece
    start = tl.load(slow_pieces + 2 * piece, mask=is_piece, other=0)
    stop = tl.load(slow_pieces + 2 * piece + 1, mask=is_piece, other=0)
    return start, tl.maximum(stop - start, 0)


@triton.jit
def count_tokens(slow_pieces, first_piece, last_piece, SCAN: tl.constexpr):
    total = 0
    for first in tl.range(first_piece, last_piece, SCAN):
        _, tokens = load_pieces(slow_pieces, first + tl.arange(0, SCAN), last_piece)
        total += tl.sum(tokens, 0)
    return total


@triton.jit
def _in_segment(tokens_before, tokens, low, high):
    """Of each piece: (its first token within the segment, how many follow)."""
    ends = tokens_before + tl.cumsum(tokens, 0)
    starts = ends - tokens
    inside = tl.maximum(starts, low)
    return inside, tl.maximum(tl.minimum(ends, high) - inside, 0)


@triton.jit
def _count_blocks(slow_pieces, first_piece, last_piece, low, high, BLOCK_N: tl.constexpr, SCAN: tl.constexpr):
    """Blocks of the segment low .. high."""
    if slow_pieces is None:
        return tl.cdiv(high - low, BLOCK_N)
    else:
        blocks = 0
        tokens_before = 0
        for first in tl.range(first_piece, last_piece, SCAN):
            _, tokens = load_pieces(slow_pieces, first + tl.arange(0, SCAN), last_piece)
            _, count = _in_segment(tokens_before, tokens, low, high)
            blocks += tl.sum(tl.cdiv(count, BLOCK_N), 0)
            tokens_before += tl.sum(tokens, 0)
        return blocks


@triton.jit
def _find_block(slow_pieces, first_piece, last_piece, low, high, block, BLOCK_N: tl.constexpr, SCAN: tl.constexpr):
    """The piece that has the ``block``-th block of the segment, and the blocks and tokens before that piece."""
    piece = first_piece
    blocks_before, tokens_before = 0, 0
    blocks, seen = 0, 0
    for first in tl.range(first_piece, last_piece, SCAN):
        _, tokens = load_pieces(slow_pieces, first + tl.arange(0, SCAN), last_piece)
        _, count = _in_segment(seen, tokens, low, high)
        upto = blocks + tl.cumsum(tl.cdiv(count, BLOCK_N), 0)
        passed = upto <= block
        piece += tl.sum(passed.to(tl.int32), 0)
        blocks_before = tl.maximum(blocks_before, tl.max(tl.where(passed, upto, 0), 0))
        tokens_before = tl.maximum(tokens_before, tl.max(tl.where(passed, seen + tl.cumsum(tokens, 0), 0), 0))
        blocks = tl.max(upto, 0)
        seen += tl.sum(tokens, 0)
    return tl.minimum(piece, last_piece), blocks_before, tokens_before


@triton.jit
def _segment(position, begin, end):
    """The next segment; without ranges all tokens are one."""
    if begin is None:
        return 0, NEVER
    else:
        return _next_segment(position, begin, end)


@triton.jit
def _end_of(end):
    if end is None:
        return NEVER
    else:
        return tl.max(end, 0)


@triton.jit
def share_of(split, num_splits, num_blocks):
    """(first, last) of the blocks that a split gets; they are dealt out evenly."""
    share, extra = num_blocks // num_splits, num_blocks % num_splits
    first = split * share + tl.minimum(split, extra)
    return first, first + share + (split < extra).to(tl.int32)


@triton.jit
def visible_share(
    begin, end, first_slow, last_slow, slow_pieces, split, num_splits,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """(first, last) block of this split's; without splits (0, NEVER), or (0, 0) if no row sees anything."""
    stop = _end_of(end)
    if SPLIT:
        num_blocks = 0
        position = 0
        while position < stop:
            low, high = _segment(position, begin, end)
            num_blocks += _count_blocks(slow_pieces, first_slow, last_slow, low, high, BLOCK_N, SCAN)
            position = high
        return share_of(split, num_splits, num_blocks)
    else:
        return 0, tl.where(stop > 0, NEVER, 0)


@triton.jit
def _unmasked(
    low, count, first, last, inner_low, inner_high, BLOCK_N: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """Of blocks first .. last of ``count`` tokens from ``low`` on: those that hold tokens that every row sees alone.

    Every row sees inner_low .. inner_high. Without PEEL none: where loads are the limit masks cost nothing.
    """
    if PEEL:
        start = tl.cdiv(tl.maximum(inner_low - low, 0), BLOCK_N)
        # Not inner_high - low: of a constant (NEVER) less a tensor, Triton 3.8's interpreter makes no tensor.
        stop = tl.minimum(tl.maximum(-(low - inner_high), 0), count) // BLOCK_N
        start = tl.minimum(tl.maximum(start, first), last)
        return start, tl.maximum(tl.minimum(stop, last), start)
    else:
        return last, last


@triton.jit
def _visit_block(
    acc, total, top, q, grad, keys, values, k_tile, v_tile, tokens_left, cols, scale, first, begin, end,
    BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr,
):  # fmt: skip
    if grad is None:
        return attend_block(
            acc, total, top, q, keys, values, k_tile, v_tile, tokens_left, cols, scale, first, begin, end,
            BLOCK_N, MASK_ROWS, MASK_COLS,
        )  # fmt: skip
    else:
        acc = differentiate_block(
            acc, total, top, q, grad, keys, values, k_tile, v_tile, tokens_left, cols, scale, first, begin, end,
            BLOCK_N, MASK_ROWS, MASK_COLS,
        )  # fmt: skip
        return acc, total, top


@triton.jit
def visit_visible(
    acc, total, top,  # the online softmax's; with ``grad`` of dQ: what is added up, delta and lse in base 2
    q,
    grad,  # of the rows' context, or None: the forward pass
    keys, values, k_tile, v_tile, cols, scale,
    begin, end,  # of each row, as ``visible_rows`` gives them; None: every row sees all
    first_slow, last_slow,  # tokens, or pieces
    slow_pieces, first_block, last_block,
    K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, MASK_COLS: tl.constexpr,
    SPLIT: tl.constexpr, PEEL: tl.constexpr, SCAN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """All blocks first_block .. last_block of the tile; ``keys`` and ``values`` are at the head's token 0 in memory."""
    stop = _end_of(end)
    inner_low, inner_high = 0, NEVER
    if begin is not None:
        inner_low = tl.max(tl.where(end > 0, begin, 0), 0)
        inner_high = tl.min(tl.where(end > 0, end, NEVER), 0)
    position = 0
    done = 0  # blocks of the segments before
    while (position < stop) & (done < last_block):
        low, high = _segment(position, begin, end)
        if slow_pieces is None:
            count = high - low
            first = tl.minimum(tl.maximum(first_block - done, 0), tl.cdiv(count, BLOCK_N))
            last = tl.minimum(last_block - done, tl.cdiv(count, BLOCK_N))
            start, end_of_plain = _unmasked(low, count, first, last, inner_low, inner_high, BLOCK_N, PEEL)
            plain = end_of_plain - start
            if PEEL:
                for block in tl.range(start, end_of_plain):
                    at = (first_slow + low + block * BLOCK_N).to(tl.int64)
                    acc, total, top = _visit_block(
                        acc, total, top, q, grad, keys + at * K_STRIDE, values + at * V_STRIDE, k_tile, v_tile, BLOCK_N,
                        cols, scale, None, None, None, BLOCK_N, False, MASK_COLS,
                    )  # fmt: skip
            for i in tl.range(first, last - plain):
                offset = (i + tl.where(i >= start, plain, 0)) * BLOCK_N
                at = (first_slow + low + offset).to(tl.int64)
                acc, total, top = _visit_block(
                    acc, total, top, q, grad, keys + at * K_STRIDE, values + at * V_STRIDE, k_tile, v_tile,
                    count - offset, cols, scale, low + offset, begin, end, BLOCK_N, True, MASK_COLS,
                )  # fmt: skip
            done += tl.cdiv(count, BLOCK_N)
        else:
            piece, blocks, tokens_before = first_slow, 0, 0
            if SPLIT or begin is not None:
                piece, blocks, tokens_before = _find_block(
                    slow_pieces, first_slow, last_slow, low, high, tl.maximum(first_block - done, 0), BLOCK_N, SCAN
                )
            while (piece < last_slow) & (done + blocks < last_block):
                memory, tokens = load_pieces(slow_pieces, piece + tl.arange(0, CHUNK), last_slow)
                inside, count = _in_segment(tokens_before, tokens, low, high)
                memory += inside - (tokens_before + tl.cumsum(tokens, 0) - tokens)
                number = tl.cdiv(count, BLOCK_N)
                before = done + blocks + tl.cumsum(number, 0) - number
                first = tl.minimum(tl.maximum(first_block - before, 0), number)
                last = tl.minimum(tl.maximum(last_block - before, 0), number)
                start, end_of_plain = _unmasked(inside, count, first, last, inner_low, inner_high, BLOCK_N, PEEL)
                plain = end_of_plain - start
                if PEEL:
                    upto = tl.cumsum(plain, 0)
                    for i in tl.range(0, tl.sum(plain, 0)):
                        here = (i < upto) & (i >= upto - plain)
                        offset = (start + i - (upto - plain)) * BLOCK_N
                        at = tl.sum(tl.where(here, memory + offset, 0), 0).to(tl.int64)
                        acc, total, top = _visit_block(
                            acc, total, top, q, grad, keys + at * K_STRIDE, values + at * V_STRIDE, k_tile, v_tile,
                            BLOCK_N, cols, scale, None, None, None, BLOCK_N, False, MASK_COLS,
                        )  # fmt: skip
                masked = last - first - plain
                upto = tl.cumsum(masked, 0)
                for i in tl.range(0, tl.sum(masked, 0)):
                    here = (i < upto) & (i >= upto - masked)
                    block = first + i - (upto - masked)
                    offset = (block + tl.where(block >= start, plain, 0)) * BLOCK_N
                    at = tl.sum(tl.where(here, memory + offset, 0), 0).to(tl.int64)
                    left = tl.sum(tl.where(here, count - offset, 0), 0)
                    token = 0
                    if begin is not None:
                        token = tl.sum(tl.where(here, inside + offset, 0), 0)
                    acc, total, top = _visit_block(
                        acc, total, top, q, grad, keys + at * K_STRIDE, values + at * V_STRIDE, k_tile, v_tile, left,
                        cols, scale, token, begin, end, BLOCK_N, True, MASK_COLS,
                    )  # fmt: skip
                blocks += tl.sum(number, 0)
                tokens_before += tl.sum(tokens, 0)
                piece += CHUNK
            done += blocks
        position = high
    return acc, total, top
