"""What stands between the products of a decoder layer over many rows, one launch each where PyTorch takes two to eight.

Roofline: each operand is read once and each result written once, at the copy rate. Values are rounded where PyTorch's
ops round: rotations and scaled weights have the bits of the formulas that they stand for, products with SiLU differ
where two exponential functions do. At 1360 rows of a 7B on an H100 the ops that rotate q and k and write k and v to a
cache take 57 us, SiLU and its product 85; their bytes take 9 and 51.

As ``gemv``'s, these are no ops of ``sk``: without a twin on a CPU or a gradient, for 16-bit types (float32's accurate
exponential is PyTorch's). Any model may import them from here. What tensors are is looked at once a signature, as an
op's call does it: a layer's host time is a good part of these launches'.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import unpack

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import Parameter

from ..dtypes import HALF_DTYPES
from ..heuristics.triton import next_power_of_2
from ..ops.dispatch import SignatureCache, read_plain, signature
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
    FILLS: tl.constexpr,
):  # fmt: skip
    """A row. ``FILLS``: ``kv_out`` is a cache of ``room`` positions a sample; else the rotated keys alone."""
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
    if FILLS:  # a slot holds each head's keys, then its values
        out_stride = 2 * HEAD_DIM
        to = kv_out + (row // length * room + position) * (NUM_KV * 2 * HEAD_DIM)
    else:
        out_stride = HEAD_DIM
        to = kv_out + kv_row
    _rotate_heads(k + kv_row, to, cos_y, cos_z, sin_y, sin_z, out_stride, NUM_KV, HEAD_DIM, BLOCK_H, BLOCK_C)
    if FILLS:
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


# A prepared call, of tensors of one signature and of their addresses; None: the kernel does not take such tensors.
Prepared = Callable[[tuple[Tensor, ...], tuple[int, ...]], object]
_prepared: SignatureCache = SignatureCache()


def _are_plain(tensors: tuple[Tensor, ...]) -> bool:
    """Their memory is what they are, as ``read_plain`` finds it: no subclass, and nothing that is lazy."""
    return all(type(x) in (Tensor, Parameter) and not x.is_neg() and not x._is_zerotensor() for x in tensors)


def _are_alike(tensors: tuple[Tensor, ...]) -> bool:
    """Dense, of one 16-bit dtype and on one device."""
    first = tensors[0]
    if first.dtype not in HALF_DTYPES:
        return False
    return all(x.dtype == first.dtype and x.device == first.device and x.is_contiguous() for x in tensors)


@on_device_of
def _run(tensors: tuple[Tensor, ...], prepare: Callable[..., Prepared | None], *options):
    """What ``prepare(*tensors, *options)`` makes of tensors alike; None where it makes nothing, or they are not."""
    read = read_plain(tensors) or (signature(tensors) if _are_plain(tensors) else None)
    if read is None:
        return None
    facts, addresses = read
    key = (prepare, facts, options)
    kept = _prepared.get(key, False)
    if kept is False:
        kept = _prepared.remember(key, prepare(*tensors, *options) if _are_alike(tensors) else None)
    return None if kept is None else kept(tensors, unpack(f"{len(tensors)}Q", addresses))


def _prepare_rotation(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *cache: Tensor) -> Prepared | None:
    (batch, length, num_q, head_dim), num_kv = q.shape, k.shape[2]
    if head_dim % 2 or not k.shape == v.shape == (batch, length, num_kv, head_dim):
        return None
    if not cos.numel() == sin.numel() == length * head_dim:  # of positions that samples do not share
        return None
    if any(x.shape != (batch, x.shape[1], num_kv, 2, head_dim) or x.shape[1] < length for x in cache):
        return None
    block_c, fills, is_empty = next_power_of_2(head_dim // 2), bool(cache), not q.numel()
    constants = {
        "NUM_Q": num_q, "NUM_KV": num_kv, "HEAD_DIM": head_dim,
        "BLOCK_H": min(next_power_of_2(num_q), max(1, _ELEMENTS // block_c)), "BLOCK_C": block_c, "FILLS": fills,
        **_OPTIONS,
    }  # fmt: skip
    launch, numbers = Launch(_rotate, (batch * length,), constants), (length, cache[0].shape[1] if fills else length)

    def run(tensors: tuple[Tensor, ...], addresses: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        q, k, *_, last = tensors
        q_out, kv_out = torch.empty_like(q), last if fills else torch.empty_like(k)
        if not is_empty:
            to = (q_out.data_ptr(), addresses[5] if fills else kv_out.data_ptr())
            launch((*tensors[:5], q_out, kv_out), numbers, (*addresses[:5], *to))
        return q_out, kv_out.narrow(1, 0, length).select(3, 0) if fills else kv_out

    return run


def _prepare_sum_and_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Prepared | None:
    channels, is_empty = x.shape[-1], not x.numel()
    if x.shape != y.shape or weight.shape != (channels,):
        return None
    block_c = next_power_of_2(channels)
    constants = {"C": channels, "BLOCK_C": block_c, **_OPTIONS, "num_warps": max(4, min(16, block_c // 1024))}
    launch = Launch(_add_rms_norm, (x.numel() // max(channels, 1),), constants)

    def run(tensors: tuple[Tensor, ...], addresses: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        total, out = torch.empty_like(tensors[0]), torch.empty_like(tensors[0])
        if not is_empty:
            launch((*tensors, total, out), (eps,), (*addresses, total.data_ptr(), out.data_ptr()))
        return total, out

    return run


def _prepare_silu_product(gate: Tensor, up: Tensor) -> Prepared | None:
    if gate.shape != up.shape:
        return None
    size = gate.numel()
    launch = Launch(_silu_mul, (triton.cdiv(size, _ELEMENTS),), {"BLOCK": _ELEMENTS, **_OPTIONS})

    def run(tensors: tuple[Tensor, ...], addresses: tuple[int, ...]) -> Tensor:
        out = torch.empty_like(tensors[0])
        if size:
            launch((*tensors, out), (size,), (*addresses, out.data_ptr()))
        return out

    return run


def _prepare_scaling(weight: Tensor, factor: Tensor, *out: Tensor) -> Prepared | None:
    rows, columns = weight.shape
    if factor.shape != (columns,) or any(x.shape != weight.shape for x in out):
        return None
    block_k = min(next_power_of_2(columns), _ELEMENTS // 2)
    block_n = _ELEMENTS // block_k
    grid = (triton.cdiv(rows, block_n), triton.cdiv(columns, block_k))
    launch = Launch(_scale_columns, grid, {"BLOCK_N": block_n, "BLOCK_K": block_k, **_OPTIONS})

    def run(tensors: tuple[Tensor, ...], addresses: tuple[int, ...]) -> Tensor:
        weight, factor, *given = tensors
        (out,) = given or (torch.empty_like(weight),)
        if rows and columns:
            launch((weight, factor, out), (rows, columns), (*addresses[:2], out.data_ptr()))
        return out

    return run


# All tensors below are contiguous, of one 16-bit dtype, on one device, of the shapes that are said, and no subclass of
# Tensor but Parameter; else the answer is None.


def rotate(
    q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor], cache: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """q [B, L, Hq, D] and k [B, L, Hkv, D] turned by x * cos + roll(x, D / 2) * sin, each product's type as x's.

    With a ``cache`` [B, room, Hkv, 2, D], room >= L, the turned k, and v [B, L, Hkv, D], become its positions 0..L - 1.

    Args:
        rope: cos and sin [L, 1, D] of each position, the first half of sin negated.

    Returns:
        The turned q, and the turned k: a view of the cache where there is one.
    """
    return _run((q, k, v, *rope) if cache is None else (q, k, v, *rope, cache), _prepare_rotation)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """x + y [..., C], rounded, and of the rounded sum s weight [C] * s / sqrt(mean(s^2) + eps), in float32."""
    return _run((x, y, weight), _prepare_sum_and_norm, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor | None:
    """silu(gate) * up, of one shape."""
    return _run((gate, up), _prepare_silu_product)


def scale_columns(weight: Tensor, factor: Tensor, out: Tensor | None = None) -> Tensor | None:
    """weight [N, K] * factor [K], into ``out`` [N, K], if given."""
    return _run((weight, factor) if out is None else (weight, factor, out), _prepare_scaling)
