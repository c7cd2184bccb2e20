"""The eager ops against exact answers, in every dtype: what kernels are measured by is itself as exact as its dtype.

An eager op widens before it computes and rounds once, so its error is one rounding of the result (in float32, 1e-5),
also where a product of the inputs exceeds the range of their dtype.
"""

from __future__ import annotations

from itertools import product

import pytest
import reference
import torch
from cases import GATE_WAYS, RAGGED, SHAPES, VIDEOS, Shape, gate_of, make_frames, make_inputs
from targets import DEVICE

import slowfast_kernels as sk
from slowfast_kernels.dtypes import KERNEL_DTYPES
from slowfast_kernels.gate import WEIGHTED_GATES

DTYPES = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
EAGER = {"backend": "eager"}


def assert_rounded_once(actual, exact, rows=slice(None)):
    reference.assert_accurate(actual[rows], None, exact[rows])


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_rounded_once(shape, dtype, rng):
    inputs = make_inputs(shape, dtype, DEVICE, rng(DEVICE))
    exact = reference.attention(*inputs.attention)
    context, lse = sk.text_cross_attention(*inputs.attention, return_lse=True, **EAGER)
    assert_rounded_once(context, exact.context)
    reference.assert_lse_accurate(lse, lse.double().where(exact.lse.isinf(), exact.lse), exact.lse)


@DTYPES
@pytest.mark.parametrize("bias", [40.0, 200.0])
def test_scores_past_the_range_of_float16_are_scores(bias, dtype, rng):
    """Keys with a bias as Qwen2's: q . k passes 65504 before it is scaled."""
    inputs = make_inputs(Shape(((2, 64), (3, 40)), (4, 2), 128), dtype, DEVICE, rng(DEVICE))
    signs = torch.randn(2, 128, generator=rng(DEVICE), device=DEVICE).sign()
    inputs.slow_kv[:, :, 0] += (bias * signs).to(dtype)
    inputs.q += (bias / 4 * signs.repeat_interleave(2, 0)).to(dtype)
    exact = reference.attention(*inputs.attention)
    context = sk.text_cross_attention(*inputs.attention, **EAGER)
    largest = float(exact.lse.abs().max())
    assert bias < 100 or largest * 128**0.5 > 65504
    # float32 scores of that size are themselves off by a rounding, which the softmax turns into a relative error.
    error = (context.double() - exact.context).abs().max()
    allowed = reference.unit_roundoff(dtype) * float(exact.context.abs().max())
    assert error <= allowed + 4 * torch.finfo(torch.float32).eps * largest * float(exact.context.abs().max())


@DTYPES
@pytest.mark.parametrize("way", GATE_WAYS)
@pytest.mark.parametrize("warm_up_tanh", [True, False])
def test_the_mix_is_rounded_once(way, warm_up_tanh, dtype, rng):
    inputs = make_inputs(RAGGED, dtype, DEVICE, rng(DEVICE))
    context = torch.randn(len(inputs.text_rows), inputs.state.shape[1], generator=rng(DEVICE), device=DEVICE).to(dtype)
    gating, options = gate_of(way, inputs, rng(DEVICE))
    arguments, options = (inputs.state, context, inputs.text_rows, *gating), options | {"warm_up_tanh": warm_up_tanh}
    out, exact = sk.gated_residual_mix(*arguments, **options, **EAGER), reference.gated_mix(*arguments, **options)
    assert_rounded_once(out, exact, inputs.text_rows.long())


@DTYPES
def test_a_gate_past_the_range_of_float16_is_a_gate(dtype):
    """A linear gate of 200 000 times a small warm-up factor; the others saturate."""
    state = torch.full((2, 64), 25.0, dtype=dtype, device=DEVICE)
    context, rows = torch.ones_like(state), torch.arange(2, dtype=torch.int32, device=DEVICE)
    weight, bias = torch.full_like(state[:1], 125.0), torch.zeros_like(state[0, :1])
    warm_up = torch.full_like(bias, 2.0**-14)
    arguments = (state, context, rows, weight, bias, warm_up)
    for gate, warm_up_tanh in product(WEIGHTED_GATES, (True, False)):
        options = {"gate": gate, "warm_up_tanh": warm_up_tanh}
        out = sk.gated_residual_mix(*arguments, **options, **EAGER)
        assert_rounded_once(out, reference.gated_mix(*arguments, **options))


@DTYPES
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
@pytest.mark.parametrize("video", VIDEOS, ids=str)
def test_pooled_tokens_are_rounded_once(video, norm_eps, dtype, rng):
    frames = make_frames(video, dtype, DEVICE, rng(DEVICE))
    given = (list(video.frame_counts), video.grid)
    pooled = sk.slowfast_pool(frames, *given, **video.strides, norm_eps=norm_eps, **EAGER)
    slow, _, fast, _ = reference.pool(frames, *given, **video.strides, norm_eps=norm_eps)
    assert_rounded_once(pooled.slow, slow)
    assert_rounded_once(pooled.fast, fast)


def test_pooling_does_not_leave_the_range_of_float16():
    frames = torch.full((8, 16, 4), 6e4, dtype=torch.float16, device=DEVICE)
    pooled = sk.slowfast_pool(frames, [8], (4, 4), pool_stride=2, temporal_stride=4, spatial_stride=2, **EAGER)
    assert (pooled.slow == 6e4).all()
    assert (pooled.fast == 6e4).all()
    normed = sk.slowfast_pool(frames, [8], (4, 4), norm_eps=1e-6, **EAGER).slow
    assert (normed == 1).all()
