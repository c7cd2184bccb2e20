"""The kernels of a decode step's linear layers: right under the interpreter, and what the compiler makes of them.

The interpreted ones run in the child process of test_triton.py.
"""

from __future__ import annotations

import pytest
import reference
import torch
from gemv_cases import CHANNELS, EPS, INSIDE, check_gated_up, check_linear, check_rotated_qkv, draw
from test_triton import local_bytes
from torch import Tensor
from triton_launches import SHARED_BYTES, VERSION, compile_all, compiled, interpreted, meta, recorder

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
    assert gemv_config(GemvShape(*shape), 1) == GemvConfig(1, *one, 4)
    assert gemv_config(GemvShape(*shape), 2) == GemvConfig(2, *two, 4)


@pytest.mark.parametrize("batch", range(1, MOST_ROWS + 1))
def test_every_batch_has_tiles_that_hold_its_rows_and_no_more_channels_than_there_are(batch):
    for shape in (GemvShape(VOCAB, HIDDEN), GemvShape(7, 48)):
        config = gemv_config(shape, batch)
        assert batch <= config.block_m < 2 * batch
        assert config.block_k < 2 * shape.inputs
        sums = config.block_m * config.block_n * config.block_k
        assert sums <= 128 * 32 * config.num_warps, "float32 registers a thread"


@pytest.mark.parametrize("batch", [0, MOST_ROWS + 1])
def test_a_batch_that_no_program_holds_is_refused(batch):
    with pytest.raises(ValueError, match=f"batch: got {batch}, want 1 to {MOST_ROWS}"):
        gemv_config(GemvShape(8, 8), batch)


def test_the_floor_is_one_read_of_the_weights():
    assert floor_us([GemvShape(1000, 500), GemvShape(500, 1000)], 2, read_gbps=1000) == 2.0


# ---------------------------------------------------------------------------------------------- compiler


def launch_step(rows: int) -> None:
    """The five launches of a 7B's layer and head."""
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
@pytest.mark.parametrize("rows", [1, 2, 8, 32])
def test_the_step_compiles_for_hopper_without_spills(record, rows, tmp_path):
    launches = record(90)
    launch_step(rows)
    assert [launch.name for launch in launches] == ["_rotated_qkv", "_linear", "_gated_up", "_linear", "_linear"]
    for launch in launches if rows == 1 else launches[:3]:
        kernel = launch.compile(90)
        assert kernel.metadata.shared <= SHARED_BYTES[90]
        assert local_bytes(kernel, tmp_path) == 0, launch.name


@compiled
@pytest.mark.parametrize("arch", [80, 100])
def test_the_step_compiles_for_other_gpus(record, arch):
    launches = record(arch)
    launch_step(1)
    names = [launch.name for launch, _ in compile_all(launches[:3], arch)]
    assert names == ["_rotated_qkv", "_linear", "_gated_up"]


@compiled
def test_weights_are_loaded_by_vectors_and_the_first_of_them_before_the_wait(record):
    """Where Triton has dependent launch; elsewhere the kernels compile without."""
    launches = record(90)
    launch_step(1)
    for launch in launches[:3]:
        ptx = launch.compile(90).asm["ptx"]
        assert "ld.global.v2.b32" in ptx or "ld.global.v4.b32" in ptx
        dependent = VERSION >= (3, 5)
        assert launch.options.get("launch_pdl", False) == dependent
        assert ptx.count("griddepcontrol.wait") == ptx.count("griddepcontrol.launch_dependents") == int(dependent)
        if dependent:
            before, after = ptx.split("griddepcontrol.wait")
            assert "ld.global.v" in before
            assert "cp.async" not in before, "activations are what is waited for"
            assert "st.global" not in before
            assert "griddepcontrol.launch_dependents" in after


# ------------------------------------------------------------------------------------------- interpreter

# bfloat16 waits for a GPU (test_gpu_decode.py): the interpreter stores it without rounding.
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])


@interpreted
@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 8, 11])
@pytest.mark.parametrize("inside", INSIDE)
def test_a_linear_layer(inside, rows, dtype, rng):
    check_linear(inside, rows, CHANNELS, 37, dtype, rng())


@interpreted
@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_silu_times_up(rows, dtype, rng):
    check_gated_up(rows, CHANNELS, 35, dtype, rng())


@interpreted
@DTYPES
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("has_bias", [True, False])
def test_q_is_turned_and_k_and_v_go_to_their_slots(has_bias, rows, dtype, rng):
    """Heads of 12 channels, whose half no block of channels divides."""
    check_rotated_qkv(has_bias, rows, CHANNELS, (3, 2, 12), dtype, rng())


@interpreted
def test_rows_of_a_batch_do_not_mix_and_what_is_past_the_end_is_not_used(rng):
    """A row of NaN leaves the others alone; weights, norm and activations end where their memory does."""
    generator = rng()
    x, weight = (draw(generator, torch.float16, rows, 40) for rows in (3, 9))
    norm = Norm(draw(generator, torch.float16, 40), EPS)
    clean = gemv.linear(x, Projection(weight), norm)
    x[1] = torch.nan

    def in_nan(t: Tensor) -> Tensor:
        memory = torch.full((t.numel() + 2048,), torch.nan, dtype=t.dtype)
        memory[1024 : 1024 + t.numel()] = t.flatten()
        return memory[1024 : 1024 + t.numel()].view(t.shape)

    dirty = gemv.linear(in_nan(x), Projection(in_nan(weight)), Norm(in_nan(norm.weight), EPS))
    assert reference.same_bits(clean[::2], dirty[::2])
    assert dirty[1].isnan().all()
