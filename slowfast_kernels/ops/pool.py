"""slowfast_pool: one pass over the vision features that writes the slow tokens (normalised) and the fast tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import eager
from ..heuristics import OpCall
from ..pool_plan import PoolOptions, PoolPlan, check_pool_arguments, make_pool_plan, token_counts
from . import checks
from .dispatch import (
    backend_for,
    check_backend_name,
    compute_capability,
    needs_formula,
    refuse_tangents,
    run_op,
)


class PooledTokens(NamedTuple):
    """slow [Ns, C], cu_slow [B + 1] int32, fast [Nf, C], cu_fast [B + 1] int32."""

    slow: Tensor
    cu_slow: Tensor
    fast: Tensor
    cu_fast: Tensor


def slowfast_pool(
    frames: Tensor,
    frame_counts: Sequence[int],
    grid: tuple[int, int],
    *,
    pool_stride: int = 1,
    sampling_stride: int = 1,
    temporal_stride: int = 1,
    spatial_stride: int = 1,
    min_fast_frames: int = 1,
    norm_eps: float | None = None,
    backend: str | None = None,
) -> PooledTokens:
    """Slow and fast tokens of a batch of videos (``split_slow_fast_tokens`` of arXiv 2504.01328, section 3).

    Args:
        frames: projected vision features [sum(frame_counts), H * W, C], frame-major; float32, bfloat16 or float16.
        frame_counts: frames of each video, B numbers >= 1; a video of one frame is an image.
        grid: (H, W) of a frame's tokens; videos need H == W.
        pool_stride: spatial average pooling that makes slow tokens (``mm_video_pooling_stride``); not on images.
        sampling_stride: keep one frame in so many for the fast tokens (``fast_token_temporal_sampling_stride``).
        temporal_stride: average the kept frames in groups of so many (``fast_token_temporal_stride``).
        spatial_stride: spatial average pooling from slow to fast tokens (``fast_token_spatial_stride``).
        min_fast_frames: fewest fast frames a video is reduced to, if it has them.
        norm_eps: if given, the slow tokens are divided by their root mean square: x / sqrt(mean(x^2) + norm_eps),
            without a weight. Fast tokens are never normalised.
        backend: "cuda", "triton", "cpu", "eager", or None (automatic).

    Returns:
        PooledTokens(slow [Ns, C], cu_slow [B + 1], fast [Nf, C], cu_fast [B + 1]); prefix sums are int32.

    Raises:
        ValueError: a wrong shape, count or stride (a stride larger than the grid, a non-square video grid).
        TypeError: a wrong dtype.
        NotImplementedError: the backend asked for cannot run this call.
    """
    counts = checks.as_ints("frame_counts", frame_counts, "a sequence of integers, one a video")
    sides = checks.as_ints("grid", grid, "(H, W)")
    given = (pool_stride, sampling_stride, temporal_stride, spatial_stride, min_fast_frames)
    options = [checks.as_int(name, value) for name, value in zip(_OPTIONS, given, strict=True)]
    eps = None if norm_eps is None else checks.as_float("norm_eps", norm_eps)
    check_backend_name(backend)
    if needs_formula(frames):
        return PooledTokens(*eager.pool(frames, _plan(frames, counts, sides, options, eps), eps))
    arguments = (counts, sides, *options, eps, backend)
    return PooledTokens(*run_op(torch.ops.slowfast.pool, _run, _check_call, (frames,), *arguments))


_OPTIONS = PoolOptions._fields


def _check(frames, frame_counts, grid, options, norm_eps) -> None:
    """Everything, without a plan: lengths may be symbolic."""
    _check_kind(frames, grid)
    check_pool_arguments(frame_counts, grid, PoolOptions(*options))
    _check_fit(frames, frame_counts, grid, norm_eps)


def _plan(frames, frame_counts, grid, options, norm_eps) -> PoolPlan:
    """The same, and the plan, which checks counts and strides once and is kept by them."""
    _check_kind(frames, grid)
    plan = make_pool_plan(tuple(frame_counts), tuple(grid), *options)
    _check_fit(frames, frame_counts, grid, norm_eps)
    return plan


def _check_kind(frames, grid) -> None:
    checks.check_tensor("frames", frames, 3, "[sum(frame_counts), H*W, C]")
    checks.check_float("frames", frames)
    if len(grid) != 2:
        checks.fail("grid", grid, "(H, W)")


def _check_fit(frames, frame_counts, grid, norm_eps) -> None:
    if frames.shape[0] != sum(frame_counts):
        checks.fail("frames", frames, f"{sum(frame_counts)} frames (the sum of frame_counts)")
    if frames.shape[1] != grid[0] * grid[1]:
        checks.fail("frames", frames, f"{grid[0] * grid[1]} tokens a frame (grid {tuple(grid)})")
    if frames.shape[2] < 1:
        checks.fail("frames", frames, "at least one channel")
    if norm_eps is not None:
        checks.check_finite("norm_eps", norm_eps)
        if norm_eps < 0:
            checks.fail("norm_eps", norm_eps, ">= 0 or None")


def _check_call(frames, frame_counts, grid, pool, sampling, temporal, spatial, minimum, norm_eps, backend) -> None:
    _check(frames, frame_counts, grid, (pool, sampling, temporal, spatial, minimum), norm_eps)


def _run(
    frames: Tensor,
    frame_counts: Sequence[int],
    grid: Sequence[int],
    pool_stride: int,
    sampling_stride: int,
    temporal_stride: int,
    spatial_stride: int,
    min_fast_frames: int,
    norm_eps: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    refuse_tangents(frames)
    options = (pool_stride, sampling_stride, temporal_stride, spatial_stride, min_fast_frames)
    plan = _plan(frames, frame_counts, grid, options, norm_eps)
    call = OpCall("slowfast_pool", frames.device.type, frames.dtype, compute_capability(frames.device))
    return backend_for(call, frames.device, backend).pool(frames, plan, norm_eps)


_pool_op = torch.library.custom_op("slowfast::pool", _run, mutates_args=())


@_pool_op.register_fake
def _pool_fake(frames, frame_counts, grid, pool, sampling, temporal, spatial, minimum, norm_eps, backend):
    options = PoolOptions(pool, sampling, temporal, spatial, minimum)
    _check(frames, frame_counts, grid, options, norm_eps)
    prefix = frames.new_empty(len(frame_counts) + 1, dtype=torch.int32)
    totals = (sum(column) for column in zip(*(token_counts(n, grid, options) for n in frame_counts), strict=True))
    slow, fast = (frames.new_empty(n, frames.shape[2]) for n in totals)
    return slow, prefix, fast, torch.empty_like(prefix)


@torch.library.custom_op("slowfast::pool_backward", mutates_args=())
def _pool_backward_op(
    grad_slow: Tensor,
    grad_fast: Tensor,
    frames: Tensor,
    frame_counts: Sequence[int],
    grid: Sequence[int],
    options: Sequence[int],
    norm_eps: float | None,
) -> Tensor:
    refuse_tangents(grad_slow, grad_fast, frames)
    plan = make_pool_plan(tuple(frame_counts), tuple(grid), *options)
    return eager.pool_backward(grad_slow, grad_fast, frames, plan, norm_eps)


@_pool_backward_op.register_fake
def _(grad_slow, grad_fast, frames, frame_counts, grid, options, norm_eps):
    return frames.new_empty(frames.shape)


def _setup_context(ctx, inputs, output):
    frames, ctx.frame_counts, ctx.grid, *options, ctx.norm_eps, _ = inputs
    ctx.options = options
    ctx.save_for_backward(frames)
    ctx.mark_non_differentiable(output[1], output[3])


def _backward(ctx, grad_slow, _cu_slow, grad_fast, _cu_fast):
    (frames,) = ctx.saved_tensors
    arguments = (frames, ctx.frame_counts, ctx.grid, ctx.options, ctx.norm_eps)
    grad = torch.ops.slowfast.pool_backward(grad_slow, grad_fast, *arguments)
    return grad, *[None] * 9


_pool_op.register_autograd(_backward, setup_context=_setup_context)
