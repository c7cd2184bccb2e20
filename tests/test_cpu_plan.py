"""How the cpu backend deals out attention: units of about equal work, by the lengths, pieces and ranges of the call."""

from __future__ import annotations

from ctypes import addressof
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from slowfast_kernels._extension import extension
from slowfast_kernels.calls import AttentionTensors
from slowfast_kernels.params import cross_attention_params, fill_attention


class Unit(NamedTuple):
    row_begin: int
    row_end: int
    head_begin: int
    head_end: int
    token_begin: int
    token_end: int

    @property
    def pairs(self) -> int:
        """(row, token) pairs over its KV heads."""
        rows, heads, tokens = (self[i + 1] - self[i] for i in (0, 2, 4))
        return rows * heads * tokens


def int32(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32)


def units_of(lengths, texts=None, heads=(7, 1), threads=2, num_splits=0, pieces=None, **ranges) -> list[Unit]:
    """Of a batch of sequences of ``lengths`` slow tokens (or pieces) and ``texts`` text rows (default: one each)."""
    texts = texts or [1] * len(lengths)
    cu_slow, cu_text = (torch.cat((torch.zeros(1), int32(x).cumsum(0))).int() for x in (lengths, texts))
    tokens = int(cu_slow[-1]) if pieces is None else int(int32(pieces).max())
    kv = torch.empty(1, heads[1], 2, 1).expand(tokens, -1, -1, -1)
    rows = torch.arange(sum(texts), dtype=torch.int32)
    selection = {name: int32(x) for name, x in ranges.items()}
    if pieces is not None:
        selection["slow_pieces"] = int32(pieces)
    tensors = AttentionTensors(torch.empty(sum(texts), heads[0], 1), kv, cu_slow, rows, cu_text, **selection)
    params = cross_attention_params(tensors, 1.0, num_splits)
    fill_attention(params, tensors)
    return [Unit(*unit) for unit in extension().cpu_attention_units(addressof(params), threads)]


@pytest.mark.parametrize("threads", [1, 2, 7, 64])
@pytest.mark.parametrize(
    "lengths",
    [[41472] + [648] * 7, [648] * 7 + [41472], [98304] + [648] * 31, [20000, 10000, 5000, 2500], [5184] * 3, [100000]],
    ids=str,
)
def test_no_unit_is_more_than_a_quarter_of_a_threads_share(lengths, threads):
    units = units_of(lengths, threads=threads)
    assert sum(unit.pairs for unit in units) == 7 * sum(lengths)
    share = 7 * max(sum(lengths) / (4 * threads), 2 * 192)  # and no split is too short to be worth its while
    assert max(unit.pairs for unit in units) <= share + 7 * 48


@pytest.mark.parametrize("threads", [2, 7])
def test_long_sequences_are_started_before_short_ones(threads):
    pairs = [unit.pairs for unit in units_of([648] * 7 + [41472], threads=threads)]
    assert all(later < 2 * earlier for earlier, later in pairwise(pairs))


@pytest.mark.parametrize(
    ("lengths", "threads", "count"),
    [
        ([5184], 2, 8),
        ([5184], 64, 27),  # 192 tokens each
        ([100], 2, 1),
        ([5184] * 16, 2, 16),  # a sequence a unit is enough
        ([], 2, 0),
        ([0, 5184, 0], 2, 8),  # what holds no tokens takes none from the others
    ],
)
def test_an_even_batch_feeds_every_thread_and_no_split_is_too_short(lengths, threads, count):
    assert len(units_of(lengths, threads=threads)) == count


@pytest.mark.parametrize("num_splits", [0, 1, 4])
def test_every_row_meets_every_token_once(num_splits):
    by_block = {}
    for unit in units_of([3000], texts=[30], heads=(8, 2), threads=16, num_splits=num_splits):
        by_block.setdefault(unit[:4], []).append((unit.token_begin, unit.token_end))
    assert sum((block[1] - block[0]) * (block[3] - block[2]) for block in by_block) == 30 * 8
    for parts in map(sorted, by_block.values()):
        assert (parts[0][0], parts[-1][1]) == (0, 3000)
        assert all(low[1] == high[0] for low, high in pairwise(parts))


@pytest.mark.parametrize("num_splits", [0, 1, 4])
def test_rows_that_see_nothing_are_in_no_unit(num_splits):
    blind = 500
    end = [0] * blind + [300] * 2 + [-5] * blind
    units = units_of([400], texts=[2 * blind + 2], heads=(1, 1), num_splits=num_splits, slow_end=end)
    assert max(unit.row_end for unit in units) == 2
    assert units_of([400], texts=[blind], slow_end=[0] * blind, num_splits=num_splits) == []


def test_a_split_that_a_row_does_not_see_is_no_unit():
    units = units_of([4800], num_splits=10, slow_begin=[1000], slow_end=[1100])
    assert [unit[4:] for unit in units] == [(960, 1440)]


def test_units_are_cut_by_what_rows_see_and_not_by_how_much_there_is():
    seen = units_of([100_000] * 2, slow_begin=[0, 99_000], slow_end=[4000, 100_000])
    assert sum(unit.pairs for unit in seen) <= 7 * (5000 + 4 * 48)
    assert max(unit.pairs for unit in seen) <= 7 * (5000 / 8 + 48)


def test_rows_that_see_alike_share_units_in_whatever_order_they_come():
    """Two windows, row by row in turn: no unit spans both."""
    begin = [0, 50_000] * 64
    units = units_of([60_000], texts=[128], heads=(1, 1), slow_begin=begin, slow_end=[b + 480 for b in begin])
    spans = [unit for unit in units if unit.token_begin < 480 and unit.token_end > 50_000]
    assert len(spans) <= 1  # where the one ends and the other begins
    assert max(unit.pairs for unit in units if unit not in spans) <= 48 * (480 + 48)


def test_pieces_count_by_their_tokens_and_not_by_their_number():
    one_long = [[0, 40_000]]
    many_short = [[i, i + 1] for i in range(100)]
    units = units_of([1, 100], pieces=one_long + many_short)
    assert sorted(unit.pairs for unit in units)[0] == 7 * 100
    assert len(units) == 9


@pytest.mark.parametrize("threads", [1, 5, 64])
def test_fixed_splits_do_not_depend_on_threads(threads):
    lengths = [5000, 100, 20_000]
    assert units_of(lengths, threads=threads, num_splits=3) == units_of(lengths, threads=2, num_splits=3)
