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
from slowfast_kernels.heuristics import cpu_num_splits

LEVELS = ("plain", "avx2", "avx512", "avx512_bf16")


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_this_file_passes_at_level(level):
    environment = os.environ | {"SLOWFAST_CPU_ISA": level}
    probe = "from slowfast_kernels._extension import extension; print(extension().cpu_isa())"
    if level == extension().cpu_isa():
        pytest.skip("the level of this very process")
    if subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, check=False).returncode:
        pytest.skip(f"this CPU has no {level}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not at_level", __file__]
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


# ----------------------------------------------------------------------------------------- conversions, mix, pool


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


# ------------------------------------------------------------------------------------------------ heuristics


def test_splits_feed_every_thread_and_stay_worth_their_while():
    assert cpu_num_splits(1, 1, 5184, 28, 4, threads=2) == 8
    assert cpu_num_splits(1, 1, 5184, 28, 4, threads=64) == 27  # 192 tokens each
    assert cpu_num_splits(1, 1, 100, 28, 4, threads=2) == 1
    assert cpu_num_splits(16, 16, 16 * 5184, 28, 4, threads=2) == 1  # a sequence a unit is enough
    assert cpu_num_splits(0, 0, 0, 28, 4, threads=2) == 1
