"""Slow-fast pooling with the slow tokens' RMS norm, against the best PyTorch composition and torch.compile of it.

Floor: vision features read once, slow and fast tokens written once, over the copy bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import slowfast_kernels as sk
from slowfast_kernels import eager
from slowfast_kernels.pool_plan import PoolPlan, VideoPlan

from .attention import our_backends
from .runner import Contender, Runner, Variant, relative_error
from .selection import parse_pool, select
from .shapes import BYTES, POOL, PoolShape, pool_cost
from .timing import num_input_sets

OP = "pool"
EPS = 1e-6


def pool_call(shape: PoolShape, frames: Tensor, backend: str) -> Callable[[], sk.PooledTokens]:
    return partial(
        sk.slowfast_pool,
        frames,
        list(shape.frames),
        shape.grid,
        pool_stride=shape.pool_stride,
        sampling_stride=shape.sampling_stride,
        temporal_stride=shape.temporal_stride,
        spatial_stride=shape.spatial_stride,
        min_fast_frames=shape.min_fast_frames,
        norm_eps=EPS,
        backend=backend,
    )


# ------------------------------------------------------------------------- the same in PyTorch's own ops


def _cells_by_mean(x: Tensor, stride: int) -> Tensor:
    """[T, h, w, C] -> [T, h // stride, w // stride, C] as one mean over two axes, channels last throughout."""
    frames, height, width, channels = x.shape
    x = x[:, : height // stride * stride, : width // stride * stride]
    return x.reshape(frames, height // stride, stride, width // stride, stride, channels).mean((2, 4))


def _cells_by_avg_pool(x: Tensor, stride: int) -> Tensor:
    """The same through F.avg_pool2d; the permuted view is a channels-last image, so nothing is copied."""
    return F.avg_pool2d(x.permute(0, 3, 1, 2), stride).permute(0, 2, 3, 1)


def window_indices(plan: PoolPlan, device: torch.device) -> list[Tensor | list[Tensor] | None]:
    """Per video, what gathers its windows: None where they tile it, one index [n, width], or an index a window.

    Made outside the timed region: an upload would cost the composition more than its arithmetic, and no graph holds it.
    """
    indices: list[Tensor | list[Tensor] | None] = []
    for video in plan.videos:
        width = len(video.windows[0])
        if video.windows == tuple(tuple(range(i * width, (i + 1) * width)) for i in range(len(video.windows))):
            indices.append(None)
        elif all(len(window) == width for window in video.windows):
            indices.append(torch.tensor(video.windows, device=device))
        else:
            indices.append([torch.tensor(window, device=device) for window in video.windows])
    return indices


def _fast_frames(tokens: Tensor, video: VideoPlan, index: Tensor | list[Tensor] | None) -> Tensor:
    count, width = len(video.windows), len(video.windows[0])
    if index is None:
        return tokens[: count * width].unflatten(0, (count, width)).mean(1) if width > 1 else tokens[:count]
    if isinstance(index, list):
        return torch.stack([tokens.index_select(0, window).mean(0) for window in index])
    return tokens[index].mean(1) if width > 1 else tokens.index_select(0, index[:, 0])


def torch_pool(
    frames: Tensor, plan: PoolPlan, indices: list, cells: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """(slow, fast) by avg_pool or mean, F.rms_norm and cat."""
    channels, slow, fast = frames.shape[-1], [], []
    for video, index in zip(plan.videos, indices, strict=True):
        tokens = frames[video.first_frame : video.first_frame + video.num_frames].unflatten(1, plan.grid)
        if video.pool_stride > 1:
            tokens = cells(tokens, video.pool_stride)
        slow.append(F.rms_norm(tokens.reshape(-1, channels), (channels,), eps=EPS))
        averaged = _fast_frames(tokens, video, index)
        if plan.spatial_stride > 1:
            averaged = cells(averaged, plan.spatial_stride)
        fast.append(averaged.reshape(-1, channels))
    return (slow[0], fast[0]) if len(slow) == 1 else (torch.cat(slow), torch.cat(fast))


# ---------------------------------------------------------------------------------------------- the run


def run(runner: Runner) -> None:
    shapes = select(POOL, runner.shapes, parse_pool, not runner.is_gpu)
    if not shapes:
        return
    backends = our_backends(runner, OP)
    if not runner.is_gpu and runner.wants_peer("torch-compile"):
        runner.absent(OP, "torch-compile", "timed on a GPU only (its C++ compilation would outlast the run)")
    for shape in shapes:
        for dtype in runner.dtypes:
            _run_shape(runner, shape, dtype, backends)


def _run_shape(runner: Runner, shape: PoolShape, dtype: str, backends: list[str]) -> None:
    plan, cost = shape.plan, pool_cost(shape, dtype)
    peers = [
        name for name in ("torch", "torch-compile") if runner.wants_peer(name) and (runner.is_gpu or name == "torch")
    ]
    if all(runner.is_done(OP, shape.name, dtype, name) for name in (*backends, *peers)):
        return
    size = (sum(shape.frames), shape.grid[0] * shape.grid[1], shape.channels)
    count = num_input_sets(size[0] * size[1] * size[2] * BYTES[dtype], runner.journal.meta["cache_bytes"])
    sets = [torch.randn(size, device=runner.device, dtype=getattr(torch, dtype)) for _ in range(count)]
    # The reference in float32 would be a copy of the largest input; the eager op in the input's dtype is the oracle.
    slow, _, fast, _ = eager.pool(sets[0], plan, EPS)
    indices = window_indices(plan, runner.device)

    def error(got_slow: Tensor, got_fast: Tensor) -> float:
        return max(relative_error(got_slow, slow), relative_error(got_fast, fast))

    def ours(backend: str) -> Contender:
        def build():
            calls = [pool_call(shape, frames, backend) for frames in sets]

            def check() -> float:
                pooled = calls[0]()
                return error(pooled.slow, pooled.fast)

            return calls, check

        # eager uploads the list of a window's frames in each call, so no graph can hold it
        return Contender(backend, [Variant("", build)], cost, "ours", capturable=backend != "eager")

    def build_theirs(cells: Callable, compiled: bool):
        function = torch_pool
        if compiled:
            torch.compiler.reset()
            function = torch.compile(torch_pool, dynamic=False)
        calls = [partial(function, frames, plan, indices, cells) for frames in sets]
        return calls, lambda: error(*calls[0]())

    def theirs(name: str) -> Contender:
        compiled = name == "torch-compile"
        ways = {"mean": _cells_by_mean} if compiled else {"mean": _cells_by_mean, "avg_pool2d": _cells_by_avg_pool}
        variants = [Variant(label, partial(build_theirs, cells, compiled)) for label, cells in ways.items()]
        return Contender(name, variants, cost)

    runner.compare(OP, shape.name, dtype, [*map(ours, backends), *map(theirs, peers)])
