"""The kernels of a decode step's linear layers: right under the interpreter, and what the compiler makes of them.

The interpreted ones run in the child process of test_triton.py.
"""

from __future__ import annotations

import re
from functools import partial

import pytest
import reference
import torch
import torch.nn.functional as F
import triton_launches
from gemv_cases import CHANNELS, EPS, INSIDE, check, check_gated_up, check_linear, check_rotated_qkv, draw, normalised
from test_triton import local_bytes
from torch import Tensor
from triton_launches import (
    SHARED_BYTES,
    VERSION,
    compile_all,
    compiled,
    interpreted,
    recorder,
    round_bfloat16,
    skip_unknown,
)

from slowfast_kernels.dtypes import KERNEL_DTYPES
from slowfast_kernels.heuristics.gemv import MOST_ROWS, GemvConfig, GemvShape, floor_us, gemv_config
from slowfast_kernels.triton import gemv
from slowfast_kernels.triton.gemv import Norm, Projection

HIDDEN, INNER, VOCAB, DIM, HEADS, KV_HEADS = 3584, 18944, 152064, 128, 28, 4  # of a 7B

# ------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize(
    ("shape", "one", "two"),
    [
        ((4608, HIDDEN), (4, 256, 4), (4, 256, 2)),
        ((HIDDEN, HIDDEN), (4, 512, 4), (4, 512, 2)),
        ((2 * INNER, HIDDEN), (4, 512, 4), (8, 256, 4)),
        ((HIDDEN, INNER), (4, 1024, 4), (4, 512, 4)),
        ((VOCAB, HIDDEN), (2, 512, 4), (2, 1024, 2)),
    ],
)
def test_few_rows_of_a_7b_have_the_tiles_that_were_measured(shape, one, two):
    assert gemv_config(GemvShape(*shape), 1, 2) == GemvConfig(1, *one, 4)
    assert gemv_config(GemvShape(*shape), 2, 2) == GemvConfig(2, *two, 4)


@pytest.mark.parametrize(
    ("shape", "few", "many"),
    [
        ((4608, HIDDEN), (64, 128, 2, 5), (32, 128, 2, 5)),
        ((HIDDEN, HIDDEN), (16, 256, 4, 4), (32, 256, 4, 4)),
        ((2 * INNER, HIDDEN), (64, 128, 2, 3), (32, 128, 2, 5)),
        ((HIDDEN, INNER), (16, 256, 4, 4), (32, 256, 4, 4)),
        ((VOCAB, HIDDEN), (64, 128, 4, 4), (64, 128, 4, 4)),
        ((70 * 64 - 1, HIDDEN), (32, 128, 2, 5), (32, 128, 2, 5)),  # too few programs of 64
    ],
)
def test_batches_of_a_7b_have_the_tiles_that_were_measured(shape, few, many):
    assert gemv_config(GemvShape(*shape), 8, 2) == GemvConfig(16, *few, tensor_cores=True)
    assert gemv_config(GemvShape(*shape), 32, 2) == GemvConfig(32, *many, tensor_cores=True)


@pytest.mark.parametrize("batch", range(1, MOST_ROWS + 1))
def test_every_batch_has_tiles_that_hold_its_rows_and_no_more_channels_than_there_are(batch):
    for shape in (GemvShape(VOCAB, HIDDEN), GemvShape(7, 48)):
        config = gemv_config(shape, batch, 4)
        assert not config.tensor_cores
        assert batch <= config.block_m < 2 * batch
        assert config.block_k < 2 * shape.inputs
        sums = config.block_m * config.block_n * config.block_k
        assert sums <= 128 * 32 * config.num_warps, "float32 registers a thread"


@pytest.mark.parametrize("batch", range(1, MOST_ROWS + 1))
def test_three_rows_of_16_bits_or_more_are_tensor_cores_in_tiles_of_16_or_more(batch):
    shapes = [(VOCAB, HIDDEN), (2 * INNER, HIDDEN), (4608, HIDDEN), (2304, HIDDEN), (HIDDEN, INNER), (7, 48), (48, 32)]
    for shape in (GemvShape(*shape) for shape in shapes):
        config = gemv_config(shape, batch, 2)
        assert config.tensor_cores == (batch >= 3)
        if config.tensor_cores:
            assert batch <= config.block_m < max(17, 2 * batch)
            assert min(config.block_m, config.block_n, config.block_k) >= 16, "tl.dot wants 16"
            assert config.block_k < 2 * shape.inputs
            under_way = (config.block_m + config.block_n) * config.block_k * 2 * config.num_stages
            assert under_way <= 144 * 1024, "of which an SM has 227 KB"


@pytest.mark.parametrize("batch", [0, MOST_ROWS + 1])
def test_a_batch_that_no_program_holds_is_refused(batch):
    with pytest.raises(ValueError, match=f"batch: got {batch}, want 1 to {MOST_ROWS}"):
        gemv_config(GemvShape(8, 8), batch, 2)


def test_the_floor_is_one_read_of_the_weights():
    assert floor_us([GemvShape(1000, 500), GemvShape(500, 1000)], 2, read_gbps=1000) == 2.0


# ---------------------------------------------------------------------------------------------- compiler


def launch_step(rows: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """The five launches of a 7B's layer and head."""
    meta = partial(triton_launches.meta, dtype=dtype)
    norm = Norm(meta(HIDDEN), EPS)
    widths = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
    qkv = [Projection(meta(width, HIDDEN), meta(width)) for width in widths]
    rope = (meta(rows, 1, 1, DIM), meta(rows, 1, 1, DIM))
    cache = meta(2048 * rows, KV_HEADS, 2, DIM)
    gemv.rotated_qkv(meta(rows, HIDDEN), qkv, rope, meta(rows, dtype=torch.int64), cache, norm)
    gemv.linear(meta(rows, HEADS * DIM), Projection(meta(HIDDEN, HEADS * DIM)), residual=meta(rows, HIDDEN))
    gemv.gated_up(meta(rows, HIDDEN), meta(INNER, HIDDEN), meta(INNER, HIDDEN), norm)
    gemv.linear(meta(rows, INNER), Projection(meta(HIDDEN, INNER)), residual=meta(rows, HIDDEN))
    gemv.linear(meta(rows, HIDDEN), Projection(meta(VOCAB, HIDDEN)))


@pytest.fixture
def record(monkeypatch):
    return recorder(monkeypatch)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        *((rows, torch.bfloat16) for rows in (1, 2, 8, 16, 32)),
        *((rows, torch.float32) for rows in (8, 32)),
        (8, torch.float16),
    ],
    ids=str,
)
def test_the_step_compiles_for_hopper_without_spills(record, rows, dtype, tmp_path):
    launches = record(90)
    launch_step(rows, dtype)
    assert [launch.name for launch in launches] == ["_rotated_qkv", "_linear", "_gated_up", "_linear", "_linear"]
    for launch in launches if rows in (1, 16) else launches[:3]:
        kernel = launch.compile(90)
        assert kernel.metadata.shared <= SHARED_BYTES[90]
        spilled = 8 if VERSION < (3, 3) and rows == 32 else 0
        assert local_bytes(kernel, tmp_path) <= spilled, launch.name


@compiled
@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("rows", [1, 8])
def test_the_step_compiles_for_other_gpus(record, rows, arch):
    skip_unknown(arch)
    launches = record(arch)
    launch_step(rows)
    del launches[3]  # as the second
    names = [launch.name for launch, _ in compile_all(launches, arch)]
    assert names == ["_rotated_qkv", "_linear", "_gated_up", "_linear"]


def around_the_wait(ptx: str) -> tuple[str, str] | None:
    """What a dependent launch does before it waits, and after; None where Triton has none."""
    dependent = VERSION >= (3, 5)
    assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch_dependents") == int(dependent)
    if not dependent:
        return None
    before, after = ptx.split("griddepcontrol.wait")
    assert "cp.async" not in before, "activations are what is waited for"
    assert "griddepcontrol.launch_dependents" in after
    return before, after


@compiled
def test_weights_are_loaded_by_vectors_and_the_first_of_them_before_the_wait(record):
    """Where Triton has dependent launch; elsewhere the kernels compile without."""
    launches = record(90)
    launch_step(1)
    for launch in launches[:3]:
        ptx = launch.compile(90).asm["ptx"]
        weights = re.findall(r"ld\.global\S*evict_first\S*\.v[24]\.b32", ptx)
        assert weights
        assert "L2::cache_hint" in weights[0] or VERSION < (3, 3)
        parts = around_the_wait(ptx)
        assert launch.options.get("launch_pdl", False) == (parts is not None)
        if parts:
            before, _ = parts
            assert weights[0] in before
            assert "st.global" not in before


@compiled
def test_tensor_cores_get_weights_by_16_bytes_that_l2_reads_before_the_wait(record):
    launches = record(90)
    launch_step(8)
    for launch in launches[:3]:
        ptx = launch.compile(90).asm["ptx"]
        copied = [int(size, 0) for size in re.findall(r"cp\.async\.\w+\.shared\.global \[.*?\], \[.*?\], (\w+)", ptx)]
        assert copied.count(16) > 0.8 * len(copied)
        assert set(copied) <= {4, 16}, "4: the norm's weight"
        assert "mma.sync" in ptx
        parts = around_the_wait(ptx)
        if parts:
            before, after = parts
            assert "ld.global" not in ptx[: ptx.rindex("mma.sync")], "the loop waits for nothing but copies"
            assert "prefetch.global.L2" in before
            assert "prefetch.global.L2" not in after


# ------------------------------------------------------------------------------------------- interpreter

DTYPES = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
ROWS_AND_DTYPES = pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        *((rows, torch.float32) for rows in (1, 3, 8, 11)),
        *((rows, dtype) for rows in (1, 3, 4, 5, 8, 16, 17, 32) for dtype in (torch.float16, torch.bfloat16)),
    ],
    ids=str,
)


@pytest.fixture
def rounding(monkeypatch):
    round_bfloat16(monkeypatch)


@interpreted
@ROWS_AND_DTYPES
@pytest.mark.parametrize("inside", INSIDE)
def test_a_linear_layer(inside, rows, dtype, rng, rounding):
    check_linear(inside, rows, CHANNELS, 37, dtype, rng())


@interpreted
@DTYPES
@pytest.mark.parametrize("rows", [2, 8, 32])
@pytest.mark.parametrize("inputs", [1, 77, 513])
def test_lengths_that_no_vector_divides(inputs, rows, dtype, rng, rounding):
    check_linear("bias norm residual", rows, inputs, 3, dtype, rng())


@interpreted
@ROWS_AND_DTYPES
def test_silu_times_up(rows, dtype, rng, rounding):
    check_gated_up(rows, CHANNELS, 35, dtype, rng())


@interpreted
@ROWS_AND_DTYPES
@pytest.mark.parametrize("has_bias", [True, False])
def test_q_is_turned_and_k_and_v_go_to_their_slots(has_bias, rows, dtype, rng, rounding):
    """Heads of 12 channels, whose half no block of channels divides."""
    check_rotated_qkv(has_bias, rows, CHANNELS, (3, 2, 12), dtype, rng())


@interpreted
@pytest.mark.parametrize("rows", [2, 8, 32])
def test_activations_times_the_norm_s_weight_may_be_beyond_float16(rows, rng):
    """As PyTorch, which rounds them when they are normalised: some 5e4 times 8 here."""
    generator = rng()
    x = draw(generator, torch.float16, rows, 40, scale=1e4)
    projection = Projection(draw(generator, torch.float16, 9, 40, scale=0.1))
    norm = Norm(draw(generator, torch.float16, 40, scale=8.0), EPS)
    assert (x.double() * norm.weight.double()).abs().max() > 2**16
    check(gemv.linear(x, projection, norm), lambda x, n, p: F.linear(normalised(x, n), *p), x, norm, projection)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_of_a_batch_do_not_mix_and_what_is_past_the_end_is_not_used(dtype, rng):
    """A row of NaN leaves the others alone; weights, norm and activations end where their memory does."""
    generator = rng()
    x, weight = (draw(generator, dtype, rows, 40) for rows in (3, 9))
    norm = Norm(draw(generator, dtype, 40), EPS)
    clean = gemv.linear(x, Projection(weight), norm)
    x[1] = torch.nan

    def in_nan(t: Tensor) -> Tensor:
        memory = torch.full((t.numel() + 2048,), torch.nan, dtype=t.dtype)
        memory[1024 : 1024 + t.numel()] = t.flatten()
        return memory[1024 : 1024 + t.numel()].view(t.shape)

    dirty = gemv.linear(in_nan(x), Projection(in_nan(weight)), Norm(in_nan(norm.weight), EPS))
    assert reference.same_bits(clean[::2], dirty[::2])
    assert dirty[1].isnan().all()
