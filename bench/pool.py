"""Slow-fast pooling with the slow tokens' RMS norm, against the best PyTorch composition and torch.compile of it.

Floor: vision features read once, slow and fast tokens written once, over the copy bandwidth. Its gradients are measured
with the norm and without, as training pools: the tokens' gradients read, the features' written, and through a norm the
features read.
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

from . import backward
from .attention import our_backends
from .backward import BACKWARD, STEP, Choice, Competitor, Way, differentiated
from .peers import compositions
from .registry import POOL
from .runner import Contender, Runner, Variant, relative_error
from .selection import parse_pool, select
from .shapes import BYTES, PoolShape, pool_backward_cost, pool_cost
from .timing import num_input_sets

OP = "pool"
EPS = 1e-6


def pool_options(shape: PoolShape, norm_eps: float | None = EPS) -> dict[str, object]:
    """Of ``slowfast_pool``, beside the frames."""
    return {
        "frame_counts": list(shape.frames),
        "grid": shape.grid,
        "pool_stride": shape.pool_stride,
        "sampling_stride": shape.sampling_stride,
        "temporal_stride": shape.temporal_stride,
        "spatial_stride": shape.spatial_stride,
        "min_fast_frames": shape.min_fast_frames,
        "norm_eps": norm_eps,
    }


def pool_call(shape: PoolShape, frames: Tensor, backend: str) -> Callable[[], sk.PooledTokens]:
    return partial(sk.slowfast_pool, frames, **pool_options(shape), backend=backend)


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
    frames: Tensor, plan: PoolPlan, indices: list, cells: Callable[[Tensor, int], Tensor], normed: bool = True
) -> tuple[Tensor, Tensor]:
    """(slow, fast) by avg_pool or mean, F.rms_norm and cat."""
    channels, slow, fast = frames.shape[-1], [], []
    for video, index in zip(plan.videos, indices, strict=True):
        tokens = frames[video.first_frame : video.first_frame + video.num_frames].unflatten(1, plan.grid)
        if video.pool_stride > 1:
            tokens = cells(tokens, video.pool_stride)
        flat = tokens.reshape(-1, channels)
        slow.append(F.rms_norm(flat, (channels,), eps=EPS) if normed else flat)
        averaged = _fast_frames(tokens, video, index)
        if plan.spatial_stride > 1:
            averaged = cells(averaged, plan.spatial_stride)
        fast.append(averaged.reshape(-1, channels))
    return (slow[0], fast[0]) if len(slow) == 1 else (torch.cat(slow), torch.cat(fast))


# ---------------------------------------------------------------------------------------------- the run


_CELLS = {"mean": _cells_by_mean, "avg_pool2d": _cells_by_avg_pool}


def _ways(name: str) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Those of a peer that are worth a try; a compiler makes the same of either."""
    return {"mean": _cells_by_mean} if name == "torch-compile" else _CELLS


def run(runner: Runner) -> None:
    _run(runner, OP, _run_shape)


def run_backward(runner: Runner) -> None:
    _run(runner, f"{OP}-{STEP}", _run_backward)


def _run(runner: Runner, op: str, run_shape: Callable) -> None:
    shapes = select(POOL, runner.shapes, parse_pool, not runner.is_gpu)
    if not shapes:
        return
    backends, peers = our_backends(runner, op), compositions(runner, op)
    for shape in shapes:
        for dtype in runner.dtypes:
            run_shape(runner, shape, dtype, backends, peers)


def _make_sets(runner: Runner, shape: PoolShape, dtype: str) -> list[Tensor]:
    size = (sum(shape.frames), shape.grid[0] * shape.grid[1], shape.channels)
    count = num_input_sets(size[0] * size[1] * size[2] * BYTES[dtype], runner.journal.meta["cache_bytes"])
    return [torch.randn(size, device=runner.device, dtype=getattr(torch, dtype)) for _ in range(count)]


def _run_shape(runner: Runner, shape: PoolShape, dtype: str, backends: list[str], peers: list[str]) -> None:
    plan, cost = shape.plan, pool_cost(shape, dtype)
    if all(runner.is_done(OP, shape.name, dtype, name) for name in (*backends, *peers)):
        return
    sets = _make_sets(runner, shape, dtype)
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
        variants = [Variant(label, partial(build_theirs, cells, compiled)) for label, cells in _ways(name).items()]
        return Contender(name, variants, cost)

    runner.compare(OP, shape.name, dtype, [*map(ours, backends), *map(theirs, peers)])


# --------------------------------------------------------------------------------------------- gradients


def _run_backward(runner: Runner, shape: PoolShape, dtype: str, backends: list[str], peers: list[str]) -> None:
    sets = _make_sets(runner, shape, dtype)
    for norm_eps in (None, EPS):
        _run_backward_of(runner, shape, norm_eps, dtype, sets, backends, peers)


def _run_backward_of(
    runner: Runner,
    shape: PoolShape,
    norm_eps: float | None,
    dtype: str,
    sets: list[Tensor],
    backends: list[str],
    peers: list[str],
) -> None:
    plan, options, name = shape.plan, pool_options(shape, norm_eps), shape.name + " normed" * (norm_eps is not None)
    mine = backward.choices("slowfast_pool", backends, sets[0], **options)
    if backward.is_done(runner, OP, name, dtype, [*(choice.who for choice in mine), *peers]):
        return
    sizes = [(count, shape.channels) for count in (plan.num_slow, plan.num_fast)]
    upstream = [[torch.randn(size, device=x.device, dtype=x.dtype) for size in sizes] for x in sets]

    def passes(function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> list[backward.Passes]:
        return [differentiated(function, [x], grads) for x, grads in zip(sets, upstream, strict=True)]

    def ours(choice: Choice) -> Competitor:
        def pool(frames: Tensor) -> tuple[Tensor, Tensor]:
            pooled = sk.slowfast_pool(frames, **options, backend=choice.backend)
            return pooled.slow, pooled.fast

        return backward.ours(choice, partial(passes, pool))

    indices = window_indices(plan, runner.device)

    def theirs(name: str) -> Competitor:
        def build(cells: Callable, part: str):
            function = backward.compiled(torch_pool, part) if name == "torch-compile" else torch_pool
            fixed = {"plan": plan, "indices": indices, "cells": cells, "normed": norm_eps is not None}
            return passes(partial(function, **fixed)), tuple

        return Competitor(name, lambda part: [Way(label, partial(build, way)) for label, way in _ways(name).items()])

    backward_cost = pool_backward_cost(shape, dtype, norm_eps is not None)
    costs = {STEP: pool_cost(shape, dtype, norm_eps is not None) + backward_cost, BACKWARD: backward_cost}
    # as in the forward pass: a reference in a wider type would be a copy of the largest input
    slow, _, fast, _ = eager.pool(sets[0], plan, norm_eps)
    reference = slow, fast, eager.pool_backward(sets[0], *upstream[0], plan, norm_eps)
    backward.compare(runner, OP, name, dtype, [*map(ours, mine), *map(theirs, peers)], reference, costs)
