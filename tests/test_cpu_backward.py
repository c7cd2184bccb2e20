"""The cpu backend's backward passes where ``csrc/cpu`` branches: tiles, blocks and groups, passes, partial sums.

What every backend must do is in ``test_ops_backward*.py``; every instruction set is met by ``test_cpu_kernels.py``,
which runs this file too. An error is held against the eager op's own by the rule of ``reference.py``.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import reference
import torch
from cases import GATE_WAYS, VIDEOS, make_frames

import slowfast_kernels as sk
from slowfast_kernels import cpu, eager
from slowfast_kernels.calls import (
    AttentionOptions,
    AttentionTensors,
    BackwardTensors,
    MixOptions,
    MixTensors,
    PoolCallOptions,
    PoolTensors,
)
from slowfast_kernels.dtypes import KERNEL_DTYPES

ALL_OF_ATTENTION = (True, True, True)


def int32(values) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32)


@pytest.fixture(autouse=True)
def threads():
    """One, unless a test sets another number: calls as small as these wait longer for threads than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------ attention


class Case(NamedTuple):
    """A backward pass: what goes in, and the forward's results."""

    call: BackwardTensors
    options: AttentionOptions

    def run(self, needs=ALL_OF_ATTENTION):
        return cpu.prepare_text_cross_attention_backward(self.call, self.options, needs)(self.call)

    def eager(self, dtype=None):
        """By the formula, with everything in ``dtype``."""
        inputs, grads = self.call.inputs, self.call.grads
        if dtype is not None:
            wide = (x.to(dtype) if x is not None and x.is_floating_point() else x for x in inputs)
            inputs, grads = AttentionTensors(*wide), [x.to(dtype) for x in grads]
        scale = self.options.softmax_scale or inputs.q.shape[2] ** -0.5
        return eager.text_cross_attention_backward(inputs, *grads, scale)


def case(
    texts, lengths, heads, dim, dtype, generator, scale=None, apart=False, tokens=None, others=2, **selection
) -> Case:
    """Sequences of so many text rows and slow tokens (or pieces); rows of q in random order, with others between."""
    num_text, num_slow = sum(texts), sum(lengths) if tokens is None else tokens
    q = torch.randn(num_text + others, heads[0], dim, generator=generator).to(dtype)
    kv = torch.randn(num_slow, heads[1], 2, dim, generator=generator).to(dtype)
    cu_slow, cu_text = (torch.cat((torch.zeros(1), int32(x).cumsum(0))).int() for x in (lengths, texts))
    rows = torch.randperm(len(q), generator=generator)[:num_text].int()
    cache = (kv[:, :, 0].contiguous(), kv[:, :, 1].contiguous()) if apart else (kv, None)
    selection = {name: int32(x) for name, x in selection.items()}
    inputs = AttentionTensors(q, cache[0], cu_slow, rows, cu_text, cache[1], **selection)
    return forward(inputs, generator, scale)


def forward(inputs: AttentionTensors, generator, scale=None) -> Case:
    options = AttentionOptions(scale, True, 0, None)
    results = cpu.prepare_text_cross_attention(inputs, options)(inputs)
    grad_context = torch.randn(results[0].shape, generator=generator).to(inputs.q.dtype)
    grad_lse = torch.randn(results[1].shape, generator=generator)
    return Case(BackwardTensors((grad_context, grad_lse), results, inputs), options)


def noise_of(made: Case) -> tuple[torch.Tensor | None, ...]:
    """For each gradient, what roundings of the context, of P and of dS to the dtype add up to, over the unit roundoff.

    As ``reference.Attended.noise``; of sequences whose rows see all.
    """
    inputs, scale = made.call.inputs, made.options.softmax_scale or made.call.inputs.q.shape[2] ** -0.5
    upstream = made.call.grads[0].double()
    q, keys, values = (x.double() for x in (inputs.q, inputs.keys, inputs.values))
    noise_q, noise_k, noise_v = torch.zeros_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    cu_slow, cu_text = inputs.cu_slow.tolist(), inputs.cu_text.tolist()
    for b in range(len(cu_slow) - 1):
        tokens, texts = slice(cu_slow[b], cu_slow[b + 1]), slice(cu_text[b], cu_text[b + 1])
        rows = inputs.text_rows[texts].long()
        query, grad = (x.unflatten(1, (keys.shape[1], -1)) for x in (q[rows], upstream[texts]))  # [t, h, g, D]
        k, v = keys[tokens], values[tokens]
        probs = (torch.einsum("thgd,nhd->thgn", query, k) * scale).softmax(-1)
        context = torch.einsum("thgn,nhd->thgd", probs, v)
        apart = torch.einsum("thgd,nhd->thgn", grad, v) - (grad * context).sum(-1, keepdim=True)
        delta = (grad * context).square().sum(-1, keepdim=True)
        scores = probs**2 * (apart**2 + delta)
        mean_key = torch.einsum("thgn,nhd->thgd", probs, k)
        of_rows = torch.einsum("thgn,nhd->thgd", probs**2 * apart**2, k**2) + delta * mean_key**2
        noise_q[rows] = 2 * scale * of_rows.sqrt().flatten(1, 2)
        noise_k[tokens] = 2 * scale * torch.einsum("thgn,thgd->nhd", scores, query**2).sqrt()
        noise_v[tokens] = 2 * torch.einsum("thgn,thgd->nhd", probs**2, grad**2).sqrt()
    if inputs.slow_values is None:
        return noise_q, torch.stack((noise_k, noise_v), 2), None
    return noise_q, noise_k, noise_v


def assert_accurate(made: Case) -> None:
    found = zip(made.run(), made.eager(), made.eager(torch.float64), noise_of(made), strict=True)
    for got, plain, exact, noise in found:
        assert (got is None) == (exact is None)
        if got is not None:
            reference.assert_accurate(got, plain, exact, noise)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 4, 12, 13, 16, 17, 24, 33, 48, 49, 100])
def test_every_height_of_the_block_of_rows_is_right(rows, dtype, rng):
    assert_accurate(case([rows], [70], (2, 2), 32, dtype, rng()))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("slow", [1, 7, 8, 9, 63, 64, 65, 127, 511, 512, 513, 2100])
def test_every_length_of_the_last_tile_and_block_is_right(slow, dtype, rng):
    assert_accurate(case([3], [slow], (3, 1), 64, dtype, rng()))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 3, 16, 33, 80, 96, 128, 257])
@pytest.mark.parametrize("apart", [False, True], ids=["one", "pair"])
def test_every_head_dimension_is_right(dim, apart, dtype, rng):
    assert_accurate(case([2, 5], [50, 90], (6, 2), dim, dtype, rng(), apart=apart))


@pytest.mark.parametrize("apart", [False, True], ids=["one", "pair"])
def test_a_head_dimension_of_one_is_right(apart, rng):
    """In float32: a single product's rounding to half precision is not the sum of many that the rule takes it for."""
    assert_accurate(case([2, 5], [50, 90], (6, 2), 1, torch.float32, rng(), apart=apart))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.3, 1e-3, 0.6])
def test_any_softmax_scale_is_right(scale, dtype, rng):
    assert_accurate(case([9], [130], (4, 2), 16, dtype, rng(), scale=scale))


def pieces_of_everything(generator):
    """Pieces in any order: with holes, shared by sequences, overlapping, one token long, twice in a sequence."""
    begins = torch.randint(0, 560, (14,), generator=generator)
    lengths = torch.tensor([70, 1, 8, 33, 1, 1, 200, 64, 5, 0, 90, 17, 3, 41])
    pieces = torch.stack((begins, (begins + lengths).clamp(max=600)), 1).int()
    pieces[10:12] = pieces[2:4]
    pieces[13] = pieces[6]
    return pieces


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("way", ["ranges", "pieces", "both"])
def test_what_no_row_sees_has_no_part_in_it(way, dtype, rng):
    """Nor have rows that see nothing: whatever these and those hold."""
    generator = rng()
    texts = [9, 0, 14]
    if way == "ranges":
        places = {"lengths": [310, 40, 250], "others": 0}
    else:
        pieces = pieces_of_everything(generator)
        places = {"lengths": [8, 2, 4], "tokens": 600, "slow_pieces": pieces}
    if way != "pieces":
        begin, end = (torch.randint(-20, 330, (sum(texts),), generator=generator) for _ in range(2))
        begin[3], end[3] = 64, 72  # a row of eight tokens, and one of none
        begin[5] = end[5] = 12
        places |= {"slow_begin": begin, "slow_end": end}
    made = case(texts, heads=(6, 2), dim=24, dtype=dtype, generator=generator, **places)
    exact = made.eager(torch.float64)
    inputs, (grad_context, grad_lse) = made.call.inputs, made.call.grads
    unseen = (exact.slow_kv == 0).flatten(1).all(1)
    blind = (made.call.results[1] == -torch.inf).any(1)
    assert unseen.any()
    inputs.slow_kv[unseen] = float("nan")
    grad_context[blind] = float("nan")
    grad_lse[blind] = float("nan")
    inputs.q[inputs.text_rows[blind].long()] = float("inf")
    grad_q, grad_kv, _ = found = made.run()
    sees = torch.zeros(len(grad_q), dtype=torch.bool)
    sees[inputs.text_rows[~blind].long()] = True
    assert not grad_q[~sees].any()
    assert not grad_kv[unseen].any()
    for got, want in zip(found[:2], exact[:2], strict=True):
        roundoff = reference.FLOAT32_TOLERANCE if dtype == torch.float32 else 2 * reference.unit_roundoff(dtype)
        assert (got.double() - want).abs().max() <= roundoff * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_a_sequence_that_sees_nan_breaks_no_other(dtype, rng):
    """Both read the same tokens; the second sees the first 28 of them."""
    ends = {"slow_pieces": [[0, 64], [0, 64]], "slow_end": [64] * 3 + [28] * 3}
    made = case([3, 3], [1, 1], (4, 2), 16, dtype, rng(), tokens=64, **ends)
    expected = made.run()[0]
    made.call.inputs.slow_kv[30] = float("nan")
    grad_q, rows = made.run()[0], made.call.inputs.text_rows.long()
    assert grad_q[rows[:3]].isnan().all()
    assert torch.equal(grad_q[rows[3:]], expected[rows[3:]])


@pytest.mark.parametrize("num_seen", [1, 5, 9])
def test_where_few_tokens_are_seen_the_rounding_of_the_context_has_no_part(num_seen, rng):
    """Tokens with one key: dQ is 0, as long as dS of the tokens adds up to 0."""
    generator = rng()
    pieces, places = [[30, 34], [70, 90]], {"lengths": [2], "tokens": 100}
    made = case([40], heads=(4, 2), dim=64, dtype=torch.float16, generator=generator, slow_pieces=pieces, **places)
    inputs = made.call.inputs._replace(slow_end=torch.full((40,), num_seen, dtype=torch.int32))
    inputs.slow_kv[:, :, 0] = inputs.slow_kv[0, :, 0]
    made = forward(inputs, generator)
    made.call.grads[1].zero_()
    assert made.run()[0].abs().max() <= 4e-6


def many_groups(dtype, generator) -> Case:
    """Tokens in several groups of several sequences, and rows of several blocks."""
    return case([30, 1, 0, 9], [1500, 40, 300, 1100], (6, 2), 64, dtype, generator)


def same(found, expected) -> bool:
    return all(x is y is None or reference.same_bits(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_many_groups_are_right(dtype, rng):
    assert_accurate(many_groups(dtype, rng()))


@pytest.mark.parametrize("count", [2, 3, 13])
def test_the_number_of_threads_changes_no_bit(count, threads, rng):
    made = many_groups(torch.bfloat16, rng())
    threads(1)
    expected = made.run()
    threads(count)
    for _ in range(3):
        assert same(made.run(), expected)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 3, 700], ids=["a row", "some rows", "a head"])
def test_passes_for_want_of_room_change_no_bit(rows, dtype, rng, monkeypatch):
    """Where partial sums of dQ have room for a few rows of a KV head only, and for one head of two."""
    made = many_groups(dtype, rng())
    expected = made.run()
    monkeypatch.setattr(cpu, "_BACKWARD_WORKSPACE", rows * 64 * 4)
    assert same(made.run(), expected)
    assert same(made.run((True, False, False)), (expected[0], None, None))


@pytest.mark.parametrize("apart", [False, True], ids=["one", "pair"])
def test_what_is_not_asked_for_changes_no_bit_of_the_rest(apart, rng):
    made = case([30], [300], (4, 2), 64, torch.bfloat16, rng(), apart=apart)
    everything = made.run()
    for needs in [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]:
        wanted = [x if need else None for x, need in zip(everything, needs, strict=True)]
        assert same(made.run(needs), wanted)


def test_incoming_gradients_are_read_by_their_strides(rng):
    made = case([7], [90], (6, 2), 33, torch.bfloat16, rng())
    expected = made.run()
    grad_context, grad_lse = made.call.grads
    heads_first = grad_context.transpose(0, 1).contiguous().transpose(0, 1)
    last_strided = grad_context.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for grad in (heads_first, last_strided):
        grads = (grad, grad_lse.T.contiguous().T)
        assert same(made._replace(call=made.call._replace(grads=grads)).run(), expected)


def test_a_missing_gradient_is_one_of_zeros(rng):
    made = case([7], [90], (6, 2), 33, torch.float32, rng())
    for grads in [(None, made.call.grads[1]), (made.call.grads[0], None)]:
        zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(made.call.results, grads, strict=True)]
        found, expected = (made._replace(call=made.call._replace(grads=g)).run() for g in (grads, zeros))
        for got, want in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(got, want, atol=1e-7, rtol=0)


def test_tokens_far_apart_in_memory_are_found(rng):
    """Offsets are 64-bit: the last token lies more than 2^31 elements behind the first (a view; little is touched)."""
    stride = 2**28 + 8
    base = torch.from_numpy(np.empty(9 * stride, dtype=np.float16))  # not torch.empty, which the tests fill
    made = case([2], [9], (2, 1), 8, torch.float16, rng())
    far = base.as_strided((9, 1, 2, 8), (stride, 16, 8, 1)).copy_(made.call.inputs.slow_kv)
    inputs = made.call.inputs._replace(slow_kv=far)
    assert same(made._replace(call=made.call._replace(inputs=inputs)).run(), made.run())


STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
reads_peaks = pytest.mark.skipif(not CLEAR.exists(), reason="the peak of the memory in use is read from Linux's /proc")


def _resident(name: str) -> int:
    return next(1024 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))


def memory_beside_results(made: Case) -> float:
    """Bytes, of the peak over what was there before, that 1.15 times results and gradients leave."""
    made.run()  # threads have their stacks
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not resident
    CLEAR.write_text("5")
    before = _resident("VmRSS")
    results = (x for x in (*made.run(), *made.call.results) if x is not None)
    peak = _resident("VmHWM") - before
    return peak - 1.15 * sum(x.numel() * x.element_size() for x in results)


@reads_peaks
@pytest.mark.parametrize("texts", [[8], [2] * 16], ids=["one", "batch"])
def test_memory_is_linear(texts, rng):
    made = case(texts, [8192 // len(texts)] * len(texts), (28, 4), 128, torch.bfloat16, rng())
    assert memory_beside_results(made) <= 96 * 2**20


@reads_peaks
def test_partial_sums_take_the_room_that_there_is(rng, monkeypatch):
    """They would take 18 MB, and those of a KV head take 4.6."""
    monkeypatch.setattr(cpu, "_BACKWARD_WORKSPACE", 5 * 2**20)
    assert memory_beside_results(case([256], [5120], (28, 4), 64, torch.bfloat16, rng())) <= 12 * 2**20


# ------------------------------------------------------------------------------------------------ mix


class Mixed(NamedTuple):
    call: BackwardTensors
    options: MixOptions

    def run(self, needs=(True,) * 6):
        return cpu.prepare_gated_residual_mix_backward(self.call, self.options, needs)(self.call)

    def eager(self, dtype=None):
        inputs, grad = self.call.inputs, self.call.grads[0]
        if dtype is not None:
            inputs = MixTensors(*(x.to(dtype) if x is not None and x.is_floating_point() else x for x in inputs))
            grad = grad.to(dtype)
        return eager.gated_residual_mix_backward(grad, *inputs[:3], inputs.gate(self.options))


def mixed(num_text, rows, channels, dtype, generator, way="tanh", warm_up="tanh", gate_dtype=None) -> Mixed:
    def normal(*size, scale=1.0, into=dtype):
        return (torch.randn(*size, generator=generator) * scale).to(into)

    gate_dtype = gate_dtype or dtype
    text_rows = torch.randperm(rows, generator=generator)[:num_text].int()
    weight, bias, value = None, None, None
    if way == "given":
        value = normal(num_text, into=gate_dtype)
    elif way != "none":
        weight, bias = normal(1, channels, scale=channels**-0.5, into=gate_dtype), normal(1, into=gate_dtype)
    factor = None if warm_up is None else torch.full((1,), 0.7, dtype=gate_dtype)
    context = normal(num_text, channels, scale=channels**-0.5)
    inputs = MixTensors(normal(rows, channels), context, text_rows, weight, bias, factor, value)
    options = MixOptions("tanh" if way == "given" else way, warm_up == "tanh", None)
    return Mixed(BackwardTensors((normal(rows, channels),), (), inputs), options)


def assert_mixed_accurate(made: Mixed) -> None:
    for got, plain, exact in zip(made.run(), made.eager(), made.eager(torch.float64), strict=True):
        assert (got is None) == (exact is None)
        if got is None:
            continue
        assert got.dtype == plain.dtype
        scale = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0  # sums over rows grow
        reference.assert_accurate(got / scale, plain / scale, exact / scale)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("num_text", [0, 1, 15, 16, 17, 100, 1100])
def test_sums_over_any_number_of_text_rows_are_right(num_text, dtype, rng):
    assert_mixed_accurate(mixed(num_text, num_text + 40, 20, dtype, rng()))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 5, 16, 63, 64, 65, 1030])
def test_every_number_of_channels_is_right(channels, dtype, rng):
    assert_mixed_accurate(mixed(20, 23, channels, dtype, rng()))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("way", GATE_WAYS)
@pytest.mark.parametrize("warm_up", ["tanh", "identity", None])
def test_every_gate_is_right(way, warm_up, dtype, rng):
    for gate_dtype in {dtype, torch.float32}:
        assert_mixed_accurate(mixed(20, 20, 40, dtype, rng(), way, warm_up, gate_dtype))


@pytest.mark.parametrize("way", ["sigmoid", "given"])
def test_what_is_not_asked_for_changes_no_bit_of_the_rest_of_the_mix(way, rng):
    made = mixed(40, 50, 70, torch.bfloat16, rng(), way)
    everything = made.run()
    for needs in torch.eye(6, dtype=torch.bool).tolist():
        assert same(made.run(needs), [x if need else None for x, need in zip(everything, needs, strict=True)])


@pytest.mark.parametrize("count", [2, 3, 13])
def test_the_number_of_threads_changes_no_bit_of_mix_and_pool(count, threads, rng):
    made, pooled = mixed(100, 300, 600, torch.float32, rng()), pooling(VIDEOS[3], torch.float32, 1e-5, rng())
    threads(1)
    expected = (*made.run(), *pooled.run())
    threads(count)
    for _ in range(3):
        assert same((*made.run(), *pooled.run()), expected)


def test_rows_of_the_gradient_may_have_any_stride(rng):
    made = mixed(20, 30, 64, torch.bfloat16, rng())
    grad = made.call.grads[0]
    wide = torch.full((30, 70), float("nan"), dtype=grad.dtype)
    wide[:, :64] = grad
    for strided in (wide[:, :64], grad.T.contiguous().T):
        assert same(made._replace(call=made.call._replace(grads=(strided,))).run(), made.run())


# ------------------------------------------------------------------------------------------------ pool


class Pooling(NamedTuple):
    call: BackwardTensors
    options: PoolCallOptions

    def run(self):
        return cpu.prepare_pool_backward(self.call, self.options, (True,))(self.call)

    def eager(self, dtype):
        frames, grads = self.call.inputs.frames.to(dtype), [x if x is None else x.to(dtype) for x in self.call.grads]
        return eager.pool_backward(frames, *grads, self.options.plan, self.options.norm_eps)


def pooling(video, dtype, norm_eps, generator, layout="contiguous") -> Pooling:
    options = PoolCallOptions(video.frame_counts, video.grid, *video.strides.values(), norm_eps, None)
    frames = make_frames(video, dtype, "cpu", generator, layout)
    counts = (options.plan.num_slow, options.plan.num_fast)
    grads = tuple(torch.randn(n, video.channels, generator=generator).to(dtype) for n in counts)
    return Pooling(BackwardTensors(grads, (), PoolTensors(frames)), options)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("norm_eps", [None, 1e-2], ids=["plain", "norm"])
@pytest.mark.parametrize("video", VIDEOS, ids=str)
def test_every_way_of_pooling_is_right(video, norm_eps, dtype, rng):
    for layout in ("contiguous", "strided"):
        made = pooling(video, dtype, norm_eps, rng(), layout)
        for grads in (made.call.grads, (None, made.call.grads[1]), (made.call.grads[0], None)):
            mine = made._replace(call=made.call._replace(grads=grads))
            reference.assert_accurate(mine.run()[0], mine.eager(dtype), mine.eager(torch.float64))


def test_without_a_norm_features_are_not_looked_at(rng):
    made = pooling(VIDEOS[3], torch.bfloat16, None, rng())
    expected = made.run()
    made.call.inputs.frames.fill_(float("nan"))
    assert same(made.run(), expected)


# ------------------------------------------------------------------------------------------------ choice


def test_a_backward_pass_on_a_cpu_takes_these_kernels():
    q = torch.zeros(1, 1, 8, requires_grad=True)
    kv = torch.zeros(1, 1, 2, 8)
    said = sk.explain("text_cross_attention", q, kv, int32([0, 1]), int32([0]), int32([0, 1]))
    assert said.backward == "slowfast::text_cross_attention_backward, on cpu"
