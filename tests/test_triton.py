"""What is Triton's own: configurations, ahead-of-time compilation for GPUs that are not here, and the interpreter.

That the ops are right is the matter of test_ops_*.py. The recorder runs the backend on meta tensors, keeps each
launch, and compiles exactly what a GPU would: so a kernel that breaks on sm_100 fails in a test run without a GPU.
Interpreter tests run in a child process, because TRITON_INTERPRET must be set before triton is imported.
"""

import os
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import reference
import torch
from cases import Shape, make_inputs
from triton_launches import (
    HALF,
    VERSION,
    compile_all,
    compiled,
    index,
    interpreted,
    meta,
    recorder,
    skip_unknown,
)

import slowfast_kernels as sk
from slowfast_kernels import eager
from slowfast_kernels._extension import interpreter_reason
from slowfast_kernels.calls import (
    AttentionOptions,
    AttentionTensors,
    BackwardTensors,
    FusedOptions,
    FusedTensors,
    MixOptions,
    MixTensors,
    PoolCallOptions,
    PoolTensors,
)
from slowfast_kernels.gate import GATE_CODES, WEIGHTED_GATES
from slowfast_kernels.heuristics.triton import AttentionConfig, triton_attention_config, triton_mix_backward_config
from slowfast_kernels.pool_plan import make_pool_plan

triton = pytest.importorskip("triton")

# ---------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("shared_bytes", [64 * 1024, 99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("dtype_bytes", [2, 4])
@pytest.mark.parametrize("head_dim", [1, 64, 80, 96, 128, 256])
def test_a_tile_fits_the_shared_memory(shared_bytes, dtype_bytes, head_dim):
    for num_text in (1, 4, 16, 64, 1024):
        config = triton_attention_config(
            num_text, 10368, 1, 28, 4, head_dim, dtype_bytes, 132, shared_bytes=shared_bytes
        )
        padded = max(16, 1 << (head_dim - 1).bit_length())
        stages = config.num_stages - (config.block_m < 64)  # a large tile's products read shared memory meanwhile
        elements = config.block_m * (padded + config.block_n)  # Q, and the probabilities
        elements += 2 * stages * config.block_n * padded  # K and V of the blocks under way
        assert elements * dtype_bytes <= shared_bytes
        assert min(config.block_m, config.block_n) >= 16, "tl.dot wants 16"


@pytest.mark.parametrize("shared_bytes", [64 * 1024, 99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("dtype_bytes", [2, 4])
@pytest.mark.parametrize("channels", [1, 896, 3584, 9000, 70_000])
def test_rows_of_the_mix_s_backward_fit_the_shared_memory(shared_bytes, dtype_bytes, channels):
    for num_text in (0, 1, 1024, 8192):
        config = triton_mix_backward_config(num_text, channels, dtype_bytes, 132, shared_bytes)
        assert config.num_stages >= 1
        assert 3 * (config.num_stages - 1) * config.block_c * dtype_bytes <= shared_bytes
        assert 1 <= config.num_programs <= max(1, num_text)


def test_a_decoded_row_is_split_over_the_whole_gpu():
    config = triton_attention_config(1, 10368, 1, 28, 4, 128, 2, 132)
    assert config.num_splits * 4 >= 132


def test_enough_rows_are_not_split():
    assert triton_attention_config(4096, 32 * 1296, 32, 28, 4, 128, 2, 132).num_splits == 1


def test_splits_that_were_asked_for_are_kept():
    assert triton_attention_config(1, 10368, 1, 28, 4, 128, 2, 132, num_splits=5).num_splits == 5


@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_fixed_number_of_splits_fixes_the_tile_whatever_the_batch(num_splits):
    """So that a sequence's bits do not depend on what it shares its batch with."""
    sizes = [(1, 5184, 1), (64, 5184, 1), (900, 40_000, 9), (4096, 98304, 1)]
    configs = {triton_attention_config(*size, 28, 4, 128, 2, 132, num_splits) for size in sizes}
    assert len(configs) == 1


def test_no_more_splits_than_blocks_are_chosen():
    assert triton_attention_config(1, 0, 1, 28, 4, 128, 2, 132).num_splits == 1
    assert triton_attention_config(1, 65, 1, 28, 4, 128, 2, 132).num_splits <= 5


def test_the_grid_has_a_tile_for_every_row_of_any_ragged_batch():
    rng = random.Random(0)
    for _ in range(200):
        texts = [rng.choice((0, 1, 1, 2, 30)) for _ in range(rng.randint(1, 20))]
        heads_per_kv, block_m = rng.randint(1, 16), rng.choice((16, 32, 64, 128))
        config = AttentionConfig(block_m, 64, 1, 4, 2)
        needed = sum(-(-n * heads_per_kv // block_m) for n in texts)
        assert config.num_tiles(sum(texts), len(texts), heads_per_kv) >= needed


def test_decode_launches_no_idle_tile():
    config = triton_attention_config(16, 16 * 10368, 16, 28, 4, 128, 2, 132)
    assert config.num_tiles(16, 16, 7) == 16


# ------------------------------------------------------------------------------ ahead-of-time compilation


@pytest.fixture
def record(monkeypatch):
    return recorder(monkeypatch)


def fused(
    num_text, num_slow, batch=1, heads=(28, 4), dim=128, dtype=HALF, rows=None, gate_dtype=None, warm=True, gate="tanh"
):  # fmt: skip
    from slowfast_kernels.triton import prepare_cross_attention

    gate_dtype, channels, rows = gate_dtype or dtype, heads[0] * dim, rows or num_text
    gating, kind = made_gate(gate, channels, num_text, gate_dtype, warm)
    tensors = FusedTensors(
        meta(rows, channels, dtype=dtype), meta(rows, heads[0], dim, dtype=dtype),
        meta(num_slow, heads[1], 2, dim, dtype=dtype), index(batch + 1), index(num_text), index(batch + 1),
        None, None, None, None, *gating,
    )  # fmt: skip
    prepare_cross_attention(tensors, FusedOptions(None, 0, kind, True, "triton"))(tensors)


def made_gate(kind, channels, num_text, dtype, warm=True):
    """(gate_weight, gate_bias, warm_up, gate_value) and the option ``gate``."""
    weighted = kind in WEIGHTED_GATES
    weight, bias = (meta(1, channels, dtype=dtype), meta(1, dtype=dtype)) if weighted else (None, None)
    value = meta(num_text, dtype=torch.float32) if kind == "given" else None
    gating = (weight, bias, meta(1, dtype=dtype) if warm else None, value)
    return gating, "none" if kind == "given" else kind


def plain(num_text, num_slow, batch=1, heads=(28, 4), dim=128, dtype=HALF, num_splits=0):
    from slowfast_kernels.triton import prepare_text_cross_attention

    tensors = AttentionTensors(
        meta(num_text, heads[0], dim, dtype=dtype), meta(num_slow, heads[1], 2, dim, dtype=dtype), index(batch + 1),
        index(num_text), index(batch + 1),
    )  # fmt: skip
    prepare_text_cross_attention(tensors, AttentionOptions(None, True, num_splits, "triton"))(tensors)


def pooled(norm_eps=1e-6, dtype=HALF, channels=3584, frame_counts=(8,)):
    from slowfast_kernels.triton import pool

    plan = make_pool_plan(frame_counts, (18, 18), 2, 1, 4, 1, 1)
    pool(meta(sum(frame_counts), 324, channels, dtype=dtype), plan, norm_eps)


def mixed(rows=64, dtype=HALF, channels=3584, gate="tanh"):
    from slowfast_kernels.triton import prepare_gated_residual_mix

    state = meta(rows, channels, dtype=dtype)
    gating, kind = made_gate(gate, channels, rows, dtype)
    tensors = MixTensors(state, state, index(rows), *gating)
    prepare_gated_residual_mix(tensors, MixOptions(kind, True, "triton"))(tensors)


def mixed_backward(rows=64, dtype=HALF, channels=3584, gate="tanh", needs=(True,) * 6):
    from slowfast_kernels.triton import prepare_gated_residual_mix_backward

    state = meta(rows, channels, dtype=dtype)
    gating, kind = made_gate(gate, channels, rows, dtype)
    call = BackwardTensors((state,), (), MixTensors(state, state, index(rows), *gating))
    prepare_gated_residual_mix_backward(call, MixOptions(kind, True, "triton"), needs)(call)


def pooled_backward(norm_eps=1e-6, dtype=HALF, channels=3584, frame_counts=(8,)):
    from slowfast_kernels.triton import prepare_pool_backward

    options = PoolCallOptions(frame_counts, (18, 18), 2, 1, 4, 1, 1, norm_eps, "triton")
    grads = tuple(meta(n, channels, dtype=dtype) for n in (options.plan.num_slow, options.plan.num_fast))
    call = BackwardTensors(grads, (), PoolTensors(meta(sum(frame_counts), 324, channels, dtype=dtype)))
    prepare_pool_backward(call, options, (True,))(call)


DECODE, BATCHED_DECODE, QUESTION, LONG_CHAT = (1, 10368), (16, 16 * 10368, 16), (64, 10368), (1024, 98304)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiles_ahead_of_time(record, arch):
    skip_unknown(arch)
    launches = record(arch)
    fused(*DECODE)
    fused(*QUESTION, rows=1360)
    plain(*BATCHED_DECODE)
    plain(*LONG_CHAT, num_splits=1)
    fused(8, 5184, dtype=torch.float32, gate_dtype=torch.float32)
    for gate in GATE_CODES:
        mixed(gate=gate)
        mixed_backward(gate=gate)
        fused(*DECODE, gate=gate)
    mixed_backward(needs=(False, True, False, False, False, False))
    mixed_backward(channels=9000, dtype=torch.float32)  # a row that leaves room for few stages
    for kernel in (pooled, pooled_backward):
        kernel()
        kernel(frame_counts=(7, 1))  # an image beside a video: two pool strides
    names = {launch.name for launch, _ in compile_all(launches, arch)}
    backward = {"_gated_mix_backward", "_sum_partials", "_pool_backward"}
    assert names == {"_attention", "_combine", "_gated_mix", "_pool"} | backward


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 80, 96, 256])
def test_every_head_dimension_and_dtype_compiles(record, dim, dtype):
    launches = record(90)
    fused(1, 5184, heads=(14, 2), dim=dim, dtype=dtype, gate_dtype=torch.float32, warm=False, gate="linear")
    if dtype == torch.float16:
        plain(1024, 5184, heads=(14, 2), dim=dim, dtype=dtype, num_splits=1)
    else:
        pooled(None, dtype, channels=dim * 14)
        pooled_backward(None, dtype, channels=dim * 14)
        mixed(4, dtype, channels=dim * 14)
        mixed_backward(4, dtype, channels=dim * 14)
    assert len(list(compile_all(launches, 90))) >= 3


@compiled
@pytest.mark.parametrize("case", [DECODE, QUESTION, LONG_CHAT], ids=["decode", "question", "long_chat"])
def test_the_hopper_loop_is_asynchronous(record, case, tmp_path):
    """K and V arrive by cp.async while tensor cores work (wgmma from 64 rows on); few registers are spilled."""
    launches = record(90)
    plain(*case)
    kernel = launches[0].compile(90)
    ptx = kernel.asm["ptx"]
    tile = launches[0].constants
    assert tile["K_STRIDE"] == tile["V_STRIDE"] == 4 * 2 * 128
    chunks = tile["BLOCK_N"] * 128 * 2 // (16 * 32 * launches[0].options["num_warps"])  # 16-byte copies a thread
    assert ptx.count("cp.async.cg.shared.global") >= 4 * chunks, "prologue and loop, K and V"
    assert ("wgmma.mma_async" in ptx) == (tile["BLOCK_M"] >= 64)
    assert local_bytes(kernel, tmp_path) <= 256


@compiled
def test_rows_of_the_mix_s_backward_arrive_while_others_are_summed(record, tmp_path):
    launches = record(90)
    mixed_backward()
    kernel = launches[0].compile(90)
    assert kernel.asm["ptx"].count("cp.async.cg.shared.global") >= 2 * 3 * 2, (
        "prologue and loop, three rows of two vectors"
    )
    assert local_bytes(kernel, tmp_path) == 0


def local_bytes(kernel, folder: Path) -> int:
    """Bytes of local memory a thread: registers that were spilled."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip(f"triton {triton.__version__} ships no cuobjdump")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


@compiled
def test_a_new_length_is_no_new_kernel(record):
    launches = record(90)
    for num_slow in (10368, 10369, 10384):
        fused(1, num_slow)
    keys = {
        (x.name, *x.signature.items(), *x.constants.items(), *map(str, x.attributes.items()), *x.options.items())
        for x in launches
    }
    assert len(keys) == 2, "attention and combine"


@compiled
def test_a_layer_at_decode_is_two_launches_and_three_with_other_rows(record):
    launches = record(90)
    fused(*DECODE)
    assert [launch.name for launch in launches] == ["_attention", "_combine"]
    assert [launch.options.get("launch_pdl", False) for launch in launches] == [False, VERSION >= (3, 5)]


@compiled
def test_a_dependent_launch_starts_early_and_waits(record):
    """Where Triton has it; elsewhere kernels that name it compile all the same."""
    launches = record(90)
    fused(*DECODE)
    attention, combine = (launch.compile(90).asm["ptx"] for launch in launches)
    assert ("griddepcontrol.launch_dependents" in attention) == (VERSION >= (3, 5))
    assert ("griddepcontrol.wait" in combine) == (VERSION >= (3, 5))


# ------------------------------------------------------------------------------------------- interpreter


@compiled
@pytest.mark.slow
@pytest.mark.skipif(bool(interpreter_reason()), reason=interpreter_reason())
def test_the_interpreter_agrees_with_eager():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    kinds = ("visible", "deal", "backward", "gemv", "elementwise")
    beside = [*(f"test_triton_{kind}.py" for kind in kinds), "test_model_decode.py", "test_model_elementwise.py"]
    command += [str(Path(__file__).with_name(name)) for name in beside]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stdout + child.stderr
    assert re.search(r"\d+ passed", child.stdout)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
RAGGED_DECODE = Shape(((1, 130), (1, 64), (1, 0)), (14, 2), 64)  # a tile a sequence
CASES = [
    RAGGED_DECODE,
    Shape(((2, 70), (0, 20), (3, 40)), (14, 2), 16),  # tiles partly filled
    Shape(((2, 40),), (3, 1), 80),
    Shape(((2, 17),), (2, 2), 256),
]
LONG_CASES = [
    Shape(((33, 130), (2, 65)), (2, 1), 32),  # 64 rows a tile: the masked tail is outside the loop
    Shape(((129, 129),), (4, 1), 16),  # 128 rows a tile
]


@interpreted
@DTYPES
@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_attention(shape, num_splits, dtype, rng):
    check_attention(shape, num_splits, dtype, rng)


@interpreted
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("shape", LONG_CASES, ids=str)
def test_attention_of_many_rows(shape, num_splits, rng):
    check_attention(shape, num_splits, torch.float16, rng)


def check_attention(shape, num_splits, dtype, rng):
    inputs = make_inputs(shape, dtype, "cpu", rng())
    scale = shape.dim**-0.5
    context, lse = attend(inputs, scale, num_splits)
    expected = eager.text_cross_attention(inputs.tensors, scale)
    exact = reference.attention(*inputs.attention, scale)
    reference.assert_accurate(context, expected[0], exact.context, exact.noise)
    reference.assert_lse_accurate(lse, expected[1], exact.lse)


def attend(inputs, scale, num_splits):
    options = {"softmax_scale": scale, "num_splits": num_splits, "return_lse": True}
    return sk.text_cross_attention(*inputs.attention, **options, backend="triton")


@interpreted
def test_the_same_input_gives_the_same_bits(rng):
    inputs = make_inputs(RAGGED_DECODE, torch.float16, "cpu", rng())
    first, second = (attend(inputs, 0.125, 3)[0] for _ in range(2))
    assert reference.same_bits(first, second)


@interpreted
@DTYPES
@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_neighbour_full_of_nan_and_infinity_does_not_leak(num_splits, dtype, rng):
    inputs = make_inputs(Shape(((2, 70), (0, 50), (40, 33)), (2, 1), 32), dtype, "cpu", rng())
    clean, _ = attend(inputs, 0.2, num_splits)
    inputs.slow_kv[70:120] = torch.tensor([float("nan"), float("inf")]).to(dtype).repeat(16)
    assert reference.same_bits(clean, attend(inputs, 0.2, num_splits)[0])


@interpreted
@pytest.mark.parametrize("gate", WEIGHTED_GATES)
@pytest.mark.parametrize(("warm_up_tanh", "warm"), [(True, 0.3), (False, 0.02), (True, None)])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_gate_and_mix(num_splits, gate, warm_up_tanh, warm, rng):
    inputs = make_inputs(RAGGED_DECODE, torch.float16, "cpu", rng(), gate_dtype=torch.float32)
    inputs.warm_up = None if warm is None else torch.tensor([warm])
    context, _ = eager.text_cross_attention(inputs.tensors, 0.125)
    exact_context = reference.attention(*inputs.attention, 0.125).context
    options = {"gate": gate, "warm_up_tanh": warm_up_tanh}
    fused = partial(sk.slowfast_cross_attention, *inputs.fused, softmax_scale=0.125, num_splits=num_splits, **options)
    mix = partial(sk.gated_residual_mix, inputs.state, context, inputs.text_rows, *inputs.gating, **options)
    text, other = inputs.text_rows.long(), inputs.other_rows
    for op, given in ((fused, exact_context), (mix, context)):
        got, expected = op(backend="triton"), op(backend="eager")
        exact = reference.gated_mix(inputs.state, given, inputs.text_rows, *inputs.gating, **options)
        reference.assert_accurate(got[text], expected[text], exact[text])
        assert reference.same_bits(got[other], inputs.state[other])


@interpreted
def test_warm_up_zero_gives_the_state_back_bitwise(rng):
    inputs = make_inputs(RAGGED_DECODE, torch.float16, "cpu", rng())
    inputs.warm_up = torch.zeros(1, dtype=torch.float16)
    for num_splits in (1, 2):
        out = sk.slowfast_cross_attention(*inputs.fused, num_splits=num_splits, backend="triton")
        assert reference.same_bits(out, inputs.state)


@interpreted
@DTYPES
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
def test_pool(norm_eps, dtype, rng):
    from slowfast_kernels.triton import pool

    for counts, grid, strides in (
        ((5, 1), (6, 6), (2, 2, 2, 2, 2)),
        ((4, 3), (7, 7), (3, 1, 2, 2, 3)),
        ((1,), (4, 6), (3, 1, 1, 3, 1)),
    ):
        plan = make_pool_plan(counts, grid, *strides)
        frames = torch.randn(sum(counts), grid[0] * grid[1], 40, generator=rng()).to(dtype)
        got, expected = pool(frames, plan, norm_eps), eager.pool(frames, plan, norm_eps)
        exact = reference.pool(frames, counts, grid, *strides, norm_eps=norm_eps)
        for i in (0, 2):
            reference.assert_accurate(got[i], expected[i], exact[i])
            assert torch.equal(got[i + 1], expected[i + 1])


@interpreted
@pytest.mark.parametrize("bias", [0.0, 1e-6, -0.01, 0.199, 0.201, -1.0, 9.0, -99.0])
def test_tanh_is_accurate_near_zero_and_far_from_it(bias):
    zero, one, row = torch.zeros(1, 8), torch.ones(1, 8), torch.zeros(1, dtype=torch.int32)
    out = sk.gated_residual_mix(zero, one, row, zero[0], torch.tensor([bias]), None, backend="triton")
    expected = torch.full_like(out, bias).double().tanh()
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=0)
