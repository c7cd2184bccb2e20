"""Numbers that are no Python numbers: every op takes any integer, float or flag by its value, and keeps no object."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from cases import Shape, make_inputs
from targets import FLOAT32

import slowfast_kernels as sk
from slowfast_kernels import numbers
from slowfast_kernels.ops import checks

COUNTS = {
    "tuple": (4, 1),
    "uint8": [np.uint8(4), np.uint8(1)],
    "array": np.array([4, 1], np.int16),
    "tensor": torch.tensor([4, 1]),
    "tensor elements": [torch.tensor(4), torch.tensor(1, dtype=torch.uint8)],
    "range": range(4, 0, -3),
}
WRONG_COUNTS = {
    "floats": [4.0, 1.0],
    "float tensor": torch.tensor([4.0, 1.0]),
    "strings": "41",
    "one number": 5,
    "a 0-d tensor": torch.tensor(5),
    "2-d": torch.tensor([[4, 1]]),
    "None": None,
    "nested": [[4], [1]],
}
STRIDES = {"pool_stride": 1, "sampling_stride": 1, "temporal_stride": 2, "spatial_stride": 1, "min_fast_frames": 1}


@pytest.fixture
def frames(rng):
    return torch.randn(5, 9, 8, generator=rng())


def pooled(frames, counts=(4, 1), grid=(3, 3), backend="eager", **strides):
    return sk.slowfast_pool(frames, counts, grid, **STRIDES | strides, norm_eps=1e-6, backend=backend)


@pytest.mark.parametrize("target", FLOAT32)
@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("kind", COUNTS)
def test_frame_counts_of_any_integers_give_the_same_tokens(target, kind, with_grad, frames):
    given = frames.to(target.device).requires_grad_(with_grad)
    got, want = pooled(given, COUNTS[kind], backend=target.backend), pooled(frames, [4, 1])
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.detach().cpu(), y)
    if with_grad:
        got.slow.sum().backward()
        assert given.grad.isfinite().all()


def test_offsets_of_tensor_counts_stay_where_they_are(frames):
    """Three videos: offsets added up in place would move those already handed out."""
    for counts in (torch.tensor([2, 2, 1]), [torch.tensor(2), torch.tensor(2), torch.tensor(1)]):
        assert pooled(frames, counts).cu_slow.tolist() == [0, 18, 36, 45]


def test_counts_of_a_narrow_type_do_not_overflow():
    tokens = pooled(torch.ones(300, 1, 1), [np.uint8(200), np.uint8(100)], (1, 1))
    assert tokens.cu_slow.tolist() == [0, 200, 300]


@pytest.mark.parametrize("counts", WRONG_COUNTS.values(), ids=WRONG_COUNTS)
def test_frame_counts_that_are_no_integers_are_refused_by_name(counts, frames):
    with pytest.raises(TypeError, match="frame_counts"):
        pooled(frames, counts)


@pytest.mark.parametrize("number", [np.int8, np.array, torch.tensor])
@pytest.mark.parametrize("name", ["grid", *STRIDES])
def test_grid_and_strides_of_any_integers_give_the_same_tokens(name, number, frames):
    changed = {"grid": (number(3), number(3))} if name == "grid" else {name: number(2)}
    plain = {"grid": (3, 3)} if name == "grid" else {name: 2}
    for x, y in zip(pooled(frames, **changed), pooled(frames, **plain), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("value", [2.0, "2", None, torch.tensor([2, 2]), np.float32(2), 2j])
@pytest.mark.parametrize("name", ["grid", *STRIDES])
def test_grid_and_strides_that_are_no_integers_are_refused_by_name(name, value, frames):
    changed = {"grid": (value, 3)} if name == "grid" else {name: value}
    with pytest.raises(TypeError, match=name):
        pooled(frames, **changed)


def test_a_count_that_changes_after_a_call_changes_no_plan(frames):
    count, grid = torch.tensor(4), np.array([3, 3])
    first = pooled(frames, [count, 1], grid)
    count.sub_(2)
    grid[:] = 1
    again = pooled(frames, [4, 1], (3, 3))
    assert torch.equal(first.slow, again.slow)
    assert again.cu_slow.tolist() == [0, 36, 45]
    assert (count.item(), grid.tolist()) == (2, [1, 1])


@pytest.mark.parametrize("number", [np.uint8, torch.tensor, np.array])
def test_options_of_attention_may_be_any_numbers(number):
    inputs = make_inputs(Shape(((2, 70), (3, 50))), torch.float32, "cpu", torch.Generator().manual_seed(0))
    plain = sk.slowfast_cross_attention(*inputs.fused, num_splits=2, softmax_scale=1.0, warm_up_tanh=True)
    options = {"num_splits": number(2), "softmax_scale": number(1), "warm_up_tanh": number(1)}
    assert reference.same_bits(sk.slowfast_cross_attention(*inputs.fused, **options), plain)
    context, _ = sk.text_cross_attention(*inputs.attention, num_splits=number(2), return_lse=number(1))
    assert torch.equal(context, sk.text_cross_attention(*inputs.attention, num_splits=2))


def test_a_scale_that_changes_after_a_call_is_not_remembered():
    inputs = make_inputs(Shape(((2, 70),)), torch.float32, "cpu", torch.Generator().manual_seed(0))
    scale = torch.tensor(1.0)
    first = sk.text_cross_attention(*inputs.attention, softmax_scale=scale)
    scale.fill_(0.25)
    assert torch.equal(sk.text_cross_attention(*inputs.attention, softmax_scale=1.0), first)
    second = sk.text_cross_attention(*inputs.attention, softmax_scale=scale)
    assert torch.equal(second, sk.text_cross_attention(*inputs.attention, softmax_scale=0.25))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_norm_eps_that_is_no_small_number_is_refused(value, frames):
    with pytest.raises(ValueError, match="norm_eps"):
        sk.slowfast_pool(frames, [5], (3, 3), norm_eps=value)


def test_warmup_takes_any_integers_and_refuses_others():
    sk.warmup(np.int64(2), torch.tensor(1), np.uint8(16), dtype=torch.float32, text_rows=np.array([1]), device="cpu")
    with pytest.raises(TypeError, match="head_dim"):
        sk.warmup(2, 1, 16.0, device="cpu")
    with pytest.raises(TypeError, match="text_rows"):
        sk.warmup(2, 1, 16, text_rows=[1.5], device="cpu")


BOOLS = [True, np.True_, torch.tensor(True), np.array(True)]


@pytest.mark.parametrize("value", BOOLS, ids=repr)
@pytest.mark.parametrize("read", [checks.as_int, checks.as_float, numbers.as_int, numbers.as_float])
def test_a_bool_is_no_number_to_any_reader(read, value):
    with pytest.raises(TypeError, match=r"^count: got .*, want "):
        read("count", value)


@pytest.mark.parametrize("value", [*BOOLS, 1, np.uint8(1), torch.tensor(1), np.array(1)], ids=repr)
@pytest.mark.parametrize("read", [checks.as_bool, numbers.as_bool])
def test_a_flag_is_a_bool_or_one_to_any_reader(read, value):
    assert read("flag", value) is True


@pytest.mark.parametrize("value", ["no", "true", None, 1.0, 2j, [True], np.array([True]), torch.tensor([1])], ids=repr)
@pytest.mark.parametrize("read", [checks.as_bool, numbers.as_bool])
def test_what_has_only_a_truth_is_no_flag_to_any_reader(read, value):
    with pytest.raises(TypeError, match=r"^flag: got .*, want True or False"):
        read("flag", value)


@pytest.mark.parametrize("value", [np.array([2]), torch.tensor([2]), [2]], ids=repr)
@pytest.mark.parametrize("read", [checks.as_int, checks.as_float, numbers.as_int, numbers.as_float])
def test_a_list_of_one_is_no_number_to_any_reader(read, value):
    with pytest.raises(TypeError, match=r"^count: got .*, want "):
        read("count", value)


@pytest.mark.parametrize("name", ["num_splits", "softmax_scale"])
def test_an_op_refuses_a_bool_where_a_number_belongs(name):
    inputs = make_inputs(Shape(((2, 70),)), torch.float32, "cpu", torch.Generator().manual_seed(0))
    with pytest.raises(TypeError, match=f"^{name}: got bool True, want an? "):
        sk.text_cross_attention(*inputs.attention, **{name: True})


def test_counts_that_are_bools_are_refused(frames):
    with pytest.raises(TypeError, match=r"^frame_counts\[0\]: got bool True, want an integer"):
        pooled(frames, [True] * 5)


def test_a_long_value_is_shortened_in_a_message():
    message = checks.describe(list(range(10000)))
    assert len(message) < 100
    assert message.endswith("...")
