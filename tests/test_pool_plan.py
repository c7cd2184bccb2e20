"""Plans of pooling are kept for the next call, within so many bytes however many ragged batches come."""

from __future__ import annotations

import random
import tracemalloc
import weakref

import pytest
import torch

from slowfast_kernels import pool_plan
from slowfast_kernels.bounded_cache import BoundedCache
from slowfast_kernels.pool_plan import make_pool_plan

CPU = torch.device("cpu")
LIMIT = 2**20


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    """Empty, and small, so that few batches fill them."""
    monkeypatch.setattr(pool_plan, "_plans", BoundedCache(LIMIT // 4))
    monkeypatch.setattr(pool_plan, "_tables", BoundedCache(LIMIT))
    monkeypatch.setattr(pool_plan, "_captured", {})


def ragged(seed: int, videos: int = 16) -> tuple[int, ...]:
    drawn = random.Random(seed)
    return tuple(drawn.randrange(1, 200) for _ in range(videos))


def plan_of(counts: tuple[int, ...]) -> pool_plan.PoolPlan:
    return make_pool_plan(counts, (4, 4), 2, 1, 4, 1, 3)


def test_the_memory_of_many_ragged_batches_is_bounded():
    tables = []
    tracemalloc.start()
    for batch in range(260):
        tables.append([weakref.ref(x) for x in plan_of(ragged(batch)).tables(CPU)])
    objects, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    alive = [x() for refs in tables for x in refs if x() is not None]
    assert sum(x.numel() * x.element_size() for x in alive) <= LIMIT
    assert objects <= 1.25 * LIMIT + 260 * 4 * 200  # and this test's own references
    assert pool_plan._tables.num_bytes <= LIMIT
    assert pool_plan._plans.num_bytes <= LIMIT // 4


@pytest.mark.parametrize("videos", [1, 10, 1000])
def test_a_plan_takes_no_more_memory_than_it_is_counted_with(videos):
    counts = ragged(0, videos)
    plan_of(ragged(1, 2))
    tracemalloc.start()
    plan = plan_of(tuple(count + 300 for count in counts))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken <= plan.num_bytes + 8192  # and what the interpreter warms up


def test_a_repeated_batch_is_planned_and_uploaded_once(monkeypatch):
    first = plan_of(ragged(0))
    tables = first.tables(CPU)
    monkeypatch.setattr(pool_plan, "check_pool_arguments", pytest.fail)
    assert plan_of(ragged(0)) is first
    assert all(x is y for x, y in zip(first.tables(CPU), tables, strict=True))


def test_a_batch_in_use_outlives_many_others():
    tables = plan_of(ragged(0)).tables(CPU)
    for batch in range(1, 260):
        plan_of(ragged(batch)).tables(CPU)
        assert plan_of(ragged(0)).tables(CPU).items is tables.items


def test_a_batch_larger_than_the_cache_is_kept_until_the_next():
    counts = (199,) * 2000
    plan = plan_of(counts)
    assert plan.num_bytes > LIMIT // 4
    assert plan_of(counts) is plan
    plan_of((2,))
    assert plan_of(counts) is not plan
    assert pool_plan._plans.num_bytes >= plan.num_bytes
    plan_of((2, 3))
    assert pool_plan._plans.num_bytes <= LIMIT // 4


def test_tables_that_a_graph_was_captured_with_stay_where_they_are(monkeypatch):
    """Its replays read them by their addresses."""
    plan = plan_of(ragged(0))
    with monkeypatch.context() as capture:
        capture.setattr(pool_plan, "_is_capturing", lambda device: True)
        captured = [weakref.ref(x) for x in plan.tables(CPU)]
    for batch in range(1, 260):
        plan_of(ragged(batch)).tables(CPU)
    assert (plan, CPU, pool_plan.PoolTables) not in pool_plan._tables._entries
    assert all(x() is not None for x in captured)


@pytest.mark.parametrize("counts", [(1,), (5, 1), ragged(3)])
@pytest.mark.parametrize("strides", [(1, 1, 1, 1, 1), (2, 2, 3, 2, 4), (1, 3, 2, 1, 7)])
def test_a_plans_totals_are_those_of_its_videos_and_its_table(counts, strides):
    plan = make_pool_plan(counts, (4, 4), *strides)
    tables = plan.tables(CPU)
    assert plan.num_items == len(tables.items)
    assert tables.cu_slow.diff().tolist() == [video.num_slow for video in plan.videos]
    assert tables.cu_fast.diff().tolist() == [video.num_fast for video in plan.videos]
    assert (plan.num_slow, plan.num_fast) == (tables.cu_slow[-1], tables.cu_fast[-1])
    assert all(len(video.windows) == video.num_windows for video in plan.videos)


@pytest.mark.parametrize("counts", [(1,), (5, 1), (9, 2)])
@pytest.mark.parametrize("strides", [(1, 1, 1, 1, 1), (2, 1, 3, 2, 4), (1, 3, 2, 1, 7)])
def test_the_table_by_frames_has_every_window_of_a_frame_in_order(counts, strides):
    plan = make_pool_plan(counts, (4, 4), *strides)
    frames, windows = plan.backward_tables(CPU)
    assert len(frames) == sum(counts)
    for video in plan.videos:
        for t in range(video.num_frames):
            first, count, slow_base, stride, *grids = frames[video.first_frame + t].tolist()
            assert (slow_base, stride) == (video.first_slow + t * video.num_slow // video.num_frames, video.pool_stride)
            assert grids == [*video.slow_grid, *video.fast_grid]
            area = video.num_fast // video.num_windows
            mine = [[video.first_fast + i * area, len(w)] for i, w in enumerate(video.windows) if t in w]
            assert windows[first : first + count].tolist() == mine
    assert plan.backward_tables(CPU).frames is frames
    assert plan.tables(CPU).items.shape == (plan.num_items, 8)  # kept apart


def test_what_was_unused_for_longest_goes_first():
    cache = BoundedCache(100)
    for key in "abc":
        cache.put(key, key.upper(), 30)
    assert cache.get("a") == "A"
    cache.put("d", "D", 30)
    assert [key for key in "abcd" if cache.get(key)] == ["a", "c", "d"]
    assert cache.num_bytes == 90


def test_of_two_values_for_a_key_the_first_is_kept():
    """Two threads may form the same one; both get the same object."""
    cache = BoundedCache(100)
    first, second = ["first"], ["second"]
    assert cache.put("a", first, 60) is first
    assert cache.put("a", second, 60) is first
    assert cache.num_bytes == 60
