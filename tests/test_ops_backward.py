"""Gradients of the four ops on every backend, and of the training step that they make up."""

import pytest
import reference
import torch
from cases import GATE_WAYS, Shape, Video, gate_of, make_frames, make_inputs
from targets import ALL

import slowfast_kernels as sk

SHAPE = Shape(((3, 20), (0, 4), (2, 0), (4, 9)), (4, 2), 64)
VIDEO = Video((6, 1, 3), (5, 5), 8, 2, 1, 2, 2, 2)
DOUBLE = torch.float64


def leaves(*tensors):
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


def gradients(outputs, upstream, inputs):
    loss = sum((out.double() * grad).sum() for out, grad in zip(outputs, upstream, strict=True))
    return torch.autograd.grad(loss, inputs)


def normal_like(outputs, generator):
    return [torch.randn(x.shape, generator=generator, device=x.device, dtype=DOUBLE) for x in outputs]


def assert_gradients_accurate(op, exact_op, inputs, generator, summed=lambda upstream: 0.0):
    """``op`` in its dtype against ``exact_op`` in float64: 2 x the dtype's unit roundoff of the largest gradient, or
    1e-5 in float32 (backward passes work in float32 and round once).

    ``summed``: of the results' gradients, the sizes of terms whose sum, in float32, is the gradient of one number:
    little of them may be left.
    """
    ours = leaves(*inputs)
    outputs = op(*ours)
    upstream = [x.to(out.dtype).to(DOUBLE) for x, out in zip(normal_like(outputs, generator), outputs, strict=True)]
    found = gradients(outputs, upstream, ours)
    wide = leaves(*(x.double() for x in inputs))
    for x, got, want in zip(inputs, found, gradients(exact_op(*wide), upstream, wide), strict=True):
        assert got.dtype == x.dtype
        assert got.shape == x.shape
        roundoff = reference.FLOAT32_TOLERANCE if x.dtype == torch.float32 else 2 * reference.unit_roundoff(x.dtype)
        allowed = roundoff * max(1.0, float(want.abs().max()))
        if x.dtype == torch.float32 and x.numel() == 1:
            allowed += 4 * reference.unit_roundoff(x.dtype) * float(summed(upstream))
        assert (got.double() - want).abs().max() <= allowed


def gate_terms(context, text_rows):
    """``summed`` of the gate: each text row's product of gradient and context is a term of the bias's gradient."""
    return lambda upstream: (upstream[0][text_rows.long()] * context.double()).sum(1).abs().sum()


def finite(inputs):
    """Rows that no op reads, without poison: autograd of the float64 formula would multiply it by zero."""
    for x in (inputs.q, inputs.state):
        x[inputs.other_rows] = 0.5
    return inputs


@pytest.mark.parametrize("target", ALL)
def test_attention_gradients_are_accurate(target, rng):
    inputs = finite(make_inputs(SHAPE, target.dtype, target.device, rng(target.device)))
    _, _, *indices = inputs.attention
    assert_gradients_accurate(
        lambda q, kv: [target.run(sk.text_cross_attention, q, kv, *indices)],
        lambda q, kv: [reference_context(q, kv, indices)],
        (inputs.q, inputs.slow_kv),
        rng(target.device),
    )


def reference_context(q, kv, indices):
    """The float64 context, differentiable: 0 where a sequence has no slow token."""
    return reference.attention(q, kv, *indices).context


@pytest.mark.parametrize("target", ALL)
def test_lse_is_differentiable(target, rng):
    shape = Shape(((3, 20), (4, 9)), (4, 2), 64)
    inputs = finite(make_inputs(shape, target.dtype, target.device, rng(target.device)))
    _, _, *indices = inputs.attention
    assert_gradients_accurate(
        lambda q, kv: target.run(sk.text_cross_attention, q, kv, *indices, return_lse=True),
        lambda q, kv: reference.attention(q, kv, *indices)[:2],
        (inputs.q, inputs.slow_kv),
        rng(target.device),
    )


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("way", GATE_WAYS)
@pytest.mark.parametrize("warm_up", ["tanh", "identity", "none"])
def test_mix_gradients_are_accurate(target, way, warm_up, rng):
    inputs = finite(make_inputs(SHAPE, target.dtype, target.device, rng(target.device), gate_dtype=torch.float32))
    size = (len(inputs.text_rows), inputs.state.shape[1])
    context = torch.randn(size, generator=rng(target.device), device=target.device)
    inputs.warm_up = None if warm_up == "none" else inputs.warm_up
    gating, options = gate_of(way, inputs, rng(target.device))
    value = options.pop("gate_value", None)
    options["warm_up_tanh"] = warm_up == "tanh"
    given = (inputs.state, context.to(target.dtype), *gating, value)
    tensors = [x for x in given if x is not None]

    def mix(op, *tensors):
        rest = iter(tensors)
        state, context, *gating, value = (None if x is None else next(rest) for x in given)
        return [op(state, context, inputs.text_rows, *gating, gate_value=value, **options)]

    assert_gradients_accurate(
        lambda *args: mix(lambda *a, **o: target.run(sk.gated_residual_mix, *a, **o), *args),
        lambda *args: mix(reference.gated_mix, *args),
        tensors,
        rng(target.device),
        gate_terms(given[1], inputs.text_rows),
    )


@pytest.mark.parametrize("target", ALL)
def test_fused_gradients_are_accurate(target, rng):
    inputs = finite(make_inputs(SHAPE, target.dtype, target.device, rng(target.device), gate_dtype=torch.float32))
    indices = inputs.attention[2:]

    def exact(state, q, kv, *gating):
        return [reference.gated_mix(state, reference_context(q, kv, indices), inputs.text_rows, *gating)]

    tensors = (inputs.state, inputs.q, inputs.slow_kv, *inputs.gating)
    # The composition rounds the context to the dtype on the way, as the op does in the forward pass: float32 only
    # is held to the formula, the others through the two ops above.
    if target.dtype == torch.float32:
        assert_gradients_accurate(
            lambda state, q, kv, *gating: [target.run(sk.slowfast_cross_attention, state, q, kv, *indices, *gating)],
            exact,
            tensors,
            rng(target.device),
            gate_terms(reference_context(*tensors[1:3], indices).flatten(1), inputs.text_rows),
        )
    ours = leaves(*tensors)
    out = target.run(sk.slowfast_cross_attention, *ours[:3], *indices, *ours[3:])
    theirs = leaves(*tensors)
    context = target.run(sk.text_cross_attention, *theirs[1:3], *indices)
    composed = target.run(sk.gated_residual_mix, theirs[0], context, inputs.text_rows, *theirs[3:])
    upstream = normal_like([out], rng(target.device))
    found, expected = gradients([out], upstream, ours), gradients([composed], upstream, theirs)
    assert all(reference.same_bits(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("way", GATE_WAYS)
def test_the_registered_fused_op_has_the_same_gradients(target, way, rng):
    """The op that torch.compile traces without gradients is differentiable too."""
    inputs = finite(make_inputs(SHAPE, torch.float32, target.device, rng(target.device)))
    gating, gate = gate_of(way, inputs, rng(target.device))
    value = gate.pop("gate_value", None)
    tensors, indices = (inputs.state, inputs.q, inputs.slow_kv, *gating, value), inputs.attention[2:]
    results = []
    for op in (torch.ops.slowfast.cross_attention, sk.slowfast_cross_attention):
        mine = leaves(*tensors)
        if op is sk.slowfast_cross_attention:
            out = target.run(op, *mine[:3], *indices, *mine[3:-1], gate_value=mine[-1], **gate)
        else:
            try:
                out = op(
                    *mine[:3], *indices, *[None] * 4, *mine[3:], None, 0, gate.get("gate", "tanh"), True, target.backend
                )
            except NotImplementedError as limit:
                pytest.skip(str(limit))
        results.append(gradients([out], [torch.ones_like(out)], [x for x in mine if x is not None]))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("norm_eps", [None, 1e-5], ids=["plain", "norm"])
def test_pool_gradients_are_accurate(target, norm_eps, rng):
    frames = make_frames(VIDEO, target.dtype, target.device, rng(target.device))
    counts, grid = list(VIDEO.frame_counts), VIDEO.grid

    def ours(frames):
        pooled = target.run(sk.slowfast_pool, frames, counts, grid, **VIDEO.strides, norm_eps=norm_eps)
        return pooled.slow, pooled.fast

    def exact(frames):
        slow, _, fast, _ = reference.pool(frames, counts, grid, *VIDEO.strides.values(), norm_eps)
        return slow, fast

    assert_gradients_accurate(ours, exact, (frames,), rng(target.device))


# --------------------------------------------------------------- what holds exactly, whatever the backend


@pytest.mark.parametrize("target", ALL)
def test_with_warm_up_zero_only_the_warm_up_gate_and_the_state_receive_a_gradient(target, rng):
    inputs = finite(make_inputs(SHAPE, target.dtype, target.device, rng(target.device)))
    state, q, kv, weight, bias, warm_up = leaves(inputs.state, inputs.q, inputs.slow_kv, *inputs.gating)
    with torch.no_grad():
        warm_up.zero_()
    out = target.run(sk.slowfast_cross_attention, state, q, kv, *inputs.attention[2:], weight, bias, warm_up)
    out.backward(torch.ones_like(out))
    for x in (q, kv, weight, bias):
        assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(state.grad, torch.ones_like(state))
    assert warm_up.grad.abs() > 0


@pytest.mark.parametrize("target", ALL)
def test_rows_that_are_no_text_rows_pass_their_gradient_through_whatever_they_hold(target, rng):
    inputs = make_inputs(SHAPE, target.dtype, target.device, rng(target.device))  # they hold NaN and Inf
    state, q, kv = leaves(inputs.state, inputs.q, inputs.slow_kv)
    out = target.run(sk.slowfast_cross_attention, state, q, kv, *inputs.attention[2:], *inputs.gating)
    upstream = torch.randn(out.shape, generator=rng(target.device), device=out.device).to(out.dtype)
    out.backward(upstream)
    others = inputs.other_rows
    assert reference.same_bits(state.grad[others], upstream[others])
    assert torch.equal(q.grad[others], torch.zeros_like(q.grad[others]))
    assert all(torch.isfinite(x.grad).all() for x in (state, q, kv))


@pytest.mark.parametrize("target", ALL)
def test_the_state_s_gradient_is_a_tensor_of_its_own(target):
    """Also where no weight adds to it: who scales it in place (clipping) scales nothing else."""
    state = torch.ones(3, 64, dtype=target.dtype, device=target.device, requires_grad=True)
    rows = torch.zeros(1, dtype=torch.int32, device=target.device)
    out = target.run(sk.gated_residual_mix, state, torch.ones_like(state[:1]), rows, None, None, None, gate="none")
    upstream = torch.ones_like(out)
    (found,) = torch.autograd.grad(out, state, upstream)
    found.zero_()
    assert bool((upstream == 1).all())


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("sequences", [((0, 9), (0, 3)), ((3, 0), (2, 0))], ids=["no text", "no slow tokens"])
def test_an_empty_side_gives_zero_gradients(target, sequences, rng):
    inputs = finite(make_inputs(Shape(sequences), target.dtype, target.device, rng(target.device)))
    tensors = leaves(inputs.state, inputs.q, inputs.slow_kv, *inputs.gating)
    out = target.run(sk.slowfast_cross_attention, *tensors[:3], *inputs.attention[2:], *tensors[3:])
    out.backward(torch.ones_like(out))
    assert torch.equal(tensors[0].grad, torch.ones_like(out))
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in tensors[1:])


@pytest.mark.parametrize("target", ALL)
def test_only_the_gradients_asked_for_are_returned(target, rng):
    inputs = finite(make_inputs(SHAPE, target.dtype, target.device, rng(target.device)))
    weight = inputs.gate_weight.requires_grad_()
    target.run(sk.slowfast_cross_attention, *inputs.fused).sum().backward()
    assert weight.grad is not None
    assert inputs.q.grad is None


# ------------------------------------------------------------------- the formulas, by finite differences


def tiny(rng):
    inputs = finite(make_inputs(Shape(((2, 3), (1, 0), (1, 2)), (2, 1), 3, 1), DOUBLE, "cpu", rng()))
    return inputs, leaves(inputs.state, inputs.q, inputs.slow_kv, *inputs.gating)


def test_gradcheck_attention(rng):
    inputs, (_, q, kv, *_) = tiny(rng)
    indices = inputs.attention[2:]

    def op(q, kv):
        return sk.text_cross_attention(q, kv, *indices, return_lse=True, backend="eager")[0]

    assert torch.autograd.gradcheck(op, (q, kv), fast_mode=True)


@pytest.mark.parametrize("way", GATE_WAYS)
@pytest.mark.parametrize("warm_up_tanh", [True, False])
def test_gradcheck_fused(way, warm_up_tanh, rng):
    inputs, tensors = tiny(rng)
    gating, options = gate_of(way, inputs, rng())
    leaves_of_gate = leaves(*(x for x in (*gating, options.pop("gate_value", None)) if x is not None))

    def op(state, q, kv, *tensors):
        rest = iter(tensors)
        gating_now = [None if x is None else next(rest) for x in gating]
        gate = {"gate_value": next(rest, None), "warm_up_tanh": warm_up_tanh, "backend": "eager", **options}
        return sk.slowfast_cross_attention(state, q, kv, *inputs.attention[2:], *gating_now, **gate)

    assert torch.autograd.gradcheck(op, (*tensors[:3], *leaves_of_gate), fast_mode=True)


@pytest.mark.parametrize("norm_eps", [None, 1e-2], ids=["plain", "norm"])
def test_gradcheck_pool(norm_eps, rng):
    video = Video((3, 1), (3, 3), 2, 1, 1, 2, 2)
    frames = make_frames(video, DOUBLE, "cpu", rng()).requires_grad_()

    def op(frames):
        pooled = sk.slowfast_pool(frames, [3, 1], (3, 3), **video.strides, norm_eps=norm_eps, backend="eager")
        return pooled.slow, pooled.fast

    assert torch.autograd.gradcheck(op, (frames,), fast_mode=True)
