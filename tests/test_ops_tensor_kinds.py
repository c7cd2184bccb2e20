"""Tensors that are more than their memory: each op gives the right value for them, or an error; never a wrong number.

Forward-mode tangents and torch.func transforms go through the eager formula on every backend; lazily negated and
storage-free tensors are made plain first.
"""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from cases import Shape, make_inputs
from targets import FLOAT32
from test_ops_backward import finite
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import slowfast_kernels as sk

SHAPE = Shape(((2, 5), (3, 4)), (4, 2), 8, 2)
CALLS = ("attention: q", "attention: slow_kv", "fused: state", "fused: gate_weight", "mix: context", "mix: gate_value")
CALLS += ("pool: frames",)


@pytest.fixture(params=FLOAT32)
def target(request):
    return request.param


@pytest.fixture(params=CALLS)
def call(request, target, rng):
    """(argument, function of it on the target, the same on eager)."""
    inputs = finite(make_inputs(SHAPE, torch.float32, target.device, rng(target.device)))
    context = torch.randn(5, 32, generator=rng(target.device), device=target.device)
    frames = torch.randn(4, 9, 8, generator=rng(target.device), device=target.device)
    value = torch.randn(5, generator=rng(target.device), device=target.device)
    q, kv, *places = inputs.attention
    mixing = (inputs.text_rows, *inputs.gating)
    weightless = (context, inputs.text_rows, None, None, inputs.warm_up)
    argument, op = {
        "attention: q": (q, lambda x, **o: sk.text_cross_attention(x, kv, *places, **o)),
        "attention: slow_kv": (kv, lambda x, **o: sk.text_cross_attention(q, x, *places, **o)),
        "fused: state": (
            inputs.state,
            lambda x, **o: sk.slowfast_cross_attention(x, *inputs.attention, *inputs.gating, **o),
        ),
        "fused: gate_weight": (
            inputs.gate_weight,
            lambda x, **o: sk.slowfast_cross_attention(
                inputs.state, *inputs.attention, x, inputs.gate_bias, inputs.warm_up, **o
            ),
        ),
        "mix: context": (context, lambda x, **o: sk.gated_residual_mix(inputs.state, x, *mixing, **o)),
        "mix: gate_value": (
            value,
            lambda x, **o: sk.gated_residual_mix(inputs.state, *weightless, gate_value=x, **o),
        ),
        "pool: frames": (
            frames,
            lambda x, **o: sk.slowfast_pool(x, [4], (3, 3), temporal_stride=2, norm_eps=1e-3, **o).slow,
        ),
    }[request.param]
    return argument, lambda x: target.run(op, x), lambda x: op(x, backend="eager")


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def directional(plain, x, direction):
    """The derivative along ``direction`` by autograd's double vjp trick's simplest form: one gradient per output."""
    x = x.detach().clone().requires_grad_()
    out = plain(x)
    rows = [
        (torch.autograd.grad(y, x, retain_graph=True)[0] * direction).sum() for y in out.flatten()
    ]  # few outputs, all small
    return torch.stack(rows).view_as(out)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_dual_tensor_keeps_its_tangent(call, requires_grad):
    x, op, plain = call
    direction = torch.randn_like(x)
    with fwAD.dual_level():
        dual = fwAD.make_dual(x.clone().requires_grad_(requires_grad), direction)
        primal, tangent = fwAD.unpack_dual(op(dual))
    close(primal.detach(), plain(x))
    close(tangent.detach(), directional(plain, x, direction))


def test_function_transforms_see_the_derivative(call):
    x, op, plain = call
    direction = torch.randn_like(x)
    want = directional(plain, x, direction)
    out, tangent = torch.func.jvp(op, (x,), (direction,))
    close(out, plain(x))
    close(tangent, want)
    close(torch.func.linearize(op, x)[1](direction), want)
    upstream = torch.randn_like(out)
    (pulled,) = torch.func.vjp(op, x)[1](upstream)
    close((pulled * direction).sum(), (upstream * want).sum())
    pair = torch.stack([x, -0.5 * x])
    wanted = torch.stack([plain(pair[0]), plain(pair[1])])
    close(torch.func.vmap(op)(pair), wanted)
    close(torch.func.vmap(op, in_dims=-1)(pair.movedim(0, -1).contiguous()), wanted)


def test_gradients_may_come_in_a_batch(call):
    """As ``torch.autograd.functional.jacobian(vectorize=True)`` and gradcheck's ``check_batched_grad`` hand them."""
    x, op, _ = call
    x = x.clone().requires_grad_()
    out = op(x)
    upstream = torch.randn(3, *out.shape, device=out.device)
    (found,) = torch.autograd.grad(out, x, upstream, is_grads_batched=True, retain_graph=True)
    close(found, torch.stack([torch.autograd.grad(out, x, one, retain_graph=True)[0] for one in upstream]))


def test_frame_counts_may_be_a_tensor_inside_a_transform(target):
    frames, counts = torch.randn(3, 4, 8, device=target.device), torch.tensor([2, 1])

    def slow(frames):
        return target.run(sk.slowfast_pool, frames, counts, (2, 2), pool_stride=2).slow

    close(torch.func.jvp(slow, (frames,), (frames,))[1], slow(frames))  # pooling is linear


def test_a_lazily_negated_tensor_is_read_with_its_sign(call):
    x, op, plain = call
    want = plain(-x)
    close(op(torch._neg_view(x)), want)
    close(op(torch.complex(torch.zeros_like(x), x).conj().imag.contiguous()), want)
    close(op(torch._neg_view(x.clone().requires_grad_())).detach(), want)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_tensor_without_storage_is_read_as_zeros(call, requires_grad):
    x, op, plain = call
    zero = torch._efficientzerotensor(x.shape, device=x.device)
    close(op(zero.requires_grad_(requires_grad)).detach(), plain(torch.zeros_like(x)))


def test_meta_tensors_give_meta_tensors():
    inputs = make_inputs(SHAPE, torch.float32, "cpu", torch.Generator().manual_seed(0))
    fused = [x.to("meta") for x in inputs.fused]
    mixed = sk.slowfast_cross_attention(*fused)
    context, lse = sk.text_cross_attention(*fused[1:6], return_lse=True)
    assert [x.device.type for x in (mixed, context, lse)] == ["meta"] * 3
    assert (mixed.shape, context.shape, lse.shape) == (inputs.state.shape, (5, 4, 8), (5, 4))
    assert sk.slowfast_pool(torch.empty(4, 9, 8, device="meta"), [4], (3, 3)).slow.shape == (36, 8)


def test_a_registered_op_refuses_a_tangent_that_it_would_drop():
    inputs = finite(make_inputs(SHAPE, torch.float32, "cpu", torch.Generator().manual_seed(0)))
    q, *rest = inputs.tensors
    with fwAD.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        torch.ops.slowfast.text_cross_attention(fwAD.make_dual(q, q), *rest, None, False, 0, None)


def test_a_registered_op_is_refused_inside_jvp_which_takes_tangents_off():
    def registered(x):
        return torch.ops.slowfast.pool(x, [4], [3, 3], 1, 1, 2, 1, 1, None, "eager")[0]

    x = torch.randn(4, 9, 8)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(registered, (x,), (x,))


def test_a_backward_refuses_a_tangent_that_it_would_drop():
    x = torch.randn(4, 9, 8, requires_grad=True)
    out = sk.slowfast_pool(x, [4], (3, 3)).slow
    with fwAD.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        torch.autograd.grad(out, x, fwAD.make_dual(torch.ones_like(out), torch.ones_like(out)))


def test_a_second_derivative_through_backward_is_an_error():
    x = torch.randn(4, 9, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(sk.slowfast_pool(x, [4], (3, 3), norm_eps=1e-3).slow.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.autograd.grad(grad.sum(), x)


def test_a_backend_that_does_not_exist_is_refused_under_a_transform_too():
    x = torch.randn(4, 9, 8)
    with pytest.raises(ValueError, match="backend: got 'nonsense'"):
        torch.func.jvp(lambda y: sk.slowfast_pool(y, [4], (3, 3), backend="nonsense").slow, (x,), (x,))


def in_functionalize(op, x):
    torch.func.functionalize(op)(x)


def in_vmap(op, x):
    torch.func.vmap(op)(x[None])


def in_a_trace(op, x):
    make_fx(op, tracing_mode="fake")(x)


def in_inference_mode(op, x):
    with torch.inference_mode():
        op(x)


def in_fake_tensor_mode(op, x):
    with FakeTensorMode(allow_non_fake_inputs=True):
        op(x)


WAYS = (in_functionalize, in_vmap, in_a_trace, in_inference_mode, in_fake_tensor_mode)


@pytest.mark.parametrize("first", WAYS, ids=lambda f: f.__name__)
def test_what_a_first_call_leaves_behind_is_plain(first):
    """Tables of a plan are kept: made inside a transform or a mode, they would have no memory for the next call."""
    length = 20 + WAYS.index(first)  # a plan that nobody has made yet
    frames = torch.randn(length, 9, 4)
    first(lambda x: sk.slowfast_pool(x, [length], (3, 3), temporal_stride=2).fast, frames)
    for backend in ("eager", "cpu"):
        pooled = sk.slowfast_pool(frames, [length], (3, 3), temporal_stride=2, backend=backend)
        assert pooled.cu_slow.tolist() == [0, 9 * length]
        torch.testing.assert_close(pooled.fast[:9], frames[:2].mean(0))
