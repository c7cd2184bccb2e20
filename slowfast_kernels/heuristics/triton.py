"""Tiles, splits, warps and stages of the Triton kernels, from tables that bench/tune_triton.py measures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, inf


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles of the Triton attention kernel. A packed row is a text row and one of the query heads of a KV head."""

    block_m: int
    block_n: int
    num_splits: int
    num_warps: int
    num_stages: int

    @property
    def peel_tail(self) -> bool:
        """Masks stay out of the loop where tensor cores are the limit; where loads are, they cost nothing."""
        return self.block_m >= 64

    def num_tiles(self, num_text: int, batch: int, heads_per_kv: int) -> int:
        """Row tiles over all sequences: a bound from shapes alone, exact for one sequence."""
        if batch == 1:
            return -(-num_text * heads_per_kv // self.block_m)
        filled = num_text * heads_per_kv // self.block_m + min(batch, num_text)  # and one partial tile a sequence
        return min(filled, num_text * -(-heads_per_kv // self.block_m))


@dataclass(frozen=True)
class AttentionBackwardConfig(AttentionConfig):
    """Of the Triton attention's backward: a program owns ``block_m`` packed rows, and one of ``num_splits`` parts of
    the slow tokens, or ``block_n`` slow tokens, and walks the others ``step`` at a time."""

    step: int = 64


@dataclass(frozen=True)
class CombineConfig:
    """A program adds up the splits of ``block_h`` heads of one text row, ``block_s`` splits at a time."""

    block_s: int
    block_h: int
    num_warps: int
    dependent: bool  # programmatic dependent launch behind the attention kernel


@dataclass(frozen=True)
class DealConfig:
    """Of a batch whose lengths may be uneven: what the device needs to cut its row tiles into parts of one length."""

    num_slots: int  # programs that run at once
    even_tiles: int  # row tiles, were all sequences alike
    num_programs: int  # of the grid: enough for the plan, and for any deal
    max_parts: int  # that the workspace holds


@dataclass(frozen=True)
class RowConfig:
    """A program holds a row of ``block_c`` channels."""

    block_c: int
    num_warps: int


@dataclass(frozen=True)
class RowSumConfig(RowConfig):
    """And takes rows one after the other, ``num_stages - 1`` of them under way, of which it keeps a sum."""

    num_programs: int
    num_stages: int


# (bytes an element, head dimension padded to a power of 2) -> (rows a sequence up to, (block_m, block_n, num_warps,
# num_stages)); the last entry serves everything longer. bench/tune_triton.py measures the alternatives.
_ATTENTION_TILES: dict[tuple[int, int], tuple[tuple[float, tuple[int, int, int, int]], ...]] = {
    (2, 64): ((1024, (64, 64, 4, 3)), (inf, (128, 64, 8, 3))),
    (2, 128): ((1024, (64, 64, 4, 3)), (inf, (128, 64, 8, 3))),
    (2, 256): ((16, (16, 32, 4, 3)), (64, (32, 32, 8, 3)), (inf, (128, 64, 8, 2))),
    (4, 64): ((inf, (16, 32, 4, 3)),),
    (4, 128): ((inf, (16, 32, 4, 3)),),
    (4, 256): ((inf, (16, 16, 4, 3)),),
}

_MAX_SPLITS = 128
_SPLIT_PENALTY = 0.04  # of the whole, for the partials of one more split


def _fewest_waves(programs: int, slots: int, most: int) -> int:
    """Splits of each of ``programs``, up to ``most``, that fill waves of ``slots`` best."""

    def share(splits: int) -> float:
        return -(-programs * splits // slots) / splits * (1 + _SPLIT_PENALTY * splits)

    return min(range(1, most + 1), key=share)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """``tl.dot`` wants a power of 2, 16 at least."""
    return max(16, next_power_of_2(head_dim))


def tile_shared_bytes(tile: tuple[int, int, int, int], block_d: int, dtype_bytes: int) -> int:
    block_m, block_n, _, num_stages = tile
    buffers = num_stages if block_m >= 64 else num_stages - 1  # wgmma reads K and V while the next ones arrive
    return (buffers * 2 * block_n + block_m) * block_d * dtype_bytes + block_m * block_n * dtype_bytes


def _attention_tile(rows: int, block_d: int, dtype_bytes: int, shared_bytes: int) -> tuple[int, int, int, int]:
    """The table's tile for a sequence of ``rows`` packed rows, made smaller until it fits the shared memory."""
    classes = _ATTENTION_TILES[dtype_bytes, max(64, block_d)]
    tile = next(tile for up_to, tile in classes if rows <= up_to)
    while tile_shared_bytes(tile, block_d, dtype_bytes) > shared_bytes:
        block_m, block_n, num_warps, num_stages = tile
        if num_stages > 2:
            tile = (block_m, block_n, num_warps, num_stages - 1)
        elif block_d > 128 and block_m > 32:  # below Hopper registers are short too: q is kept in them
            tile = (32, block_n, num_warps, num_stages)
        elif block_n > 16:
            tile = (block_m, block_n // 2, num_warps, num_stages)
        else:
            tile = (block_m // 2, block_n, 4, num_stages)
    return tile


def _slots(rows: int, num_warps: int, num_sms: int) -> int:
    """One program of 4 warps an SM streams at the memory's rate; where products rule, a second one fills its gaps."""
    return num_sms * (2 if rows > 16 and num_warps == 4 else 1)


@lru_cache(maxsize=4096)
def triton_attention_config(
    num_text: int,
    num_slow: int,
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype_bytes: int,
    num_sms: int,
    num_splits: int = 0,
    shared_bytes: int = 227 * 1024,
) -> AttentionConfig:
    """Tiles and splits of the Triton attention kernel for a batch of ``num_text`` rows over ``num_slow`` tokens.

    Lengths of single sequences are on the device, so an even batch is assumed. ``num_splits`` 0 chooses what fills the
    GPU's waves best; a fixed number fixes the tile too, so that a sequence's bits do not depend on its batch.
    """
    heads_per_kv, block_d = num_q_heads // num_kv_heads, padded_head_dim(head_dim)
    rows = -(-num_text // batch) * heads_per_kv
    tile = _attention_tile(64 if num_splits else rows, block_d, dtype_bytes, shared_bytes)
    block_m, block_n, num_warps, num_stages = tile
    if num_splits == 0:
        programs = batch * -(-rows // block_m) * num_kv_heads
        num_blocks = max(1, -(-num_slow // (batch * block_n)))
        slots = _slots(rows, num_warps, num_sms)
        num_splits = _fewest_waves(programs, slots, min(num_blocks, _MAX_SPLITS))
    return AttentionConfig(block_m, block_n, num_splits, num_warps, num_stages)


_MOST_DEALT = 1024  # sequences, all of whose lengths a program looks at
_WORTH_A_LAUNCH = 32  # blocks that one sequence may have, until parts are worth a launch that adds them up


@lru_cache(maxsize=4096)
def triton_deal_config(
    config: AttentionConfig,
    num_text: int,
    num_slow: int,
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    num_sms: int,
) -> DealConfig | None:
    """For the device to deal out the batch where it is uneven; None: ``config`` it is, whatever the lengths.

    A part is no shorter than an even share of a slot, unless that is what the longest sequence is cut into: so there
    are no more full parts than slots, each tile has a rest at most, and no more tiles than slots are cut.
    """
    if batch == 1 or batch > _MOST_DEALT:
        return None
    if config.num_splits == 1 and -(-num_slow // config.block_n) <= _WORTH_A_LAUNCH:
        return None
    heads_per_kv = num_q_heads // num_kv_heads
    rows = -(-num_text // batch) * heads_per_kv
    slots = _slots(rows, config.num_warps, num_sms)
    tiles = config.num_tiles(num_text, batch, heads_per_kv) * num_kv_heads
    return DealConfig(
        num_slots=slots,
        even_tiles=batch * -(-rows // config.block_m),
        num_programs=max(tiles * config.num_splits, tiles + slots),
        max_parts=slots + (slots if config.num_splits == 1 else tiles),  # alone, a tile that is not cut has no part
    )


# Of the backward, by bytes an element and padded head dimension: (block_m and block_n, num_warps, num_stages, step) of
# GPUs with Hopper's shared memory, and of others.
_HOPPER_SHARED_BYTES = 200 * 1024
_BACKWARD_TILES: dict[tuple[int, int], tuple[tuple[int, int, int, int], tuple[int, int, int, int]]] = {
    (2, 64): ((64, 4, 2, 64), (128, 8, 2, 64)),
    (2, 128): ((64, 4, 2, 64), (128, 8, 2, 32)),
    (2, 256): ((64, 8, 2, 32), (64, 8, 2, 16)),
    (4, 64): ((64, 8, 2, 16), (64, 8, 2, 16)),
    (4, 128): ((64, 8, 2, 16), (64, 8, 2, 16)),
    (4, 256): ((16, 4, 1, 16), (16, 4, 1, 16)),
}


@lru_cache(maxsize=4096)
def triton_attention_backward_config(
    num_text: int,
    num_slow: int,
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype_bytes: int,
    num_sms: int,
    shared_bytes: int = 227 * 1024,
    owns_tokens: bool = True,
) -> AttentionBackwardConfig:
    """Tiles and splits of the gradients of such a call; an even batch is assumed.

    ``owns_tokens``: dK or dV are wanted too. Their programs begin behind those of dQ, and fill what these leave idle:
    as few splits are enough as keep a program of dQ from outlasting all the rest.
    """
    heads_per_kv, block_d = num_q_heads // num_kv_heads, padded_head_dim(head_dim)
    rows = -(-num_text // batch) * heads_per_kv
    tiles = _BACKWARD_TILES[dtype_bytes, max(64, block_d)]
    block_n, num_warps, num_stages, step = tiles[0 if shared_bytes >= _HOPPER_SHARED_BYTES else 1]
    block_m = min(block_n, max(16, next_power_of_2(rows)))
    steps = max(1, -(-num_slow // (batch * step)))
    programs = batch * -(-rows // block_m) * num_kv_heads
    slots = num_sms * (2 if num_warps == 4 else 1)
    if owns_tokens:
        longest = 3 * block_m * steps  # products of a dQ program that has all slow tokens, over step and head dimension
        all_products = longest * programs + 4 * rows * steps * batch * num_kv_heads
        num_splits = max(1, ceil(longest * slots / all_products - 0.1))
    else:
        num_splits = _fewest_waves(programs, slots, max(1, slots // programs))
    return AttentionBackwardConfig(block_m, block_n, min(num_splits, steps), num_warps, num_stages, step)


@lru_cache(maxsize=4096)
def triton_combine_config(
    num_text: int, num_q_heads: int, head_dim: int, num_splits: int, num_sms: int, dependent: bool
) -> CombineConfig:
    """More heads a program save repeated gates; fewer fill the GPU where text rows are few.

    Of one split it adds up what an uneven batch has in parts. An even batch has none, and few programs are soon done.
    """
    most, programs_an_sm = (4, 2) if num_splits > 1 else (32, 16)
    block_s, block_d = min(next_power_of_2(num_splits), 64), padded_head_dim(head_dim)
    block_h = 1
    while block_h < most and num_text * -(-num_q_heads // (2 * block_h)) >= programs_an_sm * num_sms:
        block_h *= 2
    block_s = min(block_s, max(1, 16384 // (block_h * block_d)))
    return CombineConfig(block_s, block_h, 4 if block_s * block_h * block_d <= 8192 else 8, dependent)


def triton_parts_at_a_time(block_h: int, block_d: int) -> int:
    """Of an uneven batch, by a program of the combine kernel: a tile may have many where the plan has few."""
    return max(1, min(32, 4096 // (block_h * block_d)))


def triton_pieces_config(num_pieces: int) -> tuple[int, int]:
    """(pieces that a tile counts at a time, pieces whose blocks it walks in one loop: those that a warp holds)."""
    return 64 if num_pieces <= 64 else 1024, 32


def triton_row_config(channels: int) -> RowConfig:
    """For the pool and the mix: a program holds whole rows, because a norm or a gate needs them."""
    block_c = next_power_of_2(channels)
    return RowConfig(block_c, min(16, max(1, block_c // 512)))


def triton_mix_backward_config(
    num_text: int, channels: int, dtype_bytes: int, num_sms: int, shared_bytes: int = 227 * 1024
) -> RowSumConfig:
    """Every program leaves a row of sums, so there are no more of them than keep the memory busy.

    On an H100, 8192 rows of 3584: a program an SM with 4 stages 117 us, two with 2 stages 113; 1024: 19.5 and 22.0.
    """
    row = triton_row_config(channels)
    programs_an_sm, num_stages = (1, 4) if num_text < 16 * num_sms else (2, 2)
    row_bytes = 3 * row.block_c * dtype_bytes  # of gradient, state and context
    while num_stages > 1 and programs_an_sm * (num_stages - 1) * row_bytes + 1024 > shared_bytes:
        num_stages -= 1
    num_programs = max(1, min(num_text, programs_an_sm * num_sms))
    return RowSumConfig(row.block_c, row.num_warps, num_programs, num_stages)
