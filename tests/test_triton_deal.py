"""Uneven batches on the Triton attention: what the device cuts, in which order, and that the answer does not change.

The reference deals out lists of parts on the host, by the length that the device chose.
"""

from __future__ import annotations

import heapq
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import pytest
import reference
import torch
from cases import Shape, make_inputs, poison
from test_triton import local_bytes
from triton_launches import NUM_SMS, compile_all, compiled, index, interpreted, meta, recorder, triton

import slowfast_kernels as sk
from slowfast_kernels import eager
from slowfast_kernels.calls import AttentionOptions, AttentionTensors, FusedOptions, FusedTensors
from slowfast_kernels.gate import Gate
from slowfast_kernels.heuristics.triton import (
    AttentionConfig,
    DealConfig,
    next_power_of_2,
    triton_attention_config,
    triton_deal_config,
)
from slowfast_kernels.triton._deal import work_of

tl = triton.language

START = 4  # blocks of time that a program starts and ends in


class Batch(NamedTuple):
    """Text rows and slow tokens of each sequence, and how the host would launch them."""

    text: tuple[int, ...]
    slow: tuple[int, ...]
    config: AttentionConfig
    heads: tuple[int, int] = (28, 4)
    num_sms: int = 132

    @property
    def heads_per_kv(self) -> int:
        return self.heads[0] // self.heads[1]

    @property
    def is_direct(self) -> bool:
        return self.config.num_splits == 1

    @property
    def num_tiles(self) -> int:
        return self.config.num_tiles(sum(self.text), len(self.text), self.heads_per_kv)

    @property
    def deal(self) -> DealConfig | None:
        return triton_deal_config(
            self.config, sum(self.text), sum(self.slow), len(self.text), *self.heads, self.num_sms
        )  # fmt: skip

    @property
    def cut(self) -> tuple[np.ndarray, np.ndarray]:
        """(tiles, blocks of each tile) of the sequences."""
        tiles = -(-np.array(self.text) * self.heads_per_kv // self.config.block_m)
        return tiles, np.where(tiles > 0, -(-np.array(self.slow) // self.config.block_n), 0)


class Part(NamedTuple):
    sequence: int
    tile: int
    kv_head: int
    first_block: int
    last_block: int
    slot: int


def dealt(batch: Batch, length: int) -> list[Part]:
    """Every part, in the order of programs."""
    tiles, blocks = batch.cut
    turns: list[list[Part]] = [[], [], [], []]
    slot = 0
    for b, (num_tiles, num_blocks) in enumerate(zip(tiles.tolist(), blocks.tolist(), strict=True)):
        begins = list(range(0, num_blocks, length)) or [0]
        for part, begin in enumerate(begins):
            end = min(begin + length, num_blocks)
            size = end - begin
            turn = 0 if size == length else 1 + (2 * size <= length) + (4 * size <= length)
            for kv_head in range(batch.heads[1]):
                for tile in range(num_tiles):
                    unit = kv_head * num_tiles + tile
                    place = slot + part * num_tiles * batch.heads[1] + unit
                    is_kept = len(begins) > 1 or not batch.is_direct
                    turns[turn].append(Part(b, tile, kv_head, begin, end, place if is_kept else -1))
        if len(begins) > 1 or not batch.is_direct:
            slot += num_tiles * batch.heads[1] * len(begins)
    return [part for turn in turns for part in turn]


def finished(parts: list[Part], slots: int) -> float:
    """When the last one is done, of programs that start in their order wherever a slot is free."""
    free = [0] * slots
    for part in parts:
        heapq.heapreplace(free, free[0] + part.last_block - part.first_block + START)
    return max(free)


def random_batches(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        batch = int(rng.integers(2, 41))
        longest = 10 ** rng.uniform(2, 5)
        slow = (longest * 10 ** rng.uniform(-2, 0, batch)).astype(int) * (rng.random(batch) > rng.choice([0, 0.1, 0.9]))
        text = (rng.choice([1, 8, 64, 300]) ** rng.uniform(0, 1, batch)).astype(int) * (rng.random(batch) > 0.1)
        if not text.any():
            continue
        heads = ((28, 4), (14, 2), (4, 4), (8, 1))[rng.integers(4)]
        sms = int(rng.choice([2, 14, 78, 132]))
        config = triton_attention_config(int(text.sum()), int(slow.sum()), batch, *heads, 128, 2, sms)
        yield Batch(tuple(text.tolist()), tuple(slow.tolist()), config, heads, sms)


# ----------------------------------------------------------------------------------------------- what the host sizes


def lengths_that_are_allowed(batch: Batch) -> set[int]:
    """From an even share of a slot to the longest sequence: there are enough programs and slots for any of these."""
    tiles, blocks = batch.cut
    share = int((tiles * blocks).sum()) * batch.heads[1] // batch.deal.num_slots + 1
    longest = max(1, int(blocks.max()))
    return {min(longest, share + step) for step in (0, 1, share // 2, share)} | {longest}


def test_every_block_of_every_tile_has_one_program_and_parts_have_slots_of_their_own():
    count = 0
    for batch in random_batches(1000):
        if batch.deal is None:
            continue
        tiles, blocks = batch.cut
        for length in lengths_that_are_allowed(batch):
            parts = dealt(batch, length)
            assert len(parts) <= batch.deal.num_programs
            slots = [part.slot for part in parts if part.slot >= 0]
            assert len(set(slots)) == len(slots)
            assert max(slots, default=-1) < batch.deal.max_parts
            found = np.zeros((len(tiles), 4), int)  # parts, blocks, and sums of where they begin and end
            for b, _, _, first, last, _ in parts:
                found[b] += 1, last - first, first, last
            units = tiles * batch.heads[1]
            assert (found[:, 1] == units * blocks).all()
            assert (found[:, 3] - found[:, 2] == units * blocks).all()
            assert len({part[:4] for part in parts}) == len(parts)
            count += 1
    assert count > 2000


def test_short_batches_and_those_of_very_many_sequences_are_not_dealt_out():
    direct = AttentionConfig(64, 64, 1, 4, 3)
    assert triton_deal_config(direct, 16, 32 * 64, 16, 28, 4, 132) is None
    assert triton_deal_config(direct, 16, 32 * 64 + 1, 16, 28, 4, 132) is not None
    assert triton_deal_config(replace(direct, num_splits=2), 16, 32 * 64, 16, 28, 4, 132) is not None
    assert triton_deal_config(direct, 1024, 10**6, 1024, 28, 4, 132) is not None
    assert triton_deal_config(direct, 1025, 10**6, 1025, 28, 4, 132) is None


def test_the_workspace_of_many_tiles_is_that_of_the_parts_that_run_at_once():
    config = triton_attention_config(32 * 256, 32 * 10368, 32, 28, 4, 128, 2, 132)
    deal = triton_deal_config(config, 32 * 256, 32 * 10368, 32, 28, 4, 132)
    assert config.num_splits == 1
    assert deal.max_parts == 2 * deal.num_slots


# ------------------------------------------------------------------------------------------------ what the device finds


@triton.jit(do_not_specialize=["num_programs", "batch", "num_tiles", "num_splits", "even_tiles"])
def _work_of(
    programs, out, cu_text, cu_slow, num_programs, batch, num_tiles, num_splits, even_tiles, num_slots, max_parts,
    HEADS_PER_KV: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    sequence, tile, kv_head, first, last, split, slot, length = work_of(
        tl.load(programs + i), num_programs, cu_text, cu_slow, batch, num_tiles, num_splits, even_tiles, num_slots,
        max_parts, HEADS_PER_KV, KV_HEADS, BLOCK_M, BLOCK_N, BLOCK_B, DIRECT,
    )  # fmt: skip
    out += 8 * i
    tl.store(out, sequence)
    tl.store(out + 1, tile)
    tl.store(out + 2, kv_head)
    tl.store(out + 3, first)
    tl.store(out + 4, last)
    tl.store(out + 5, slot)
    tl.store(out + 6, split)
    tl.store(out + 7, length)


def prefix(counts) -> torch.Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)


def found_by_device(batch: Batch, programs: list[int]) -> tuple[list[tuple[Part, int]], int]:
    """(part, split) of these programs, and the length that all of them find."""
    deal, size = batch.deal, len(batch.text)
    out = torch.full((len(programs), 8), -7, dtype=torch.int32)
    _work_of[(len(programs),)](
        torch.tensor(programs, dtype=torch.int32), out, prefix(batch.text), prefix(batch.slow),
        deal.num_programs, size, batch.num_tiles, batch.config.num_splits,
        deal.even_tiles, deal.num_slots, deal.max_parts, batch.heads_per_kv, batch.heads[1],
        batch.config.block_m, batch.config.block_n, next_power_of_2(size), batch.is_direct,
    )  # fmt: skip
    lengths = {row[7] for row in out.tolist()}
    assert len(lengths) == 1
    return [(Part(*row[:6]), row[6]) for row in out.tolist()], lengths.pop()


def some_programs(batch: Batch, rng) -> list[int]:
    last = batch.deal.num_programs - 1
    return sorted({0, last, *rng.integers(0, last + 1, 6).tolist()})


@interpreted
def test_every_program_finds_its_part():
    rng, dealt_out = np.random.default_rng(1), 0
    for batch in random_batches(30, seed=1):
        if batch.deal is None:
            continue
        programs = some_programs(batch, rng)
        found, length = found_by_device(batch, programs)
        if length == 0:
            continue
        dealt_out += 1
        parts = dealt(batch, length)
        for program, (part, _) in zip(programs, found, strict=True):
            if program < len(parts):
                assert part == parts[program]
            else:
                assert part.sequence >= len(batch.text)
    assert dealt_out > 10


MIXES = {  # text rows, slow tokens; blocks more than an even batch may take
    "one long of 8": ((64,) * 8, (41472, *[648] * 7)),
    "one long of 4": ((64,) * 4, (98304, *[1296] * 3)),
    "one long of 32 rows": ((1,) * 32, (98304, *[648] * 31)),
    "one live of 32": ((1,) * 32, (98304, *[0] * 31)),
    "one live of a cache of 2": ((1, 0), (10368, 22400)),
    "rows as uneven": ((1, 100, 20, 3, 60, 2, 16, 7), (400, 9000, 41000, 800, 2000, 30000, 700, 5000)),
}


def of_an_h100(text, slow) -> Batch:
    return Batch(text, slow, triton_attention_config(sum(text), sum(slow), len(text), 28, 4, 128, 2, 132))


@interpreted
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_parts_end_within_15_percent_of_the_work_evenly_shared(mix):
    """By lengths alone: of a model of time in which a block takes as long as any other."""
    batch = of_an_h100(*mix)
    _, length = found_by_device(batch, [0])
    tiles, blocks = batch.cut
    share = (tiles * blocks).sum() * batch.heads[1] / batch.deal.num_slots
    assert finished(dealt(batch, length), batch.deal.num_slots) <= 1.15 * (share + START)


@interpreted
@pytest.mark.parametrize(
    ("text", "slow"),
    [
        ((1,) * 16, (10368,) * 16),
        ((64,) * 8, (5184,) * 8),
        ((64,) * 4, (5000, 5400, 5184, 4800)),
        ((0, 0, 5), (0, 9000, 0)),
        ((300,) * 2, (20736, 20000)),
        ((1,) * 16, (200, 0, 70, 256) * 4),  # of fewer blocks than a program starts in
    ],
)
def test_an_even_batch_keeps_the_plan(text, slow):
    batch = of_an_h100(text, slow)
    _, blocks = batch.cut
    rng, num_splits = np.random.default_rng(0), batch.config.num_splits
    for program in some_programs(batch, rng):
        [(part, split)], length = found_by_device(batch, [program])
        assert length == 0
        assert part.slot == -1
        rest, tile = divmod(program, batch.num_tiles)
        tiles = [(b, i) for b, n in enumerate(batch.cut[0].tolist()) for i in range(n)]
        if tile >= len(tiles) or rest // batch.heads[1] >= num_splits:
            assert part.sequence >= len(text)
            continue
        assert part[:3] == (*tiles[tile], rest % batch.heads[1])
        assert split == rest // batch.heads[1]
        share, extra = divmod(int(blocks[part.sequence]), num_splits)
        assert part.first_block == split * share + min(split, extra)
        assert part.last_block - part.first_block == share + (split < extra)


# ------------------------------------------------------------------------------------------------------- the answer


TILES = {"memory": (16, 16, 4, 2), "tensor cores": (64, 16, 4, 2)}
WAYS = pytest.mark.parametrize(("tile", "num_splits"), [("memory", 3), ("tensor cores", 1)])
UNEVEN = {
    "one long": Shape(((2, 500), (1, 20), (3, 33), (1, 0), (0, 90)), (4, 2), 32),
    "one live of many": Shape((*[(1, 0)] * 15, (1, 600), *[(1, 0)] * 9), (2, 1), 16),
    "many rows": Shape(((40, 100), (3, 600), (20, 17)), (4, 2), 16),
    "two": Shape(((1, 30), (2, 800)), (3, 1), 80),
}


def attention_of(tensors, tile: str, num_splits: int, is_dealt=True, gate=None):
    from slowfast_kernels.triton.attention import Attention

    block_m, block_n, warps, stages = TILES[tile]
    config = AttentionConfig(block_m, block_n, num_splits, warps, stages)
    heads = tensors.q.shape[1], tensors.slow_kv.shape[1]
    sizes = tensors.text_rows.shape[0], tensors.slow_kv.shape[0], tensors.cu_text.shape[0] - 1
    deal = triton_deal_config(config, *sizes, *heads, 5) if is_dealt else None
    assert (deal is not None) == is_dealt
    return Attention(tensors, 0.3, gate=gate, config=config, deal=deal)


def attend(tensors, tile: str, num_splits: int, is_dealt=True) -> tuple[torch.Tensor, torch.Tensor]:
    context = torch.full((len(tensors.text_rows), *tensors.q.shape[1:]), torch.nan, dtype=tensors.q.dtype)
    lse = torch.full(context.shape[:2], torch.nan)
    attention_of(tensors, tile, num_splits, is_dealt).attend(tensors, context, lse)
    return context, lse


@interpreted
@WAYS
@pytest.mark.parametrize("shape", UNEVEN.values(), ids=UNEVEN)
def test_an_uneven_batch_is_accurate(shape, tile, num_splits, rng):
    inputs = make_inputs(shape, torch.float32, "cpu", rng())
    for b, (text, _) in enumerate(shape.sequences):
        if text == 0:
            poison(inputs.slow_kv[inputs.cu_slow[b] : inputs.cu_slow[b + 1]])
    context, lse = attend(inputs.tensors, tile, num_splits)
    expected = eager.text_cross_attention(inputs.tensors, 0.3)
    exact = reference.attention(*inputs.attention, 0.3)
    reference.assert_accurate(context, expected[0], exact.context, exact.noise)
    reference.assert_lse_accurate(lse, expected[1], exact.lse)


@interpreted
@WAYS
def test_the_same_lengths_give_the_same_bits(tile, num_splits, rng):
    inputs = make_inputs(UNEVEN["one long"], torch.float16, "cpu", rng())
    first, second = (attend(inputs.tensors, tile, num_splits) for _ in range(2))
    assert all(reference.same_bits(*pair) for pair in zip(first, second, strict=True))


@interpreted
@WAYS
def test_an_even_batch_has_the_bits_of_the_plan(tile, num_splits, rng):
    inputs = make_inputs(Shape(((2, 300), (2, 310), (2, 290)), (4, 2), 32), torch.float16, "cpu", rng())
    found, plan = (attend(inputs.tensors, tile, num_splits, is_dealt) for is_dealt in (True, False))
    assert all(reference.same_bits(*pair) for pair in zip(found, plan, strict=True))


@interpreted
@pytest.mark.parametrize(("tile", "num_splits"), [("memory", 1), ("tensor cores", 2)])
def test_an_uneven_batch_is_mixed(tile, num_splits, rng):
    """Rows without a slow token keep their state, bit for bit."""
    inputs = make_inputs(UNEVEN["one long"], torch.float32, "cpu", rng())
    state, rows = inputs.state, inputs.text_rows.long()
    state[rows[6]] = -0.0
    gate = Gate("tanh", inputs.gate_weight, inputs.gate_bias, None, True, None)
    tensors = FusedTensors(state, *inputs.tensors, gate.weight, gate.bias, None, None)
    out = attention_of(tensors, tile, num_splits, gate=gate).attend_and_mix(tensors, gate)
    exact = reference.attention(*inputs.attention, 0.3)
    mixed = reference.gated_mix(state, exact.context, inputs.text_rows, *gate.read_tensors[:3])
    torch.testing.assert_close(out[rows].double(), mixed[rows], atol=1e-5, rtol=1e-5)
    kept = [*inputs.other_rows.tolist(), int(rows[6])]
    assert reference.same_bits(out[kept], state[kept])


@interpreted
def test_lengths_may_change_from_call_to_call(rng):
    """A prepared call, as a graph's replay, has the shapes alone."""
    inputs = make_inputs(Shape(((2, 300), (1, 300), (3, 300)), (4, 2), 16), torch.float32, "cpu", rng())
    for num_splits in (1, 2):
        attention = attention_of(inputs.tensors, "memory", num_splits)
        for slow, text in (((300, 300, 300), (2, 2, 2)), ((880, 0, 20), (1, 1, 4)), ((3, 7, 890), (6, 0, 0))):
            inputs.cu_slow, inputs.cu_text = prefix(slow), prefix(text)
            context, lse = torch.empty(6, 4, 16), torch.empty(6, 4)
            attention.attend(inputs.tensors, context, lse)
            exact = reference.attention(*inputs.attention, 0.3)
            torch.testing.assert_close(context.double(), exact.context, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(lse.double(), exact.lse, atol=1e-5, rtol=1e-5)


@interpreted
@pytest.mark.parametrize("num_splits", [0, 2])
def test_the_ops_deal_out_where_splits_are_theirs_to_choose(num_splits, rng, monkeypatch):
    from slowfast_kernels.triton import attention

    deals, real = [], attention.Attention.__init__

    def init(self, *args, **kwargs):
        real(self, *args, **kwargs)
        deals.append(self.deal)

    monkeypatch.setattr(attention.Attention, "__init__", init)
    inputs = make_inputs(Shape(((1, 1100), (1, 20)), (4, 2), 16), torch.float32, "cpu", rng())
    context, lse = sk.text_cross_attention(*inputs.attention, num_splits=num_splits, return_lse=True, backend="triton")
    assert [deal is not None for deal in deals] == [num_splits == 0]
    exact = reference.attention(*inputs.attention, 0.25)
    torch.testing.assert_close(context.double(), exact.context, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), exact.lse, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------ ahead-of-time compilation


@pytest.fixture
def record(monkeypatch):
    return recorder(monkeypatch)


def plain(num_text, num_slow, batch, num_splits=0):
    from slowfast_kernels.triton import prepare_text_cross_attention

    q, kv = meta(num_text, 28, 128), meta(num_slow, 4, 2, 128)
    tensors = AttentionTensors(q, kv, index(batch + 1), index(num_text), index(batch + 1))
    prepare_text_cross_attention(tensors, AttentionOptions(None, True, num_splits, "triton"))(tensors)


def mixed(num_text, num_slow, batch):
    from slowfast_kernels.triton import prepare_cross_attention

    tensors = FusedTensors(
        meta(num_text, 28 * 128), meta(num_text, 28, 128), meta(num_slow, 4, 2, 128), index(batch + 1),
        index(num_text), index(batch + 1), None, None, None, None, meta(1, 28 * 128), meta(1), meta(1), None,
    )  # fmt: skip
    prepare_cross_attention(tensors, FusedOptions(None, 0, "tanh", True, "triton"))(tensors)


DECODE, QUESTIONS, MANY_ROWS = (16, 16 * 10368, 16), (512, 8 * 5184, 8), (1024, 4 * 10368, 4)


@compiled
@pytest.mark.parametrize("case", [DECODE, QUESTIONS, MANY_ROWS], ids=["decode", "questions", "many rows"])
def test_nothing_is_spilled_for_a_deal(case, record, tmp_path):
    launches = record(90)
    plain(*case)
    for launch in launches:
        assert launch.constants["DEAL_HEADS"] == 4
        assert local_bytes(launch.compile(90), tmp_path) == 0
    loop, chunks = launches[0].compile(90).asm["ptx"], 32 // launches[0].options["num_warps"]
    assert loop.count("cp.async.cg.shared.global") >= 4 * chunks, "prologue and loop, K and V"


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_a_deal_compiles(arch, record):
    launches = record(arch)
    one_wave = NUM_SMS[arch] // 4
    for call in (plain, mixed):
        for case in (DECODE, QUESTIONS, MANY_ROWS, (one_wave, one_wave * 2000, one_wave), (300, 300 * 2000, 300)):
            call(*case)
    assert {launch.name for launch, _ in compile_all(launches, arch)} == {"_attention", "_combine", "_gated_mix"}


@compiled
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_fixed_number_of_splits_or_one_sequence_is_never_dealt_out(num_splits, record):
    launches = record(90)
    plain(8, 8000, 1)
    plain(8, 8000, 2, num_splits)
    assert {launch.constants["DEAL_HEADS"] for launch in launches} == {0}


@compiled
def test_new_lengths_of_a_batch_are_no_new_kernel(record):
    launches = record(90)
    for num_slow in (16 * 10368, 16 * 10369, 16 * 9000 + 1):
        mixed(16, num_slow, 16)
    keys = {(x.name, *x.signature.items(), *x.constants.items(), *map(str, x.attributes.items())) for x in launches}
    assert len(keys) == 2


@compiled
def test_a_layer_with_context_in_memory_is_a_launch_more(record):
    launches = record(90)
    mixed(*QUESTIONS)
    assert [launch.name for launch in launches] == ["_attention", "_combine", "_gated_mix"]
