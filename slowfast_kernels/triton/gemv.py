"""Linear layers of a few rows with what stands around them: RMS norm before, bias, rotation, SiLU x up, residual after.

Roofline: the weights are read once, at the read rate; activations stay in L2. A program takes a few rows of the weights
over their whole length, so that no sums are split and none are added up by another launch. Weights are read where their
modules keep them, at every launch: nothing is packed or folded, so projections stay apart in a checkpoint, and an edit
in place shows.

Products are float32 multiplications on CUDA cores, one a weight and row, or ``tl.dot`` on tensor cores, 16 rows and
more at a time; sums are float32 either way. ``heuristics.gemv`` chooses.

With dependent launch a program has its first weights in flight before it waits for the launch before. Weights must
therefore not be written by that launch, as no launch of a decode step does.

Not an op of ``sk``: it has no twin on a CPU, no gradient and no FLOP formula, and takes the layout of a decode step's
caches. Any model may import it from here; it becomes public when it has been measured and a second model asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..heuristics.gemv import GemvConfig, GemvShape, gemv_config
from ._common import describe, gdc_launch_dependents, gdc_wait, on_device_of, prefetch

# Triton 3.2 aborts the process where it is to copy a tile of three dimensions ahead.
_COPIES_3D_AHEAD = not triton.__version__.startswith("3.2.")


class Norm(NamedTuple):
    """weight * x / sqrt(mean(x^2) + eps), of the activations that a launch reads."""

    weight: Tensor
    eps: float


class Projection(NamedTuple):
    """A linear layer's own weight [N, K] and bias [N] or None."""

    weight: Tensor
    bias: Tensor | None = None


@triton.jit
def _by_cuda_cores(
    x, weights, others, norm,
    M: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """What ``_products`` scales, by float32 multiplications, and each row's sum of squares [BLOCK_M, 1].

    Weights, which pass L2 by once a step, are the first to leave it: what all layers share stays.
    """
    k = tl.arange(0, BLOCK_K)[None, None, :]
    x += tl.arange(0, BLOCK_M)[:, None, None] * K + k
    weights = weights[None, :, None] + k
    first = tl.load(weights, mask=k < K, other=0.0, eviction_policy="evict_first")
    sums = tl.zeros((BLOCK_M, weights.shape[1], BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_M, 1, BLOCK_K), tl.float32)
    if others is not None:
        others = others[None, :, None] + k
        other_first = tl.load(others, mask=k < K, other=0.0, eviction_policy="evict_first")
        other_sums = tl.zeros((BLOCK_M, weights.shape[1], BLOCK_K), tl.float32)
    if PDL:
        gdc_wait()
    for i in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        is_in = i + k < K
        a = tl.load(x + i, mask=is_in & (tl.arange(0, BLOCK_M)[:, None, None] < M), other=0.0).to(tl.float32)
        if norm is not None:
            squares += a * a
            a *= tl.load(norm + i + k, mask=is_in, other=0.0).to(tl.float32)
        # A load in a branch goes to registers and not through shared memory, as activations do: so it was measured.
        if i == 0:
            w = first
        else:
            w = tl.load(weights + i, mask=is_in, other=0.0, eviction_policy="evict_first")
        sums += w.to(tl.float32) * a
        if others is not None:
            if i == 0:
                w = other_first
            else:
                w = tl.load(others + i, mask=is_in, other=0.0, eviction_policy="evict_first")
            other_sums += w.to(tl.float32) * a
    if PDL:
        gdc_launch_dependents()
    y = tl.sum(sums, 2)
    z = y if others is None else tl.sum(other_sums, 2)
    return y, z, tl.sum(squares, 2)


@triton.jit
def _prefetch_rows(rows, K: tl.constexpr, CHANNELS: tl.constexpr):
    """Ask L2 for the first channels of ``rows`` [n], of K each."""
    LINE: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = triton.next_power_of_2(triton.cdiv(CHANNELS, LINE))
    prefetch(rows[:, None] + tl.minimum(tl.arange(0, LINES) * LINE, K - 1)[None, :])


@triton.jit
def _rounded_product(a, b):
    return (a.to(tl.float32) * b.to(tl.float32)).to(a.dtype)


@triton.jit
def _by_tensor_cores(
    x, weights, others, norm,
    M: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """As ``_by_cuda_cores``; weights are the left operand, the rows of x are columns of the right one."""
    # float16 has no room for the norm's weight times an activation that is not yet scaled.
    SCALE_WEIGHTS: tl.constexpr = norm is not None and x.dtype.element_ty == tl.float16
    k, m = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_M)
    if PDL:
        # The loop's copies come after the wait, those of x among them: until then L2 reads what they will ask for.
        _prefetch_rows(weights, K, BLOCK_K * STAGES)
        if others is not None:
            _prefetch_rows(others, K, BLOCK_K * STAGES)
        gdc_wait()
    x += m[:, None] * K + k[None, :]
    weights = weights[:, None] + k[None, :]
    sums = tl.zeros((weights.shape[0], BLOCK_M), tl.float32)
    if others is not None:
        others = others[:, None] + k[None, :]
        other_sums = tl.zeros((weights.shape[0], BLOCK_M), tl.float32)
    gram = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for i in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        is_in = i + k < K
        a = tl.load(x + i, mask=is_in[None, :] & (m < M)[:, None], other=0.0)
        if norm is not None:
            # Squares by a product too: a sum beside it would read x in another layout, and its copy lose the swizzle.
            gram = tl.dot(a, tl.trans(a), gram)
            scale = tl.load(norm + i + k, mask=is_in, other=0.0)[None, :]
            if not SCALE_WEIGHTS:
                a = _rounded_product(a, scale)
        w = tl.load(weights + i, mask=is_in[None, :], other=0.0)
        if SCALE_WEIGHTS:
            w = _rounded_product(w, scale)
        sums = tl.dot(w, tl.trans(a), sums)
        if others is not None:
            w = tl.load(others + i, mask=is_in[None, :], other=0.0)
            if SCALE_WEIGHTS:
                w = _rounded_product(w, scale)
            other_sums = tl.dot(w, tl.trans(a), other_sums)
    if PDL:
        gdc_launch_dependents()
    y = tl.trans(sums)
    z = y if others is None else tl.trans(other_sums)
    squares = tl.where(m[:, None] == m[None, :], gram, 0.0)
    return y, z, tl.sum(squares, 1)[:, None]


@triton.jit
def _products(
    x, weights, others, norm, eps,
    M: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    TENSOR_CORES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, n]: the rows of x [M, K], normalised if there is a norm, times the rows at ``weights`` [n].

    Twice: of ``weights`` and of ``others``, or, where these are None, of ``weights`` again.
    """
    if TENSOR_CORES:
        y, z, squares = _by_tensor_cores(x, weights, others, norm, M, K, BLOCK_M, BLOCK_K, STAGES, PDL)
    else:
        y, z, squares = _by_cuda_cores(x, weights, others, norm, M, K, BLOCK_M, BLOCK_K, STAGES, PDL)
    if norm is not None:
        scale = tl.rsqrt(squares / K + eps)
        y *= scale
        z *= scale
    return y, z


@triton.jit
def _linear(
    x, weight, bias, norm, residual, out, num_outputs, eps,
    M: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, TENSOR_CORES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_col = col < num_outputs
    rows = weight + tl.minimum(col, num_outputs - 1).to(tl.int64) * K
    y, _ = _products(x, rows, None, norm, eps, M, K, BLOCK_M, BLOCK_K, STAGES, TENSOR_CORES, PDL)
    if bias is not None:
        y += tl.load(bias + col, mask=is_col, other=0.0).to(tl.float32)[None, :]
    m = tl.arange(0, BLOCK_M)[:, None]
    where = m * num_outputs + col[None, :]
    is_out = (m < M) & is_col[None, :]
    if residual is not None:
        y += tl.load(residual + where, mask=is_out, other=0.0).to(tl.float32)
    tl.store(out + where, y.to(out.dtype.element_ty), mask=is_out)


@triton.jit
def _gated_up(
    x, gate, up, norm, out, num_outputs, eps,
    M: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, TENSOR_CORES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(col, num_outputs - 1).to(tl.int64) * K
    y, z = _products(x, gate + row, up + row, norm, eps, M, K, BLOCK_M, BLOCK_K, STAGES, TENSOR_CORES, PDL)
    y = y / (1 + tl.exp(-y)) * z
    m = tl.arange(0, BLOCK_M)[:, None]
    is_out = (m < M) & (col < num_outputs)[None, :]
    tl.store(out + m * num_outputs + col[None, :], y.to(out.dtype.element_ty), mask=is_out)


@triton.jit
def _of_head(head, q, k, v, NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, SIZE: tl.constexpr):
    """Where a head's ``SIZE`` elements begin, heads counted through q, k and v."""
    if head < NUM_Q:
        begin = q + head.to(tl.int64) * SIZE
    elif head < NUM_Q + NUM_KV:
        begin = k + (head - NUM_Q).to(tl.int64) * SIZE
    else:
        begin = v + (head - NUM_Q - NUM_KV).to(tl.int64) * SIZE
    return begin


@triton.jit
def _rotated_qkv(
    x, q_weight, k_weight, v_weight, q_bias, k_bias, v_bias, norm, cos, sin, slots, out, cache, eps,
    NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, HEAD_DIM: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, TENSOR_CORES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2  # channels i and i + HALF of a head turn together: a program has both
    head, channel = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_channel = channel < HALF
    clamped = tl.minimum(channel, HALF - 1)
    rows = _of_head(head, q_weight, k_weight, v_weight, NUM_Q, NUM_KV, HEAD_DIM * K) + clamped.to(tl.int64) * K
    y, z = _products(x, rows, rows + HALF * K, norm, eps, M, K, BLOCK_M, BLOCK_K, STAGES, TENSOR_CORES, PDL)
    if q_bias is not None:
        bias = _of_head(head, q_bias, k_bias, v_bias, NUM_Q, NUM_KV, HEAD_DIM) + clamped
        y += tl.load(bias).to(tl.float32)[None, :]
        z += tl.load(bias + HALF).to(tl.float32)[None, :]

    m = tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
    is_out = (m < M) & is_channel[None, :]
    channel = channel[None, :]
    if head < NUM_Q + NUM_KV:
        turn = m * HEAD_DIM + channel
        cos_y = tl.load(cos + turn, mask=is_out, other=0.0).to(tl.float32)
        cos_z = tl.load(cos + turn + HALF, mask=is_out, other=0.0).to(tl.float32)
        sin_y = tl.load(sin + turn, mask=is_out, other=0.0).to(tl.float32)
        sin_z = tl.load(sin + turn + HALF, mask=is_out, other=0.0).to(tl.float32)
        y, z = y * cos_y + z * sin_y, z * cos_z + y * sin_z
    if head < NUM_Q:
        to = out + (m * NUM_Q + head) * HEAD_DIM + channel
    else:  # a slot holds each head's keys, then its values
        kv = tl.where(head < NUM_Q + NUM_KV, 2 * (head - NUM_Q), 2 * (head - NUM_Q - NUM_KV) + 1)
        slot = tl.load(slots + m, mask=m < M, other=0).to(tl.int64)
        to = cache + (slot * (2 * NUM_KV) + kv) * HEAD_DIM + channel
    tl.store(to, y.to(out.dtype.element_ty), mask=is_out)
    tl.store(to + HALF, z.to(out.dtype.element_ty), mask=is_out)


def _launch(
    kernel, config: GemvConfig | None, grid: Callable, x: Tensor, outputs: int, *arguments, tiles: int = 1, **constants
) -> None:
    """``kernel`` over ``outputs`` rows of weights as long as those of ``x``; ``grid``: of the rows of one tile."""
    batch, channels = x.shape
    config = config or gemv_config(GemvShape(outputs, channels), batch, x.element_size())
    dependent = describe(x.device).dependent_launch
    block_n = max(16 if config.tensor_cores else 1, config.block_n // tiles)
    num_stages = config.num_stages if config.tensor_cores or _COPIES_3D_AHEAD else 1
    kernel[grid(block_n)](
        x, *arguments, **constants, M=batch, K=channels,
        BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_K=config.block_k, STAGES=num_stages,
        TENSOR_CORES=config.tensor_cores, PDL=dependent,
        num_warps=config.num_warps, enable_fp_fusion=True, **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip


def _rows(count: int) -> Callable[[int], tuple[int]]:
    return lambda block_n: (triton.cdiv(count, block_n),)


def _parts(norm: Norm | None) -> tuple[Tensor | None, float]:
    return (None, 0.0) if norm is None else norm


@on_device_of
def linear(
    x: Tensor,
    projection: Projection,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    config: GemvConfig | None = None,
) -> Tensor:
    """x [M, K] -> (residual +) normalised x times weight^T (+ bias) [M, N], rounded once.

    All tensors are contiguous, of one dtype and on one device; M is at most ``heuristics.gemv.MOST_ROWS``. ``config``:
    None for the one that ``heuristics.gemv`` chooses.
    """
    weight, bias = projection
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    norm_weight, eps = _parts(norm)
    _launch(
        _linear, config, _rows(len(weight)), x, len(weight), weight, bias, norm_weight, residual, out, len(weight), eps
    )
    return out


@on_device_of
def gated_up(x: Tensor, gate: Tensor, up: Tensor, norm: Norm | None = None, config: GemvConfig | None = None) -> Tensor:
    """x [M, K] -> silu(x gate^T) * (x up^T) [M, N] of weights [N, K]; otherwise as ``linear``."""
    out = torch.empty((x.shape[0], len(gate)), dtype=x.dtype, device=x.device)
    norm_weight, eps = _parts(norm)
    arguments = (gate, up, norm_weight, out, len(gate), eps)
    _launch(_gated_up, config, _rows(len(gate)), x, 2 * len(gate), *arguments, tiles=2)
    return out


@on_device_of
def rotated_qkv(
    x: Tensor,
    projections: Sequence[Projection],
    rope: tuple[Tensor, Tensor],
    slots: Tensor,
    cache: Tensor,
    norm: Norm | None = None,
    config: GemvConfig | None = None,
) -> Tensor:
    """x [M, K] -> rotated q [M, Hq, D]; rotated k, and v, of row m go to slot ``slots[m]`` of ``cache``.

    Otherwise as ``linear``.

    Args:
        projections: of q, k and v; all have a bias, or none.
        rope: cos and sin [M, ..., D] of each row's position, the first half of sin negated.
        slots: [M] integers.
        cache: [slots, Hkv, 2, D], written in place.
    """
    (q, k, v), (cos, sin) = projections, rope
    num_kv, head_dim = cache.shape[1], cache.shape[3]
    num_q = len(q.weight) // head_dim
    out = torch.empty((x.shape[0], num_q, head_dim), dtype=x.dtype, device=x.device)
    norm_weight, eps = _parts(norm)
    num_heads = num_q + 2 * num_kv
    _launch(
        _rotated_qkv, config, lambda block_n: (num_heads, triton.cdiv(head_dim // 2, block_n)), x, num_heads * head_dim,
        q.weight, k.weight, v.weight, q.bias, k.bias, v.bias, norm_weight, cos, sin, slots, out, cache, eps,
        tiles=2, NUM_Q=num_q, NUM_KV=num_kv, HEAD_DIM=head_dim,
    )  # fmt: skip
    return out
