"""Uneven batches: which blocks of which row tile a program of the attention kernel works on, found on the device.

The host knows no lengths, so its plan cuts every sequence into ``num_splits`` parts alike. Each program looks at all
lengths. If they are as even as the plan takes them for, the plan holds. If not, all programs find the same length, in
blocks: a tile is cut into full parts of that length and a rest. Full parts come first, then rests, longer ones before
shorter ones, which fill what the full ones leave; the KV heads of a part are side by side. Of a sequence all tiles are
cut alike, so that its parts lie in the workspace [part, KV head, tile, row of the tile], behind those of the sequences
before it. ``_combine`` finds them by the length alone, which the first program leaves behind the partials.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._tiles import find_tile, lengths, tiles_of, uniform
from ._visible import share_of

_START = tl.constexpr(4.0)  # blocks that a program could do in the time that its start and its end take
_MAX_PARTS = tl.constexpr(128)  # of a tile
_TURNS = tl.constexpr(4)  # full parts, then rests of more than a half and a quarter of their length, then others


@triton.jit
def _weigh(
    cu_text, cu_slow, batch,
    HEADS_PER_KV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """(row tiles, blocks of each of them) of all sequences; those without a text row have no blocks."""
    tiles = tiles_of(cu_text, batch, HEADS_PER_KV, BLOCK_M, BLOCK_B)
    return tiles, tl.where(tiles > 0, tl.cdiv(lengths(cu_slow, batch, BLOCK_B), BLOCK_N), 0)


@triton.jit
def _are_even(tiles, blocks, even_tiles):
    """The plan's ``even_tiles`` tiles of the longest sequence would be as much work as there is, within an eighth."""
    work = tl.sum(tiles.to(tl.float32) * blocks.to(tl.float32), 0)
    longest = tl.max(blocks, 0).to(tl.float32)
    planned = longest * even_tiles
    return (longest <= _START) | ((8 * planned <= 9 * work) & (8 * work <= 9 * planned))


@triton.jit
def _cut(tiles, blocks, length):
    """(full parts of each tile, blocks of its rest, whether it has one); a tile without blocks has an empty rest."""
    full = blocks // length
    rest = blocks - full * length
    return full, rest, (tiles > 0) & ((rest > 0) | (full == 0))


@triton.jit
def _parts_kept(tiles, full, has_rest, KV_HEADS: tl.constexpr, DIRECT: tl.constexpr):
    """Parts of a sequence that the workspace holds; with DIRECT none of the tiles that are a part by themselves."""
    parts = full + has_rest.to(tl.int32)
    if DIRECT:
        parts = tl.where(parts > 1, parts, 0)
    return tiles * KV_HEADS * parts


@triton.jit
def _choose_length(
    tiles, blocks, num_slots, num_programs, max_parts, KV_HEADS: tl.constexpr, BLOCK_B: tl.constexpr,
    DIRECT: tl.constexpr,
):  # fmt: skip
    """Of some lengths the one whose time, in blocks of a program, a model likes best; of equals the longest.

    Candidates are fractions of the longest sequence, which alone always fits, and what a slot would get of an even
    deal, up to twice that.
    """
    COUNT: tl.constexpr = 32 if BLOCK_B <= 128 else 4096 // BLOCK_B
    FRACTIONS: tl.constexpr = COUNT // 4
    tiles, blocks = tiles[None, :], blocks[None, :]
    units = tiles * KV_HEADS  # that are cut alike
    work = tl.sum(tl.sum(units.to(tl.float32) * blocks.to(tl.float32), 1), 0)
    longest = tl.max(tl.max(blocks, 1), 0)
    i = tl.arange(0, COUNT)
    more = 1.0 + (i - FRACTIONS).to(tl.float32) / (COUNT - FRACTIONS)
    length = tl.where(i < FRACTIONS, tl.cdiv(longest, i + 1), (work / num_slots * more).to(tl.int32) + 1)
    length = tl.minimum(length, longest)

    full, rest, has_rest = _cut(tiles, blocks, length[:, None])
    num_full = tl.sum(units * full, 1)
    num_rests = tl.sum(tl.where(has_rest, units, 0), 1)
    kept = tl.sum(_parts_kept(tiles, full, has_rest, KV_HEADS, DIRECT), 1)
    fits = (num_full + num_rests <= num_programs) & (kept <= max_parts) & (tl.cdiv(longest, length) <= _MAX_PARTS)

    full_time = tl.where(num_full > 0, length + _START, 0.0)
    rest_time = tl.where(num_rests > 0, tl.max(rest, 1) + _START, 0.0)
    one_wave = tl.maximum(full_time, rest_time)
    rest_work = work - num_full.to(tl.float32) * length + num_rests * _START
    # Wave after wave, and then half a rest where nothing is left for the others.
    slots = num_slots.to(tl.float32)
    waves = tl.cdiv(num_full, num_slots)
    waves = tl.maximum(waves * full_time, (num_full * full_time + rest_work) / slots + 0.5 * rest_time)
    # Or, if a wave takes all full parts, rests in the slots that these leave.
    idle = tl.maximum(num_slots - num_full, 1).to(tl.float32)
    aside = rest_work / idle + 0.5 * rest_work / tl.maximum(num_rests, 1).to(tl.float32)
    aside = tl.maximum(one_wave, aside)
    time = tl.where((num_full < num_slots) & (num_rests > 0), tl.minimum(waves, aside), waves)
    time = tl.where(num_full + num_rests <= num_slots, one_wave, time)
    time = tl.where(fits, time, float("inf"))
    return tl.max(tl.where(time == tl.min(time, 0), length, 0), 0)


@triton.jit
def _dealt(
    program, length, tiles, blocks, KV_HEADS: tl.constexpr, BLOCK_B: tl.constexpr, DIRECT: tl.constexpr
):  # fmt: skip
    """(sequence, tile, KV head, first block, last block, slot) of a part; sequence BLOCK_B: there is none.

    ``slot``: where the workspace holds the part; -1: nowhere.
    """
    b = tl.arange(0, BLOCK_B)
    full, rest, has_rest = _cut(tiles, blocks, length)
    units = tiles * KV_HEADS
    turn = tl.arange(0, _TURNS)[:, None]
    turn_of_rest = 1 + (2 * rest <= length).to(tl.int32) + (4 * rest <= length).to(tl.int32)
    is_rest = has_rest[None, :] & (turn_of_rest[None, :] == turn)
    count = tl.where(turn == 0, (units * full)[None, :], tl.where(is_rest, units[None, :], 0))
    of_turn = tl.sum(count, 1)
    end = tl.cumsum(count, 1) + (tl.cumsum(of_turn, 0) - of_turn)[:, None]
    begin = end - count
    here = (begin <= program) & (program < end)
    sequence = tl.sum(tl.sum(tl.where(here, b[None, :], 0), 1), 0)
    sequence = tl.where(program < tl.sum(of_turn, 0), sequence, BLOCK_B)
    place = program - tl.sum(tl.sum(tl.where(here, begin, 0), 1), 0)
    in_rests = tl.sum(tl.sum(tl.where(here, turn, 0), 1), 0) > 0

    own = b == sequence
    num_tiles = tl.maximum(tl.sum(tl.where(own, tiles, 0), 0), 1)
    num_blocks, num_full = tl.sum(tl.where(own, blocks, 0), 0), tl.sum(tl.where(own, full, 0), 0)
    kept = _parts_kept(tiles, full, has_rest, KV_HEADS, DIRECT)
    before = tl.sum(tl.where(b < sequence, kept, 0), 0)
    is_kept = tl.sum(tl.where(own, kept, 0), 0) > 0
    num_units = num_tiles * KV_HEADS
    part = tl.where(in_rests, num_full, place // num_units)
    unit = place % num_units
    first = part * length
    slot = tl.where(is_kept, before + part * num_units + unit, -1)
    return sequence, unit % num_tiles, unit // num_tiles, first, tl.minimum(first + length, num_blocks), slot


@triton.jit
def work_of(
    program, num_programs, cu_text, cu_slow, batch, num_tiles, num_splits, even_tiles, num_slots, max_parts,
    HEADS_PER_KV: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """Of a program: (sequence, tile within it, KV head, first block, last block, split, slot, length of parts).

    sequence >= batch: it has nothing to do. length 0: the batch is even, and the plan's ``split`` it is. Otherwise
    ``slot`` of the workspace, which is -1 for a tile in one part where ``DIRECT`` writes its context at once.
    """
    tiles, blocks = _weigh(cu_text, cu_slow, batch, HEADS_PER_KV, BLOCK_M, BLOCK_N, BLOCK_B)
    # A branch that a warp's threads might take apart would cost the loop behind it its uniform registers.
    if uniform(_are_even(tiles, blocks, even_tiles).to(tl.int32)) > 0:
        length, slot = 0, -1
        split = program // (num_tiles * KV_HEADS)
        kv_head = program // num_tiles % KV_HEADS
        sequence, tile = find_tile(tiles, program % num_tiles)
        num_blocks = tl.sum(tl.where(tl.arange(0, BLOCK_B) == sequence, blocks, 0), 0)
        first, last = share_of(split, num_splits, num_blocks)
        sequence = tl.where(split < num_splits, sequence, BLOCK_B)
    else:
        split = 0
        length = _choose_length(tiles, blocks, num_slots, num_programs, max_parts, KV_HEADS, BLOCK_B, DIRECT)
        sequence, tile, kv_head, first, last, slot = _dealt(program, length, tiles, blocks, KV_HEADS, BLOCK_B, DIRECT)
    return (
        uniform(sequence), uniform(tile), uniform(kv_head), uniform(first), uniform(last), uniform(split),
        uniform(slot), length,
    )  # fmt: skip


@triton.jit
def parts_of(
    text, head, length, cu_text, cu_slow, batch,
    HEADS_PER_KV: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """(row of the workspace that has a head's first part, rows from part to part, parts) of text row ``text``.

    Without parts the workspace has none of it. ``length`` > 0, as ``work_of`` found it.
    """
    b = tl.arange(0, BLOCK_B)
    tiles, blocks = _weigh(cu_text, cu_slow, batch, HEADS_PER_KV, BLOCK_M, BLOCK_N, BLOCK_B)
    full, _, has_rest = _cut(tiles, blocks, length)
    kept = _parts_kept(tiles, full, has_rest, KV_HEADS, DIRECT)
    passed = (b < batch) & (tl.load(cu_text + b + 1, mask=b < batch, other=0) <= text)
    sequence = tl.sum(passed.to(tl.int32), 0)
    own = b == sequence
    num_tiles = tl.sum(tl.where(own, tiles, 0), 0)
    num_units = num_tiles * KV_HEADS
    num_parts = tl.sum(tl.where(own, kept, 0), 0) // num_units
    packed = (text - tl.load(cu_text + sequence)) * HEADS_PER_KV + head % HEADS_PER_KV
    unit = head // HEADS_PER_KV * num_tiles + packed // BLOCK_M
    slot = tl.sum(tl.where(b < sequence, kept, 0), 0) + unit
    return slot.to(tl.int64) * BLOCK_M + packed % BLOCK_M, num_units.to(tl.int64) * BLOCK_M, num_parts
