"""text_cross_attention: every text row attends all slow tokens of its own sequence and nothing else."""

import pytest
import reference
import torch
from cases import LAYOUTS, RAGGED, SHAPES, Shape, add_ramp, make_inputs, poison
from hypothesis import given
from hypothesis import strategies as st
from targets import ALL, DEVICE, KERNELS, REPEATS

import slowfast_kernels as sk


def attend(target, inputs, **options):
    return target.run(sk.text_cross_attention, *inputs.attention, **options)


def check(target, inputs, **options):
    """Context and lse against float64, by the 2x-eager rule."""
    context, lse = attend(target, inputs, return_lse=True, **options)
    scale = options.get("softmax_scale")
    plain = sk.text_cross_attention(*inputs.attention, return_lse=True, softmax_scale=scale, backend="eager")
    exact = reference.attention(*inputs.attention, scale)
    reference.assert_accurate(context, plain[0], exact.context, exact.noise)
    reference.assert_lse_accurate(lse, plain[1], exact.lse)


def check_huge(target, inputs, **options):
    """The same for scores so large that they cost float32 itself some digits: a score that is rounded by d changes its
    probability by a factor of 1 + d, and the context by 2 d of the largest value at most."""
    context, lse = attend(target, inputs, return_lse=True, **options)
    assert torch.isfinite(context).all()
    exact = reference.attention(*inputs.attention)
    plain = sk.text_cross_attention(*inputs.attention, backend="eager")
    error, plain_error = ((x.double() - exact.context).abs().max() for x in (context, plain))
    rounded = reference.unit_roundoff(torch.float32) * exact.lse.abs().max()
    rounded = 2 * rounded * inputs.slow_kv[:, :, 1].double().abs().max()
    allowed = max(2 * plain_error, reference.allowed(context, plain, exact.context, exact.noise))
    assert error <= allowed + rounded, f"{error:.3g} > {allowed:.3g} + {rounded:.3g}, eager's is {plain_error:.3g}"
    assert (lse.double() - exact.lse).abs().max() <= 1e-6 * exact.lse.abs().max()


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_context_and_lse_are_accurate(target, shape, rng):
    check(target, make_inputs(shape, target.dtype, target.device, rng(target.device)))


@pytest.mark.parametrize("target", ALL)
def test_many_sequences_find_their_own_tokens(target, rng):
    """More of them than a warp looks through at once, with none, a few and many rows."""
    lengths = tuple((b % 4 if b % 11 else 70, 7 * b % 40) for b in range(70))
    check(target, make_inputs(Shape(lengths, (4, 2), 64), target.dtype, target.device, rng(target.device)))


FEW_DIMS = (64, 128) if DEVICE.type == "cuda" else (1, 7, 16, 64, 80, 128)  # a GPU compiles each one
RAGGED_SHAPES = st.builds(
    Shape,
    sequences=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 90)), min_size=1, max_size=4).map(tuple),
    heads=st.sampled_from([(1, 1), (4, 2), (7, 1), (3, 3), (14, 2), (16, 4)]),
    dim=st.sampled_from(FEW_DIMS),
    other_rows=st.integers(0, 4),
)


@pytest.mark.parametrize("target", KERNELS)
@given(shape=RAGGED_SHAPES, layout=st.sampled_from(LAYOUTS), num_splits=st.sampled_from([0, 1, 3]))
def test_random_ragged_batches_are_accurate(target, rng, shape, layout, num_splits):
    check(target, make_inputs(shape, target.dtype, target.device, rng(target.device), layout), num_splits=num_splits)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("num_splits", [1, 2, 7])
def test_any_number_of_splits_is_accurate(target, num_splits, rng):
    check(target, make_inputs(RAGGED, target.dtype, target.device, rng(target.device)), num_splits=num_splits)


@pytest.mark.parametrize("target", ALL)
def test_more_splits_than_slow_tokens_are_accurate(target, rng):
    shape = Shape(((2, 5), (1, 0)), (2, 1))
    check(target, make_inputs(shape, target.dtype, target.device, rng(target.device)), num_splits=64)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_inputs_may_have_any_strides_with_a_contiguous_last_dimension(target, layout, rng):
    inputs = make_inputs(RAGGED, target.dtype, target.device, rng(target.device), layout)
    assert not inputs.slow_kv.is_contiguous()
    check(target, inputs)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("scale", [0.5, 0.01, 0.0, -0.3])  # 1.0 would cost float32 itself 1e-5
def test_softmax_scale_is_applied(target, scale, rng):
    check(target, make_inputs(RAGGED, target.dtype, target.device, rng(target.device)), softmax_scale=scale)


@pytest.mark.parametrize("target", ALL)
def test_a_sequence_without_slow_tokens_gets_zero_context_and_lse_minus_infinity(target, rng):
    inputs = make_inputs(Shape(((2, 30), (3, 0))), target.dtype, target.device, rng(target.device))
    context, lse = attend(target, inputs, return_lse=True)
    assert torch.equal(context[2:], torch.zeros_like(context[2:]))
    assert torch.equal(lse[2:], torch.full_like(lse[2:], -torch.inf))
    assert torch.isfinite(lse[:2]).all()


@pytest.mark.parametrize("target", ALL)
def test_lse_is_returned_only_on_request(target, rng):
    inputs = make_inputs(Shape(((2, 30),)), target.dtype, target.device, rng(target.device))
    context = attend(target, inputs)
    assert isinstance(context, torch.Tensor)
    assert torch.equal(context, attend(target, inputs, return_lse=True)[0])


@pytest.mark.parametrize("target", ALL)
def test_huge_scores_do_not_overflow(target, rng):
    inputs = make_inputs(Shape(((2, 70),), (2, 1), 64), target.dtype, target.device, rng(target.device))
    inputs.q[..., 0] = 32
    inputs.slow_kv[:, :, 0, 0] = 32  # adds 128 to every score: e^128 is no float32, and the softmax must not care
    check_huge(target, inputs)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("rise", [10, 300])
@pytest.mark.parametrize("num_splits", [0, 1, 3])  # 3: what one split's maximum is to the next overflows a float32
def test_scores_may_rise_or_fall_along_the_sequence(target, rise, num_splits, rng):
    inputs = make_inputs(Shape(((3, 700),), (14, 2), 64), target.dtype, target.device, rng(target.device))
    add_ramp(inputs, rise / 30 if target.dtype == torch.float32 else rise)  # scores of 300 cost float32 itself 2e-4
    check_huge(target, inputs, num_splits=num_splits)


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("num_splits", [0, 3])
def test_poisoned_neighbours_change_no_bit(target, num_splits, rng):
    clean = make_inputs(RAGGED, target.dtype, target.device, rng(target.device))
    expected = attend(target, clean, num_splits=num_splits, return_lse=True)
    cu_slow, cu_text = clean.cu_slow.tolist(), clean.cu_text.tolist()
    kv = clean.slow_kv.clone()
    for b in range(len(RAGGED.sequences)):
        poison(clean.slow_kv)
        mine = slice(cu_slow[b], cu_slow[b + 1])
        clean.slow_kv[mine] = kv[mine]
        found = attend(target, clean, num_splits=num_splits, return_lse=True)
        texts = slice(cu_text[b], cu_text[b + 1])
        for got, want in zip(found, expected, strict=True):
            assert reference.same_bits(got[texts], want[texts])


@pytest.mark.parametrize("target", ALL)
def test_nan_in_a_sequence_reaches_its_own_text_rows(target, rng):
    inputs = make_inputs(Shape(((2, 30), (3, 20))), target.dtype, target.device, rng(target.device))
    inputs.slow_kv[35] = float("nan")
    context = attend(target, inputs)
    assert torch.isnan(context[2:]).all()
    assert torch.isfinite(context[:2]).all()


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("num_splits", [0, 1])
def test_nan_in_text_rows_stays_there(target, num_splits, rng):
    """The others' scores rise from block to block meanwhile, so that their running maxima must move: of row 2, whose
    packed rows share threads of the Hopper kernel with those of rows 0 and 1, too.
    """
    inputs = make_inputs(Shape(((4, 700),), (14, 2)), target.dtype, target.device, rng(target.device))
    add_ramp(inputs, 10 if target.dtype == torch.float32 else 30)  # scores of 30 cost float32 itself 1e-5
    inputs.q[inputs.text_rows[:2].long()] = float("nan")
    context = attend(target, inputs, num_splits=num_splits)
    plain, exact = sk.text_cross_attention(*inputs.attention, backend="eager"), reference.attention(*inputs.attention)
    assert torch.isnan(context[:2]).all()
    reference.assert_accurate(context[2:], plain[2:], exact.context[2:], exact.noise[2:])


@pytest.mark.parametrize("target", ALL)
def test_inputs_are_not_modified(target, rng):
    inputs = make_inputs(RAGGED, target.dtype, target.device, rng(target.device), "strided")
    before = [x.clone() for x in inputs.attention]
    attend(target, inputs)
    assert all(reference.same_bits(x, y) for x, y in zip(inputs.attention, before, strict=True))


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("num_splits", [0, 3])
def test_same_input_same_bits(target, num_splits, rng):
    inputs = make_inputs(RAGGED, target.dtype, target.device, rng(target.device))
    first = attend(target, inputs, num_splits=num_splits, return_lse=True)
    for _ in range(REPEATS):
        again = attend(target, inputs, num_splits=num_splits, return_lse=True)
        assert all(reference.same_bits(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("num_splits", [1, 4])
def test_with_fixed_splits_a_sequence_has_the_same_bits_alone_and_in_a_batch(target, num_splits, rng):
    inputs = make_inputs(RAGGED, target.dtype, target.device, rng(target.device))
    batched = attend(target, inputs, num_splits=num_splits)
    cu_text = inputs.cu_text.tolist()
    for b in range(len(RAGGED.sequences)):
        alone = attend(target, inputs.sequence(b), num_splits=num_splits)
        assert reference.same_bits(alone, batched[cu_text[b] : cu_text[b + 1]])


@pytest.mark.parametrize("target", ALL)
def test_an_empty_batch_gives_an_empty_context(target):
    none = torch.zeros(1, dtype=torch.int32, device=target.device)
    q = torch.zeros(0, 4, 64, dtype=target.dtype, device=target.device)
    kv = torch.zeros(0, 2, 2, 64, dtype=target.dtype, device=target.device)
    context, lse = target.run(sk.text_cross_attention, q, kv, none, none[:0], none, return_lse=True)
    assert context.shape == (0, 4, 64)
    assert lse.shape == (0, 4)
