"""slowfast_cross_attention: attention, gate and mix of one hybrid layer as one op."""

import re

import pytest
import reference
import torch
from cases import GATE_WAYS, LAYOUTS, RAGGED, SHAPES, Shape, gate_of, list_unknown_gate, make_inputs, poison, said
from hypothesis import given
from hypothesis import strategies as st
from targets import ALL, KERNELS, REPEATS
from test_ops_attention import RAGGED_SHAPES

import slowfast_kernels as sk


def check(target, inputs, softmax_scale=None, num_splits=0, gating=None, **gate):
    options = {"softmax_scale": softmax_scale, "num_splits": num_splits, **gate}
    gating = gating or inputs.gating
    arguments = (inputs.state, *inputs.attention, *gating)
    out = target.run(sk.slowfast_cross_attention, *arguments, **options)
    plain = sk.slowfast_cross_attention(*arguments, **options, backend="eager")
    exact = reference.attention(*inputs.attention, softmax_scale)
    mixed = reference.gated_mix(inputs.state, exact.context, inputs.text_rows, *gating, **gate)
    rows = inputs.text_rows.long()
    reference.assert_accurate(out[rows], plain[rows], mixed[rows], exact.noise)
    assert reference.same_bits(out[inputs.other_rows], inputs.state[inputs.other_rows])


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_text_rows_are_accurate_and_other_rows_copied(target, shape, rng):
    check(target, make_inputs(shape, target.dtype, target.device, rng(target.device)))


@pytest.mark.parametrize("target", KERNELS)
@given(shape=RAGGED_SHAPES, layout=st.sampled_from(LAYOUTS), num_splits=st.sampled_from([0, 1, 3]))
def test_random_ragged_batches_are_accurate(target, rng, shape, layout, num_splits):
    check(target, make_inputs(shape, target.dtype, target.device, rng(target.device), layout), num_splits=num_splits)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_inputs_may_have_any_strides_with_a_contiguous_last_dimension(target, layout, rng):
    check(target, make_inputs(RAGGED, target.dtype, target.device, rng(target.device), layout))


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("num_splits", [1, 2, 7])
def test_any_number_of_splits_is_accurate(target, num_splits, rng):
    check(target, make_inputs(RAGGED, target.dtype, target.device, rng(target.device)), num_splits=num_splits)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("way", GATE_WAYS)
@pytest.mark.parametrize("warm_up", ["tanh", "identity", "none"])
def test_gating_variants_are_accurate(target, way, warm_up, rng):
    inputs = make_inputs(RAGGED, target.dtype, target.device, rng(target.device), gate_dtype=torch.float32)
    inputs.warm_up = None if warm_up == "none" else inputs.warm_up
    gating, gate = gate_of(way, inputs, rng(target.device))
    check(target, inputs, gating=gating, **gate, warm_up_tanh=warm_up == "tanh", softmax_scale=0.2)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("num_splits", [0, 1, 4])
@pytest.mark.parametrize("way", ["none", "given"])
def test_a_gate_without_a_weight_serves_any_shape(target, way, num_splits, rng):
    for shape in SHAPES:
        inputs = make_inputs(shape, target.dtype, target.device, rng(target.device))
        gating, gate = gate_of(way, inputs, rng(target.device))
        check(target, inputs, gating=gating, **gate, num_splits=num_splits)


@pytest.mark.parametrize("target", ALL)
def test_a_kind_of_gate_without_a_formula_is_refused(target, monkeypatch, rng):
    inputs = make_inputs(RAGGED, target.dtype, target.device, rng(target.device))
    list_unknown_gate(monkeypatch, "swish")
    with pytest.raises(Exception) as refused:  # noqa: PT011  its causes are looked through
        target.run(sk.slowfast_cross_attention, *inputs.fused, gate="swish")
    assert re.search("swish|does not know", said(refused.value))


@pytest.mark.parametrize("target", ALL)
def test_a_float32_gate_weight_may_be_larger_than_a_float16(target, rng):
    inputs = make_inputs(RAGGED, target.dtype, target.device, rng(target.device), gate_dtype=torch.float32)
    inputs.gate_weight.view(-1)[:2] = 1e5
    inputs.state[:, :2] = 0
    check(target, inputs)


@pytest.mark.parametrize("target", ALL)
def test_sequences_without_slow_tokens_keep_their_state_bit_for_bit(target, rng):
    inputs = make_inputs(Shape(((3, 0), (2, 0))), target.dtype, target.device, rng(target.device))
    assert reference.same_bits(target.run(sk.slowfast_cross_attention, *inputs.fused), inputs.state)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("num_splits", [1, 4])
def test_warm_up_zero_gives_the_state_bit_for_bit(target, num_splits, rng):
    inputs = make_inputs(RAGGED, target.dtype, target.device, rng(target.device))
    inputs.warm_up.zero_()
    out = target.run(sk.slowfast_cross_attention, *inputs.fused, num_splits=num_splits)
    assert reference.same_bits(out, inputs.state)


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("num_splits", [0, 3])
def test_poisoned_neighbours_change_no_bit(target, num_splits, rng):
    inputs = make_inputs(RAGGED, target.dtype, target.device, rng(target.device))
    expected = target.run(sk.slowfast_cross_attention, *inputs.fused, num_splits=num_splits)
    slow, text = inputs.cu_slow.tolist(), inputs.cu_text.tolist()
    kv = inputs.slow_kv.clone()
    for b in range(len(RAGGED.sequences)):
        poison(inputs.slow_kv)[slow[b] : slow[b + 1]] = kv[slow[b] : slow[b + 1]]
        rows = inputs.text_rows[text[b] : text[b + 1]].long()
        found = target.run(sk.slowfast_cross_attention, *inputs.fused, num_splits=num_splits)
        assert reference.same_bits(found[rows], expected[rows])


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("shape", [RAGGED, SHAPES[1], SHAPES[6]], ids=str)
def test_the_result_is_new_and_inputs_are_not_modified(target, shape, rng):
    inputs = make_inputs(shape, target.dtype, target.device, rng(target.device))
    before = [x.clone() for x in inputs.fused]
    out = target.run(sk.slowfast_cross_attention, *inputs.fused)
    assert out.untyped_storage().data_ptr() != inputs.state.untyped_storage().data_ptr()
    assert all(reference.same_bits(x, y) for x, y in zip(inputs.fused, before, strict=True))


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("num_splits", [0, 3])
def test_same_input_same_bits(target, num_splits, rng):
    inputs = make_inputs(RAGGED, target.dtype, target.device, rng(target.device))
    first = target.run(sk.slowfast_cross_attention, *inputs.fused, num_splits=num_splits)
    for _ in range(REPEATS):
        again = target.run(sk.slowfast_cross_attention, *inputs.fused, num_splits=num_splits)
        assert reference.same_bits(first, again)


@pytest.mark.parametrize("target", KERNELS)
@pytest.mark.parametrize("num_splits", [1, 4])
def test_with_fixed_splits_a_sequence_has_the_same_bits_alone_and_in_a_batch(target, num_splits, rng):
    inputs = make_inputs(RAGGED, target.dtype, target.device, rng(target.device))
    batched = target.run(sk.slowfast_cross_attention, *inputs.fused, num_splits=num_splits)
    for b in range(len(RAGGED.sequences)):
        alone = inputs.sequence(b)
        out = target.run(sk.slowfast_cross_attention, *alone.fused, num_splits=num_splits)
        rows = alone.text_rows.long()
        assert reference.same_bits(out[rows], batched[rows])
