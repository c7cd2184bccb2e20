"""What of the attention's backward is Triton's own: tiles, splits of dQ, layers of pieces, needs, poison.

The answer is the eager formula in float64, which reads sequences and pieces one after another and knows no tiles.
"""

from __future__ import annotations

import pytest
import reference
import torch
from cases import poison
from test_triton import local_bytes
from test_triton_visible import PIECES, RANGES, make_call, seen_by
from torch import Tensor
from triton_launches import HALF, VERSION, compile_all, compiled, index, interpreted, meta, recorder, skip_unknown

from slowfast_kernels import eager
from slowfast_kernels.calls import AttentionTensors, BackwardTensors
from slowfast_kernels.heuristics.triton import AttentionBackwardConfig, triton_attention_backward_config

TILES = {"memory": (16, 16, 4, 2, 16), "tensor cores": (64, 64, 4, 2, 32)}  # without PEEL, and with
WAYS = pytest.mark.parametrize(("tile", "num_splits"), [("memory", 3), ("tensor cores", 1)])
ALL = (True, True, True)


def differentiated(rng, call: AttentionTensors, scale: float, upstream: float = 1.0) -> BackwardTensors:
    """``call`` with its results and random gradients; what rows that see nothing have of them is poison."""
    context, lse = eager.text_cross_attention(call, scale)
    grad, grad_lse = (torch.randn(x.shape, generator=rng).to(x.dtype) * upstream for x in (context, lse))
    for i, tokens in enumerate(seen_by(call)):
        if not tokens:
            for x in (grad[i], grad_lse[i], call.q[int(call.text_rows[i])]):
                poison(x)
    return BackwardTensors((grad, grad_lse), (context, lse), call)


def gradients(call: BackwardTensors, scale=0.3, tile="memory", num_splits=1, needs=ALL) -> tuple[Tensor | None, ...]:
    from slowfast_kernels.triton.attention_backward import AttentionBackward

    block_m, block_n, warps, stages, step = TILES[tile]
    config = AttentionBackwardConfig(block_m, block_n, num_splits, warps, stages, step)
    return AttentionBackward(call, scale, needs, config=config).run(call)


def exact(call: BackwardTensors, scale: float, needs=ALL) -> tuple[Tensor | None, ...]:
    def wide(x):
        return x if x is None or x.dtype == torch.int32 else x.double()

    grads, inputs = map(wide, call.grads), AttentionTensors(*map(wide, call.inputs))
    return eager.text_cross_attention_backward(inputs, *grads, scale, needs)


def assert_accurate(found, want):
    for got, grad in zip(found, want, strict=True):
        if grad is None:
            assert got is None
            continue
        assert got.shape == grad.shape
        roundoff = reference.FLOAT32_TOLERANCE
        if got.dtype != torch.float32:
            roundoff = 2 * reference.unit_roundoff(got.dtype)
        assert (got.double() - grad).abs().max() <= roundoff * max(1.0, float(grad.abs().max()))
        assert not got[grad == 0].any()  # where nobody looks, exactly


def check(call: BackwardTensors, tile="memory", num_splits=1, scale=0.3, needs=ALL):
    assert_accurate(gradients(call, scale, tile, num_splits, needs), exact(call, scale, needs))


def random_call(rng, *args, scale=0.3, **kwargs) -> BackwardTensors:
    generator = rng()
    return differentiated(generator, make_call(generator, *args, **kwargs), scale)


# ------------------------------------------------------------------------------------------------ shapes


@interpreted
@pytest.mark.parametrize(
    ("dtype", "tile", "num_splits"), [(torch.float32, "memory", 3), (torch.float16, "tensor cores", 1)]
)
@pytest.mark.parametrize(
    ("texts", "slows", "heads", "dim"),
    [
        ([7], [70], (4, 2), 16),
        ([1, 0, 5, 2, 3], [40, 7, 0, 65, 31], (3, 1), 32),
        ([12, 3], [16, 33], (7, 1), 80),
        ([2], [20], (2, 2), 256),
    ],
    ids=["one", "ragged", "masked columns", "wide"],
)
def test_gradients_are_accurate(texts, slows, heads, dim, dtype, tile, num_splits, rng):
    scale = dim**-0.5
    check(random_call(rng, texts, slows, heads, dim, dtype, scale=scale), tile, num_splits, scale)


@interpreted
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_may_be_negative_or_zero(scale, rng):
    check(random_call(rng, [5, 2], [30, 9], (4, 2), scale=scale), scale=scale, num_splits=2)


@interpreted
def test_scores_may_be_so_low_that_a_score_of_zero_would_be_infinitely_likely(rng):
    """As those of tokens behind a sequence would be."""
    call = random_call(rng, [5], [37], dtype=torch.float16)
    for x, value in ((call.inputs.q, 20.0), (call.inputs.keys, -18.0)):
        x[..., 0] = value
    results = eager.text_cross_attention(call.inputs, 0.3)
    check(call._replace(results=results), "tensor cores")


@interpreted
@pytest.mark.parametrize("needs", ["q", "kv"])
def test_of_q_and_the_cache_only_what_is_needed_is_computed(needs, rng):
    check(random_call(rng, [3, 2], [20, 9]), num_splits=2, needs=("q" in needs, "kv" in needs, False))


@interpreted
@pytest.mark.parametrize("needs", ["q", "k", "v", "qk", "qv", "kv"])
def test_of_q_and_a_pair_only_what_is_needed_is_computed(needs, rng):
    check(random_call(rng, [3, 2], [20, 9], pair=True), num_splits=2, needs=tuple(name in needs for name in "qkv"))


@interpreted
@pytest.mark.parametrize("which", [0, 1], ids=["context", "lse"])
def test_one_of_two_results_may_have_no_gradient(which, rng):
    call = random_call(rng, [5, 2], [30, 9], (4, 2))
    grads = tuple(grad if i == which else None for i, grad in enumerate(call.grads))
    check(call._replace(grads=grads))


@interpreted
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_gradients_may_come_in_any_layout(layout, rng):
    call = random_call(rng, [5, 2], [30, 9], (4, 2))
    if layout == "expanded":
        grads = tuple(x[:1].expand_as(x) for x in call.grads)
    else:
        grads = tuple(x.transpose(0, -1).contiguous().transpose(0, -1) for x in call.grads)
    check(call._replace(grads=grads))


@interpreted
def test_the_same_call_gives_the_same_bits(rng):
    call = random_call(rng, [5, 2], [30, 9], (4, 2), dtype=torch.float16)
    first, second = (gradients(call, num_splits=2) for _ in range(2))
    assert all(reference.same_bits(x, y) for x, y in zip(first[:2], second[:2], strict=True))


@interpreted
@WAYS
def test_tokens_of_no_sequence_get_zeros_whatever_they_hold(tile, num_splits, rng):
    """Before the first sequence, behind the last, around blocks' ends."""
    generator = rng()
    call = make_call(generator, [2, 3], [40, 37], num_tokens=150)
    for first in (1, 50):
        moved = call._replace(cu_slow=call.cu_slow + first, slow_kv=torch.full_like(call.slow_kv, float("nan")))
        moved.slow_kv[first : first + 77] = torch.randn(77, *call.slow_kv.shape[1:], generator=generator)
        check(differentiated(generator, moved, 0.3), tile, num_splits)  # zero where zero is wanted


@interpreted
def test_small_probabilities_keep_their_digits_in_float16(rng):
    """Of 2^-20, which is below float16's normal numbers, sums of many must be as accurate as others."""
    generator = rng()
    call = make_call(generator, [60], [40], (1, 1), dtype=torch.float16)
    call.q.zero_()[..., 0] = 4.0
    call.slow_kv[:, :, 0].zero_()[0, :, 0] = 11.6  # 11.6 * 4 * 0.3 = 13.9, and e^13.9 = 2^20
    call = differentiated(generator, call, 0.3, upstream=1000.0)
    found, want = gradients(call, tile="tensor cores")[1][1:, :, 1], exact(call, 0.3)[1][1:, :, 1]
    assert (found.double() - want).abs().max() <= 2 * reference.unit_roundoff(torch.float16) * want.abs().max()


# --------------------------------------------------------------------------------------- ranges and pieces


@interpreted
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_a_row_sees_its_range(ranges, rng):
    check(random_call(rng, [6], [100], ranges=ranges), "memory", 3)


@interpreted
@WAYS
def test_ranges_in_several_sequences(tile, num_splits, rng):
    """Blocks of tokens that two sequences share, tiles that see nothing of a block, tiles that see all of it."""
    ranges = [(0, 9 * (i % 8)) if i % 3 else (0, 1000) for i in range(30)]
    check(random_call(rng, [20, 1, 9], [70, 3, 21], (4, 1), ranges=ranges), tile, num_splits)


@interpreted
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_tokens_add_up_what_every_piece_makes_of_them(pieces, rng):
    check(random_call(rng, [3] * len(pieces), None, pieces=pieces), "memory", 3)


@interpreted
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_ranges_count_along_the_pieces(pieces, rng):
    meeting, apart = [(0, 7), (30, 60), (5, 1000), (13, 14)], [(29, 30), (11, 19), (37, 60), (40, 40)]
    check(random_call(rng, [4] * len(pieces), None, pieces=pieces, ranges=meeting * len(pieces)), "tensor cores")
    pieces = pieces[:2]
    check(random_call(rng, [4] * len(pieces), None, pieces=pieces, ranges=apart * len(pieces)), "memory", 2)


@interpreted
def test_more_pieces_than_are_scanned_at_a_time(rng):
    """Of which only a few lie in a block, and one token is read by many."""
    pieces = [[(3 * (i % 20), 3 * (i % 20) + (i * 7) % 4 * (i % 19 == 0)) for i in range(1100)]]
    total = sum(end - begin for begin, end in pieces[0])
    ranges = [(0, 20), (total // 2, total // 2 + 40)]
    check(random_call(rng, [2], None, (2, 1), pieces=pieces, ranges=ranges), "tensor cores", 2)


@interpreted
def test_ranges_along_pieces_of_a_pair_in_half_precision(rng):
    """The second of three pieces has no token in the block of the first and the third."""
    pieces, ranges = [[(5, 10), (70, 90), (20, 50)], [(0, 70)]], [(0, 5), (4, 40), (0, 100), (9, 9)]
    options = {"pieces": pieces, "ranges": ranges, "dtype": torch.float16, "pair": True}
    check(random_call(rng, [2, 2], None, **options), "tensor cores", 3)


# ------------------------------------------------------------------------------ ahead-of-time compilation


@pytest.fixture
def record(monkeypatch):
    return recorder(monkeypatch)


def run_on_meta(
    num_text, num_slow, batch=1, heads=(28, 4), dim=128, dtype=HALF, ranges=False, pieces=False, pair=False, needs=ALL
):  # fmt: skip
    from slowfast_kernels.triton.attention_backward import AttentionBackward

    shape = (num_slow, heads[1], dim) if pair else (num_slow, heads[1], 2, dim)
    keys, values = meta(*shape, dtype=dtype), meta(*shape, dtype=dtype) if pair else None
    bounds = (index(num_text), index(num_text)) if ranges else (None, None)
    table = meta(300, 2, dtype=torch.int32) if pieces else None
    q, places = meta(num_text, heads[0], dim, dtype=dtype), (index(batch + 1), index(num_text), index(batch + 1))
    lse = meta(num_text, heads[0], dtype=torch.float32)
    call = BackwardTensors((q, lse), (q, lse), AttentionTensors(q, keys, *places, values, *bounds, table))
    AttentionBackward(call, None, needs).run(call)


CALLS = {
    "all": {},
    "dQ alone": {"needs": (True, False, False)},
    "dV alone": {"needs": (False, False, True), "pair": True},
    "ranges along pieces of a pair": {"ranges": True, "pieces": True, "pair": True},
    "masked columns": {"dim": 80, "dtype": torch.float16, "batch": 3},
    "wide": {"dim": 256},
    "float32": {"dim": 64, "dtype": torch.float32},
}
ARCHS = [(name, 90) for name in CALLS] + [(name, arch) for name in list(CALLS)[:4:3] for arch in (80, 100)]


@compiled
@pytest.mark.slow
@pytest.mark.parametrize(("what", "arch"), ARCHS)
def test_every_kernel_compiles(record, what, arch):
    skip_unknown(arch)
    launches = record(arch)
    run_on_meta(64, 10368, **CALLS[what])
    names = [launch.name for launch, _ in compile_all(launches, arch)]
    assert names == ["_pack", "_backward"] + ["_reduce"] * (what != "dV alone")


@compiled
def test_hopper_loads_by_tma_and_keeps_its_loops_in_registers(record, tmp_path):
    launches = record(90)
    run_on_meta(256, 10368)
    kernel = launches[1].compile(90)
    ptx = kernel.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert ("cp.async.bulk.tensor" in ptx) == (VERSION >= (3, 5))
    assert local_bytes(kernel, tmp_path) <= 128


# ---------------------------------------------------------------------------------------- configurations


def backward_config(num_text, num_slow, batch=1, heads=(28, 4), dim=128, dtype_bytes=2, **options):
    return triton_attention_backward_config(num_text, num_slow, batch, *heads, dim, dtype_bytes, 132, **options)


@pytest.mark.parametrize("shared_bytes", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("dtype_bytes", [2, 4])
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
def test_a_tile_has_what_tl_dot_wants(shared_bytes, dtype_bytes, dim):
    for num_text in (1, 4, 64, 1024):
        config = backward_config(num_text, 10368, dim=dim, dtype_bytes=dtype_bytes, shared_bytes=shared_bytes)
        assert min(config.block_m, config.block_n, config.step) >= 16
        assert config.block_m % min(config.block_m, config.step) == config.block_n % config.step == 0


def test_dq_alone_is_split_over_the_whole_gpu():
    config = backward_config(64, 10368, owns_tokens=False)
    assert config.num_splits * config.num_tiles(64, 1, 7) * 4 > 132


def test_beside_dk_and_dv_fewer_splits_of_dq_are_enough():
    assert backward_config(64, 10368).num_splits < backward_config(64, 10368, owns_tokens=False).num_splits
    assert backward_config(8 * 512, 8 * 5184, 8).num_splits == 1


def test_there_are_no_more_splits_than_steps():
    for num_slow in (0, 1, 65):
        for owns_tokens in (False, True):
            assert backward_config(1, num_slow, owns_tokens=owns_tokens).num_splits <= 2
