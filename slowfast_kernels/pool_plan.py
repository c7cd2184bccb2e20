"""Which frames and cells make which slow and fast tokens: the pooling rules, in Python, before any kernel.

``split_slow_fast_tokens`` of arXiv 2504.01328 is a chain of PyTorch calls whose branches depend only on frame
counts and strides. Those branches are resolved here, once, into a table; every backend executes the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

from .bounded_cache import BoundedCache
from .call_plan import CallPlan
from .constants import plain_tensors


class PoolOptions(NamedTuple):
    """The strides of a call, by the names of ``slowfast_pool``'s arguments."""

    pool_stride: int = 1
    sampling_stride: int = 1
    temporal_stride: int = 1
    spatial_stride: int = 1
    min_fast_frames: int = 1


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """One video (or image, ``num_frames == 1``) of the batch."""

    first_frame: int
    num_frames: int
    num_windows: int  # fast frames
    pool_stride: int  # spatial pooling that makes slow tokens; 1 for an image
    slow_grid: tuple[int, int]
    fast_grid: tuple[int, int]
    first_slow: int
    first_fast: int
    options: PoolOptions

    @property
    def windows(self) -> tuple[tuple[int, ...], ...]:
        """The video's own frame indices that each fast frame averages. Made at each use: only a table keeps them."""
        if self.num_frames == 1:
            return ((0,),)
        _, sampling_stride, temporal_stride, _, min_fast_frames = self.options
        sampled = sample_fast_frames(self.num_frames, sampling_stride, min_fast_frames)
        return tuple(temporal_windows(sampled, temporal_stride, min_fast_frames))

    @property
    def num_slow(self) -> int:
        return self.num_frames * self.slow_grid[0] * self.slow_grid[1]

    @property
    def num_fast(self) -> int:
        return self.num_windows * self.fast_grid[0] * self.fast_grid[1]


class PoolTables(NamedTuple):
    """What kernels read, int32 (layout: ``PoolParams`` in csrc/params.h)."""

    items: torch.Tensor  # [n, 8]
    entries: torch.Tensor  # [m, 2]
    cu_slow: torch.Tensor  # [B + 1]
    cu_fast: torch.Tensor  # [B + 1]


class PoolBackwardTables(NamedTuple):
    """The same by frames, int32 (layout: ``PoolBackwardParams`` in csrc/params.h)."""

    frames: torch.Tensor  # [F, 8]
    windows: torch.Tensor  # [m, 2], those of a frame one after the other


_Tables = TypeVar("_Tables", PoolTables, PoolBackwardTables)


@dataclass(frozen=True, slots=True, eq=False)  # equal only to itself: hashing a batch would cost more than pooling it
class PoolPlan:
    """All videos of a call: where each one's frames lie, and where its slow and fast tokens go."""

    grid: tuple[int, int]
    spatial_stride: int
    videos: tuple[VideoPlan, ...]
    num_slow: int
    num_fast: int
    num_items: int  # rows of the work table: windows, and frames in none
    cells: tuple[int, int]  # most (vertical, horizontal) cells of ``spatial_stride`` slow tokens, partial ones counted

    @property
    def num_bytes(self) -> int:
        return _PLAN_BYTES + _VIDEO_BYTES * len(self.videos)

    def tables(self, device: torch.device) -> PoolTables:
        """The work table on ``device``, uploaded once while it is kept.

        The tensors are shared between calls: copy ``cu_*`` before handing them to a user. Those that a CUDA graph is
        captured with are kept for good, since its replays read them.
        """
        return self._kept(PoolTables, device, self._rows)

    def backward_tables(self, device: torch.device) -> PoolBackwardTables:
        """The work table of the backward pass, likewise."""
        return self._kept(PoolBackwardTables, device, self._rows_by_frame)

    @property
    def backward_cells(self) -> tuple[int, int]:
        """Most (vertical, horizontal) squares that pooling cuts a frame's features into, dropped ones counted."""
        strides = {video.pool_stride for video in self.videos}
        return tuple(max(-(-side // stride) for stride in strides) for side in self.grid)

    def _kept(self, kind: type[_Tables], device: torch.device, rows: Callable[[], tuple]) -> _Tables:
        key = (self, device, kind)
        found = _tables.get(key)
        if found is None:
            with plain_tensors():
                found = kind(*(torch.tensor(r, dtype=torch.int32, device=device) for r in rows()))
            num_bytes = self.num_bytes + sum(_TENSOR_BYTES + x.numel() * x.element_size() for x in found)
            found = _tables.put(key, found, num_bytes)
        if _is_capturing(device):
            _captured[key] = found
        return found

    def _rows(self) -> tuple[list, list, list[int], list[int]]:
        items, entries = [], []
        for video in self.videos:
            slow_area = video.slow_grid[0] * video.slow_grid[1]
            fast_area = video.fast_grid[0] * video.fast_grid[1]
            written = set()
            windows = video.windows
            idle = set(range(video.num_frames)).difference(*windows)
            groups = [(w, video.first_fast + i * fast_area) for i, w in enumerate(windows)]
            groups += [((t,), -1) for t in sorted(idle)]
            for frames, fast_base in groups:
                grids = (*video.slow_grid, *video.fast_grid)
                items.append([len(entries), len(frames), fast_base, video.pool_stride, *grids])
                for t in frames:
                    slow_base = -1 if t in written else video.first_slow + t * slow_area
                    written.add(t)
                    entries.append([video.first_frame + t, slow_base])
        cu_slow = [*(video.first_slow for video in self.videos), self.num_slow]
        cu_fast = [*(video.first_fast for video in self.videos), self.num_fast]
        return items, entries, cu_slow, cu_fast

    def _rows_by_frame(self) -> tuple[list[list[int]], list[list[int]]]:
        frames, windows = [], []
        for video in self.videos:
            slow_area = video.slow_grid[0] * video.slow_grid[1]
            fast_area = video.fast_grid[0] * video.fast_grid[1]
            seen_in = [[] for _ in range(video.num_frames)]
            for i, window in enumerate(video.windows):
                for t in window:
                    seen_in[t].append([video.first_fast + i * fast_area, len(window)])
            for t, mine in enumerate(seen_in):
                grids = (*video.slow_grid, *video.fast_grid)
                frames.append([len(windows), len(mine), video.first_slow + t * slow_area, video.pool_stride, *grids])
                windows += mine
        return frames, windows


# Of Python objects, by tracemalloc on Python 3.10 to 3.14 and rounded up: a plan with its key, a video of one, and what
# a tensor takes beside its numbers.
_PLAN_BYTES, _VIDEO_BYTES, _TENSOR_BYTES = 1024, 640, 1024
# A video of 1536 frames makes a table of some 24 kB: several hundred such batches stay.
_plans: BoundedCache[PoolPlan] = BoundedCache(4 * 2**20)
_tables: BoundedCache[PoolTables | PoolBackwardTables] = BoundedCache(16 * 2**20)  # over all devices
_captured: dict[tuple[PoolPlan, torch.device, type], PoolTables | PoolBackwardTables] = {}


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def sample_fast_frames(num_frames: int, sampling_stride: int, min_fast_frames: int) -> list[int]:
    """Frames kept by ``temporal_sampling_stride``.

    The official code steps by a floating-point stride; for 164 frames and more that can differ from integer
    arithmetic, so the same floating-point product is taken here.
    """
    count = _sampled_count(num_frames, sampling_stride, min_fast_frames)
    if count == num_frames:
        return list(range(num_frames))
    step = num_frames / count
    return [int(i * step) for i in range(count)]


def _sampled_count(num_frames: int, sampling_stride: int, min_fast_frames: int) -> int:
    if sampling_stride <= 1 or num_frames < min_fast_frames:
        return num_frames
    return max(num_frames // sampling_stride, min_fast_frames)


def _window_count(count: int, temporal_stride: int, min_fast_frames: int) -> int:
    if temporal_stride <= 1:
        return count
    full = count // temporal_stride
    return full if full >= min_fast_frames else min(count, min_fast_frames)


def temporal_windows(frames: list[int], temporal_stride: int, min_fast_frames: int) -> list[tuple[int, ...]]:
    """Group sampled frames into the windows that one fast frame averages each."""
    count = len(frames)
    bins = _window_count(count, temporal_stride, min_fast_frames)
    if temporal_stride <= 1 or count // temporal_stride >= min_fast_frames:
        return [tuple(frames[i * temporal_stride : (i + 1) * temporal_stride]) for i in range(bins)]
    return [tuple(frames[i * count // bins : -(-(i + 1) * count // bins)]) for i in range(bins)]


def check_pool_arguments(frame_counts: Sequence[int], grid: Sequence[int], options: PoolOptions) -> None:
    """Raises:
    ValueError: a count, stride or grid below 1; a video on a non-square grid; a stride larger than the grid.
    """
    if not len(frame_counts):
        raise ValueError("frame_counts: got an empty list, want one frame count a video")
    for i, count in enumerate(frame_counts):
        if count < 1:
            raise ValueError(f"frame_counts[{i}]: got {count}, want >= 1 (a video needs a frame)")
    height, width = grid
    if height < 1 or width < 1:
        raise ValueError(f"grid: got {tuple(grid)}, want (H, W) both >= 1")
    for name, value in zip(PoolOptions._fields, options, strict=True):
        if value < 1:
            raise ValueError(f"{name}: got {value}, want >= 1")
    for count in frame_counts:
        if count > 1 and height != width:
            raise ValueError(
                f"grid: got {tuple(grid)} for a video of {count} frames, want H == W (as the official models)"
            )
        pool, slow_grid = _slow_grid_of(count, grid, options)
        if pool > height or pool > width:
            raise ValueError(f"pool_stride: got {pool}, want <= the grid {tuple(grid)}")
        if options.spatial_stride > slow_grid[0] or options.spatial_stride > slow_grid[1]:
            raise ValueError(f"spatial_stride: got {options.spatial_stride}, want <= the slow grid {slow_grid}")


def _slow_grid_of(num_frames: int, grid: Sequence[int], options: PoolOptions) -> tuple[int, tuple[int, int]]:
    """(pool stride, slow grid) of a video; an image's tokens all stay."""
    pool = 1 if num_frames == 1 else options.pool_stride
    return pool, (grid[0] // pool, grid[1] // pool)


def token_counts(num_frames: int, grid: Sequence[int], options: PoolOptions) -> tuple[int, int]:
    """(slow, fast) tokens of one video: arithmetic alone, so that lengths may be symbolic (torch.compile)."""
    _, (height, width) = _slow_grid_of(num_frames, grid, options)
    fast_frames, stride = _fast_frame_count(num_frames, options), options.spatial_stride
    return num_frames * height * width, fast_frames * (height // stride) * (width // stride)


def _fast_frame_count(num_frames: int, options: PoolOptions) -> int:
    if num_frames == 1:
        return 1
    sampled = _sampled_count(num_frames, options.sampling_stride, options.min_fast_frames)
    return _window_count(sampled, options.temporal_stride, options.min_fast_frames)


def describe_pool(
    plan: PoolPlan, grid: tuple[int, ...] | None = None, workspace_bytes: int | None = 0, **tiles: int | str | bool
) -> CallPlan:
    """What a call is cut into by ``plan``, on any backend, and by a backend's own ``tiles``."""
    windows = [video.windows for video in plan.videos]
    idle = plan.num_items - sum(map(len, windows))
    cells_h, cells_w = plan.cells
    table = {
        "items": plan.num_items,
        "entries": idle + sum(len(window) for each in windows for window in each),
        "cells": f"{cells_h} x {cells_w}",
        "slow_tokens": plan.num_slow,
        "fast_tokens": plan.num_fast,
    }
    return CallPlan(tiles=table | tiles, grid=grid, workspace_bytes=workspace_bytes)


def make_pool_plan(frame_counts: tuple[int, ...], grid: tuple[int, int], *strides: int) -> PoolPlan:
    """Resolve every branch of the official pooling for a batch of videos.

    Everything given is a Python int, ``strides`` in the order of ``PoolOptions``: the plan is kept by their values.

    Raises:
        ValueError: as ``check_pool_arguments``.
    """
    key = (frame_counts, grid, strides)
    found = _plans.get(key)
    if found is None:
        plan = _make_pool_plan(frame_counts, grid, PoolOptions(*strides))
        found = _plans.put(key, plan, plan.num_bytes)
    return found


def _make_pool_plan(frame_counts: tuple[int, ...], grid: tuple[int, int], options: PoolOptions) -> PoolPlan:
    check_pool_arguments(frame_counts, grid, options)
    videos = []
    first_frame = first_slow = first_fast = num_items = 0
    stride, cells = options.spatial_stride, (0, 0)
    for count in frame_counts:
        pool, slow_grid = _slow_grid_of(count, grid, options)
        video = VideoPlan(
            first_frame=first_frame,
            num_frames=count,
            num_windows=_fast_frame_count(count, options),
            pool_stride=pool,
            slow_grid=slow_grid,
            fast_grid=(slow_grid[0] // stride, slow_grid[1] // stride),
            first_slow=first_slow,
            first_fast=first_fast,
            options=options,
        )
        videos.append(video)
        first_frame += video.num_frames
        first_slow += video.num_slow
        first_fast += video.num_fast
        num_items += video.num_windows + count - len({t for window in video.windows for t in window})
        cells = (max(cells[0], -(-slow_grid[0] // stride)), max(cells[1], -(-slow_grid[1] // stride)))
    return PoolPlan(grid, stride, tuple(videos), first_slow, first_fast, num_items, cells)
