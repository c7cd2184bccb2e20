"""What stands between a decoder layer's products, as one launch: against PyTorch's ops, with their roundings."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from gemv_cases import draw

from slowfast_kernels.triton import elementwise
from slowfast_model.layers import apply_rope, silu_mul

UNTOUCHED = 7.0


def check_rotate(
    batch: int, length: int, heads: tuple[int, int, int], room: int | None, dtype: torch.dtype, generator
) -> None:
    """``heads``: query heads, KV heads, their channels; ``room``: positions of a sample in a cache, or None for none.

    The bits are those of ``apply_rope``, and of v as it is; nothing else of the cache is written.
    """
    num_q, num_kv, dim = heads
    q, k, v = (draw(generator, dtype, batch, length, n, dim) for n in (num_q, num_kv, num_kv))
    before = [x.clone() for x in (q, k, v)]
    angles = draw(generator, torch.float32, length, 1, dim // 2)
    rope = (torch.cat([angles.cos()] * 2, -1).to(dtype), torch.cat([-angles.sin(), angles.sin()], -1).to(dtype))
    cache = None
    if room is not None:
        cache = torch.full((batch, room, num_kv, 2, dim), UNTOUCHED, dtype=dtype, device=q.device)
    turned, keys = elementwise.rotate(q, k, v, rope, cache)
    assert reference.same_bits(turned, apply_rope(q, rope))
    assert reference.same_bits(keys, apply_rope(k, rope))
    if cache is not None:
        assert keys.data_ptr() == cache.data_ptr()
        assert reference.same_bits(cache[:, :length, :, 1], v)
        assert (cache[:, length:] == UNTOUCHED).all()
    assert all(reference.same_bits(a, b) for a, b in zip((q, k, v), before, strict=True))


def check_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, generator, eps: float = 0.5) -> None:
    x, y, weight = draw(generator, dtype, *shape), draw(generator, dtype, *shape), draw(generator, dtype, shape[-1])
    y[..., 0] = 2.0  # no row is all small
    before = [x.clone(), y.clone()]
    total, normed = elementwise.add_rms_norm(x, y, weight, eps)
    assert reference.same_bits(total, x + y)
    exact = F.rms_norm(total.double(), shape[-1:], weight.double(), eps)
    reference.assert_accurate(normed, F.rms_norm(total, shape[-1:], weight, eps), exact)
    assert all(reference.same_bits(a, b) for a, b in zip((x, y), before, strict=True))


def check_silu_mul(shape: tuple[int, ...], dtype: torch.dtype, generator) -> None:
    gate, up = (draw(generator, dtype, *shape) * 4 for _ in range(2))
    got, eager = elementwise.silu_mul(gate, up), silu_mul(gate, up)
    reference.assert_accurate(got, eager, silu_mul(gate.double(), up.double()))
    assert (got == eager).float().mean() > 0.99, "rounded where PyTorch rounds"


def check_scale_columns(rows: int, columns: int, dtype: torch.dtype, generator) -> None:
    weight, factor = draw(generator, dtype, rows, columns), draw(generator, dtype, columns)
    expected = weight * factor
    assert reference.same_bits(elementwise.scale_columns(weight, factor), expected)
    room = torch.full((rows + 2, columns), UNTOUCHED, dtype=dtype, device=weight.device)
    assert elementwise.scale_columns(weight, factor, room[1:-1]).data_ptr() == room[1:-1].data_ptr()
    assert reference.same_bits(room[1:-1], expected)
    assert (room[[0, -1]] == UNTOUCHED).all()
