"""On a Hopper GPU: however gradients are cut into CTAs, rounds and groups they are accurate, and the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference
import torch
from cases import Shape, make_inputs
from targets import HAS_GPU, REPEATS

from slowfast_kernels import cuda, eager
from slowfast_kernels._extension import unavailable_reason
from slowfast_kernels.calls import AttentionTensors, BackwardTensors, scale_of
from slowfast_kernels.heuristics.cuda import HopperBackwardConfig, hopper_attention_backward_config

IS_HOPPER = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
REASON = unavailable_reason("cuda", torch.device("cuda")) if IS_HOPPER else "no Hopper GPU"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

# 40 text rows x 7 heads are 4 full row tiles of 64 and one of 24; 1380 slow tokens are 10 blocks of 128 and one of 100.
ONE = Shape(((40, 1380),), (14, 2), 128)
RAGGED = Shape(((24, 1380), (1, 60), (0, 300), (40, 0), (3, 200), (60, 768)), (14, 2), 128)
MANY = Shape(((5, 40),) * 37, (6, 2), 64)
ROUNDS = Shape(((40, 4000),), (8, 8), 64)


def config_of(shape: Shape, num_ctas: int, max_groups: int, spread: int, splits: bool, spare: int = 64):
    heads, kv_heads = shape.heads
    num_text = sum(text for text, _ in shape.sequences)
    num_slow = sum(slow for _, slow in shape.sequences)
    made = hopper_attention_backward_config(num_text, num_slow, len(shape.sequences), heads, kv_heads, shape.dim)
    sums = made.max_tiles + spare
    return HopperBackwardConfig(min(num_ctas, made.num_ctas), made.max_tiles, sums, max_groups, spread, splits)


PLANS = {
    "one CTA": (ONE, (1, 1, 1, False)),
    "one CTA, two KV heads of a round": (ONE, (2, 1, 1, False)),
    "a last round of halves": (ONE, (9, 4, 2, True)),
    "all blocks halved": (ONE, (44, 4, 2, True)),
    "a last round too full for halves": (ONE, (6, 4, 2, True)),
    "a group": (ONE, (22, 1, 1, False)),
    "a group a tile": (ONE, (22, 16, 8, False)),
    "groups": (ONE, (22, 3, 2, False)),
    "groups without room": (ONE, (22, 3, 2, False, 0)),
    "groups with room for some": (RAGGED, (40, 8, 2, False, 6)),
    "ragged": (RAGGED, (132, 8, 2, False)),
    "ragged, halves": (RAGGED, (132, 8, 2, True)),
    "ragged, rounds": (RAGGED, (7, 2, 1, False)),
    "ragged, rounds, halves": (RAGGED, (15, 2, 1, True)),
    "many sequences": (MANY, (132, 4, 2, False)),
    "many sequences, rounds": (MANY, (13, 4, 2, True)),
    "rounds": (ROUNDS, (100, 3, 2, True)),
    "more rounds": (ROUNDS, (17, 2, 2, True)),
}


def make_call(shape: Shape, generator) -> BackwardTensors:
    inputs = make_inputs(shape, torch.bfloat16, "cuda", generator)
    tensors: AttentionTensors = inputs.tensors
    scale = scale_of(tensors.q, None)
    context, lse = eager.text_cross_attention(tensors, scale)
    grads = (
        torch.randn(context.shape, generator=generator, device="cuda").to(context.dtype),
        torch.randn(lse.shape, generator=generator, device="cuda"),
    )
    return BackwardTensors(grads, (context, lse), tensors)


def exact(call: BackwardTensors) -> eager.AttentionGradients:
    wide = call.inputs._replace(q=call.inputs.q.double(), slow_kv=call.inputs.slow_kv.double())
    return eager.text_cross_attention_backward(wide, call.grads[0].double(), call.grads[1], scale_of(wide.q, None))


def assert_accurate(found, call):
    for got, want in zip(found[:2], exact(call)[:2], strict=True):
        error = (got.double() - want).abs().max()
        assert error <= 2 * reference.unit_roundoff(torch.bfloat16) * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_is_accurate_and_gives_the_same_bits_every_time(plan, rng):
    shape, choices = PLANS[plan]
    call = make_call(shape, rng("cuda"))
    backward = cuda.AttentionBackward(call.inputs, None, (True, True, False), config_of(shape, *choices))
    first = backward(call)
    assert_accurate(first, call)
    for _ in range(REPEATS):
        again = backward(call)
        assert all(reference.same_bits(x, y) for x, y in zip(first[:2], again[:2], strict=True))


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False)], ids=["q", "kv"])
def test_what_is_asked_for_alone_has_the_bits_that_it_has_with_the_rest(needs, rng):
    call = make_call(RAGGED, rng("cuda"))
    both = cuda.AttentionBackward(call.inputs, None, (True, True, False))(call)
    alone = cuda.AttentionBackward(call.inputs, None, needs)(call)
    for need, x, y in zip(needs, both, alone, strict=True):
        assert (y is None) == (not need)
        assert y is None or reference.same_bits(x, y)


def test_a_tensor_for_keys_and_one_for_values_have_the_bits_of_both_in_one(rng):
    call = make_call(RAGGED, rng("cuda"))
    grad_q, grad_kv, _ = cuda.AttentionBackward(call.inputs, None, (True, True, False))(call)
    kv = call.inputs.slow_kv
    apart = call._replace(inputs=call.inputs._replace(slow_kv=kv[:, :, 0].contiguous(), slow_values=kv[:, :, 1]))
    found = cuda.AttentionBackward(apart.inputs, None, (True, True, True))(apart)
    for x, y in zip(found, (grad_q, grad_kv[:, :, 0], grad_kv[:, :, 1]), strict=True):
        assert reference.same_bits(x, y.contiguous())
    values = cuda.AttentionBackward(apart.inputs, None, (False, False, True))(apart)
    assert values[:2] == (None, None)
    assert reference.same_bits(values[2], found[2])


def test_a_workspace_may_hold_anything(rng, monkeypatch):
    call = make_call(RAGGED, rng("cuda"))
    want = cuda.AttentionBackward(call.inputs, None, (True, True, False))(call)
    make = torch.empty

    def poisoned(*size, **options):
        x = make(*size, **options)
        return x.fill_(float("nan")) if x.dtype.is_floating_point else x

    monkeypatch.setattr(torch, "empty", poisoned)
    found = cuda.AttentionBackward(call.inputs, None, (True, True, False))(call)
    assert all(reference.same_bits(x, y) for x, y in zip(want[:2], found[:2], strict=True))


def test_gradients_of_any_layout_are_read(rng):
    call = make_call(ONE, rng("cuda"))
    backward = cuda.AttentionBackward(call.inputs, None, (True, True, False))
    grad, grad_lse = call.grads
    want = backward(call)
    wide = torch.stack((grad, grad), 3)[..., 0]  # every second element
    turned = grad.transpose(0, 1).contiguous().transpose(0, 1)
    for x in (wide, turned):
        found = backward(call._replace(grads=(x, grad_lse.t().contiguous().t())))
        assert all(reference.same_bits(a, b) for a, b in zip(want[:2], found[:2], strict=True))
    alone = backward(call._replace(grads=(None, grad_lse)))
    assert_accurate(alone, call._replace(grads=(torch.zeros_like(grad), grad_lse)))


def test_a_plan_says_how_it_cuts(rng):
    call = make_call(ONE, rng("cuda"))
    config = replace(config_of(ONE, 9, 4, 2, True), spread=3)
    plan = cuda.AttentionBackward(call.inputs, None, (True, True, False), config).describe()
    assert plan.grid == (9,)
    assert plan.tiles["spread"] == 3
    assert plan.workspace_bytes == sum(config.workspace(2, 128))
