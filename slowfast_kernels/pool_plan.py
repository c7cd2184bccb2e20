"""Which frames and cells make which slow and fast tokens: the pooling rules, in Python, before any kernel.

``split_slow_fast_tokens`` of arXiv 2504.01328 is a chain of PyTorch calls whose branches depend only on frame
counts and strides. Those branches are resolved here, once, into a table; every backend executes the same table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch


@dataclass(frozen=True)
class VideoPlan:
    """One video (or image, ``num_frames == 1``) of the batch."""

    first_frame: int
    num_frames: int
    pool_stride: int  # spatial pooling that makes slow tokens; 1 for an image
    slow_grid: tuple[int, int]
    fast_grid: tuple[int, int]
    first_slow: int
    first_fast: int
    windows: tuple[tuple[int, ...], ...]  # per fast frame: the video's own frame indices that it averages

    @property
    def num_slow(self) -> int:
        return self.num_frames * self.slow_grid[0] * self.slow_grid[1]

    @property
    def num_fast(self) -> int:
        return len(self.windows) * self.fast_grid[0] * self.fast_grid[1]


@dataclass(frozen=True)
class PoolPlan:
    """All videos of a call, and the work table that kernels read (layout: ``PoolParams`` in csrc/params.h)."""

    grid: tuple[int, int]
    spatial_stride: int
    videos: tuple[VideoPlan, ...]

    @property
    def num_slow(self) -> int:
        return sum(video.num_slow for video in self.videos)

    @property
    def num_fast(self) -> int:
        return sum(video.num_fast for video in self.videos)

    @cached_property
    def cu_slow(self) -> list[int]:
        return [video.first_slow for video in self.videos] + [self.num_slow]

    @cached_property
    def cu_fast(self) -> list[int]:
        return [video.first_fast for video in self.videos] + [self.num_fast]

    @cached_property
    def cells(self) -> tuple[int, int]:
        """Largest number of (vertical, horizontal) cells of ``spatial_stride`` slow tokens, partial ones counted."""
        stride = self.spatial_stride
        heights, widths = zip(*(video.slow_grid for video in self.videos), strict=True)
        return -(-max(heights) // stride), -(-max(widths) // stride)

    @cached_property
    def _rows(self) -> tuple[list[list[int]], list[list[int]]]:
        items, entries = [], []
        for video in self.videos:
            slow_area = video.slow_grid[0] * video.slow_grid[1]
            fast_area = video.fast_grid[0] * video.fast_grid[1]
            written = set()
            idle = set(range(video.num_frames)) - {t for window in video.windows for t in window}
            groups = [(w, video.first_fast + i * fast_area) for i, w in enumerate(video.windows)]
            groups += [((t,), -1) for t in sorted(idle)]
            for frames, fast_base in groups:
                grids = (*video.slow_grid, *video.fast_grid)
                items.append([len(entries), len(frames), fast_base, video.pool_stride, *grids])
                for t in frames:
                    slow_base = -1 if t in written else video.first_slow + t * slow_area
                    written.add(t)
                    entries.append([video.first_frame + t, slow_base])
        return items, entries

    @property
    def num_items(self) -> int:
        return len(self._rows[0])

    def tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(items [n, 8], entries [m, 2], cu_slow [B + 1], cu_fast [B + 1]) as int32 on ``device``, uploaded once.

        The tensors are shared between calls: copy ``cu_*`` before handing them to a user.
        """
        return _tables_on(self, device)


@lru_cache(maxsize=64)
def _tables_on(plan: PoolPlan, device: torch.device) -> tuple[torch.Tensor, ...]:
    rows = (*plan._rows, plan.cu_slow, plan.cu_fast)
    return tuple(torch.tensor(r, dtype=torch.int32, device=device) for r in rows)


def sample_fast_frames(num_frames: int, sampling_stride: int, min_fast_frames: int) -> list[int]:
    """Frames kept by ``temporal_sampling_stride``.

    The official code steps by a floating-point stride; for 164 frames and more that can differ from integer
    arithmetic, so the same floating-point product is taken here.
    """
    if sampling_stride <= 1 or num_frames < min_fast_frames:
        return list(range(num_frames))
    count = max(num_frames // sampling_stride, min_fast_frames)
    step = num_frames / count
    return [int(i * step) for i in range(count)]


def temporal_windows(frames: list[int], temporal_stride: int, min_fast_frames: int) -> list[tuple[int, ...]]:
    """Group sampled frames into the windows that one fast frame averages each."""
    count = len(frames)
    if temporal_stride <= 1:
        return [(t,) for t in frames]
    if count // temporal_stride >= min_fast_frames:
        full = count // temporal_stride
        return [tuple(frames[i * temporal_stride : (i + 1) * temporal_stride]) for i in range(full)]
    bins = min(count, min_fast_frames)
    return [tuple(frames[i * count // bins : -(-(i + 1) * count // bins)]) for i in range(bins)]


@lru_cache(maxsize=256)
def make_pool_plan(
    frame_counts: tuple[int, ...],
    grid: tuple[int, int],
    pool_stride: int,
    sampling_stride: int,
    temporal_stride: int,
    spatial_stride: int,
    min_fast_frames: int,
) -> PoolPlan:
    """Resolve every branch of the official pooling for a batch of videos.

    Raises:
        ValueError: a count, stride or grid below 1; a video on a non-square grid; a stride larger than the grid.
    """
    if not frame_counts:
        raise ValueError("frame_counts: got an empty list, want one frame count a video")
    for i, count in enumerate(frame_counts):
        if count < 1:
            raise ValueError(f"frame_counts[{i}]: got {count}, want >= 1 (a video needs a frame)")
    height, width = grid
    if height < 1 or width < 1:
        raise ValueError(f"grid: got {grid}, want (H, W) both >= 1")
    strides = {
        "pool_stride": pool_stride,
        "sampling_stride": sampling_stride,
        "temporal_stride": temporal_stride,
        "spatial_stride": spatial_stride,
        "min_fast_frames": min_fast_frames,
    }
    for name, value in strides.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, want >= 1")

    videos = []
    first_frame = first_slow = first_fast = 0
    for count in frame_counts:
        is_image = count == 1
        if not is_image and height != width:
            raise ValueError(f"grid: got {grid} for a video of {count} frames, want H == W (as the official models)")
        pool = 1 if is_image else pool_stride
        if pool > min(grid):
            raise ValueError(f"pool_stride: got {pool}, want <= the grid {grid}")
        slow_grid = (height // pool, width // pool)
        if spatial_stride > min(slow_grid):
            raise ValueError(f"spatial_stride: got {spatial_stride}, want <= the slow grid {slow_grid}")
        if is_image:
            windows = [(0,)]
        else:
            sampled = sample_fast_frames(count, sampling_stride, min_fast_frames)
            windows = temporal_windows(sampled, temporal_stride, min_fast_frames)
        video = VideoPlan(
            first_frame=first_frame,
            num_frames=count,
            pool_stride=pool,
            slow_grid=slow_grid,
            fast_grid=(slow_grid[0] // spatial_stride, slow_grid[1] // spatial_stride),
            first_slow=first_slow,
            first_fast=first_fast,
            windows=tuple(windows),
        )
        videos.append(video)
        first_frame += video.num_frames
        first_slow += video.num_slow
        first_fast += video.num_fast
    return PoolPlan(grid=grid, spatial_stride=spatial_stride, videos=tuple(videos))
