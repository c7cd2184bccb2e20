"""What of ranges and pieces is Triton's own: tiles with and without masks in the loop, segments, scans over pieces.

What no row sees holds NaN and Inf. The reference reads token by token, and knows nothing of blocks, segments or splits.
"""

from __future__ import annotations

import pytest
import reference
import torch
from torch import Tensor
from triton_launches import HALF, compile_all, compiled, index, interpreted, meta, recorder, skip_unknown

from slowfast_kernels.calls import AttentionTensors, FusedTensors, MergeTensors
from slowfast_kernels.gate import Gate
from slowfast_kernels.heuristics.triton import AttentionConfig


def int32(*numbers) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def tokens_of(call: AttentionTensors, b: int) -> list[int]:
    """Where the tokens of sequence ``b`` lie, in their order."""
    first, last = call.cu_slow[b : b + 2].tolist()
    if call.slow_pieces is None:
        return list(range(first, last))
    return [token for begin, end in call.slow_pieces[first:last].tolist() for token in range(begin, end)]


def seen_by(call: AttentionTensors) -> list[list[int]]:
    """For each text row, the tokens that it sees."""
    seen = []
    for b in range(len(call.cu_text) - 1):
        tokens = tokens_of(call, b)
        for i in range(call.cu_text[b], call.cu_text[b + 1]):
            begin = 0 if call.slow_begin is None else max(0, int(call.slow_begin[i]))
            end = len(tokens) if call.slow_end is None else max(0, int(call.slow_end[i]))
            seen.append(tokens[begin:end])
    return seen


def exact(call: AttentionTensors, scale: float) -> tuple[Tensor, Tensor]:
    keys, values = call.keys, call.values
    heads_per_kv = call.q.shape[1] // keys.shape[1]
    contexts, lses = [], []
    for row, tokens in zip(call.text_rows.tolist(), seen_by(call), strict=True):
        query = call.q[row].double().unflatten(0, (-1, heads_per_kv))  # [Hkv, heads_per_kv, D]
        scores = torch.einsum("hgd,nhd->hgn", query, keys[tokens].double()) * scale
        lses.append(scores.logsumexp(-1).flatten())
        probs = scores.softmax(-1) if tokens else scores
        contexts.append(torch.einsum("hgn,nhd->hgd", probs, values[tokens].double()).flatten(0, 1))
    return torch.stack(contexts), torch.stack(lses)


def make_call(
    rng, texts, slows, heads=(2, 1), dim=16, dtype=torch.float32, pieces=None, ranges=None, pair=False, num_tokens=None
) -> AttentionTensors:
    """``slows``: tokens of each sequence; with ``pieces``, a list of (begin, end) for each sequence, they are not read.

    ``ranges``: (begin, end) of each row. Tokens that no row sees are poisoned afterwards.
    """

    def normal(*shape):
        return torch.randn(*shape, generator=rng).to(dtype)

    lengths = [len(p) for p in pieces] if pieces is not None else slows
    flat = [piece for p in pieces for piece in p] if pieces is not None else None
    num_tokens = num_tokens or (sum(slows) if pieces is None else max((end for _, end in flat), default=0) + 3)
    num_text = sum(texts)
    q = normal(num_text + 2, heads[0], dim)
    rows = torch.randperm(num_text + 2, generator=rng)[:num_text].int()
    kv = normal(num_tokens, heads[1], 2, dim)
    begin, end = (int32(*column) for column in zip(*ranges, strict=True)) if ranges else (None, None)

    def prefix(counts):
        return int32(*(sum(counts[:i]) for i in range(len(counts) + 1)))

    table = None if pieces is None else torch.tensor(flat, dtype=torch.int32).reshape(-1, 2)
    call = AttentionTensors(q, kv, prefix(lengths), rows, prefix(texts), None, begin, end, table)
    unseen = torch.ones(num_tokens, dtype=torch.bool)
    for tokens in seen_by(call):
        unseen[tokens] = False
    bad = torch.tensor([float("nan"), float("inf"), float("-inf")]).to(dtype)
    kv[unseen] = bad[torch.arange(int(unseen.sum())) % 3][:, None, None, None]
    if pair:
        apart = torch.full((2, num_tokens, heads[1], dim + 8), float("nan")).to(dtype)[..., :dim]
        apart.copy_(kv.movedim(2, 0))
        call = call._replace(slow_kv=apart[0], slow_values=apart[1].transpose(0, 1).contiguous().transpose(0, 1))
    return call


TILES = {"memory": (16, 16, 4, 2), "tensor cores": (64, 32, 4, 2)}  # without PEEL, and with


def attend(call: AttentionTensors, tile="memory", num_splits=1, scale=0.3) -> tuple[Tensor, Tensor]:
    from slowfast_kernels.triton.attention import Attention

    block_m, block_n, warps, stages = TILES[tile]
    config = AttentionConfig(block_m, block_n, num_splits, warps, stages)
    context = torch.empty(len(call.text_rows), *call.q.shape[1:], dtype=call.q.dtype)
    lse = torch.empty(context.shape[:2])
    Attention(call, scale, config=config).attend(call, context, lse)
    return context, lse


def check(call: AttentionTensors, tile="memory", num_splits=1, scale=0.3):
    context, lse = attend(call, tile, num_splits, scale)
    want_context, want_lse = exact(call, scale)
    empty = torch.tensor([not tokens for tokens in seen_by(call)])
    assert (context[empty] == 0).all()
    assert (lse[empty] == -torch.inf).all()
    assert context.isfinite().all()
    atol = 1e-5 if call.q.dtype == torch.float32 else 3e-3
    torch.testing.assert_close(context.double(), want_context, atol=atol, rtol=atol)
    torch.testing.assert_close(lse[~empty].double(), want_lse[~empty], atol=1e-4, rtol=1e-4)
    return context, lse


WAYS = pytest.mark.parametrize(("tile", "num_splits"), [("memory", 3), ("tensor cores", 1)])


RANGES = {
    "growing prefixes": [(0, 0), (0, 10), (0, 40), (0, 41), (0, 70), (0, 100)],
    "windows": [(0, 20), (10, 30), (20, 40), (60, 80), (64, 96), (80, 100)],
    "far apart": [(90, 95), (0, 3), (40, 41), (0, 1), (99, 100), (41, 42)],
    "one token apart": [(0, 16), (17, 32), (33, 48), (49, 50), (51, 52), (53, 54)],
    "nobody": [(0, 0), (5, 5), (9, 3), (100, 200), (-7, 0), (50, 50)],
    "clamped": [(-5, 1000), (-100, 3), (97, 2**31 - 1), (-(2**31), 2**31 - 1), (100, 101), (99, 98)],
    "all": [(0, 100)] * 6,
    "all but one": [(0, 100)] * 5 + [(7, 7)],
}


@interpreted
@WAYS
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_a_row_sees_its_range(ranges, tile, num_splits, rng):
    check(make_call(rng(), [6], [100], ranges=ranges), tile, num_splits)


PIECES = {
    "in order": [[(0, 32), (32, 64), (64, 96)]],
    "any order": [[(70, 90), (5, 6), (20, 50)], [(0, 5), (90, 93)]],
    "empty ones": [[(3, 3), (10, 40), (9, 9), (9, 2), (50, 70), (70, 70)], [], [(5, 5)], [(1, 2)]],
    "repeated and overlapping": [[(0, 40), (0, 40), (20, 60)], [(10, 30), (0, 40)]],
    "more than are walked at a time": [[(7 * i, 7 * i + i % 3) for i in range(40)], [(i, i + 1) for i in range(9)]],
    "one long one": [[(2, 150)]],
}


@interpreted
@WAYS
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_a_sequence_is_its_pieces_one_after_another(pieces, tile, num_splits, rng):
    check(make_call(rng(), [3] * len(pieces), None, pieces=pieces), tile, num_splits)


@interpreted
@WAYS
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_ranges_count_along_the_pieces(pieces, tile, num_splits, rng):
    """Ranges that meet, from the first token on, and ranges with holes between them."""
    for ranges in ([(0, 7), (30, 60), (5, 1000), (13, 14)], [(29, 30), (11, 19), (37, 60), (40, 40)]):
        check(make_call(rng(), [4] * len(pieces), None, pieces=pieces, ranges=ranges * len(pieces)), tile, num_splits)


@interpreted
def test_more_pieces_than_are_counted_at_a_time(rng):
    """Enough for two rounds of the scan, with holes that no row sees between them."""
    pieces = [[(3 * (i % 50), 3 * (i % 50) + (i * 7) % 4) for i in range(1100)]]
    total = sum(end - begin for begin, end in pieces[0])
    ranges = [(0, 20), (total - 9, total), (total // 2, total // 2 + 40)]
    check(make_call(rng(), [3], None, (2, 1), pieces=pieces, ranges=ranges), "memory", 2)


@interpreted
@WAYS
def test_a_static_cache_is_read_in_place_through_pieces(tile, num_splits, rng):
    """[B, Hkv, S, D] as [B * Hkv * S, Hkv, D] of token stride D and head stride S D; sequence b begins at b Hkv S."""
    batch, kv_heads, capacity, dim, lengths = 3, 2, 24, 16, (5, 24, 0)
    caches = torch.full((2, batch, kv_heads, capacity, dim), float("nan"))
    for b, n in enumerate(lengths):
        caches[:, b, :, :n] = torch.randn(2, kv_heads, n, dim, generator=rng())
    size, stride = (batch * kv_heads * capacity - (kv_heads - 1) * capacity, kv_heads, dim), (dim, capacity * dim, 1)
    keys, values = (x.as_strided(size, stride) for x in caches)
    begins = [b * kv_heads * capacity for b in range(batch)]
    pieces = [[(first, first + n)] for first, n in zip(begins, lengths, strict=True)]
    call = make_call(rng(), [2] * batch, None, (4, kv_heads), dim, pieces=pieces, num_tokens=len(keys))
    check(call._replace(slow_kv=keys, slow_values=values), tile, num_splits)


@interpreted
@WAYS
def test_in_half_precision(tile, num_splits, rng):
    pieces = [[(40, 70), (3, 20)], [(0, 70)]]
    ranges = [(0, 5), (4, 40), (0, 100), (9, 9)]
    check(make_call(rng(), [2, 2], None, pieces=pieces, ranges=ranges, dtype=torch.float16), tile, num_splits)


# ------------------------------------------------------------------------------------------- the fused op


def fused(state: Tensor, call: AttentionTensors, gate: Gate, tile: str, num_splits: int) -> Tensor:
    from slowfast_kernels.triton.attention import Attention

    block_m, block_n, warps, stages = TILES[tile]
    config = AttentionConfig(block_m, block_n, num_splits, warps, stages)
    tensors = FusedTensors(state, *call, gate.weight, gate.bias, gate.warm_up, gate.value)
    return Attention(tensors, 0.3, gate=gate, config=config).attend_and_mix(tensors, gate)


@interpreted
@WAYS
@pytest.mark.parametrize("kind", ["ranges", "a sequence without tokens", "empty pieces"])
def test_rows_that_see_nothing_keep_their_state_bit_for_bit(kind, tile, num_splits, rng):
    """-0 and NaN too, whatever their gate; the others are mixed."""
    if kind == "ranges":
        call = make_call(rng(), [4], [50], ranges=[(0, 0), (0, 50), (7, 3), (20, 21)])
        empty = [0, 2]
    elif kind == "a sequence without tokens":
        call = make_call(rng(), [2, 2], [0, 50])
        empty = [0, 1]
    else:
        call = make_call(rng(), [2, 2], None, pieces=[[(3, 3), (9, 4)], [(3, 30)]])
        empty = [0, 1]
    state = torch.randn(len(call.q), 32, generator=rng())
    rows = call.text_rows.long()
    state[rows[empty[0]]] = -0.0
    state[rows[empty[1]], ::3] = torch.tensor(float("inf"))
    state[rows[empty[1]], 1] = torch.tensor([0x7FC01234], dtype=torch.int32).view(torch.float32)
    weight, bias = torch.randn(32, generator=rng()) / 8, torch.ones(1)
    out = fused(state, call, Gate("tanh", weight, bias, None, True, None), tile, num_splits)
    context, _ = exact(call, 0.3)
    want = reference.gated_mix(state, context, call.text_rows, weight, bias, None)
    kept = torch.ones(len(state), dtype=torch.bool)
    kept[rows] = False
    kept[rows[empty]] = True
    assert reference.same_bits(out[kept], state[kept])
    torch.testing.assert_close(out[~kept].double(), want[~kept], atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------- merging


def merge(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    from slowfast_kernels.triton import prepare_merge_attention

    return prepare_merge_attention(MergeTensors(*tensors), None)(MergeTensors(*tensors))


@interpreted
def test_merged_is_rounded_once_whatever_the_size_of_the_exponents(rng):
    a, b = torch.randn(2, 6, 4, 16, generator=rng()).half()
    for shift, apart in ((0.0, 0.5), (3e4, 1.0), (-3e4, 200.0), (80.0, 90.0)):
        lse_a = torch.full((6, 4), shift)
        lse_b = lse_a + apart
        context, lse = merge(a, lse_a, b, lse_b)
        weight = torch.sigmoid(lse_a.double() - lse_b.double())[..., None]
        want = weight * a.double() + (1 - weight) * b.double()
        reference.assert_accurate(context, None, want)
        torch.testing.assert_close(lse.double(), torch.logaddexp(lse_a.double(), lse_b.double()), atol=1e-6, rtol=1e-6)


@interpreted
def test_contexts_to_merge_may_have_any_strides(rng):
    tensors = torch.randn(6, 5, 16, generator=rng()), torch.randn(6, 5, generator=rng())
    strided = tuple(x[::2].transpose(0, 1) for x in tensors)
    plain = tuple(x.contiguous() for x in strided)
    for found, want in zip(merge(*strided, *plain), merge(*plain, *strided), strict=True):
        torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------------------ ahead-of-time compilation


VISIBLE = {  # ranges, pieces, K and V apart
    "ranges": (True, False, False),
    "pieces": (False, True, False),
    "ranges along pieces of a pair": (True, True, True),
}


QUESTION = (64, 10368)


@pytest.fixture
def record(monkeypatch):
    return recorder(monkeypatch)


def visible(num_text, num_slow, heads=(28, 4), dim=128, dtype=HALF, ranges=True, pieces=False, pair=False):
    from slowfast_kernels.triton.attention import Attention

    shape = (num_slow, heads[1], dim) if pair else (num_slow, heads[1], 2, dim)
    keys, values = meta(*shape, dtype=dtype), meta(*shape, dtype=dtype) if pair else None
    bounds = (index(num_text), index(num_text)) if ranges else (None, None)
    table = meta(300, 2, dtype=torch.int32) if pieces else None
    q, places = meta(num_text, heads[0], dim, dtype=dtype), (index(2), index(num_text), index(2))
    call = AttentionTensors(q, keys, *places, values, *bounds, table)
    context = meta(num_text, heads[0], dim, dtype=dtype)
    Attention(call).attend(call, context, meta(num_text, heads[0], dtype=torch.float32))


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("what", VISIBLE)
def test_ranges_and_pieces_compile(record, what, arch):
    """Both of their loops keep loads in flight, also where a block looks its piece up."""
    skip_unknown(arch)
    launches = record(arch)
    visible(*QUESTION, ranges=False)
    visible(*QUESTION, **dict(zip(("ranges", "pieces", "pair"), VISIBLE[what], strict=True)))
    kernels = [kernel for launch, kernel in compile_all(launches, arch) if launch.name == "_attention"]
    base, other = (kernel.asm["ptx"].count("cp.async.cg.shared.global") for kernel in kernels)
    assert other >= (2 if arch < 100 else 1) * base > 0  # without ranges, the loop with masks has them from sm_100 on


@compiled
def test_merging_compiles(record):
    from slowfast_kernels.triton import prepare_merge_attention

    launches = record(90)
    tensors = (meta(64, 28, 128), meta(64, 28, dtype=torch.float32)) * 2
    prepare_merge_attention(tensors, None)(tensors)
    assert [launch.name for launch, _ in compile_all(launches, 90)] == ["_merge"]
