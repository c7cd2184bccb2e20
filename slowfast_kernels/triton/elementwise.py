"""What stands between the products of a decoder layer over many rows, one launch each where PyTorch takes two to eight.

Roofline: each operand is read once and each result written once, at the copy rate. Values are rounded where PyTorch's
ops round: rotations and scaled weights have the bits of the formulas that they stand for, products with SiLU differ
where two exponential functions do. At 1360 rows of a 7B on an H100 the ops that rotate q and k and write k and v to a
cache take 57 us, SiLU and its product 85; their bytes take 9 and 51.

As ``gemv``'s, these are no ops of ``sk``: without a twin on a CPU or a gradient, for 16-bit types (float32's accurate
exponential is PyTorch's). Any model may import them from here.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..heuristics.triton import next_power_of_2
from ._common import on_device_of
from ._launch import Launch

_ELEMENTS = 2048  # of a program at a time: 16 a thread, enough loads under way for the copy rate
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _rounded(x, like):
    """float32, rounded to the type of the pointer's elements and back."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _rotate_heads(
    x, out, cos_y, cos_z, sin_y, sin_z, out_stride,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Heads of one row, ``HEAD_DIM`` elements apart at ``x`` and ``out_stride`` at ``out``."""
    HALF: tl.constexpr = HEAD_DIM // 2
    channel = tl.arange(0, BLOCK_C)[None, :]
    for first in range(0, NUM_HEADS, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)[:, None]
        is_in = (head < NUM_HEADS) & (channel < HALF)
        begin = x + head * HEAD_DIM + channel
        y = tl.load(begin, mask=is_in, other=0.0).to(tl.float32)
        z = tl.load(begin + HALF, mask=is_in, other=0.0).to(tl.float32)
        to = out + head * out_stride + channel
        tl.store(to, (_rounded(y * cos_y, out) + z * sin_y).to(out.dtype.element_ty), mask=is_in)
        tl.store(to + HALF, (_rounded(z * cos_z, out) + y * sin_z).to(out.dtype.element_ty), mask=is_in)


@triton.jit(do_not_specialize=["length", "room"])
def _rotate(
    q, k, v, cos, sin, q_out, kv_out, length, room,
    NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A row. With ``v`` None ``kv_out`` are the rotated keys alone; else a cache of ``room`` positions a sample."""
    HALF: tl.constexpr = HEAD_DIM // 2
    row = tl.program_id(0).to(tl.int64)
    position = row % length
    channel = tl.arange(0, BLOCK_C)[None, :]
    angle = position * HEAD_DIM + channel
    cos_y = tl.load(cos + angle, mask=channel < HALF, other=0.0).to(tl.float32)
    cos_z = tl.load(cos + angle + HALF, mask=channel < HALF, other=0.0).to(tl.float32)
    sin_y = tl.load(sin + angle, mask=channel < HALF, other=0.0).to(tl.float32)
    sin_z = tl.load(sin + angle + HALF, mask=channel < HALF, other=0.0).to(tl.float32)
    q_row = row * (NUM_Q * HEAD_DIM)
    _rotate_heads(q + q_row, q_out + q_row, cos_y, cos_z, sin_y, sin_z, HEAD_DIM, NUM_Q, HEAD_DIM, BLOCK_H, BLOCK_C)
    kv_row = row * (NUM_KV * HEAD_DIM)
    if v is None:
        out_stride = HEAD_DIM
        to = kv_out + kv_row
    else:  # a slot holds each head's keys, then its values
        out_stride = 2 * HEAD_DIM
        to = kv_out + (row // length * room + position) * (NUM_KV * 2 * HEAD_DIM)
    _rotate_heads(k + kv_row, to, cos_y, cos_z, sin_y, sin_z, out_stride, NUM_KV, HEAD_DIM, BLOCK_H, BLOCK_C)
    if v is not None:
        channel = tl.arange(0, 2 * BLOCK_C)[None, :]
        for first in range(0, NUM_KV, BLOCK_H):
            head = first + tl.arange(0, BLOCK_H)[:, None]
            is_in = (head < NUM_KV) & (channel < HEAD_DIM)
            value = tl.load(v + kv_row + head * HEAD_DIM + channel, mask=is_in)
            tl.store(to + head * out_stride + HEAD_DIM + channel, value, mask=is_in)


@triton.jit
def _add_rms_norm(x, y, weight, total, out, eps, C: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * C
    channel = tl.arange(0, BLOCK_C)
    is_in = channel < C
    a = tl.load(x + row + channel, mask=is_in, other=0.0).to(tl.float32)
    a = _rounded(a + tl.load(y + row + channel, mask=is_in, other=0.0).to(tl.float32), total)
    tl.store(total + row + channel, a.to(total.dtype.element_ty), mask=is_in)
    a *= tl.rsqrt(tl.sum(a * a, 0) / C + eps)
    a *= tl.load(weight + channel, mask=is_in, other=0.0).to(tl.float32)
    tl.store(out + row + channel, a.to(out.dtype.element_ty), mask=is_in)


@triton.jit
def _silu_mul(gate, up, out, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(gate + i, mask=i < size, other=0.0).to(tl.float32)
    y = tl.load(up + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(out + i, (_rounded(x / (1 + tl.exp(-x)), out) * y).to(out.dtype.element_ty), mask=i < size)


@triton.jit
def _scale_columns(weight, factor, out, num_rows, num_columns, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    is_in = (n < num_rows) & (k < num_columns)
    where = n * num_columns + k
    w = tl.load(weight + where, mask=is_in, other=0.0).to(tl.float32)
    f = tl.load(factor + k, mask=k < num_columns, other=0.0).to(tl.float32)
    tl.store(out + where, (w * f).to(out.dtype.element_ty), mask=is_in)


# A launch is kept for each signature, of which the dtype is a part: ``Launch`` compiles by it and asks for one alone.


@lru_cache(maxsize=256)
def _rotation(rows: int, num_q: int, num_kv: int, head_dim: int, dtype: torch.dtype, has_cache: bool) -> Launch:
    block_c = next_power_of_2(head_dim // 2)
    constants = {
        "NUM_Q": num_q, "NUM_KV": num_kv, "HEAD_DIM": head_dim,
        "BLOCK_H": min(next_power_of_2(num_q), max(1, _ELEMENTS // block_c)), "BLOCK_C": block_c,
        **_OPTIONS,
    }  # fmt: skip
    return Launch(_rotate, (rows,), constants)


@lru_cache(maxsize=256)
def _sum_and_norm(rows: int, channels: int, dtype: torch.dtype) -> Launch:
    block_c = next_power_of_2(channels)
    constants = {"C": channels, "BLOCK_C": block_c, **_OPTIONS, "num_warps": max(4, min(32, block_c // 1024))}
    return Launch(_add_rms_norm, (rows,), constants)


@lru_cache(maxsize=256)
def _silu_product(size: int, dtype: torch.dtype) -> Launch:
    return Launch(_silu_mul, (triton.cdiv(size, _ELEMENTS),), {"BLOCK": _ELEMENTS, **_OPTIONS})


@lru_cache(maxsize=256)
def _scaling(rows: int, columns: int, dtype: torch.dtype) -> Launch:
    block_k = min(next_power_of_2(columns), _ELEMENTS // 2)
    block_n = _ELEMENTS // block_k
    grid = (triton.cdiv(rows, block_n), triton.cdiv(columns, block_k))
    return Launch(_scale_columns, grid, {"BLOCK_N": block_n, "BLOCK_K": block_k, **_OPTIONS})


@on_device_of
def rotate(
    q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], cache: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q [B, L, Hq, D] and k [B, L, Hkv, D] turned by x * cos + roll(x, D / 2) * sin, each product's type as x's.

    With a ``cache`` [B, room, Hkv, 2, D], room >= L, the turned k, and v [B, L, Hkv, D], become its positions 0..L - 1.

    All tensors are contiguous, of one 16-bit dtype and on one device.

    Args:
        rope: cos and sin [L, 1, D] of each position, the first half of sin negated.

    Returns:
        The turned q, and the turned k: a view of the cache where there is one.
    """
    (batch, length, num_q, head_dim), num_kv = q.shape, k.shape[2]
    q_out, kv_out = torch.empty_like(q), torch.empty_like(k) if cache is None else cache
    room = length if cache is None else cache.shape[1]
    if q.numel():
        launch = _rotation(batch * length, num_q, num_kv, head_dim, q.dtype, cache is not None)
        launch((q, k, None if cache is None else v, *rope, q_out, kv_out), (length, room))
    return q_out, kv_out if cache is None else cache.narrow(1, 0, length).select(3, 0)


@on_device_of
def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y [..., C], rounded, and weight [C] * (x + y) / sqrt(mean((x + y)^2) + eps) of the rounded sum, in float32.

    All tensors are contiguous, of one 16-bit dtype and on one device.
    """
    total, out = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        channels = x.shape[-1]
        _sum_and_norm(x.numel() // channels, channels, x.dtype)((x, y, weight, total, out), (eps,))
    return total, out


@on_device_of
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of two contiguous tensors of one shape, one 16-bit dtype and one device."""
    out = torch.empty_like(gate)
    if gate.numel():
        _silu_product(gate.numel(), gate.dtype)((gate, up, out), (gate.numel(),))
    return out


@on_device_of
def scale_columns(weight: Tensor, factor: Tensor, out: Tensor | None = None) -> Tensor:
    """weight [N, K] * factor [K], both contiguous, of one 16-bit dtype and on one device; into ``out``, if given."""
    out = torch.empty_like(weight) if out is None else out
    if weight.numel():
        _scaling(*weight.shape, weight.dtype)((weight, factor, out), tuple(weight.shape))
    return out
