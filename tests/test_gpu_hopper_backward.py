"""On a Hopper GPU: however gradients are cut into CTAs, rounds and groups they are accurate, and the same bits."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace

import pytest
import reference
import torch
from cases import Shape, make_inputs, poison
from targets import HALF, HAS_GPU, REPEATS
from test_ops_visible import PIECES, RANGES, Call, apart, blinded, in_pieces, ranges_of

from slowfast_kernels import cuda, eager
from slowfast_kernels._extension import unavailable_reason
from slowfast_kernels.calls import AttentionTensors, BackwardTensors, scale_of
from slowfast_kernels.heuristics.cuda import HopperBackwardConfig, hopper_attention_backward_config

IS_HOPPER = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
REASON = unavailable_reason("cuda", torch.device("cuda")) if IS_HOPPER else "no Hopper GPU"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

# 40 text rows x 7 heads are 4 full row tiles of 64 and one of 24; 1380 slow tokens are 10 blocks of 128 and one of 100.
ONE = Shape(((40, 1380),), (14, 2), 128)
RAGGED = Shape(((24, 1380), (1, 60), (0, 300), (40, 0), (3, 200), (60, 768)), (14, 2), 128)
MANY = Shape(((5, 40),) * 37, (6, 2), 64)
ROUNDS = Shape(((40, 4000),), (8, 8), 64)
# Two groups a sequence, of which the second has no block wherever a round ends within the sequence.
SHORT = Shape(((40, 512),) * 5, (14, 2), 128)


def config_of(shape: Shape, num_ctas: int, max_groups: int, spread: int, splits: bool, spare: int = 64):
    heads, kv_heads = shape.heads
    num_text = sum(text for text, _ in shape.sequences)
    num_slow = sum(slow for _, slow in shape.sequences)
    made = hopper_attention_backward_config(num_text, num_slow, len(shape.sequences), heads, kv_heads, shape.dim)
    sums = made.max_tiles + spare
    return HopperBackwardConfig(min(num_ctas, made.num_ctas), made.max_tiles, sums, max_groups, spread, splits)


PLANS = {
    "one CTA": (ONE, (1, 1, 1, False)),
    "one CTA, two KV heads of a round": (ONE, (2, 1, 1, False)),
    "a last round of halves": (ONE, (9, 4, 2, True)),
    "all blocks halved": (ONE, (44, 4, 2, True)),
    "a last round too full for halves": (ONE, (6, 4, 2, True)),
    "a group": (ONE, (22, 1, 1, False)),
    "a group a tile": (ONE, (22, 16, 8, False)),
    "groups": (ONE, (22, 3, 2, False)),
    "groups without room": (ONE, (22, 3, 2, False, 0)),
    "groups with room for some": (RAGGED, (40, 8, 2, False, 6)),
    "ragged": (RAGGED, (132, 8, 2, False)),
    "ragged, halves": (RAGGED, (132, 8, 2, True)),
    "ragged, rounds": (RAGGED, (7, 2, 1, False)),
    "ragged, rounds, halves": (RAGGED, (15, 2, 1, True)),
    "many sequences": (MANY, (132, 4, 2, False)),
    "many sequences, rounds": (MANY, (13, 4, 2, True)),
    "a group without a block": (SHORT, (10, 8, 2, False)),
    "a group without a block, rounds of halves": (SHORT, (11, 8, 2, True)),
    "rounds": (ROUNDS, (100, 3, 2, True)),
    "more rounds": (ROUNDS, (17, 2, 2, True)),
}


def make_call(
    shape: Shape, generator, ranges: str | None = None, dtype=torch.bfloat16, pieces: str | None = None
) -> BackwardTensors:
    """``ranges``: one of RANGES, ``pieces``: of PIECES.

    With either, poison lies in tokens that nobody sees and in gradients of rows that see none.
    """
    inputs, selection, lengths = make_inputs(shape, dtype, "cuda", generator), {}, None
    if pieces is not None:
        inputs, selection, lengths = in_pieces(inputs, pieces)
    if ranges is not None:
        selection |= ranges_of(inputs, ranges, lengths=lengths)
    tensors: AttentionTensors = inputs.tensors
    if selection:
        tensors = blinded(Call(inputs, selection)).inputs.tensors._replace(**selection)
    scale = scale_of(tensors.q, None)
    context, lse = eager.text_cross_attention(tensors, scale)
    grads = (
        torch.randn(context.shape, generator=generator, device="cuda").to(context.dtype),
        torch.randn(lse.shape, generator=generator, device="cuda"),
    )
    if selection:
        is_blind = lse[:, 0] == -torch.inf
        for grad in grads:
            grad[is_blind] = poison(torch.empty_like(grad[is_blind]))
    return BackwardTensors(grads, (context, lse), tensors)


def exact_and_lost(call: BackwardTensors) -> tuple[eager.AttentionGradients, eager.AttentionGradients]:
    """In float64: the gradients, and what the rounding of the context that they start from makes of each."""
    wide = call.inputs._replace(q=call.inputs.q.double(), slow_kv=call.inputs.slow_kv.double())
    scale, (grad, grad_lse) = scale_of(wide.q, None), call.grads
    context, lse = eager.text_cross_attention(wide, scale)
    lost = (grad.double() * (context - call.results[0].double())).sum(-1).masked_fill(lse == -torch.inf, 0.0)
    return (
        eager.text_cross_attention_backward(wide, grad.double(), grad_lse, scale),
        eager.text_cross_attention_backward(wide, torch.zeros_like(context), lost, scale),
    )


def assert_accurate(found, call):
    """2 x the unit roundoff of the largest gradient, as of every op, beside what the context's rounding costs."""
    for got, want, lost in zip(found[:2], *(x[:2] for x in exact_and_lost(call)), strict=True):
        error = (got.double() - want).abs().max()
        allowed = 2 * reference.unit_roundoff(got.dtype) * max(1.0, float(want.abs().max()))
        assert error <= allowed + float(lost.abs().max())


def check_repeats(call, config: HopperBackwardConfig, repeats: int):
    """The gradients, which further passes give with the same bits."""
    backward = cuda.AttentionBackward(call.inputs, None, (True, True, False), config)
    first = backward(call)
    for _ in range(repeats):
        again = backward(call)
        assert all(reference.same_bits(x, y) for x, y in zip(first[:2], again[:2], strict=True))
    return first


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_is_accurate_and_gives_the_same_bits_every_time(plan, rng):
    shape, choices = PLANS[plan]
    call = make_call(shape, rng("cuda"))
    assert_accurate(check_repeats(call, config_of(shape, *choices), REPEATS), call)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False)], ids=["q", "kv"])
@pytest.mark.parametrize("ranges", [None, "growing prefix", "anything"])
def test_what_is_asked_for_alone_has_the_bits_that_it_has_with_the_rest(ranges, needs, rng):
    call = make_call(RAGGED, rng("cuda"), ranges)
    both = cuda.AttentionBackward(call.inputs, None, (True, True, False))(call)
    alone = cuda.AttentionBackward(call.inputs, None, needs)(call)
    for need, x, y in zip(needs, both, alone, strict=True):
        assert (y is None) == (not need)
        assert y is None or reference.same_bits(x, y)


def test_a_tensor_for_keys_and_one_for_values_have_the_bits_of_both_in_one(rng):
    call = make_call(RAGGED, rng("cuda"))
    grad_q, grad_kv, _ = cuda.AttentionBackward(call.inputs, None, (True, True, False))(call)
    kv = call.inputs.slow_kv
    apart = call._replace(inputs=call.inputs._replace(slow_kv=kv[:, :, 0].contiguous(), slow_values=kv[:, :, 1]))
    found = cuda.AttentionBackward(apart.inputs, None, (True, True, True))(apart)
    for x, y in zip(found, (grad_q, grad_kv[:, :, 0], grad_kv[:, :, 1]), strict=True):
        assert reference.same_bits(x, y.contiguous())
    values = cuda.AttentionBackward(apart.inputs, None, (False, False, True))(apart)
    assert values[:2] == (None, None)
    assert reference.same_bits(values[2], found[2])


# Whole training batches: several sequences in every round, and their ends anywhere in it.
@pytest.mark.parametrize(
    "shape",
    [
        Shape(((64, 5184),) * 4, (28, 4), 128),
        Shape(((512, 2000),) * 8, (28, 4), 128),
        Shape(((32, 5184),) * 6, (14, 2), 64),
        Shape(((16, 1296), (100, 10368), (64, 700), (1, 5184), (256, 40), (30, 3000)), (32, 8), 128),
    ],
    ids=["4x64x5184", "8x512x2000", "6x32x5184 of 0.5B", "6 ragged"],
)
@pytest.mark.parametrize("ranges", [None, "growing prefix"])
def test_gradients_of_a_training_batch_are_accurate(shape, ranges, rng):
    call = make_call(shape, rng("cuda"), ranges)
    found = cuda.AttentionBackward(call.inputs, None, (True, True, False))(call)
    assert_accurate(found, call)


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("ranges", [None, "growing prefix"])
@pytest.mark.parametrize("apart", [False, True])
def test_gradients_of_some_kv_heads_at_a_time_are_accurate(kv_heads, ranges, apart, rng):
    shape = Shape(((24, 1380), (1, 60), (0, 300), (60, 768)), (15, 5), 64)
    call = make_call(shape, rng("cuda"), ranges)
    kv = call.inputs.slow_kv
    if apart:
        call = call._replace(inputs=call.inputs._replace(slow_kv=kv[:, :, 0].contiguous(), slow_values=kv[:, :, 1]))
    backward = cuda.AttentionBackward(call.inputs, None, (True, True, apart), kv_heads=kv_heads)
    assert backward.describe().tiles["kv_heads"] == kv_heads
    first = backward(call)
    grad_kv = torch.stack(first[1:], 2) if apart else first[1]
    assert_accurate((first[0], grad_kv), call._replace(inputs=call.inputs._replace(slow_kv=kv, slow_values=None)))
    for x, y in zip(first, backward(call), strict=True):
        assert x is None or reference.same_bits(x, y)


@pytest.mark.parametrize("ranges", [None, "window", "nothing"])
@pytest.mark.parametrize("plan", ["ragged", "a group without a block"])
def test_a_workspace_may_hold_anything(plan, ranges, rng, monkeypatch):
    shape, choices = PLANS[plan]
    call, config = make_call(shape, rng("cuda"), ranges), config_of(shape, *choices)
    want = cuda.AttentionBackward(call.inputs, None, (True, True, False), config)(call)
    make = torch.empty

    def poisoned(*size, **options):
        x = make(*size, **options)
        return x.fill_(float("nan")) if x.dtype.is_floating_point else x

    monkeypatch.setattr(torch, "empty", poisoned)
    found = cuda.AttentionBackward(call.inputs, None, (True, True, False), config)(call)
    assert all(reference.same_bits(x, y) for x, y in zip(want[:2], found[:2], strict=True))


def test_gradients_of_any_layout_are_read(rng):
    call = make_call(ONE, rng("cuda"))
    backward = cuda.AttentionBackward(call.inputs, None, (True, True, False))
    grad, grad_lse = call.grads
    want = backward(call)
    wide = torch.stack((grad, grad), 3)[..., 0]  # every second element
    turned = grad.transpose(0, 1).contiguous().transpose(0, 1)
    for x in (wide, turned):
        found = backward(call._replace(grads=(x, grad_lse.t().contiguous().t())))
        assert all(reference.same_bits(a, b) for a, b in zip(want[:2], found[:2], strict=True))
    alone = backward(call._replace(grads=(None, grad_lse)))
    assert_accurate(alone, call._replace(grads=(torch.zeros_like(grad), grad_lse)))


def test_a_plan_says_how_it_cuts(rng):
    call = make_call(ONE, rng("cuda"))
    config = replace(config_of(ONE, 9, 4, 2, True), spread=3)
    plan = cuda.AttentionBackward(call.inputs, None, (True, True, False), config).describe()
    assert plan.grid == (9,)
    assert plan.tiles["spread"] == 3
    assert plan.workspace_bytes == sum(config.workspace(2, 128))


# ---------------------------------------------------------------------------------------------- rows that see ranges

SEEING_REPEATS = 10
# Many row tiles and blocks, so that groups, rounds and halves work on what tiles see in part or not at all.
LONG = Shape(((150, 9000), (0, 500), (20, 2500)), (7, 1), 128)
SEEING_PLANS = PLANS | {
    "long": (LONG, (132, 12, 2, True)),
    "long, one group": (LONG, (132, 1, 1, False)),
    "long, a last round of halves": (LONG, (44, 12, 2, True)),
    "long, rounds without room": (LONG, (24, 12, 1, True, 0)),
}


def assert_sees(found, call):
    """Accurate; exactly 0 where nobody looks, whatever lies there."""
    grad_q, grad_kv = found[:2]
    assert_accurate(found, call)
    hidden = ~call.inputs.slow_kv.isfinite().flatten(1).all(1)
    is_blind = call.results[1][:, 0] == -torch.inf
    assert not grad_kv[hidden].any()
    assert not grad_q[call.inputs.text_rows[is_blind].long()].any()


@pytest.mark.parametrize("ranges", ["growing prefix", "window", "anything"])
@pytest.mark.parametrize("plan", SEEING_PLANS)
def test_ranges_under_every_plan_are_accurate_and_give_the_same_bits_every_time(plan, ranges, rng):
    shape, choices = SEEING_PLANS[plan]
    call = make_call(shape, rng("cuda"), ranges)
    assert_sees(check_repeats(call, config_of(shape, *choices), SEEING_REPEATS), call)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [((2, 2), 64), ((6, 2), 128), ((7, 1), 64), ((8, 1), 128)], ids=str)
@pytest.mark.parametrize("ranges", RANGES)
def test_ranges_of_every_kind_are_accurate(ranges, heads, dim, dtype, rng):
    shape = Shape(((33, 700), (0, 9), (3, 0), (90, 1100), (1, 33)), heads, dim)
    call = make_call(shape, rng("cuda"), ranges, dtype)
    assert_sees(cuda.AttentionBackward(call.inputs, None, (True, True, False))(call), call)


@pytest.mark.parametrize("plan", ["a last round of halves", "groups", "ragged, rounds, halves", "more rounds"])
def test_ranges_that_hide_nothing_give_the_bits_of_a_call_without_ranges(plan, rng):
    shape, choices = PLANS[plan]
    call = make_call(shape, rng("cuda"))
    lengths = call.inputs.cu_slow.diff().repeat_interleave(call.inputs.cu_text.diff())
    seeing = call._replace(inputs=call.inputs._replace(slow_begin=torch.zeros_like(lengths), slow_end=lengths))
    config = config_of(shape, *choices)
    plain, found = (cuda.AttentionBackward(x.inputs, None, (True, True, False), config)(x) for x in (call, seeing))
    assert all(reference.same_bits(x, y) for x, y in zip(plain[:2], found[:2], strict=True))


def test_a_captured_graph_follows_ranges_that_change(rng):
    inputs = make_inputs(LONG, torch.bfloat16, "cuda", rng("cuda"))
    call = make_call(LONG, rng("cuda"))
    call = call._replace(inputs=inputs.tensors._replace(**ranges_of(inputs, "window")))
    backward = cuda.AttentionBackward(call.inputs, None, (True, True, False))
    backward(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backward(call)
    for ranges in ("one token", "anything", "nothing", "everything", "window"):
        for side, values in ranges_of(inputs, ranges).items():
            getattr(call.inputs, side).copy_(values)
        fresh = eager.text_cross_attention(call.inputs, scale_of(inputs.q, None))
        for old, new in zip(call.results, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        assert_accurate(captured, call)
        assert all(reference.same_bits(x, y) for x, y in zip(captured[:2], backward(call)[:2], strict=True))


# ------------------------------------------------------------------------------------------- sequences in pieces

PIECES_AND_RANGES = [
    ("cut and shuffled, with holes and empty ones", None),
    ("shared by all", None),
    ("shared by all", "growing prefix"),
    ("repeated and overlapping", None),
    ("repeated and overlapping", "anything"),
]
# Questions about one video; and a video in hundreds of pieces beside others.
SHARED = Shape(((9, 700), (30, 0), (0, 3), (64, 600), (5, 9)), (14, 2), 128)
SCATTERED = Shape(((50, 900), (3, 70), (20, 300)), (7, 1), 64)


@pytest.mark.parametrize(("pieces", "ranges"), PIECES_AND_RANGES)
@pytest.mark.parametrize("plan", SEEING_PLANS)
def test_pieces_under_every_plan_are_accurate_and_give_the_same_bits_every_time(plan, pieces, ranges, rng):
    shape, choices = SEEING_PLANS[plan]
    call = make_call(shape, rng("cuda"), ranges, pieces=pieces)
    assert_sees(check_repeats(call, config_of(shape, *choices), SEEING_REPEATS), call)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("heads", "dim"), [((2, 2), 64), ((6, 2), 128), ((7, 1), 64), ((8, 1), 128)], ids=str)
@pytest.mark.parametrize("ranges", [None, "growing prefix", "window", "anything", "nothing"])
@pytest.mark.parametrize("pieces", PIECES)
def test_pieces_of_every_kind_are_accurate(pieces, ranges, heads, dim, dtype, rng):
    shape = Shape(((33, 700), (0, 9), (3, 0), (90, 1100), (1, 33)), heads, dim)
    call = make_call(shape, rng("cuda"), ranges, dtype, pieces)
    assert_sees(cuda.AttentionBackward(call.inputs, None, (True, True, False))(call), call)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False)], ids=["q", "kv"])
@pytest.mark.parametrize(("pieces", "ranges"), PIECES_AND_RANGES)
def test_of_pieces_what_is_asked_for_alone_has_the_bits_that_it_has_with_the_rest(pieces, ranges, needs, rng):
    call = make_call(SHARED, rng("cuda"), ranges, pieces=pieces)
    both = cuda.AttentionBackward(call.inputs, None, (True, True, False))(call)
    alone = cuda.AttentionBackward(call.inputs, None, needs)(call)
    for need, x, y in zip(needs, both, alone, strict=True):
        assert (y is None) == (not need)
        assert y is None or reference.same_bits(x, y)


@pytest.mark.parametrize("layout", ["heads first", "unlike"])
@pytest.mark.parametrize(("pieces", "ranges"), PIECES_AND_RANGES)
def test_pieces_of_keys_and_values_apart_have_the_bits_of_both_in_one(pieces, ranges, layout, rng):
    call = make_call(SHARED, rng("cuda"), ranges, pieces=pieces)
    grad_q, grad_kv, _ = cuda.AttentionBackward(call.inputs, None, (True, True, False))(call)
    keys, values = apart(SimpleNamespace(slow_kv=call.inputs.slow_kv), layout).slow_kv
    pair = call._replace(inputs=call.inputs._replace(slow_kv=keys, slow_values=values))
    found = cuda.AttentionBackward(pair.inputs, None, (True, True, True))(pair)
    for x, y in zip(found, (grad_q, grad_kv[:, :, 0], grad_kv[:, :, 1]), strict=True):
        assert reference.same_bits(x, y.contiguous())


@pytest.mark.parametrize(("pieces", "ranges"), PIECES_AND_RANGES)
def test_a_workspace_of_pieces_may_hold_anything(pieces, ranges, rng, monkeypatch):
    call = make_call(SHARED, rng("cuda"), ranges, pieces=pieces)
    want = cuda.AttentionBackward(call.inputs, None, (True, True, False))(call)
    make = torch.empty

    def poisoned(*size, **options):
        x = make(*size, **options)
        return x.fill_(float("nan")) if x.dtype.is_floating_point else x

    monkeypatch.setattr(torch, "empty", poisoned)
    found = cuda.AttentionBackward(call.inputs, None, (True, True, False))(call)
    assert all(reference.same_bits(x, y) for x, y in zip(want[:2], found[:2], strict=True))


def scattered(inputs, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """500 pieces of up to 40 tokens, of all slow tokens, and how many of them each sequence has."""
    rng = random.Random(seed)
    begins = [rng.randrange(len(inputs.slow_kv)) for _ in range(500)]
    pieces = [(begin, min(len(inputs.slow_kv), begin + rng.randrange(40))) for begin in begins]
    cuts = [0, *sorted(rng.randrange(501) for _ in range(inputs.cu_slow.shape[0] - 2)), 500]
    make = {"dtype": torch.int32, "device": inputs.slow_kv.device}
    return torch.tensor(pieces, **make), torch.tensor(cuts, **make)


def refresh(call: BackwardTensors) -> None:
    """Results of the forward pass for what the inputs hold now."""
    fresh = eager.text_cross_attention(call.inputs, scale_of(call.inputs.q, None))
    for old, new in zip(call.results, fresh, strict=True):
        old.copy_(new)


def test_a_captured_graph_follows_pieces_that_change(rng):
    call = make_call(SCATTERED, rng("cuda"))
    pieces, counts = scattered(call.inputs, 0)
    call = call._replace(inputs=call.inputs._replace(slow_pieces=pieces, cu_slow=counts))
    refresh(call)
    backward = cuda.AttentionBackward(call.inputs, None, (True, True, False))
    backward(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backward(call)
    for seed in range(6):
        for old, new in zip((pieces, counts), scattered(call.inputs, seed), strict=True):
            old.copy_(new)
        refresh(call)
        graph.replay()
        assert_accurate(captured, call)
        assert all(reference.same_bits(x, y) for x, y in zip(captured[:2], backward(call)[:2], strict=True))


def test_questions_about_one_video_give_the_gradients_of_one_long_question(rng):
    whole = make_call(ONE, rng("cuda"))
    lengths, tokens = (7, 20, 13), ONE.sequences[0][1]
    make = {"dtype": torch.int32, "device": "cuda"}
    split = whole.inputs._replace(
        slow_pieces=torch.tensor([[0, tokens]] * 3, **make),
        cu_slow=torch.arange(4, **make),
        cu_text=torch.tensor([0, *accumulate(lengths)], **make),
    )
    call = whole._replace(inputs=split)
    assert_accurate(cuda.AttentionBackward(split, None, (True, True, False))(call), whole)


def test_a_video_may_be_one_sequence_s_once_and_another_s_twice(rng):
    call = make_call(Shape(((40, 256), (25, 0)), (14, 2), 128), rng("cuda"))
    make = {"dtype": torch.int32, "device": "cuda"}
    pieces = torch.tensor([[0, 256], [0, 256], [0, 256]], **make)
    call = call._replace(inputs=call.inputs._replace(slow_pieces=pieces, cu_slow=torch.tensor([0, 1, 3], **make)))
    refresh(call)
    assert_accurate(cuda.AttentionBackward(call.inputs, None, (True, True, False))(call), call)
