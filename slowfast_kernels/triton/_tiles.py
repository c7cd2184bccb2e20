"""Tiles of packed rows: which sequence a tile of the grid belongs to.

A packed row is a text row and one of the query heads of a KV head. The rows of a sequence fill tiles of BLOCK_M, the
last one partly, and the tiles of all sequences are numbered through. A grid is an upper bound from shapes alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def uniform(x):
    """The int32 scalar ``x``, which comes of a sum over a tensor, as a value that a warp's threads are known to share.

    A reduction of 32 elements is one instruction with such a result. A loop whose bounds are not known to be shared
    keeps its descriptors and counters in each thread's registers: 540 instructions instead of 380, and spills.
    """
    return tl.max(tl.zeros((32,), tl.int32) + x, 0)


@triton.jit
def lengths(cu, batch, BLOCK_B: tl.constexpr):
    b = tl.arange(0, BLOCK_B)
    begin = tl.load(cu + b, mask=b < batch, other=0)
    end = tl.load(cu + b + 1, mask=b < batch, other=0)
    return end - begin


@triton.jit
def tiles_of(cu_text, batch, HEADS_PER_KV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr):
    """Tiles of each sequence."""
    return tl.cdiv(lengths(cu_text, batch, BLOCK_B) * HEADS_PER_KV, BLOCK_M)


@triton.jit
def find_tile(tiles, tile):
    """(sequence, tile within it) of a grid tile, where sequences have ``tiles``; behind the last one past them all."""
    before = tl.cumsum(tiles, 0) <= tile
    return tl.sum(before.to(tl.int32), 0), tile - tl.sum(tl.where(before, tiles, 0), 0)


@triton.jit
def sequence_of(tile, cu_text, batch, HEADS_PER_KV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr):
    """(sequence, tile within it) of a grid tile; sequence == BLOCK_B for the tiles that the upper bound adds."""
    return find_tile(tiles_of(cu_text, batch, HEADS_PER_KV, BLOCK_M, BLOCK_B), tile)


@triton.jit
def rows_in_tiles(sequence, cu_text, batch, HEADS_PER_KV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr):
    """(first, last) packed row of a sequence, its first row being that of its first tile: ``sequence_of``'s inverse."""
    rows = lengths(cu_text, batch, BLOCK_B) * HEADS_PER_KV
    b = tl.arange(0, BLOCK_B)
    first = tl.sum(tl.where(b < sequence, tl.cdiv(rows, BLOCK_M), 0), 0) * BLOCK_M
    return uniform(first), uniform(first + tl.sum(tl.where(b == sequence, rows, 0), 0))


@triton.jit
def rows_of(tile, cu_text, num_text, batch, HEADS_PER_KV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr):
    """(sequence, its first text row, the tile's first packed row within it, its packed rows); the last is 0 for the
    tiles that the upper bound adds."""
    if BLOCK_B == 1:
        return 0, 0, tile * BLOCK_M, num_text * HEADS_PER_KV
    else:
        sequence, tile = sequence_of(tile, cu_text, batch, HEADS_PER_KV, BLOCK_M, BLOCK_B)
        sequence, tile = uniform(sequence), uniform(tile)
        is_sequence = sequence < batch
        first_text = tl.load(cu_text + sequence, mask=is_sequence, other=0)
        last_text = tl.load(cu_text + sequence + 1, mask=is_sequence, other=0)
        return sequence, first_text, tile * BLOCK_M, (last_text - first_text) * HEADS_PER_KV
