"""The kernels between a layer's products: right under the interpreter, and what the compiler makes of them.

The interpreted ones run in the child process of test_triton.py; those of a GPU are in test_gpu_prefill.py.
"""

from __future__ import annotations

import re

import pytest
import torch
from elementwise_cases import check_add_rms_norm, check_rotate, check_scale_columns, check_silu_mul
from test_triton import local_bytes
from triton_launches import HALF, compiled, interpreted, meta, recorder, round_bfloat16, skip_unknown

from slowfast_kernels.triton import elementwise

HIDDEN, INNER, HEADS, KV_HEADS, DIM, ROWS = 3584, 18944, 28, 4, 128, 1360  # of a 7B

# ---------------------------------------------------------------------------------------------- compiler


@pytest.fixture
def record(monkeypatch):
    return recorder(monkeypatch)


def launch_all(rows: int = ROWS, room: int = 2000, dtype: torch.dtype = HALF) -> None:
    """Those of a 7B's layer."""
    q, k, v = (meta(1, rows, n, DIM, dtype=dtype) for n in (HEADS, KV_HEADS, KV_HEADS))
    rope = (meta(rows, 1, DIM, dtype=dtype), meta(rows, 1, DIM, dtype=dtype))
    elementwise.rotate(q, k, v, rope, meta(1, room, KV_HEADS, 2, DIM, dtype=dtype))
    elementwise.add_rms_norm(*(meta(1, rows, HIDDEN, dtype=dtype) for _ in range(2)), meta(HIDDEN, dtype=dtype), 1e-6)
    elementwise.silu_mul(meta(1, rows, INNER, dtype=dtype), meta(1, rows, INNER, dtype=dtype))
    elementwise.scale_columns(meta(2 * KV_HEADS * DIM, HIDDEN, dtype=dtype), meta(HIDDEN, dtype=dtype))


@compiled
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_layer_s_kernels_move_16_bytes_a_thread_and_spill_nothing(record, dtype, arch, tmp_path):
    skip_unknown(arch)
    launches = record(arch)
    launch_all(dtype=dtype)
    assert [launch.name for launch in launches] == ["_rotate", "_add_rms_norm", "_silu_mul", "_scale_columns"]
    for launch in launches:
        kernel = launch.compile(arch)
        moved = re.findall(r"(?:ld|st)\.global(\S*)", kernel.asm["ptx"])
        assert moved
        assert all(".v4.b32" in form for form in moved), launch.name
        assert local_bytes(kernel, tmp_path) == 0, launch.name


@compiled
def test_a_new_length_or_room_is_no_new_kernel(record):
    launches = record(90)
    for rows, room in ((1360, 1376), (1361, 1361), (1, 7), (1, 1)):
        launch_all(rows, room)
    keys = {
        (x.name, *x.signature.items(), *x.constants.items(), *map(str, x.attributes.items()), *x.options.items())
        for x in launches
    }
    assert len(keys) == 4


def test_nothing_is_launched_for_no_rows(record):
    launches = record(90)
    none = meta(1, 0, 2, 16)
    elementwise.rotate(none, none, none, (meta(0, 1, 16), meta(0, 1, 16)))
    elementwise.add_rms_norm(meta(0, 8), meta(0, 8), meta(8), 1e-6)
    elementwise.silu_mul(meta(0, 8), meta(0, 8))
    elementwise.scale_columns(meta(0, 8), meta(8))
    assert not launches


class Subclass(torch.Tensor):
    pass


def test_tensors_that_no_kernel_takes_have_no_answer(record):
    """A caller computes by itself what is None."""
    launches = record(90)
    x, factor = meta(4, 8), meta(8)
    for other in (meta(4, 8, dtype=torch.float16), meta(8, 4).t(), torch.empty(4, 8, dtype=HALF), meta(2, 8)):
        assert elementwise.silu_mul(x, other) is None
        assert elementwise.add_rms_norm(x, other, factor, 1e-6) is None
        assert elementwise.scale_columns(x, factor, other) is None
    assert elementwise.scale_columns(x, meta(4)) is None
    assert elementwise.add_rms_norm(x, x, meta(4), 1e-6) is None
    integers = meta(4, 8, dtype=torch.int16)
    assert elementwise.silu_mul(integers, integers) is None
    for layout in (torch._neg_view(x), x.as_subclass(Subclass), torch._efficientzerotensor((4, 8), dtype=HALF)):
        assert elementwise.silu_mul(layout, layout) is None
    q, k = meta(2, 3, 4, 8), meta(2, 3, 2, 8)
    rope, cache = (meta(3, 1, 8),) * 2, meta(2, 5, 2, 2, 8)
    for other in (meta(2, 3, 1, 8), meta(2, 4, 2, 8), meta(1, 3, 2, 8), meta(2, 3, 2, 4)):
        assert elementwise.rotate(q, k, other, rope, cache) is None
        assert elementwise.rotate(q, other, k, rope, cache) is None
    for other in (meta(2, 2, 2, 2, 8), meta(2, 5, 1, 2, 8), meta(1, 5, 2, 2, 8), meta(2, 5, 2, 2, 4)):
        assert elementwise.rotate(q, k, k, rope, other) is None
    odd = meta(2, 3, 2, 7)
    assert elementwise.rotate(odd, odd, odd, (meta(3, 1, 7),) * 2) is None
    assert not launches


@compiled
def test_tensors_that_another_kernel_does_not_take_may_be_this_one_s(record):
    launches = record(90)
    x, factor = meta(4, 8), meta(8)
    assert elementwise.silu_mul(x, factor) is None
    assert elementwise.scale_columns(x, factor) is not None
    assert len(launches) == 1


# ------------------------------------------------------------------------------------------- interpreter

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def rounding(monkeypatch):
    round_bfloat16(monkeypatch)


@interpreted
@DTYPES
@pytest.mark.parametrize("heads", [(3, 1, 12), (2, 2, 64), (20, 20, 256), (1, 1, 2)], ids=str)
@pytest.mark.parametrize("room", [None, 5, 7])
def test_q_and_k_are_turned_and_fill_a_cache(room, heads, dtype, rng, rounding):
    check_rotate(2, 5, heads, room, dtype, rng())


@interpreted
@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 1000), (5, 64)], ids=str)
def test_a_sum_and_its_norm(shape, dtype, rng, rounding):
    for eps in (0.5, 1e-6):
        check_add_rms_norm(shape, dtype, rng(), eps)


@interpreted
@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 1000), (4096,)], ids=str)
def test_silu_times_up(shape, dtype, rng, rounding):
    check_silu_mul(shape, dtype, rng())


@interpreted
@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (5, 1100), (130, 12), (3, 2048)], ids=str)
def test_columns_are_scaled(shape, dtype, rng, rounding):
    check_scale_columns(*shape, dtype, rng())
