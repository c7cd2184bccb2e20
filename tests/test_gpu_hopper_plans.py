"""On a Hopper GPU: every way to cut a call into CTAs gives the accurate answer, and the same bits every time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import reference
import torch
from cases import Shape, add_ramp, make_inputs
from targets import HAS_GPU, REPEATS

import slowfast_kernels as sk
from slowfast_kernels import cuda
from slowfast_kernels._extension import unavailable_reason
from slowfast_kernels.calls import FusedTensors
from slowfast_kernels.gate import WEIGHTED_GATES, Gate
from slowfast_kernels.heuristics.cuda import HopperConfig

IS_HOPPER = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
REASON = unavailable_reason("cuda", torch.device("cuda")) if IS_HOPPER else "no Hopper GPU"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

# 24 text rows x 7 heads are 168 packed rows a KV head: a full tile of 128 and one of 40, which two heads share.
# 11 blocks of 128 slow tokens, the first of which, with 100, is cut short by the end of the sequence.
ONE = Shape(((24, 1380),), (14, 2), 128)
RAGGED = Shape(((24, 1380), (1, 60), (0, 300), (40, 0), (3, 200), (20, 768)), (14, 2), 128)
SHORT = Shape(((24, 1275), (20, 200), (4, 7), (3, 40)), (14, 2), 128)
ODD = Shape(((24, 1380),), (21, 3), 128)
DECODE = Shape(((1, 1500),), (28, 4), 128)
PLANS = {
    "whole": (ONE, HopperConfig(2, 1, 1, 2)),
    "groups 2": (ONE, HopperConfig(2, 1, 2, 2)),
    "groups 3": (ONE, HopperConfig(2, 1, 3, 2)),
    "groups 7": (ONE, HopperConfig(2, 1, 7, 2)),
    "more groups than blocks": (ONE, HopperConfig(2, 1, 13, 2)),
    "a short group": (ONE, HopperConfig(2, 1, 3, 2, long_blocks=5)),
    "an empty group": (ONE, HopperConfig(2, 1, 3, 2, long_blocks=6)),
    "whole units first": (ONE, HopperConfig(2, 1, 2, 2, whole_units=2, long_blocks=7)),
    "cluster 2": (ONE, HopperConfig(2, 2, 1, 2)),
    "cluster 8": (ONE, HopperConfig(2, 8, 1, 2)),
    "cluster 4, groups": (ONE, HopperConfig(2, 4, 2, 2)),
    "a half tile without a partner": (ODD, HopperConfig(2, 1, 1, 2)),
    "a half tile without a partner, groups": (ODD, HopperConfig(2, 1, 3, 2)),
    "a half tile without a partner, whole": (ODD, HopperConfig(2, 1, 2, 2, whole_units=3, long_blocks=7)),
    "a half tile without a partner, cluster": (ODD, HopperConfig(2, 4, 1, 2)),
    "a half tile without a partner, cluster and groups": (ODD, HopperConfig(2, 2, 3, 2)),
    "one warpgroup": (ONE, HopperConfig(1, 1, 1, 3)),
    "one warpgroup, groups": (ONE, HopperConfig(1, 1, 5, 3)),
    "one warpgroup, cluster": (ONE, HopperConfig(1, 4, 3, 3)),
    "ragged": (RAGGED, HopperConfig(2, 1, 1, 10)),
    "ragged, groups": (RAGGED, HopperConfig(2, 1, 5, 10)),
    "ragged, a short group": (RAGGED, HopperConfig(2, 1, 2, 10, long_blocks=7)),
    "ragged, cluster": (RAGGED, HopperConfig(2, 4, 1, 10)),
    "ragged, shared": (RAGGED, HopperConfig(2, 1, 1, 10, share_slots=16, even_units=24)),
    "ragged, shared finely": (
        RAGGED,
        HopperConfig(2, 1, 2, 10, long_blocks=7, share_slots=132, even_units=24, even_blocks=9),
    ),
    "ragged, shared by clusters": (RAGGED, HopperConfig(2, 4, 1, 10, share_slots=30, even_units=24)),
    "ragged, shared by one warpgroup": (RAGGED, HopperConfig(1, 1, 1, 15, share_slots=60, even_units=24)),
    "ragged, shared by clusters of one warpgroup": (RAGGED, HopperConfig(1, 2, 1, 15, share_slots=60, even_units=24)),
    "short videos": (SHORT, HopperConfig(2, 1, 1, 6)),
    "short videos, groups": (SHORT, HopperConfig(2, 1, 8, 6)),
    "short videos, cluster": (SHORT, HopperConfig(2, 8, 1, 6)),
    "short videos, cluster and groups": (SHORT, HopperConfig(2, 4, 2, 6)),
    "decode, one CTA": (DECODE, HopperConfig(1, 1, 1, 1)),
    "decode, groups": (DECODE, HopperConfig(1, 1, 33, 1)),
    "decode, cluster and groups": (DECODE, HopperConfig(1, 4, 5, 1)),
}


def attend(inputs, config, **selection):
    """context, lse and the mixed state of one launch."""
    tensors, q = inputs.tensors._replace(**selection), inputs.q
    context = torch.full((len(inputs.text_rows), *q.shape[1:]), float("nan"), dtype=q.dtype, device="cuda")
    lse = torch.full(context.shape[:2], float("nan"), device="cuda")
    out = inputs.state.clone()
    gate = Gate.of(*inputs.gating)
    fused = FusedTensors.of(inputs.state, tensors, gate)
    cuda.Attention(fused, gate=gate, config=config)(fused, context=context, lse=lse, out=out)
    return context, lse, out


def check(inputs, config, relative_lse=0.0):
    """The results of one launch, and that they are accurate."""
    context, lse, out = attend(inputs, config)
    exact = reference.attention(*inputs.attention)
    plain, plain_lse = sk.text_cross_attention(*inputs.attention, return_lse=True, backend="eager")
    reference.assert_accurate(context, plain, exact.context, exact.noise)
    reference.assert_lse_accurate(lse, plain_lse, exact.lse, relative_lse)
    rows = inputs.text_rows.long()
    mixed = reference.gated_mix(inputs.state, exact.context, inputs.text_rows, *inputs.gating)
    fused = sk.slowfast_cross_attention(*inputs.fused, backend="eager")
    reference.assert_accurate(out[rows], fused[rows], mixed[rows], exact.noise)
    return context, lse, out


@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_is_accurate_and_repeatable(plan, dtype, head_dim, rng):
    shape, config = PLANS[plan]
    inputs = make_inputs(shape._replace(dim=head_dim), dtype, torch.device("cuda"), rng("cuda"))
    context, lse, out = check(inputs, config)
    for _ in range(REPEATS):
        again = attend(inputs, config)
        assert all(reference.same_bits(a, b) for a, b in zip(again, (context, lse, out), strict=True))


@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize("plan", PLANS)
def test_under_every_plan_gates_may_be_formed_first(plan, head_dim, rng):
    shape, config = PLANS[plan]
    inputs = make_inputs(shape._replace(dim=head_dim), torch.bfloat16, torch.device("cuda"), rng("cuda"))
    config = replace(config, gates_first=True)
    *_, out = check(inputs, config)
    for _ in range(REPEATS):
        assert reference.same_bits(attend(inputs, config)[2], out)


# More rows than warps fit on the GPU, and more channels than a lane loads at once; the rows between see nothing.
MANY = Shape(((4000, 300), (50, 0), (950, 130)), (28, 4), 128, other_rows=9)


@pytest.mark.parametrize("parameters", [None, torch.float32], ids=["parameters alike", "float32 parameters"])
@pytest.mark.parametrize("way", WEIGHTED_GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_the_gates_of_many_rows_are_formed_first_whatever_their_kind(dtype, way, parameters, rng):
    inputs = make_inputs(MANY, dtype, torch.device("cuda"), rng("cuda"))
    gating = tuple(x.to(parameters or dtype) for x in inputs.gating)
    arguments = (inputs.state, *inputs.attention, *gating)
    assert "a launch before forms the gates" in sk.explain(sk.slowfast_cross_attention, *arguments, gate=way).notes
    out = sk.slowfast_cross_attention(*arguments, gate=way)
    plain = sk.slowfast_cross_attention(*arguments, gate=way, backend="eager")
    exact = reference.attention(*inputs.attention)
    rows = inputs.text_rows.long()
    mixed = reference.gated_mix(inputs.state, exact.context, inputs.text_rows, *gating, gate=way)
    reference.assert_accurate(out[rows], plain[rows], mixed[rows], exact.noise)
    assert reference.same_bits(out[inputs.other_rows], inputs.state[inputs.other_rows])
    blind = rows[4000:4050]
    assert reference.same_bits(out[blind], inputs.state[blind])


def test_gates_that_come_first_are_of_the_state_that_the_call_before_leaves(rng):
    """Every row is a text row, so that nothing is copied between the two."""
    inputs = make_inputs(MANY._replace(other_rows=0), torch.bfloat16, torch.device("cuda"), rng("cuda"))
    _, *rest = inputs.fused
    expected = inputs.state
    for _ in range(4):
        expected = sk.slowfast_cross_attention(expected, *rest)
        torch.cuda.synchronize()
    for _ in range(REPEATS):
        state = inputs.state
        for _ in range(4):
            state = sk.slowfast_cross_attention(state, *rest)
        assert reference.same_bits(state, expected)


def test_gates_that_come_first_follow_what_a_graph_is_replayed_on(rng):
    inputs = make_inputs(MANY, torch.bfloat16, torch.device("cuda"), rng("cuda"))
    other = make_inputs(MANY, torch.bfloat16, torch.device("cuda"), rng("cuda"))
    sk.slowfast_cross_attention(*inputs.fused)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sk.slowfast_cross_attention(*inputs.fused)
    inputs.state.copy_(other.state)
    inputs.gate_weight.copy_(other.gate_weight)
    graph.replay()
    assert reference.same_bits(out, sk.slowfast_cross_attention(*inputs.fused))


@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("plan", ["whole", "groups 2", "cluster 2", "ragged", "one warpgroup", "decode, one CTA"])
@pytest.mark.parametrize("rise", [30, 300, 3000])
def test_scores_may_rise_or_fall_from_block_to_block(plan, rise, dtype, head_dim, rng):
    shape, config = PLANS[plan]
    inputs = make_inputs(shape._replace(dim=head_dim), dtype, torch.device("cuda"), rng("cuda"))
    add_ramp(inputs, rise)
    check(inputs, config, relative_lse=1e-6)


# 14 blocks: 700 tokens are 6, the last of them short; 130 .. 1050 are 8.
PIECES = [(680, 1380), (3, 3), (0, 1), (130, 1050)]
IN_PIECES = {
    "groups 3": HopperConfig(2, 1, 3, 2),
    "a short group": HopperConfig(2, 1, 3, 2, long_blocks=6, even_blocks=15),
    "a short group of a plan for fewer": HopperConfig(2, 1, 3, 2, long_blocks=3, even_blocks=7),
    "a short group of a plan for many more": HopperConfig(2, 1, 3, 2, long_blocks=400, even_blocks=1000),
    "whole units first": HopperConfig(2, 1, 2, 2, whole_units=2, long_blocks=7, even_blocks=11),
    "cluster 8": HopperConfig(2, 8, 1, 2),
    "decode": HopperConfig(1, 4, 2, 3),
    "dealt out": HopperConfig(2, 1, 2, 2, dealt_ctas=4 + 132),
    "dealt out among few": HopperConfig(2, 1, 2, 2, dealt_ctas=7),
}


def check_pieces(inputs, config, pieces, rows):
    """One sequence in these pieces: that the results are accurate, and the same bits once more."""
    make = {"dtype": torch.int32, "device": "cuda"}
    inputs = replace(inputs, cu_slow=torch.tensor([0, len(pieces)], **make))
    selection = {"slow_pieces": torch.tensor(pieces, **make)}
    if rows == "a growing prefix":
        length, count = sum(end - begin for begin, end in pieces), len(inputs.text_rows)
        selection["slow_end"] = (torch.arange(1, count + 1, device="cuda") * length // count).int()
    context, lse, _ = got = attend(inputs, config, **selection)
    exact = reference.visible_attention(*inputs.attention, **selection)
    plain, plain_lse = sk.text_cross_attention(*inputs.attention, **selection, return_lse=True, backend="eager")
    reference.assert_accurate(context, plain, exact.context, exact.noise)
    reference.assert_lse_accurate(lse, plain_lse, exact.lse)
    again = attend(inputs, config, **selection)
    assert all(reference.same_bits(a, b) for a, b in zip(again, got, strict=True))


@pytest.mark.parametrize("rows", ["all see all", "a growing prefix"])
@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize("plan", IN_PIECES)
def test_one_sequence_in_pieces_may_take_any_plan(plan, head_dim, rows, rng):
    inputs = make_inputs(ONE._replace(dim=head_dim), torch.bfloat16, torch.device("cuda"), rng("cuda"))
    check_pieces(inputs, IN_PIECES[plan], PIECES, rows)


@pytest.mark.parametrize("rows", ["all see all", "a growing prefix"])
@pytest.mark.parametrize("count", [129, 1500, 2100])  # many; windows of 32 by the dozen; more than are summed up ahead
@pytest.mark.parametrize("plan", ["groups 3", "decode", "dealt out"])
def test_a_block_is_found_among_many_pieces(plan, count, rows, rng):
    inputs = make_inputs(ONE, torch.bfloat16, torch.device("cuda"), rng("cuda"))
    draw = random.Random(count)
    begins = [draw.randrange(1380) for _ in range(count)]
    pieces = [(begin, min(1380, begin + draw.choice((0, 1, 5, 40, 200)))) for begin in begins]
    check_pieces(inputs, IN_PIECES[plan], pieces, rows)
