"""The C++ kernels of the cpu backend where they branch: tile shapes, rows read in place, conversions, extremes.

What every backend must do is in ``test_ops_*``. Here each choice that ``csrc/cpu`` makes for itself is met on purpose,
with every instruction set that the CPU has.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import slowfast_kernels as sk
from slowfast_kernels._extension import extension
from slowfast_kernels.dtypes import KERNEL_DTYPES

LEVELS = ("plain", "avx2", "avx512", "avx512_bf16")
FILES = (__file__, str(Path(__file__).with_name("test_cpu_backward.py")))


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_these_files_pass_at_level(level):
    environment = os.environ | {"SLOWFAST_CPU_ISA": level}
    probe = "from slowfast_kernels._extension import extension; print(extension().cpu_isa())"
    if level == extension().cpu_isa():
        pytest.skip("the level of this very process")
    if subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, check=False).returncode:
        pytest.skip(f"this CPU has no {level}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not at_level", *FILES]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attend(q: torch.Tensor, kv: torch.Tensor, backend: str = "cpu", **options) -> torch.Tensor:
    """One sequence, every row of q a text row."""
    rows = torch.arange(q.shape[0], dtype=torch.int32)
    return sk.text_cross_attention(q, kv, int32(0, kv.shape[0]), rows, int32(0, q.shape[0]), backend=backend, **options)


def inputs(text: int, slow: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, generator: torch.Generator):
    q = torch.randn(text, heads[0], dim, generator=generator)
    kv = torch.randn(slow, heads[1], 2, dim, generator=generator)
    return q.to(dtype), kv.to(dtype)


def assert_close(got: torch.Tensor, q: torch.Tensor, kv: torch.Tensor, **options) -> None:
    """Within what rounding costs: of P and the result to q's dtype, and of the scores to float32.

    A score s that is wrong by a relative e makes its weight wrong by a relative e * s: the larger the scores, the worse
    conditioned the softmax, for any kernel that keeps them in float32 (the eager one too).
    """
    exact = attend(q.double(), kv.double(), "eager", **options)
    keys = kv[:, :, 0].double().repeat_interleave(q.shape[1] // kv.shape[1], dim=1)
    scores = torch.einsum("thd,shd->ths", q.double(), keys) * options.get("softmax_scale", q.shape[-1] ** -0.5)
    resolution = {torch.float32: 3e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[q.dtype]
    resolution = resolution + 2.0**-22 * scores.abs().amax(dim=-1, keepdim=True)
    assert ((got.double() - exact).abs() <= resolution * (1 + exact.abs())).all()


# ------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 12, 13, 16, 17, 24, 25, 32, 33, 48, 49, 97])
def test_every_height_of_the_row_tile_is_right(rows, dtype, rng):
    q, kv = inputs(rows, 61, (2, 2), 64, dtype, rng())
    assert_close(attend(q, kv), q, kv)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("slow", [1, 7, 8, 9, 15, 16, 17, 47, 48, 49, 95, 96, 97, 193])
def test_every_length_of_the_last_token_tile_is_right(slow, dtype, rng):
    q, kv = inputs(1, slow, (14, 2), 128, dtype, rng())
    assert_close(attend(q, kv), q, kv)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 3, 16, 33, 64, 80, 128, 257])
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (7, 1), (20, 1)], ids=str)
def test_every_head_dimension_is_right(heads, dim, dtype, rng):
    q, kv = inputs(1, 50, heads, dim, dtype, rng())
    assert_close(attend(q, kv), q, kv)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("pad", [1, 2, 3])
def test_keys_read_in_place_and_keys_packed_first_give_the_same_bits(pad, dtype, rng):
    q, kv = inputs(1, 96, (7, 1), 128, dtype, rng())
    spaced = torch.full((96, 1, 2, 128 + pad), float("nan"), dtype=dtype)[..., :128]
    spaced.copy_(kv)
    assert torch.equal(attend(q, spaced), attend(q, kv))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_memory_behind_the_last_slow_token_is_not_used(dtype, rng):
    q, kv = inputs(1, 60, (7, 1), 128, dtype, rng())
    expected = attend(q, kv[:50].clone(), num_splits=1)
    kv[50:] = float("nan")
    assert torch.equal(attend(q, kv[:50], num_splits=1), expected)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-3, 3.0])
def test_any_softmax_scale_is_right(scale, dtype, rng):
    q, kv = inputs(3, 70, (4, 2), 32, dtype, rng())
    assert_close(attend(q, kv, softmax_scale=scale), q, kv, softmax_scale=scale)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_a_whole_tile_of_minus_infinite_scores_counts_for_nothing(dtype, rng):
    q, kv = inputs(1, 200, (4, 1), 64, dtype, rng())
    q = q.abs() + 0.1
    kv[:100, :, 0] = -float("inf")
    assert_close(attend(q, kv, num_splits=1), q, kv[100:])


def test_lse_is_exact_to_float32_in_every_dtype(rng):
    for dtype in KERNEL_DTYPES:
        q, kv = inputs(5, 300, (7, 1), 128, dtype, rng())
        _, lse = attend(q, kv, return_lse=True)
        _, exact = attend(q.double(), kv.double(), "eager", return_lse=True)
        assert (lse - exact).abs().max() <= 3e-6


def test_equal_values_are_returned_as_they_are(rng):
    """The weights sum to one as they were rounded, so rounding them to bf16 cannot shift the mean."""
    q, kv = inputs(2, 500, (7, 1), 64, torch.bfloat16, rng())
    kv[:, :, 1] = kv[0, :, 1]
    assert torch.equal(attend(q, kv), kv[0, :, 1].expand(2, 7, 64))


def test_tokens_far_apart_in_memory_are_found():
    """Offsets are 64-bit: the last token lies more than 2^31 elements behind the first (a view; little is touched)."""
    stride = 2**28 + 8
    base = torch.from_numpy(np.empty(9 * stride, dtype=np.float16))  # not torch.empty, which the tests fill
    kv = base.as_strided((9, 1, 2, 8), (stride, 16, 8, 1))
    kv.copy_(torch.linspace(-1, 1, 9 * 16).reshape(9, 1, 2, 8))
    q = torch.ones(1, 2, 8, dtype=torch.float16)
    assert torch.equal(attend(q, kv), attend(q, kv.clone(memory_format=torch.contiguous_format)))


# -------------------------------------------------------------------------------------------- ranges, pieces


def ranges(text: int, slow: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Any ranges, of which the last row's is empty."""
    begin, end = (torch.randint(-3, slow + 4, (text,), generator=generator, dtype=torch.int32) for _ in range(2))
    begin[-1] = end[-1] = 3
    return {"slow_begin": begin, "slow_end": end}


def unseen(slow: int, slow_begin: torch.Tensor, slow_end: torch.Tensor) -> torch.Tensor:
    """[slow], true for tokens that no row sees."""
    token = torch.arange(slow)
    return ~((slow_begin[:, None] <= token) & (token < slow_end[:, None])).any(0)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 3, 5, 9, 17, 33, 60])
def test_ranges_hold_at_every_height_of_the_row_tile(rows, dtype, rng):
    generator = rng()
    q, kv = inputs(rows, 150, (2, 2), 64, dtype, generator)
    sees = ranges(rows, 150, generator)
    exact = attend(q.double(), kv.double(), "eager", **sees)
    kv[unseen(150, **sees)] = float("nan")
    q[-1] = float("inf")
    for num_splits in (1, 2):
        got = attend(q, kv, num_splits=num_splits, **sees)
        assert not got[-1].any()
        resolution = {torch.float32: 4e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
        assert ((got.double() - exact).abs() <= resolution * (1 + exact.abs())).all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (40, 1)], ids=str)
def test_a_range_may_begin_and_end_at_any_token_of_a_tile(heads, dtype, rng):
    q, kv = inputs(1, 120, heads, 16, dtype, rng())
    for begin in (0, 1, 7, 8, 15, 16, 47, 48, 49):
        for end in (begin + 1, begin + 2, begin + 9, begin + 48, 97, 119):
            hidden = kv.clone()
            hidden[:begin] = hidden[end:] = float("nan")
            got = attend(q, hidden, slow_begin=int32(begin), slow_end=int32(end))
            assert_close(got, q, kv[begin:end])


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_what_is_not_seen_counts_for_nothing_at_any_scale(scale, rng):
    q, kv = inputs(2, 60, (3, 1), 32, torch.float32, rng())
    got = attend(q, kv, softmax_scale=scale, slow_begin=int32(10, 40), slow_end=int32(20, 41))
    assert_close(got[:1], q[:1], kv[10:20], softmax_scale=scale)
    assert_close(got[1:], q[1:], kv[40:41], softmax_scale=scale)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (40, 1), (14, 2)], ids=str)
@pytest.mark.parametrize("length", [1, 7, 8, 20, 64])
def test_tokens_in_pieces_give_the_bits_of_tokens_in_one_run(length, heads, dtype, rng):
    generator = rng()
    q, kv = inputs(2, 192, heads, 128, dtype, generator)
    begins = torch.arange(0, 192, length)
    order = torch.randperm(len(begins), generator=generator)
    pieces = torch.stack((begins, (begins + length).clamp(max=192)), 1)[order].int()
    joined = torch.cat([kv[begin:end] for begin, end in pieces.tolist()])
    rows = torch.arange(2, dtype=torch.int32)
    for more in ({}, {"slow_begin": int32(0, 13), "slow_end": int32(150, 192)}):
        got = sk.text_cross_attention(
            q, kv, int32(0, len(pieces)), rows, int32(0, 2), slow_pieces=pieces, num_splits=2, backend="cpu", **more
        )
        assert torch.equal(got, attend(q, joined, num_splits=2, **more))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_a_row_that_sees_nothing_keeps_its_state_whatever_it_holds(dtype, rng):
    q, kv = inputs(3, 50, (4, 2), 16, dtype, rng())
    state = torch.full((3, 64), float("nan"), dtype=dtype)
    state[1] = 1.0
    value = torch.tensor([float("nan"), 0.5, float("nan")])
    places = (q, kv, int32(0, 50), int32(0, 1, 2), int32(0, 3))
    mixed = sk.slowfast_cross_attention(
        state, *places, None, None, None, gate_value=value, slow_end=int32(0, 50, -7), backend="cpu"
    )
    assert torch.equal(mixed[[0, 2]].view(torch.uint8), state[[0, 2]].view(torch.uint8))
    assert mixed[1].isfinite().all()


@pytest.mark.parametrize("threads", [1, 3])
def test_with_fixed_splits_the_bits_depend_neither_on_threads_nor_on_the_batch(threads, rng, monkeypatch):
    generator = rng()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    q, kv = inputs(6, 700, (7, 1), 64, torch.bfloat16, generator)
    rows = torch.arange(6, dtype=torch.int32)
    cu_slow, cu_text = int32(0, 30, 30, 700), int32(0, 3, 4, 6)
    got = sk.text_cross_attention(q, kv, cu_slow, rows, cu_text, num_splits=3, backend="cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(got[4:], attend(q[4:], kv[30:], num_splits=3))


# -------------------------------------------------------------------------------- conversions, mix, merge, pool


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_every_half_precision_number_survives_the_way_through_float32(dtype, offset):
    """A stride of 1 averages nothing, so pooling must give each number back; ``offset`` makes scalar tails."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)[offset:]
    numbers = bits.view(dtype).reshape(1, 1, -1)
    pooled = sk.slowfast_pool(numbers, [1], (1, 1), backend="cpu").slow.flatten()
    numbers = numbers.flatten()
    nan = numbers.isnan()
    assert torch.equal(pooled.isnan(), nan)
    assert torch.equal(pooled[~nan], numbers[~nan])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1e-7, 1.0, 1e4])
def test_results_are_rounded_once_to_nearest_even(dtype, magnitude, rng):
    frames = (torch.randn(1, 4, 1003, generator=rng()) * magnitude).to(dtype)
    pooled = sk.slowfast_pool(frames, [1], (2, 2), spatial_stride=2, backend="cpu").fast[0]
    a, b, c, d = frames[0].float()
    assert torch.equal(pooled, ((a + b + c + d) / 4).to(dtype))


@pytest.mark.parametrize("channels", [1, 5, 16, 63, 64, 65, 130])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_gate_sums_every_channel_once(channels, dtype):
    state, context = torch.ones(2, channels, dtype=dtype), torch.ones(1, channels, dtype=dtype)
    weight, bias = torch.ones(channels), torch.zeros(1)
    mixed = sk.gated_residual_mix(state, context, int32(1), weight, bias, None, gate="linear", backend="cpu")
    assert torch.equal(mixed[1], torch.full((channels,), 1.0 + channels).to(dtype))
    assert torch.equal(mixed[0], state[0])


@pytest.mark.parametrize("dim", [1, 5, 16, 63, 64, 130])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_merging_weighs_every_channel_of_both_sides(dim, dtype):
    ones = torch.ones(2, 3, dim, dtype=dtype)
    lse = torch.zeros(2, 3)
    context, both = sk.merge_attention(ones, lse, -3 * ones, lse + torch.tensor(3.0).log(), backend="cpu")
    torch.testing.assert_close(context, -2 * ones)
    torch.testing.assert_close(both, lse + torch.tensor(4.0).log())
