"""Backward pass of the pooling, in Triton: every feature's gradient from those of the tokens that it is in.

Roofline: the tokens' gradients are read and every feature's written once, at copy speed; behind a norm, features are
read once too. The features that one slow token averages share a gradient, so a program takes such a square of a frame,
by the table of ``PoolPlan.backward_tables``; what pooling dropped gets 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call_plan import described
from ..calls import BackwardTensors, PoolCallOptions
from ..gradients import row_major
from ..heuristics.triton import triton_row_config
from ..pool_plan import describe_pool
from ._common import on_device_of
from ._launch import Launch
from .pool import common_stride, features


@triton.jit(do_not_specialize=["num_cells", "cells_w", "grid_h", "grid_w", "spatial_stride"])
def _pool_backward(
    frames, frame_table, windows, grad_slow, grad_fast, grad_frames,  # the second and third last: None is 0
    frame_stride, token_stride, slow_row_stride, fast_row_stride,
    num_cells, cells_w, grid_h, grid_w, spatial_stride, eps,
    POOL_STRIDE: tl.constexpr,  # of all frames, so that a token's loads are all in flight at once; 0: looked up
    C: tl.constexpr, BLOCK_C: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    frame, cell = tl.program_id(0) // num_cells, tl.program_id(0) % num_cells
    cell_y, cell_x = cell // cells_w, cell % cells_w
    entry = frame_table + tl.cast(frame, tl.int64) * 8
    first_window, num_windows = tl.load(entry), tl.load(entry + 1)
    slow_base, pool_stride = tl.load(entry + 2), tl.load(entry + 3)
    slow_h, slow_w = tl.load(entry + 4), tl.load(entry + 5)
    fast_h, fast_w = tl.load(entry + 6), tl.load(entry + 7)
    top, left = cell_y * pool_stride, cell_x * pool_stride
    area = pool_stride * pool_stride

    cols = tl.arange(0, BLOCK_C)
    in_token = cols < tl.where((cell_y < slow_h) & (cell_x < slow_w), C, 0)
    grad = tl.zeros((BLOCK_C,), tl.float32)
    if grad_slow is not None:
        row = (slow_base + cell_y * slow_w + cell_x).to(tl.int64)
        grad += tl.load(grad_slow + row * slow_row_stride + cols, mask=in_token, other=0.0).to(tl.float32)
        if NORM:
            corner = frames + tl.cast(frame, tl.int64) * frame_stride + cols
            corner += (top * grid_w + left).to(tl.int64) * token_stride
            token = tl.zeros((BLOCK_C,), tl.float32)
            if POOL_STRIDE:
                for i in tl.static_range(POOL_STRIDE * POOL_STRIDE):
                    token += features(corner, i // POOL_STRIDE * grid_w + i % POOL_STRIDE, token_stride, in_token)
            else:
                for i in tl.range(0, area):
                    token += features(corner, i // pool_stride * grid_w + i % pool_stride, token_stride, in_token)
            token /= area.to(tl.float32)
            inv_rms = tl.rsqrt(tl.sum(token * token, 0) / C + eps)
            along = inv_rms * inv_rms * (tl.sum(grad * token, 0) / C)
            grad = inv_rms * (grad - token * along)
    if grad_fast is not None:
        fast_y, fast_x = cell_y // spatial_stride, cell_x // spatial_stride
        in_fast = in_token & (cols < tl.where((fast_y < fast_h) & (fast_x < fast_w), C, 0))
        for i in tl.range(first_window, first_window + num_windows):
            fast_base, num_frames = tl.load(windows + i * 2), tl.load(windows + i * 2 + 1)
            row = (fast_base + fast_y * fast_w + fast_x).to(tl.int64)
            of_fast = tl.load(grad_fast + row * fast_row_stride + cols, mask=in_fast, other=0.0).to(tl.float32)
            grad += of_fast / (num_frames * spatial_stride * spatial_stride).to(tl.float32)
    grad = (grad / area.to(tl.float32)).to(grad_frames.dtype.element_ty)

    first = tl.cast(frame, tl.int64) * grid_h * grid_w
    if POOL_STRIDE:
        for i in tl.static_range(POOL_STRIDE * POOL_STRIDE):
            y, x = top + i // POOL_STRIDE, left + i % POOL_STRIDE
            is_there = cols < tl.where((y < grid_h) & (x < grid_w), C, 0)
            tl.store(grad_frames + (first + y * grid_w + x) * C + cols, grad, mask=is_there)
    else:
        for i in tl.range(0, area):
            y, x = top + i // pool_stride, left + i % pool_stride
            is_there = cols < tl.where((y < grid_h) & (x < grid_w), C, 0)
            tl.store(grad_frames + (first + y * grid_w + x) * C + cols, grad, mask=is_there)


def prepare_pool_backward(sample: BackwardTensors, options: PoolCallOptions, needs: tuple[bool, ...]) -> Callable:
    """A function of tensors alike: the gradient of frames, which is needed."""
    plan, channels = options.plan, sample.inputs.frames.shape[2]
    config = triton_row_config(channels)
    cells_h, cells_w = plan.backward_cells
    grid = (sample.inputs.frames.shape[0] * cells_h * cells_w,)

    constants = {
        "POOL_STRIDE": common_stride(plan), "C": channels, "BLOCK_C": config.block_c,
        "NORM": options.norm_eps is not None, "num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip
    launch = Launch(_pool_backward, grid, constants)

    @described(lambda: describe_pool(plan, grid, **asdict(config)))
    @on_device_of
    def run(tensors: BackwardTensors) -> tuple[Tensor | None]:
        (frames,) = tensors.inputs
        grad_slow, grad_fast = (None if x is None else row_major(x) for x in tensors.grads)
        grad_frames = torch.empty(frames.shape, dtype=frames.dtype, device=frames.device)
        frame_table, windows = plan.backward_tables(frames.device)
        numbers = (
            frames.stride(0), frames.stride(1), 0 if grad_slow is None else grad_slow.stride(0),
            0 if grad_fast is None else grad_fast.stride(0),
            cells_h * cells_w, cells_w, *plan.grid, plan.spatial_stride, options.norm_eps or 0.0,
        )  # fmt: skip
        launch((frames, frame_table, windows, grad_slow, grad_fast, grad_frames), numbers)
        return (grad_frames,)

    return run
