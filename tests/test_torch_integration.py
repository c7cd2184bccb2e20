"""The ops inside PyTorch: torch.library contracts, torch.compile, autograd modes, fake tensors."""

from __future__ import annotations

import pytest
import torch
from cases import Shape, Video, make_frames, make_inputs
from targets import DEVICE, FLOAT32
from test_ops_backward import finite

import slowfast_kernels as sk

SHAPE = Shape(((3, 20), (0, 4), (2, 0), (4, 9)), (4, 2), 16)
VIDEO = Video((4, 1), (4, 4), 8, 2, 1, 2, 1)
STRIDES = VIDEO.strides  # a dict: older dynamos cannot spread the attribute of a NamedTuple
POOL = ([4, 1], [4, 4], 2, 1, 2, 1, 1)


def registered_calls(target, generator) -> dict[str, tuple]:
    """One call of every registered op, forward and backward."""
    inputs = finite(make_inputs(SHAPE, torch.float32, target.device, generator))
    state, q, kv, *_ = (x.clone() for x in (inputs.state, inputs.q, inputs.slow_kv))
    indices, gating = inputs.tensors[2:], inputs.gating
    num_text = len(inputs.text_rows)
    context = torch.randn(num_text, state.shape[1], generator=generator, device=target.device)
    frames = make_frames(VIDEO, torch.float32, target.device, generator)
    pooled = sk.slowfast_pool(frames, [4, 1], (4, 4), **VIDEO.strides, backend="eager")
    value = torch.rand(num_text, generator=generator, device=target.device)
    lse = torch.ones(num_text, q.shape[1], device=target.device)
    name = target.backend

    def grad(*tensors):
        return tuple(x.clone().requires_grad_() for x in tensors)

    return {
        "pool": (*grad(frames), *POOL, 1e-6, name),
        "text_cross_attention": (*grad(q, kv), *indices, None, True, 2, name),
        "gated_residual_mix": (*grad(state, context), inputs.text_rows, *grad(*gating), None, "tanh", True, name),
        "cross_attention": (*grad(state, q, kv), *indices, *grad(*gating), None, 0.3, 0, "linear", False, name),
        "pool_backward": (pooled.slow, pooled.fast, [True], frames, *POOL, 1e-6, name),
        "text_cross_attention_backward": (
            *(context.view(num_text, 4, 16), lse) * 2,
            [True, True, False],
            q,
            kv,
            *indices,
            0.25,
            True,
            0,
            name,
        ),
        "gated_residual_mix_backward": (
            state,
            [True] * 6,
            state,
            context,
            inputs.text_rows,
            *gating,
            None,
            "tanh",
            True,
            name,
        ),
        "cross_attention_backward": (
            state,
            [True] * 8,
            state,
            q,
            kv,
            *indices,
            None,
            None,
            gating[2],
            value,
            0.25,
            0,
            "tanh",
            True,
            name,
        ),
    }


OPS = ["pool", "text_cross_attention", "gated_residual_mix", "cross_attention"]
OPS += [f"{name}_backward" for name in OPS]


@pytest.mark.parametrize("target", FLOAT32)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(target, name, rng):
    call = registered_calls(target, rng(target.device))[name]
    op = getattr(torch.ops.slowfast, name).default

    def check(*args):
        result = torch.library.opcheck(op, args)
        assert set(result.values()) == {"SUCCESS"}

    if target.backend == "cuda":
        target.run(lambda *args, backend: op(*args), *call)  # skips where the backend names a limit
    check(*call)


def hybrid_layer(frames, state, q, projection, cu_text, text_rows, gate_weight, gate_bias, warm_up, backend):
    """The slow path of one layer from the vision features on, with plain PyTorch between the ops."""
    pooled = sk.slowfast_pool(frames, [4, 1], (4, 4), **STRIDES, norm_eps=1e-6, backend=backend)
    kv = (pooled.slow @ projection).view(-1, 2, 2, 16)
    context = sk.text_cross_attention(q, kv, pooled.cu_slow, text_rows, cu_text, backend=backend)
    mixed = sk.gated_residual_mix(state, context, text_rows, gate_weight, gate_bias, warm_up, backend=backend)
    rest = (q, kv, pooled.cu_slow, text_rows, cu_text, gate_weight, gate_bias, warm_up)
    fused = sk.slowfast_cross_attention(mixed, *rest, num_splits=2, backend=backend)
    return fused * 2 + pooled.fast.sum()


def layer_arguments(target, generator, requires_grad: bool):
    inputs = finite(make_inputs(Shape(((3, 0), (2, 0)), (4, 2), 16), torch.float32, target.device, generator))
    frames = make_frames(VIDEO, torch.float32, target.device, generator)
    projection = torch.randn(8, 64, generator=generator, device=target.device)
    floats = [x.clone().requires_grad_(requires_grad) for x in (frames, inputs.state, inputs.q, projection)]
    gating = [x.clone().requires_grad_(requires_grad) for x in inputs.gating]
    return [*floats, inputs.cu_text, inputs.text_rows, *gating]


@pytest.mark.parametrize("target", FLOAT32)
def test_compiles_without_a_graph_break_and_gives_the_same_bits(target, rng):
    arguments = layer_arguments(target, rng(target.device), requires_grad=False)
    expected = target.run(hybrid_layer, *arguments)
    compiled = torch.compile(hybrid_layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments, backend=target.backend), expected)


@pytest.mark.parametrize("target", FLOAT32)
def test_compiles_for_training_without_a_graph_break(target, rng):
    arguments = layer_arguments(target, rng(target.device), requires_grad=True)
    leaves = [x for x in arguments if x.requires_grad]
    out = target.run(hybrid_layer, *arguments)
    expected = torch.autograd.grad(out.square().sum(), leaves)
    compiled = torch.compile(hybrid_layer, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*arguments, backend=target.backend).square().sum(), leaves)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_inductor_code_around_an_op_gives_the_same_answer(rng):
    inputs = make_inputs(SHAPE, torch.float32, DEVICE, rng(DEVICE))
    context = torch.randn(len(inputs.text_rows), inputs.state.shape[1], generator=rng(DEVICE), device=DEVICE)

    def around(state, context, *rest):
        return sk.gated_residual_mix(torch.nan_to_num(state), context, *rest) * 2

    arguments = (inputs.state, context, inputs.text_rows, *inputs.gating)
    found = torch.compile(around, fullgraph=True)(*arguments)
    torch.testing.assert_close(found, around(*arguments), atol=1e-5, rtol=0)


@pytest.mark.parametrize("target", FLOAT32)
def test_one_compiled_graph_serves_any_number_of_slow_tokens_and_rows(target, rng):
    def op(*arguments):
        return sk.slowfast_cross_attention(*arguments, backend=target.backend) + 1

    shapes = [Shape(((2 + n, 9 + 5 * n), (3, 8 + n)), (4, 2), 16, 2 + n) for n in range(4)]
    calls = [make_inputs(shape, torch.float32, target.device, rng(target.device)).fused for shape in shapes]
    expected = [target.run(sk.slowfast_cross_attention, *call) + 1 for call in calls]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend=counter)
    for call, want in zip(calls, expected, strict=True):
        assert torch.equal(torch.nan_to_num(compiled(*call)), torch.nan_to_num(want))
    assert counter.frame_count == 1


@pytest.mark.parametrize("target", FLOAT32)
def test_fake_tensors_get_shapes_without_running_a_kernel(target, rng):
    arguments = layer_arguments(target, rng(target.device), requires_grad=False)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(x) for x in arguments]
        out = target.run(hybrid_layer, *fake)
    assert isinstance(out, torch._subclasses.FakeTensor)
    assert out.shape == arguments[1].shape


@pytest.mark.parametrize("target", FLOAT32)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_direct_call_and_the_registered_op_give_the_same_bits(target, mode, rng):
    inputs = finite(make_inputs(SHAPE, torch.float32, target.device, rng(target.device)))
    inputs.gate_weight.requires_grad_()
    with mode():
        direct = target.run(sk.slowfast_cross_attention, *inputs.fused)
    assert not direct.requires_grad
    registered = target.run(sk.slowfast_cross_attention, *inputs.fused)
    assert registered.requires_grad
    torch.testing.assert_close(direct, registered.detach(), atol=1e-6, rtol=1e-6)


def test_use_backend_reaches_a_compiled_graph(rng):
    """The choice is made when the graph runs, not when it was traced."""
    inputs = make_inputs(SHAPE, torch.float64, "cpu", rng())
    compiled = torch.compile(lambda *a: sk.text_cross_attention(*a), fullgraph=True, backend="aot_eager")
    compiled(*inputs.attention)
    with sk.use_backend("cpu"), pytest.raises(NotImplementedError, match="backend='cpu' cannot run"):
        compiled(*inputs.attention)


def test_this_suite_poisons_fresh_memory():
    """What ``conftest.poisoned_memory`` promises to every other test."""
    like = torch.zeros(3)
    fresh = (torch.empty(3), torch.empty_like(like), like.new_empty(3), torch.empty_strided((3,), (1,)))
    assert all(x.isnan().all() for x in fresh)
    assert (torch.empty(3, dtype=torch.int32) < -(10**9)).all()
