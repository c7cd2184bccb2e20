"""merge_attention: the parts of an attention, each with its log-sum-exp, are the whole."""

from __future__ import annotations

import pytest
import reference
import torch
from cases import Shape, make_inputs, poison
from targets import ALL, FLOAT32, KERNELS, REPEATS

import slowfast_kernels as sk
from slowfast_kernels.calls import MergeTensors

SHAPE = Shape(((37, 90),), (6, 2), 80, 0)
NOTHING = -torch.inf


def parts_of(target, rng, cut=31, backend="eager"):
    """(context_a, lse_a, context_b, lse_b) over the tokens before and after ``cut``, and the inputs they are of."""
    inputs = make_inputs(SHAPE, target.dtype, target.device, rng(target.device))
    q, kv, _, *rows = inputs.attention
    found = []
    for part in (kv[:cut], kv[cut:]):
        cu_part = torch.tensor([0, len(part)], dtype=torch.int32, device=target.device)
        found += sk.text_cross_attention(q, part, cu_part, *rows, return_lse=True, backend=backend)
    return found, inputs


def exact_merge(context_a, lse_a, context_b, lse_b):
    weights = torch.stack((lse_a, lse_b)).double().softmax(0).unsqueeze(-1)
    merged = weights[0] * context_a.double() + weights[1] * context_b.double()
    return merged, torch.stack((lse_a, lse_b)).double().logsumexp(0)


@pytest.mark.parametrize("target", ALL)
def test_two_parts_are_the_whole(target, rng):
    parts, inputs = parts_of(target, rng)
    context, lse = target.run(sk.merge_attention, *parts)
    exact, exact_lse = exact_merge(*parts)
    plain, _ = sk.merge_attention(*parts, backend="eager")
    reference.assert_accurate(context, plain, exact)
    assert (lse.double() - exact_lse).abs().max() <= reference.FLOAT32_TOLERANCE
    whole = reference.attention(*inputs.attention)
    rounded = 4 * reference.unit_roundoff(target.dtype) * whole.context.abs().max() + reference.FLOAT32_TOLERANCE
    assert (context.double() - whole.context).abs().max() <= rounded
    assert (lse.double() - whole.lse).abs().max() <= reference.FLOAT32_TOLERANCE


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("side", ["a", "b"])
def test_where_one_side_has_no_token_the_other_keeps_its_bits(target, side, rng):
    parts, _ = parts_of(target, rng)
    parts = MergeTensors(*parts)
    empty, kept = (parts[:2], parts[2:]) if side == "a" else (parts[2:], parts[:2])
    kept[0][0, 0, 0] = -0.0
    empty[1][::2] = NOTHING
    poison(empty[0][::2])
    context, lse = target.run(sk.merge_attention, *parts)
    assert reference.same_bits(context[::2], kept[0][::2])
    assert reference.same_bits(lse[::2], kept[1][::2])
    exact, _ = exact_merge(*(x[1::2] for x in parts))
    plain, _ = sk.merge_attention(*parts, backend="eager")
    reference.assert_accurate(context[1::2], plain[1::2], exact)


@pytest.mark.parametrize("target", ALL)
def test_where_neither_side_has_a_token_there_is_nothing(target, rng):
    parts, _ = parts_of(target, rng)
    for context, lse in (parts[:2], parts[2:]):
        lse[3] = NOTHING
        poison(context[3])
    context, lse = target.run(sk.merge_attention, *parts)
    assert not context[3].any()
    assert (lse[3] == NOTHING).all()
    assert torch.isfinite(context).all()


@pytest.mark.parametrize("target", ALL)
def test_far_apart_sides_do_not_overflow(target, rng):
    parts, _ = parts_of(target, rng)
    parts[1] += 3e4
    parts[3][::2] -= 3e30
    context, lse = target.run(sk.merge_attention, *parts)
    assert reference.same_bits(context, parts[0])
    assert reference.same_bits(lse, parts[1])


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("both", [-3000.0, 60.0])
def test_what_both_sides_have_more_does_not_round_the_context(target, both, rng):
    parts, _ = parts_of(target, rng)
    parts[1] += both
    parts[3] += both
    context, _ = target.run(sk.merge_attention, *parts)
    exact, _ = exact_merge(*parts)
    plain, _ = sk.merge_attention(*parts, backend="eager")
    reference.assert_accurate(context, plain, exact)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("shape", [(0, 4, 16), (3, 1, 1), (2, 3, 7), (5, 28, 128), (1, 2, 300)])
def test_any_shape_and_strides(target, shape, rng):
    generator = rng(target.device)

    def strided(*size, dtype):
        wide = poison(
            torch.zeros(size[0] + 1, *(n + 3 for n in size[1:-1]), size[-1] + 8, dtype=dtype, device=target.device)
        )
        view = wide[(slice(1, None), *(slice(2, n + 2) for n in size[1:-1]), slice(8, None))]
        return view.copy_(torch.randn(size, generator=generator, device=target.device))

    parts = [
        strided(*(shape if i % 2 == 0 else shape[:2]), dtype=target.dtype if i % 2 == 0 else torch.float32)
        for i in range(4)
    ]
    context, lse = target.run(sk.merge_attention, *parts)
    exact, exact_lse = exact_merge(*parts)
    plain, _ = sk.merge_attention(*parts, backend="eager")
    reference.assert_accurate(context, plain, exact)
    assert not lse.numel() or (lse.double() - exact_lse).abs().max() <= reference.FLOAT32_TOLERANCE


@pytest.mark.parametrize("target", KERNELS)
def test_same_input_same_bits(target, rng):
    parts, _ = parts_of(target, rng)
    first = target.run(sk.merge_attention, *parts)
    for _ in range(REPEATS):
        again = target.run(sk.merge_attention, *parts)
        assert all(reference.same_bits(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("target", ALL)
def test_gradients_are_accurate(target, rng):
    parts, _ = parts_of(target, rng)
    parts[1][2], parts[3][5] = NOTHING, NOTHING
    parts[1][7] = parts[3][7] = NOTHING
    mine = [x.detach().requires_grad_() for x in parts]
    wide = [x.detach().double().requires_grad_() for x in parts]
    context, lse = target.run(sk.merge_attention, *mine)
    exact, exact_lse = exact_merge(*wide)
    up, up_lse = torch.randn_like(exact).to(target.dtype).double(), torch.randn_like(exact_lse).float().double()
    both = torch.ones(len(lse), dtype=torch.bool)
    both[[2, 5, 7]] = False  # where a side has nothing, the formula in float64 knows no gradient
    grads = torch.autograd.grad((context.double() * up).sum() + (lse.double() * up_lse)[both].sum(), mine)
    wanted = torch.autograd.grad(((exact * up)[both]).sum() + (exact_lse * up_lse)[both].sum(), wide)
    for x, got, want in zip(mine, grads, wanted, strict=True):
        assert got.dtype == x.dtype
        roundoff = reference.FLOAT32_TOLERANCE if x.dtype == torch.float32 else 2 * reference.unit_roundoff(x.dtype)
        assert (got[both].double() - want[both]).abs().max() <= roundoff * max(1.0, float(want[both].abs().max()))
    for row, (kept, empty) in {2: (2, 0), 5: (0, 2)}.items():
        assert reference.same_bits(grads[kept][row], up[row].to(target.dtype))
        assert not grads[empty][row].any()
        assert not grads[empty + 1][row].any()
    assert not any(grad[7].any() for grad in grads)


@pytest.mark.parametrize("target", ALL)
def test_poison_in_gradients_does_not_reach_a_side_without_tokens(target, rng):
    parts, _ = parts_of(target, rng)
    parts[1][2] = parts[1][7] = parts[3][7] = NOTHING
    mine = [x.detach().requires_grad_() for x in parts]
    results = target.run(sk.merge_attention, *mine)
    upstream = [torch.ones_like(x) for x in results]
    for x in upstream:
        x[[2, 7]] = torch.nan
    context_a, lse_a, context_b, lse_b = torch.autograd.grad(results, mine, upstream)
    assert not any(grad[2].any() for grad in (context_a, lse_a))
    assert not any(grad[7].any() for grad in (context_a, lse_a, context_b, lse_b))


@pytest.mark.parametrize("target", FLOAT32)
def test_function_transforms_find_the_gradients_that_autograd_finds(target, rng):
    parts, _ = parts_of(target, rng)
    parts[1][2] = parts[3][5] = parts[1][7] = parts[3][7] = NOTHING

    def loss(*parts):
        context, lse = target.run(sk.merge_attention, *parts)
        return context.square().sum() + torch.where(lse > NOTHING, lse, 0).square().sum()

    mine = [x.detach().requires_grad_() for x in parts]
    wanted = torch.autograd.grad(loss(*mine), mine)
    found = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*parts)
    ones = tuple(map(torch.ones_like, parts))
    _, along = torch.func.jvp(loss, tuple(parts), ones)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(along, sum(x.sum() for x in wanted), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("target", ALL)
def test_opcheck_and_compile(target, rng):
    parts, _ = parts_of(target, rng)
    arguments = (*(x.detach().requires_grad_() for x in parts), target.backend)
    try:
        torch.ops.slowfast.merge_attention(*arguments)
    except NotImplementedError as limit:
        pytest.skip(str(limit))
    result = torch.library.opcheck(torch.ops.slowfast.merge_attention.default, arguments)
    assert set(result.values()) == {"SUCCESS"}
    torch._dynamo.reset()
    merge = torch.compile(
        lambda *x: sk.merge_attention(*x, backend=target.backend), fullgraph=True, backend="aot_eager"
    )
    expected = sk.merge_attention(*parts, backend=target.backend)
    assert all(reference.same_bits(x, y) for x, y in zip(merge(*parts), expected, strict=True))


REFUSED = [
    ("context_b", lambda x: x[1:], ValueError, r"context_b: .*want shape \[37, 6, 80\] \(that of context_a\)"),
    ("context_b", lambda x: x.double(), TypeError, "context_b: got torch.float64, want torch.float32"),
    ("context_a", lambda x: x.flatten(1), ValueError, r"context_a: .*want shape \[Nt, Hq, D\]"),
    ("context_a", lambda x: x.int(), TypeError, "context_a: got torch.int32, want float32"),
    ("lse_a", lambda x: x.T, ValueError, "lse_a: "),
    ("lse_b", lambda x: x.bfloat16(), TypeError, "lse_b: got torch.bfloat16, want float32"),
    ("lse_b", lambda x: x[:, :2], ValueError, r"lse_b: .*want shape \[37, 6\]"),
    ("lse_b", lambda x: None, TypeError, "lse_b: got NoneType"),
    ("lse_a", lambda x: x.to("meta"), ValueError, "lse_a: .*on meta, want cpu"),
]


@pytest.mark.parametrize(("name", "changed", "error", "words"), REFUSED)
def test_bad_input_is_refused_by_name(name, changed, error, words):
    parts = MergeTensors(torch.ones(37, 6, 80), torch.ones(37, 6), torch.ones(37, 6, 80), torch.ones(37, 6))
    with pytest.raises(error, match=words):
        sk.merge_attention(*parts._replace(**{name: changed(getattr(parts, name))}))
