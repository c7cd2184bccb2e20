"""Gradients of the mix and of the pooling, by their own kernels: accurate, and of what is asked for alone.

The oracle is the eager op's backward, exact in float64; ``test_ops_backward.py`` holds that to the references.
"""

import pytest
import reference
import torch
from cases import GATE_WAYS, LAYOUTS, VIDEOS, Shape, Video, gate_of, make_frames, poison
from hypothesis import given
from hypothesis import strategies as st
from targets import DEVICE, KERNELS, REPEATS
from test_ops_gated_mix import SHAPES, mix_arguments
from test_ops_pool import videos

from slowfast_kernels.calls import BackwardTensors, MixOptions, MixTensors, PoolCallOptions, PoolTensors
from slowfast_kernels.gate import WEIGHTED_GATES
from slowfast_kernels.ops.op import OPS

MIX, POOL = OPS["gated_residual_mix"], OPS["slowfast_pool"]
GRAD_LAYOUTS = ("contiguous", "padded", "unaligned", "one row", "one number", "transposed")
WIDE = [Shape(((2, 0),), (1, 1), channels, 1) for channels in (4104, 9000)]
MANY_ROWS = Shape(((5000 if DEVICE.type == "cuda" else 30, 0),), (1, 1), 40, 60)
SMALL = Video((3, 1), (3, 3), 24, 2, 1, 2, 1)
SOME_VIDEOS = [  # a program a square and frame, which an interpreter takes one by one
    VIDEOS[0],
    Video((4, 1, 2), (5, 5), 24, 2, 1, 2, 2),  # an image between videos; odd rows and columns are dropped
    VIDEOS[4],
    Video((5,), (3, 3), 100, 1, 2, 1, 2),  # frames in no window, partial cells
    VIDEOS[6],
    Video((4, 3), (2, 2), 1, 1, 1, 3, 1, 2),  # overlapping windows
    Video((2,), (9, 9), 256, 3, 1, 5, 2),  # fewer frames than the stride
    Video((2,), (3, 3), 520, 1, 1, 2, 3),
    VIDEOS[11],
]


def by_kernels(op, target, call, options, needs):
    options = options._replace(backend=target.backend)
    assert op.backward_choice(call.inputs, options).backend == target.backend or target.backend == "cpu"
    return op.run_backward(call, options, needs)


def widened(call):
    def wide(tensors):
        return (x.double() if x is not None and x.is_floating_point() else x for x in tensors)

    return BackwardTensors(tuple(wide(call.grads)), (), type(call.inputs)(*wide(call.inputs)))


def assert_gradient_accurate(got, plain, exact, summed=0.0):
    """Within twice eager's error, or within what rounding the largest one costs: 1e-5 of it in float32.

    ``summed``: the sizes of terms added up in float32, of which little may be left.
    """
    assert got.dtype == plain.dtype
    assert got.shape == plain.shape
    if got.numel():
        error, eager_error = (float((x.double() - exact).abs().max()) for x in (got, plain))
        roundoff = reference.FLOAT32_TOLERANCE if got.dtype == torch.float32 else reference.unit_roundoff(got.dtype)
        allowed = roundoff * max(1.0, float(exact.abs().max())) + 1e-6 + 4 * 2**-24 * summed
        assert error <= max(2 * eager_error, allowed)


def laid_out(x, layout):
    """``x`` [rows, C], or numbers of it, as a gradient may come; poison lies around a view."""
    if layout == "one row":
        return x[:1].expand_as(x)
    if layout == "one number":
        return x[:1, :1].expand_as(x)
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "contiguous":
        return x
    before = {"padded": 8, "unaligned": 1}[layout]
    around = poison(x.new_zeros(x.shape[0] + 1, x.shape[1] + 8))
    return around[:-1, before : before + x.shape[1]].copy_(x)


# ------------------------------------------------------------------------------------------------ the mix


def mix_call(shape, target, generator, way="tanh", layout="contiguous", gate_dtype=None, warm_up_tanh=True):
    """(call, options); rows that are no text rows hold NaN and Inf, in the gradient too."""
    inputs, (state, context, rows, *_) = mix_arguments(shape, target, generator, layout, gate_dtype)
    gating, gate = gate_of(way, inputs, generator)
    grad = torch.randn(state.shape, generator=generator, device=target.device).to(target.dtype)
    grad[inputs.other_rows] = poison(torch.zeros_like(grad[inputs.other_rows]))
    tensors = MixTensors(state, context, rows, *gating, gate.get("gate_value"))
    return BackwardTensors((grad,), (), tensors), MixOptions(gate.get("gate", "tanh"), warm_up_tanh, None)


def check_mix(target, call, options, needs=(True,) * 6):
    """Of all that is there and needed; the state's on text rows, elsewhere it is the gradient itself."""
    found = by_kernels(MIX, target, call, options, needs)
    exact, plain = (MIX.gradients(x, options, needs) for x in (widened(call), call))
    text = call.inputs.text_rows.long()
    is_text = torch.zeros(len(call.inputs.state), dtype=torch.bool, device=text.device)
    is_text[text] = True
    dots = (call.grads[0][text].double() * call.inputs.context.double()).sum(1).abs().sum()
    for name, need, got, same, wide in zip(MIX.differentiable, needs, found, plain, exact, strict=True):
        assert (got is not None) == (need and getattr(call.inputs, name) is not None), name
        if got is not None and name == "state":
            assert got.is_contiguous()
            torch.testing.assert_close(got[~is_text], call.grads[0][~is_text], rtol=0, atol=0, equal_nan=True)
            got, same, wide = got[is_text], same[is_text], wide[is_text]
        if got is not None:
            assert_gradient_accurate(got, same, wide, float(dots) if name in ("gate_bias", "warm_up") else 0.0)
    return found


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("shape", [*SHAPES, *WIDE, MANY_ROWS], ids=str)
def test_mix_gradients_are_accurate(target, shape, rng):
    check_mix(target, *mix_call(shape, target, rng(target.device)))


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("way", GATE_WAYS)
@pytest.mark.parametrize("channels", [7, 64])
def test_every_gate_has_its_gradients(target, way, channels, rng):
    """Of the state's own dtype; ``test_ops_backward.py`` has float32 ones."""
    shape = Shape(((9, 0),), (1, 1), channels, 3)
    check_mix(target, *mix_call(shape, target, rng(target.device), way, warm_up_tanh=channels == 7))


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("warm_up_tanh", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_without_text_rows_a_gate_s_gradients_are_zeros_whatever_it_holds(target, warm_up_tanh, value, rng):
    shape = Shape(((0, 0),), (1, 1), 64, 3)
    call, options = mix_call(shape, target, rng(target.device), warm_up_tanh=warm_up_tanh)
    gate = call.inputs[3:6]
    for x in gate:
        x.fill_(value)
    found = by_kernels(MIX, target, call, options, (True,) * 6)
    assert all(torch.equal(got, torch.zeros_like(x)) for got, x in zip(found[2:5], gate, strict=True))


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("way", GATE_WAYS)
@pytest.mark.parametrize("name", MIX.differentiable)
def test_a_gradient_alone_reads_only_what_it_depends_on(target, way, name, rng):
    shape = Shape(((9, 0),), (1, 1), 64, 3)
    call, options = mix_call(shape, target, rng(target.device), way)
    needs = tuple(each == name for each in MIX.differentiable)
    found = check_mix(target, call, options, needs)
    unread = {
        ("state", False): ("state", "context"),
        ("context", True): ("context",),
        ("context", False): ("state", "context"),
        ("warm_up", False): ("state",),
        ("gate_value", False): ("state",),
    }.get((name, way in WEIGHTED_GATES), ())
    for each in unread:
        poison(getattr(call.inputs, each))
    again = by_kernels(MIX, target, call, options, needs)
    assert all(x is y is None or reference.same_bits(x, y) for x, y in zip(found, again, strict=True))


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("other_rows", [0, 3])
@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_the_mix_s_gradient_may_have_any_layout(target, layout, other_rows, rng):
    call, options = mix_call(Shape(((9, 0),), (1, 1), 64, other_rows), target, rng(target.device))
    (grad,) = call.grads
    text = call.inputs.text_rows.long()
    grad = grad[text[torch.arange(len(grad), device=text.device) % len(text)]]  # finite, whatever is expanded
    check_mix(target, call._replace(grads=(laid_out(grad, layout),)), options)


@pytest.mark.parametrize("target", KERNELS)
@given(
    text=st.integers(0, 12),
    other=st.integers(0, 5),
    channels=st.sampled_from([1, 3, 8, 33, 64, 200, 896]),
    layout=st.sampled_from(LAYOUTS),
    way=st.sampled_from(GATE_WAYS),
    needs=st.tuples(*[st.booleans()] * 6),
    warm_up_tanh=st.booleans(),
)
def test_random_rows_have_accurate_gradients(target, rng, text, other, channels, layout, way, needs, warm_up_tanh):
    shape = Shape(((text, 0),), (1, 1), channels, other)
    call, options = mix_call(shape, target, rng(target.device), way, layout, None, warm_up_tanh)
    check_mix(target, call, options, needs)


@pytest.mark.parametrize("target", KERNELS)
def test_the_mix_s_sums_have_the_same_bits_every_time(target, rng):
    call, options = mix_call(MANY_ROWS, target, rng(target.device))
    first, *others = (by_kernels(MIX, target, call, options, (True,) * 6) for _ in range(REPEATS + 1))
    for other in others:
        assert all(x is y is None or reference.same_bits(x, y) for x, y in zip(first, other, strict=True))


# --------------------------------------------------------------------------------------------- the pooling


def pool_call(video, target, generator, norm_eps, layout="contiguous"):
    options = PoolCallOptions(video.frame_counts, video.grid, *video.strides.values(), norm_eps, None)
    frames = make_frames(video, target.dtype, target.device, generator, layout)
    sizes = ((n, video.channels) for n in (options.plan.num_slow, options.plan.num_fast))
    grads = (torch.randn(size, generator=generator, device=target.device).to(target.dtype) for size in sizes)
    return BackwardTensors(tuple(grads), (), PoolTensors(frames)), options


def check_pool(target, call, options):
    (found,) = by_kernels(POOL, target, call, options, (True,))
    grads = tuple(
        torch.zeros(n, found.shape[2], dtype=found.dtype, device=found.device) if x is None else x
        for x, n in zip(call.grads, (options.plan.num_slow, options.plan.num_fast), strict=True)
    )
    call = call._replace(grads=grads)
    assert found.is_contiguous()
    assert_gradient_accurate(found, *(POOL.gradients(x, options, (True,))[0] for x in (call, widened(call))))
    return found


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("video", SOME_VIDEOS, ids=str)
def test_gradients_through_the_norm_are_accurate(target, video, rng):
    check_pool(target, *pool_call(video, target, rng(target.device), 1e-6))


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("video", [SMALL, *SOME_VIDEOS[4:6], VIDEOS[11]], ids=str)
def test_gradients_without_a_norm_are_accurate(target, video, rng):
    check_pool(target, *pool_call(video, target, rng(target.device), None))


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("channels", [3584, 4104, 8192, 9000])
def test_wide_tokens_have_accurate_gradients(target, channels, rng):
    video = Video((3,), (2, 2), channels, 2, 1, 2, 1)
    check_pool(target, *pool_call(video, target, rng(target.device), 1e-6))


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize(
    ("frames", "grads"), [*(("strided", layout) for layout in GRAD_LAYOUTS), ("heads_first", "contiguous")]
)
def test_frames_and_the_tokens_gradients_may_have_any_layout(target, frames, grads, rng):
    call, options = pool_call(SMALL, target, rng(target.device), 1e-6, frames)
    check_pool(target, call._replace(grads=tuple(laid_out(x, grads) for x in call.grads)), options)


@pytest.mark.parametrize("target", KERNELS)
@given(video=videos(5, 5), layout=st.sampled_from(LAYOUTS), norm_eps=st.sampled_from([None, 1e-5]))
def test_random_videos_have_accurate_gradients(target, rng, video, layout, norm_eps):
    check_pool(target, *pool_call(video, target, rng(target.device), norm_eps, layout))


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("norm_eps", [None, 1e-6], ids=["plain", "norm"])
@pytest.mark.parametrize("missing", [0, 1], ids=["slow", "fast"])
def test_tokens_may_have_no_gradient(target, missing, norm_eps, rng):
    call, options = pool_call(SMALL, target, rng(target.device), norm_eps)
    grads = tuple(None if i == missing else x for i, x in enumerate(call.grads))
    check_pool(target, call._replace(grads=grads), options)


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("norm_eps", [None, 1e-6], ids=["plain", "norm"])
def test_features_in_no_token_have_gradient_zero_whatever_they_hold(target, norm_eps, rng):
    video = Video((2,), (5, 5), 16, pool_stride=2, temporal_stride=2)
    call, options = pool_call(video, target, rng(target.device), norm_eps)
    cells = call.inputs.frames.unflatten(1, (5, 5))
    poison(cells[:, 4]), poison(cells[:, :, 4])
    found = by_kernels(POOL, target, call, options, (True,))[0].unflatten(1, (5, 5))
    for dropped in (found[:, 4], found[:, :, 4]):
        assert torch.equal(dropped, torch.zeros_like(dropped))
    assert found.isfinite().all()


@pytest.mark.parametrize("target", KERNELS)
def test_eps_bounds_the_gradient_of_tokens_that_are_zero(target, rng):
    call, options = pool_call(SMALL, target, rng(target.device), 0.25)
    call.inputs.frames.zero_()
    found = check_pool(target, call, options)
    assert found.isfinite().all()
    assert found.any()


@pytest.mark.parametrize("target", KERNELS)
def test_without_a_norm_features_are_not_read(target, rng):
    call, options = pool_call(SMALL, target, rng(target.device), None)
    (before,) = by_kernels(POOL, target, call, options, (True,))
    poison(call.inputs.frames)
    assert reference.same_bits(before, by_kernels(POOL, target, call, options, (True,))[0])


@pytest.mark.parametrize("target", KERNELS)
def test_poisoned_videos_do_not_reach_the_gradients_of_their_neighbours(target, rng):
    video = Video((2, 3, 3), (4, 4), 16, pool_stride=2, temporal_stride=2)
    call, options = pool_call(video, target, rng(target.device), 1e-6)
    (clean,) = by_kernels(POOL, target, call, options, (True,))
    poison(call.inputs.frames[2:5])
    middle = options.plan.videos[1]
    poison(call.grads[0][middle.first_slow : middle.first_slow + middle.num_slow])
    poison(call.grads[1][middle.first_fast : middle.first_fast + middle.num_fast])
    (dirty,) = by_kernels(POOL, target, call, options, (True,))
    assert reference.same_bits(clean[:2], dirty[:2])
    assert reference.same_bits(clean[5:], dirty[5:])
    assert not dirty[2:5].isfinite().any()


@pytest.mark.parametrize("target", KERNELS)
def test_the_pooling_s_gradients_have_the_same_bits_every_time(target, rng):
    call, options = pool_call(SMALL, target, rng(target.device), 1e-6)
    first, *others = (by_kernels(POOL, target, call, options, (True,))[0] for _ in range(REPEATS + 1))
    assert all(reference.same_bits(first, other) for other in others)
