"""Linear layers of a decode step with what stands around them, against the eager formula and float64."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from slowfast_kernels.heuristics.gemv import ROWS_OF_CUDA_CORES
from slowfast_kernels.triton import gemv
from slowfast_kernels.triton.gemv import Norm, Projection

EPS = 1e-6
CHANNELS = 1100  # more than two blocks, and no multiple of one
INSIDE = ["", "bias", "norm", "residual", "bias norm residual"]


def draw(generator: torch.Generator, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=generator, device=generator.device) * scale).to(dtype)


def projection_of(generator, dtype, outputs: int, inputs: int, has_bias: bool = False) -> Projection:
    weight = draw(generator, dtype, outputs, inputs, scale=inputs**-0.5)
    return Projection(weight, draw(generator, dtype, outputs) if has_bias else None)


def normalised(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def as_double(part):
    """A tensor, a Norm or a Projection in float64."""
    if isinstance(part, tuple):
        return type(part)(*map(as_double, part))
    return part.double() if isinstance(part, Tensor) else part


def folded(norm: Norm, *parts):
    """The norm without its weight, and ``parts`` whose projections have it."""

    def fold(part):
        return Projection(part.weight * norm.weight, part.bias) if isinstance(part, Projection) else part

    return Norm(torch.ones_like(norm.weight), norm.eps), *map(fold, parts)


def check(got: Tensor, formula, x: Tensor, norm: Norm | None, *parts) -> None:
    """``formula`` of x, norm and parts in their own dtype is the eager answer, in float64 the exact one.

    In float16 on tensor cores the norm's weight is multiplied into the projections: there the eager answer is that or
    the formula as it is, whichever errs more.
    """
    exact = formula(*map(as_double, (x, norm, *parts)))
    eager = [formula(x, norm, *parts)]
    if norm is not None and x.dtype == torch.float16 and x.shape[0] > ROWS_OF_CUDA_CORES:
        eager.append(formula(x, *folded(norm, *parts)))
    reference.assert_accurate(got, max(eager, key=lambda y: float((y.double() - exact).abs().max())), exact)


def check_linear(inside: str, rows: int, inputs: int, outputs: int, dtype: torch.dtype, generator) -> None:
    def formula(x, norm, projection, residual):
        y = F.linear(normalised(x, norm), *projection)
        return y if residual is None else residual + y

    x = draw(generator, dtype, rows, inputs)
    projection = projection_of(generator, dtype, outputs, inputs, "bias" in inside)
    norm = Norm(draw(generator, dtype, inputs), 0.5) if "norm" in inside else None
    residual = draw(generator, dtype, rows, outputs) if "residual" in inside else None
    check(gemv.linear(x, projection, norm, residual), formula, x, norm, projection, residual)


def check_gated_up(rows: int, inputs: int, outputs: int, dtype: torch.dtype, generator) -> None:
    def formula(x, norm, gate, up):
        x = normalised(x, norm)
        return F.silu(F.linear(x, *gate)) * F.linear(x, *up)

    x, norm = draw(generator, dtype, rows, inputs), Norm(draw(generator, dtype, inputs), 0.5)
    gate, up = (projection_of(generator, dtype, outputs, inputs) for _ in range(2))
    check(gemv.gated_up(x, gate.weight, up.weight, norm), formula, x, norm, gate, up)


def check_rotated_qkv(
    has_bias: bool, rows: int, inputs: int, heads: tuple[int, int, int], dtype: torch.dtype, generator
) -> None:
    """``heads``: query heads, KV heads, their channels. Slots are not those of a batch in order."""
    num_q, num_kv, dim = heads

    def formula(x, norm, projection, cos, sin):
        y = F.linear(normalised(x, norm), *projection).unflatten(1, (-1, dim))
        return y if cos is None else y * cos[:, None] + y.roll(dim // 2, -1) * sin[:, None]

    x, norm = draw(generator, dtype, rows, inputs), Norm(draw(generator, dtype, inputs), 0.5)
    qkv = [projection_of(generator, dtype, n * dim, inputs, has_bias) for n in (num_q, num_kv, num_kv)]
    angles = draw(generator, torch.float32, rows, dim // 2)
    cos, sin = torch.cat([angles.cos()] * 2, 1).to(dtype), torch.cat([-angles.sin(), angles.sin()], 1).to(dtype)
    cache = torch.full((5 * rows, num_kv, 2, dim), 7.0, dtype=dtype, device=x.device)
    slots = torch.randperm(5 * rows, generator=generator, device=x.device)[:rows]
    q = gemv.rotated_qkv(x, qkv, (cos[:, None, None], sin[:, None, None]), slots, cache, norm)
    check(q, formula, x, norm, qkv[0], cos, sin)
    check(cache[slots][:, :, 0], formula, x, norm, qkv[1], cos, sin)
    check(cache[slots][:, :, 1], formula, x, norm, qkv[2], None, None)
    others = torch.ones(5 * rows, dtype=torch.bool, device=x.device).index_fill_(0, slots, False)
    assert (cache[others] == 7).all()
