"""On a GPU with the memory for it: tensors of more than 2^31 elements, which 32-bit offsets would wrap."""

from __future__ import annotations

import pytest
import reference
import torch
from targets import HAS_GPU, on_gpu

import slowfast_kernels as sk

BF16 = torch.bfloat16
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="torch finds no GPU")]
TARGETS = on_gpu(BF16)
LIMIT = 2**31


@pytest.fixture(autouse=True)
def memory():
    """20 GB free before, everything given back after."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < 20e9:
        pytest.skip(f"{free / 1e9:.0f} GB of GPU memory are free, 20 are needed")
    yield
    torch.cuda.empty_cache()


@pytest.fixture
def normal(rng):
    generator = rng("cuda")
    return lambda *size: torch.randn(size, generator=generator, device="cuda").to(BF16)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("num_splits", [0, 1])
def test_a_slow_kv_cache_of_more_than_2_31_elements(target, num_splits, normal):
    heads, dim, tail = 4, 128, 301
    many = LIMIT // (heads * 2 * dim) + 5000
    kv = torch.full((many + tail, heads, 2, dim), float("nan"), dtype=BF16, device="cuda")
    kv[many:] = normal(tail, heads, 2, dim)
    cu_slow = torch.tensor([0, many, many + tail], dtype=torch.int32, device="cuda")
    q = normal(5, 28, dim)
    rows = torch.arange(5, dtype=torch.int32, device="cuda")
    cu_text = torch.tensor([0, 0, 5], dtype=torch.int32, device="cuda")
    context = target.run(sk.text_cross_attention, q, kv, cu_slow, rows, cu_text, num_splits=num_splits)
    alone = (q, kv[many:], cu_slow[1:] - many, rows, cu_text[1:])
    exact = reference.attention(*alone)
    plain = sk.text_cross_attention(*alone, backend="eager")
    reference.assert_accurate(context, plain, exact.context, exact.noise)

    # One sequence over all of it: keys are 0, but for one token past 2^31 elements that takes all the weight.
    kv.zero_()
    needle = many + 7
    kv[needle, :, 0] = 8
    kv[needle, :, 1] = normal(heads, dim)
    cu_slow = torch.tensor([0, many + tail], dtype=torch.int32, device="cuda")
    whole = (torch.ones_like(q), kv, cu_slow, rows, cu_text[1:])
    context = target.run(sk.text_cross_attention, *whole, num_splits=num_splits)
    expected = kv[needle, :, 1].repeat_interleave(7, 0).expand_as(context)
    torch.testing.assert_close(context, expected, atol=0, rtol=2**-8)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_state_of_more_than_2_31_elements(target, normal):
    channels = 3584
    count = LIMIT // channels + 1000
    state = torch.zeros(count, channels, dtype=BF16, device="cuda")
    rows = torch.tensor([3, count - 1, count - 900], dtype=torch.int32, device="cuda")
    state[rows.long()] = normal(3, channels)
    state[-1000, 5] = 7
    context = normal(3, channels)
    gating = (normal(channels) / 60, normal(1), normal(1))
    out = target.run(sk.gated_residual_mix, state, context, rows, *gating)
    small = (state[rows.long()], context, torch.arange(3, dtype=torch.int32, device="cuda"), *gating)
    plain, exact = sk.gated_residual_mix(*small, backend="eager"), reference.gated_mix(*small)
    reference.assert_accurate(out[rows.long()], plain, exact)
    out[rows.long()] = state[rows.long()]
    assert torch.equal(out, state)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_frames_of_more_than_2_31_elements(target, normal):
    grid, channels = (16, 16), 3584
    count = LIMIT // (grid[0] * grid[1] * channels) + 12
    frames = torch.zeros(count, grid[0] * grid[1], channels, dtype=BF16, device="cuda")
    frames[-4:] = normal(4, grid[0] * grid[1], channels)
    strides = {"pool_stride": 2, "temporal_stride": 4}
    pooled = target.run(sk.slowfast_pool, frames, [count - 4, 4], grid, **strides, norm_eps=1e-6)
    plain = sk.slowfast_pool(frames[-4:], [4], grid, **strides, norm_eps=1e-6, backend="eager")
    slow, _, fast, _ = reference.pool(frames[-4:], [4], grid, 2, 1, 4, 1, 1, 1e-6)
    reference.assert_accurate(pooled.slow[-len(slow) :], plain.slow, slow)
    reference.assert_accurate(pooled.fast[-len(fast) :], plain.fast, fast)
    assert not pooled.slow[: -len(slow)].any()
