"""slowfast_pool: one pass over the vision features that writes the slow tokens (normalised) and the fast tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import eager, flops, observe
from ..call_plan import CallPlan
from ..calls import BackwardTensors, PoolCallOptions, PoolTensors
from ..heuristics.backends import OpCall
from ..pool_plan import PoolOptions, check_pool_arguments, describe_pool, token_counts
from . import checks
from .dispatch import backend_for, backend_module, check_backend_name, compute_capability
from .op import Op


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
    strides = (pool_stride, sampling_stride, temporal_stride, spatial_stride, min_fast_frames)
    return PooledTokens(*_OP(PoolTensors(frames), _by_value(frame_counts, grid, *strides, norm_eps, backend)))


def _by_value(
    frame_counts: object,
    grid: object,
    pool_stride: object,
    sampling_stride: object,
    temporal_stride: object,
    spatial_stride: object,
    min_fast_frames: object,
    norm_eps: object,
    backend: str | None,
) -> PoolCallOptions:
    counts = checks.as_ints("frame_counts", frame_counts, "a sequence of integers, one a video")
    sides = checks.as_ints("grid", grid, "(H, W)")
    given = (pool_stride, sampling_stride, temporal_stride, spatial_stride, min_fast_frames)
    strides = [checks.as_int(name, value) for name, value in zip(PoolOptions._fields, given, strict=True)]
    eps = None if norm_eps is None else checks.as_float("norm_eps", norm_eps)
    check_backend_name(backend)
    return PoolCallOptions(tuple(counts), tuple(sides), *strides, eps, backend)


class _Pool(Op):
    """Its call is not kept a signature: what it would keep is the plan, which is kept by the call's numbers."""

    name, torch_name = "slowfast_pool", "pool"
    tensors, options = PoolTensors, PoolCallOptions
    returns = "(Tensor, Tensor, Tensor, Tensor)"
    differentiable = ("frames",)
    has_gradient = (0, 2)
    by_value = staticmethod(_by_value)

    def check(self, tensors: PoolTensors, options: PoolCallOptions) -> None:
        """Without a plan: lengths may be symbolic."""
        _check_kind(tensors.frames, options)
        check_pool_arguments(options.frame_counts, options.grid, options.strides)
        _check_fit(tensors.frames, options)

    def data_rules(self, tensors: PoolTensors) -> tuple[checks.DataRule, ...]:
        return ()  # features may be anything

    def facts(self, tensors: PoolTensors, options: PoolCallOptions) -> OpCall:
        device = tensors.frames.device
        return OpCall(self.name, device.type, tensors.frames.dtype, compute_capability(device))

    def run(
        self, tensors: PoolTensors, options: PoolCallOptions, read: tuple | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (frames,) = tensors
        _check_kind(frames, options)
        plan = options.plan  # made, it has checked counts and strides
        _check_fit(frames, options)
        backend = backend_for(self.facts(tensors, options), frames.device, options.backend)
        pool = backend_module(backend).pool
        if not observe.IS_ON:
            return pool(frames, plan, options.norm_eps)
        return self.observed(lambda tensors: pool(tensors.frames, plan, options.norm_eps), tensors, options)(tensors)

    def plan(self, backend: str, tensors: PoolTensors, options: PoolCallOptions) -> CallPlan:
        if backend == "eager":
            return describe_pool(options.plan, workspace_bytes=None)
        return backend_module(backend).pool_plan_of(tensors.frames, options.plan)

    def formula(self, tensors: PoolTensors, options: PoolCallOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return eager.pool(tensors.frames, options.plan, options.norm_eps)

    def fake(self, tensors: PoolTensors, options: PoolCallOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        frames, counts = tensors.frames, options.frame_counts
        prefix = frames.new_empty(len(counts) + 1, dtype=torch.int32)
        tokens = (token_counts(n, options.grid, options.strides) for n in counts)
        slow, fast = (frames.new_empty(sum(column), frames.shape[2]) for column in zip(*tokens, strict=True))
        return slow, prefix, fast, torch.empty_like(prefix)

    def gradients(self, call: BackwardTensors, options: PoolCallOptions, needs: tuple[bool, ...]) -> tuple[Tensor]:
        return (eager.pool_backward(call.inputs.frames, *call.grads, options.plan, options.norm_eps),)

    def flops(self, shapes: PoolTensors, options: PoolCallOptions) -> int:
        return flops.pool(options.plan, shapes.frames[2], options.norm_eps is not None)

    def backward_flops(self, shapes: PoolTensors, options: PoolCallOptions) -> int:
        return flops.pool_backward(options.plan, shapes.frames[2], options.norm_eps is not None)


def _check_kind(frames: Tensor, options: PoolCallOptions) -> None:
    checks.check_tensor("frames", frames, 3, "[sum(frame_counts), H*W, C]")
    checks.check_float("frames", frames)
    if len(options.grid) != 2:
        checks.fail("grid", list(options.grid), "(H, W)")


def _check_fit(frames: Tensor, options: PoolCallOptions) -> None:
    total, (height, width), eps = sum(options.frame_counts), options.grid, options.norm_eps
    if frames.shape[0] != total:
        checks.fail("frames", frames, f"{total} frames (the sum of frame_counts)")
    if frames.shape[1] != height * width:
        checks.fail("frames", frames, f"{height * width} tokens a frame (grid {(height, width)})")
    if frames.shape[2] < 1:
        checks.fail("frames", frames, "at least one channel")
    if eps is not None:
        checks.check_finite("norm_eps", eps)
        if eps < 0:
            checks.fail("norm_eps", eps, ">= 0 or None")


_OP = _Pool()
