"""Slow and fast tokens from vision features in one pass, the slow ones normalised on the way, in Triton.

Roofline: every feature is read once and every token written once, at copy speed. A program owns one cell of an item
of ``pool_plan``'s table: it pools each slow token of its frames in float32, writes it divided by its own root mean
square, and keeps the running sum that becomes the fast token, so that no token is read twice.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call_plan import CallPlan
from ..heuristics.triton import triton_row_config
from ..pool_plan import PoolPlan, describe_pool
from ._common import on_device_of
from ._launch import Launch


@triton.jit
def features(corner, index, token_stride, is_col):
    """The token ``index`` tokens after the one at ``corner``, in float32."""
    offset = tl.cast(index, tl.int64) * token_stride
    return tl.load(corner + offset, mask=is_col, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["cells_w", "grid_w", "spatial_stride"])
def _pool(
    frames, items, entries, slow, fast, frame_stride, token_stride, cells_w, grid_w, spatial_stride, eps,
    POOL_STRIDE: tl.constexpr,  # of all items, so that a token's loads are all in flight at once; 0: looked up
    C: tl.constexpr, BLOCK_C: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    cell_y, cell_x = tl.program_id(0) // cells_w, tl.program_id(0) % cells_w
    item = items + tl.program_id(1).to(tl.int64) * 8
    first_entry, num_entries, fast_base = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    pool_stride = tl.load(item + 3)
    slow_h, slow_w = tl.load(item + 4), tl.load(item + 5)
    fast_h, fast_w = tl.load(item + 6), tl.load(item + 7)
    top, left = cell_y * spatial_stride, cell_x * spatial_stride
    bottom, right = tl.minimum(top + spatial_stride, slow_h), tl.minimum(left + spatial_stride, slow_w)

    cols = tl.arange(0, BLOCK_C)
    is_col = cols < C
    total = tl.zeros((BLOCK_C,), tl.float32)
    for entry in tl.range(first_entry, first_entry + num_entries):
        frame = frames + tl.load(entries + entry * 2).to(tl.int64) * frame_stride + cols
        slow_base = tl.load(entries + entry * 2 + 1)
        for y in tl.range(top, bottom):
            for x in tl.range(left, right):
                token = tl.zeros((BLOCK_C,), tl.float32)
                corner = frame + (y * pool_stride * grid_w + x * pool_stride).to(tl.int64) * token_stride
                if POOL_STRIDE:
                    for i in tl.static_range(POOL_STRIDE * POOL_STRIDE):
                        token += features(corner, i // POOL_STRIDE * grid_w + i % POOL_STRIDE, token_stride, is_col)
                else:
                    for i in tl.range(0, pool_stride * pool_stride):
                        token += features(corner, i // pool_stride * grid_w + i % pool_stride, token_stride, is_col)
                token /= (pool_stride * pool_stride).to(tl.float32)
                total += token
                if slow_base >= 0:  # else another item writes this frame's slow tokens
                    if NORM:
                        token *= tl.rsqrt(tl.sum(token * token, 0) / C + eps)
                    row = (slow_base + y * slow_w + x).to(tl.int64)
                    tl.store(slow + row * C + cols, token.to(slow.dtype.element_ty), mask=is_col)
    if (fast_base >= 0) & (cell_y < fast_h) & (cell_x < fast_w):
        total /= (num_entries * spatial_stride * spatial_stride).to(tl.float32)
        row = (fast_base + cell_y * fast_w + cell_x).to(tl.int64)
        tl.store(fast + row * C + cols, total.to(fast.dtype.element_ty), mask=is_col)


def common_stride(plan: PoolPlan) -> int:
    """The pool stride of all videos, if a kernel may be compiled for it; else 0."""
    strides = {video.pool_stride for video in plan.videos}
    common = strides.pop() if len(strides) == 1 else 0
    return common if common <= 4 else 0


def pool_plan_of(frames: Tensor, plan: PoolPlan) -> CallPlan:
    """Of ``pool``."""
    cells_h, cells_w = plan.cells
    return describe_pool(plan, (cells_h * cells_w, plan.num_items), **asdict(triton_row_config(frames.shape[2])))


@on_device_of
def pool(frames: Tensor, plan: PoolPlan, norm_eps: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """frames [F, H * W, C] -> slow [Ns, C], cu_slow, fast [Nf, C], cu_fast (prefix sums int32 [B + 1])."""
    channels = frames.shape[-1]
    slow = torch.empty((plan.num_slow, channels), dtype=frames.dtype, device=frames.device)
    fast = torch.empty((plan.num_fast, channels), dtype=frames.dtype, device=frames.device)
    items, entries, cu_slow, cu_fast = plan.tables(frames.device)
    cells_h, cells_w = plan.cells
    launch = _launch(
        (cells_h * cells_w, plan.num_items), frames.dtype, channels, common_stride(plan), norm_eps is not None
    )
    numbers = (*frames.stride()[:2], cells_w, plan.grid[1], plan.spatial_stride, norm_eps or 0.0)
    launch((frames, items, entries, slow, fast), numbers)
    return slow, cu_slow.clone(), fast, cu_fast.clone()


@lru_cache(maxsize=256)
def _launch(grid: tuple[int, int], dtype: torch.dtype, channels: int, pool_stride: int, norm: bool) -> Launch:
    """Of frames of that dtype, tables, slow and fast."""
    config = triton_row_config(channels)
    constants = {
        "POOL_STRIDE": pool_stride, "C": channels, "BLOCK_C": config.block_c, "NORM": norm,
        "num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip
    return Launch(_pool, grid, constants)
