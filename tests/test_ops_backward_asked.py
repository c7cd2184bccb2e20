"""What a backward pass is asked for, and how gradients come in: subsets, missing and oddly laid out ones, poison."""

import pytest
import reference
import torch
from cases import Shape, make_inputs
from targets import ALL, KERNELS, REPEATS
from test_ops_backward import SHAPE, VIDEO, finite, leaves, make_frames

import slowfast_kernels as sk
from slowfast_kernels.ops.op import OPS

NAMES = ("state", "q", "slow_kv", "gate_weight", "gate_bias", "warm_up")
SUBSETS = [(name,) for name in NAMES] + [("q", "warm_up"), ("state", "slow_kv"), NAMES]


@pytest.fixture
def fused(request, rng):
    """A call of the fused op by its differentiable tensors, and those tensors."""
    target = request.getfixturevalue("target")
    inputs = finite(make_inputs(SHAPE, target.dtype, target.device, rng(target.device)))
    places = inputs.attention[2:]

    def call(state, q, slow_kv, *gating):
        return target.run(sk.slowfast_cross_attention, state, q, slow_kv, *places, *gating)

    return call, (inputs.state, inputs.q, inputs.slow_kv, *inputs.gating)


def tolerance(x):
    return reference.FLOAT32_TOLERANCE if x.dtype == torch.float32 else 4 * reference.unit_roundoff(x.dtype)


def asked_gradients(call, tensors, names):
    """By name, of the sum of the squares of the result."""
    mine = [x.detach().clone().requires_grad_(name in names) for name, x in zip(NAMES, tensors, strict=True)]
    out = call(*mine)
    out.float().square().sum().backward()
    return {name: x.grad for name, x in zip(NAMES, mine, strict=True)}


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_any_subset_has_the_gradients_that_all_together_have(target, names, fused):
    everything, found = asked_gradients(*fused, NAMES), asked_gradients(*fused, names)
    for name, grad in found.items():
        if name not in names:
            assert grad is None
            continue
        want = everything[name].double()
        assert (grad.double() - want).abs().max() <= tolerance(grad) * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize(
    ("names", "mix", "attention"),
    [
        (("warm_up",), (False, False, False, False, True, False), None),
        (("q",), (False, True, False, False, False, False), (True, False, False)),
        (("slow_kv", "state"), (True, True, False, False, False, False), (False, True, False)),
    ],
    ids=lambda x: "+".join(x) if x and isinstance(x[0], str) else "",
)
def test_the_kernels_are_told_what_is_needed(target, names, mix, attention, fused, monkeypatch):
    needs = {}
    for name in ("gated_residual_mix", "text_cross_attention"):
        op = OPS[name]
        monkeypatch.setattr(op, "run_backward", _noting(needs, name, op.run_backward))
    asked_gradients(*fused, names)
    assert needs.get("gated_residual_mix") == mix
    assert needs.get("text_cross_attention") == attention


def _noting(needs, name, run):
    def noted(call, options, asked):
        needs[name] = asked
        found = run(call, options, asked)
        assert [x is not None for x in found] == list(asked)
        return found

    return noted


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("which", [0, 1], ids=["context", "lse"])
def test_one_of_two_results_may_have_no_gradient(target, which, rng):
    """As if the other's were zero."""
    inputs = finite(make_inputs(SHAPE, target.dtype, target.device, rng(target.device)))
    found = []
    for zero in (False, True):
        mine = leaves(inputs.q, inputs.slow_kv)
        results = target.run(sk.text_cross_attention, *mine, *inputs.attention[2:], return_lse=True)
        results = [torch.where(x == -torch.inf, 0, x) for x in results]  # of a sequence without slow tokens
        loss = results[which].float().square().sum() + (results[1 - which].float() * 0).sum() * zero
        found.append(torch.autograd.grad(loss, mine))
    for got, want in zip(*found, strict=True):
        assert (got - want).abs().max() <= tolerance(got) * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_gradients_may_come_in_any_layout(target, layout, fused, rng):
    call, tensors = fused
    out = call(*leaves(*tensors))
    upstream = torch.randn(out.shape, generator=rng(target.device), device=out.device).to(out.dtype)
    upstream = upstream[:1].expand_as(out) if layout == "expanded" else upstream.T.contiguous().T
    found = []
    for up in (upstream, upstream.contiguous()):
        mine = leaves(*tensors)
        found.append(torch.autograd.grad(call(*mine), mine, up))
    for got, want in zip(*found, strict=True):
        assert (got - want).abs().max() <= tolerance(got) * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_gradients_of_the_attention_and_the_pool_may_come_in_any_layout(target, layout, rng):
    inputs = finite(make_inputs(SHAPE, target.dtype, target.device, rng(target.device)))
    frames = make_frames(VIDEO, target.dtype, target.device, rng(target.device))
    counts = list(VIDEO.frame_counts)
    calls = [
        (lambda q, kv: target.run(sk.text_cross_attention, q, kv, *inputs.attention[2:]), (inputs.q, inputs.slow_kv)),
        (
            lambda x: target.run(sk.slowfast_pool, x, counts, VIDEO.grid, **VIDEO.strides, norm_eps=1e-5).slow,
            (frames,),
        ),
    ]
    for call, tensors in calls:
        found = []
        for contiguous in (False, True):
            mine = leaves(*tensors)
            out = call(*mine)
            up = torch.randn(out.shape, generator=rng(target.device), device=out.device).to(out.dtype)
            up = up[:1].expand_as(out) if layout == "expanded" else up.transpose(0, -1).contiguous().transpose(0, -1)
            found.append(torch.autograd.grad(out, mine, up.contiguous() if contiguous else up))
        for got, want in zip(*found, strict=True):
            assert (got - want).abs().max() <= tolerance(got) * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("target", ALL)
def test_poison_in_gradients_of_rows_without_text_stays_there(target, fused, rng):
    call, tensors = fused
    mine = leaves(*tensors)
    out = call(*mine)
    others = finite(make_inputs(SHAPE, target.dtype, target.device, rng(target.device))).other_rows
    upstream = torch.ones_like(out)
    upstream[others] = float("nan")
    state, q, *rest = torch.autograd.grad(out, mine, upstream)
    assert state[others].isnan().all()
    kept = torch.ones(len(state), dtype=torch.bool, device=state.device)
    kept[others] = False
    assert all(x.isfinite().all() for x in (state[kept], q, *rest))
    assert not q[others].any()


@pytest.mark.parametrize("target", ALL)
def test_one_tensor_may_be_two_inputs(target, rng):
    shape = Shape(((3, 20), (4, 9)), (4, 2), 64, 0)
    inputs = make_inputs(shape, target.dtype, target.device, rng(target.device))
    indices, one = inputs.attention[2:], inputs.slow_kv[:, :, 0].contiguous()

    def grads(*leaves_of, call):
        return torch.autograd.grad(call(*leaves_of).float().square().sum(), leaves_of)

    (both,) = leaves(one)
    (joint,) = grads(both, call=lambda x: target.run(sk.text_cross_attention, inputs.q, (x, x), *indices))
    apart = grads(*leaves(one, one), call=lambda k, v: target.run(sk.text_cross_attention, inputs.q, (k, v), *indices))
    want = apart[0].double() + apart[1].double()
    assert (joint.double() - want).abs().max() <= tolerance(joint) * max(1.0, float(want.abs().max()))

    rows = torch.arange(shape.rows, dtype=torch.int32, device=target.device)
    (state,) = leaves(inputs.state)
    (joint,) = grads(state, call=lambda x: target.run(sk.gated_residual_mix, x, x, rows, *inputs.gating))
    apart = grads(
        *leaves(inputs.state, inputs.state),
        call=lambda x, y: target.run(sk.gated_residual_mix, x, y, rows, *inputs.gating),
    )
    want = apart[0].double() + apart[1].double()
    assert (joint.double() - want).abs().max() <= tolerance(joint) * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("target", KERNELS)
def test_same_call_same_bits(target, rng):
    """SmolLM2's heads: three query heads a KV head."""
    shape = Shape(((5, 70), (0, 3), (9, 131)), (9, 3), 64)
    inputs = finite(make_inputs(shape, target.dtype, target.device, rng(target.device)))
    tensors = (inputs.state, inputs.q, inputs.slow_kv, *inputs.gating)

    def grads():
        mine = leaves(*tensors)
        out = target.run(sk.slowfast_cross_attention, *mine[:3], *inputs.attention[2:], *mine[3:])
        return torch.autograd.grad(out, mine, torch.ones_like(out))

    first = grads()
    for _ in range(REPEATS):
        assert all(reference.same_bits(x, y) for x, y in zip(grads(), first, strict=True))
