"""gated_residual_mix: text rows get ``gate * context`` added, every other row is copied."""

import re

import pytest
import reference
import torch
from cases import GATE_WAYS, LAYOUTS, Shape, gate_of, list_unknown_gate, make_inputs, said
from hypothesis import given
from hypothesis import strategies as st
from targets import ALL, KERNELS, REPEATS

import slowfast_kernels as sk
from slowfast_kernels.gate import GATES

SHAPES = [
    Shape(((1, 0),), (1, 1), 1, 0),
    Shape(((1, 0),), (28, 4), 128, 0),
    Shape(((5, 0),), (3, 1), 7, 4),
    Shape(((0, 0),), (2, 1), 16, 3),
    Shape(((40, 0),), (14, 2), 64, 9),
    Shape(((6, 0),), (1, 1), 100, 2),
    Shape(((2, 0),), (64, 8), 128, 1),
]


def mix_arguments(shape, target, generator, layout="contiguous", gate_dtype=None):
    inputs = make_inputs(shape, target.dtype, target.device, generator, layout, gate_dtype)
    size = (len(inputs.text_rows) + 2, inputs.state.shape[1] + 8)
    context = torch.randn(size, generator=generator, device=target.device).to(target.dtype)[1:-1, 8:]
    context = context if layout == "strided" else context.contiguous()
    return inputs, (inputs.state, context, inputs.text_rows, *inputs.gating)


def check(target, arguments, **options):
    out = target.run(sk.gated_residual_mix, *arguments, **options)
    plain = sk.gated_residual_mix(*arguments, **options, backend="eager")
    rows = arguments[2].long()
    exact = reference.gated_mix(*arguments, **options)
    reference.assert_accurate(out[rows], plain[rows], exact[rows])
    return out


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("channels", [64, 3584, 7])
def test_a_row_is_rounded_once_to_the_nearest_number(target, channels, rng):
    """Without gate and warm-up factor the exact sum is a float32 number, or, of two of these, rounded in one way."""
    shape = Shape(((40, 0),), (1, 1), channels, 9)
    _, (state, context, rows, *_) = mix_arguments(shape, target, rng(target.device))
    out = target.run(sk.gated_residual_mix, state, context, rows, None, None, None, gate="none")
    expected = (state[rows.long()].double() + context.double()).to(target.dtype)
    assert reference.same_bits(out[rows.long()], expected)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_text_rows_are_accurate(target, shape, rng):
    check(target, mix_arguments(shape, target, rng(target.device))[1])


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("way", GATE_WAYS)
@pytest.mark.parametrize("warm_up", ["tanh", "identity", "none"])
def test_gating_variants_are_accurate(target, way, warm_up, rng):
    inputs, arguments = mix_arguments(SHAPES[4], target, rng(target.device))
    inputs.warm_up = None if warm_up == "none" else inputs.warm_up
    gating, gate = gate_of(way, inputs, rng(target.device))
    check(target, (*arguments[:3], *gating), **gate, warm_up_tanh=warm_up == "tanh")


@pytest.mark.parametrize("target", ALL)
def test_a_given_gate_takes_the_place_of_gate(target, rng):
    """``gate`` is not applied to it, and its dtype may be float32 whatever the state's."""
    inputs, arguments = mix_arguments(SHAPES[4], target, rng(target.device), gate_dtype=torch.float32)
    value = torch.linspace(-3, 3, 2 * len(inputs.text_rows), device=target.device)[::2]  # of any stride
    arguments = (*arguments[:3], None, None, inputs.warm_up)
    results = [check(target, arguments, gate_value=value, gate=gate) for gate in GATES]
    assert all(reference.same_bits(results[0], other) for other in results[1:])
    half = check(target, (*arguments[:5], None), gate_value=value.to(target.dtype))
    assert reference.same_bits(half, target.run(
        sk.gated_residual_mix, *arguments[:5], None, gate_value=value.to(target.dtype).float()
    ))  # fmt: skip


@pytest.mark.parametrize("target", ALL)
def test_a_kind_of_gate_without_a_formula_is_refused(target, monkeypatch, rng):
    """A kind that is on the list alone fails in every backend, and is never computed as another."""
    _, arguments = mix_arguments(SHAPES[4], target, rng(target.device))
    list_unknown_gate(monkeypatch, "swish")
    with pytest.raises(Exception) as refused:  # noqa: PT011  its causes are looked through
        target.run(sk.gated_residual_mix, *arguments, gate="swish")
    assert re.search("swish|does not know", said(refused.value))


@pytest.mark.parametrize("target", ALL)
def test_gate_parameters_may_be_float32_whatever_the_state(target, rng):
    check(target, mix_arguments(SHAPES[4], target, rng(target.device), gate_dtype=torch.float32)[1])


@pytest.mark.parametrize("target", ALL)
def test_parameters_and_context_may_have_either_shape(target, rng):
    inputs, (state, context, rows, weight, bias, warm_up) = mix_arguments(SHAPES[4], target, rng(target.device))
    expected = target.run(sk.gated_residual_mix, state, context, rows, weight, bias, warm_up)
    by_head = context.unflatten(1, inputs.q.shape[1:])
    found = target.run(sk.gated_residual_mix, state, by_head, rows, weight[0], bias[0], warm_up[0])
    assert reference.same_bits(found, expected)


@pytest.mark.parametrize("target", KERNELS)
@given(
    text=st.integers(0, 12),
    other=st.integers(0, 5),
    channels=st.sampled_from([1, 3, 8, 33, 64, 200, 896]),
    layout=st.sampled_from(LAYOUTS),
    way=st.sampled_from(GATE_WAYS),
    warm_up_tanh=st.booleans(),
)
def test_random_rows_are_accurate(target, rng, text, other, channels, layout, way, warm_up_tanh):
    shape = Shape(((text, 0),), (1, 1), channels, other)
    inputs, arguments = mix_arguments(shape, target, rng(target.device), layout)
    gating, gate = gate_of(way, inputs, rng(target.device))
    check(target, (*arguments[:3], *gating), **gate, warm_up_tanh=warm_up_tanh)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_other_rows_are_copied_bit_for_bit(target, layout, rng):
    inputs, arguments = mix_arguments(SHAPES[4], target, rng(target.device), layout)
    out = check(target, arguments)
    assert not torch.isfinite(out[inputs.other_rows]).any()  # they hold NaN and Inf
    assert reference.same_bits(out[inputs.other_rows], inputs.state[inputs.other_rows])


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("warm_up_tanh", [True, False])
def test_warm_up_zero_gives_the_state_bit_for_bit(target, warm_up_tanh, rng):
    _, arguments = mix_arguments(SHAPES[4], target, rng(target.device))
    arguments[-1].zero_()
    out = target.run(sk.gated_residual_mix, *arguments, warm_up_tanh=warm_up_tanh)
    assert reference.same_bits(out, arguments[0])


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("bias", [-200.0, -9.0, 9.0, 200.0])
def test_a_saturated_gate_is_plus_or_minus_one(target, bias, rng):
    _, (state, context, rows, weight, gate_bias, _) = mix_arguments(SHAPES[4], target, rng(target.device))
    gate_bias.fill_(bias)
    check(target, (state, context, rows, weight, gate_bias, torch.full_like(gate_bias, 50)))


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("warm_up", [1e-6, -1e-4, 3e-3])
def test_a_small_warm_up_keeps_its_relative_accuracy(target, warm_up, rng):
    """Training starts at 0: a tanh with an absolute error would drown the first steps."""
    arguments = mix_arguments(SHAPES[4], target, rng(target.device), gate_dtype=torch.float32)[1]
    state, context, rows, weight, bias, gate = arguments
    state = torch.where(torch.isfinite(state), 0, state)
    context = torch.ones_like(context)
    exact_gate = (bias.double().tanh() * torch.tensor(warm_up, dtype=torch.float32).double().tanh()).item()
    out = target.run(sk.gated_residual_mix, state, context, rows, weight, bias, gate.fill_(warm_up))
    error = (out[rows.long()].double() - exact_gate).abs()
    subnormal = torch.finfo(target.dtype).smallest_normal * torch.finfo(target.dtype).eps
    assert (error <= abs(exact_gate) * (reference.unit_roundoff(target.dtype) + 1e-6) + subnormal).all()


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[4]], ids=str)
def test_the_result_is_new_and_inputs_are_not_modified(target, shape, rng):
    _, arguments = mix_arguments(shape, target, rng(target.device))
    before = [x.clone() for x in arguments]
    out = target.run(sk.gated_residual_mix, *arguments)
    assert out.untyped_storage().data_ptr() != arguments[0].untyped_storage().data_ptr()
    assert all(reference.same_bits(x, y) for x, y in zip(arguments, before, strict=True))


@pytest.mark.parametrize("target", KERNELS)
def test_same_input_same_bits(target, rng):
    _, arguments = mix_arguments(SHAPES[4], target, rng(target.device))
    first = target.run(sk.gated_residual_mix, *arguments)
    assert all(reference.same_bits(first, target.run(sk.gated_residual_mix, *arguments)) for _ in range(REPEATS))


@pytest.mark.parametrize("target", KERNELS)
def test_a_row_has_the_same_bits_alone_and_in_a_batch(target, rng):
    _, (state, context, rows, *gating) = mix_arguments(SHAPES[4], target, rng(target.device))
    out = target.run(sk.gated_residual_mix, state, context, rows, *gating)
    for i in (0, len(rows) - 1):
        row = int(rows[i])
        single = (state[row : row + 1], context[i : i + 1], torch.zeros_like(rows[:1]))
        alone = target.run(sk.gated_residual_mix, *single, *gating)
        assert reference.same_bits(alone[0], out[row])
