"""CPU kernels, and host time of an op call, under pytest-benchmark. Run by ``make bench-host``, not by the test suite.

    python -m pytest -o addopts= tests/bench_host/bench_ops.py --benchmark-compare=tests/bench_host/baseline.json

compares with the stored baseline; ``--benchmark-json=FILE`` writes a new one. Medians hold on one kind of machine only,
so every kernel is benchmarked beside PyTorch's composition of the same op, in one group: read the ratio.
"""

from __future__ import annotations

from collections import deque
from functools import partial

import pytest
import torch

import slowfast_kernels as sk
from bench import attention, inputs, mix, peers, pool
from bench.shapes import AttentionShape, Heads, MixShape, PoolShape

CPU = torch.device("cpu")
GPU = torch.device("cuda")
DTYPES = ("float32", "bfloat16")
ATTENTION = {
    "decode": AttentionShape.even(1, 1, 5184),
    "decode of 4": AttentionShape.even(4, 1, 1296),
    "question": AttentionShape.even(1, 16, 1296),
}
POOL = PoolShape((16,), (18, 18), temporal_stride=4)
MIX = {"decode": MixShape(1, 1), "question": MixShape(64, 64), "rows among others": MixShape(64, 1360)}
TINY = AttentionShape.even(1, 1, 16, Heads(4, 2, 64))  # the host time of a call is all there is


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def measure(benchmark):
    """Warm up, then time at most a second."""

    def run(group: str, call):
        benchmark.group = group
        call()
        benchmark.pedantic(call, rounds=_rounds(call), iterations=1, warmup_rounds=2)

    return run


def _rounds(call, budget_s: float = 0.5) -> int:
    from bench.timing import time_calls

    return max(5, min(2000, int(budget_s * 1e6 / time_calls([call], CPU, 0.02).median_us)))


def _needs(backend: str) -> None:
    capability = sk.backends()[backend]
    if not capability:
        pytest.skip(str(capability))


# ------------------------------------------------------------------------------------------ CPU kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("who", ["cpu", "torch"])
def test_attention(measure, who, shape, dtype):
    (x, *_) = inputs.make_inputs(shape, dtype, CPU, 0)
    if who == "cpu":
        _needs("cpu")
        call = attention.fused_call(x, "cpu")
    else:  # packed heads: the way that wins on a CPU
        (variant,) = peers.sdpa_variants([x], x.q, backend=None, ways=("packed hnd",))
        (call,), _ = variant.build()
    measure(f"attention {shape.name} {dtype}", call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("who", ["cpu", "torch"])
def test_pool(measure, who, dtype):
    frames = torch.randn(16, 18 * 18, POOL.channels, dtype=getattr(torch, dtype))
    if who == "cpu":
        _needs("cpu")
        call = pool.pool_call(POOL, frames, "cpu")
    else:
        indices = pool.window_indices(POOL.plan, CPU)
        call = partial(pool.torch_pool, frames, POOL.plan, indices, pool._cells_by_avg_pool)
    measure(f"pool {POOL.name} {dtype}", call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", MIX.values(), ids=MIX)
@pytest.mark.parametrize("who", ["cpu", "torch"])
def test_mix(measure, who, shape, dtype):
    state, context, rows, *gate = mix._make(shape, dtype, CPU)
    if who == "cpu":
        _needs("cpu")
        call = partial(sk.gated_residual_mix, state, context, rows, *gate, backend="cpu")
    else:
        way = mix.all_rows if shape.num_text == shape.rows else mix.added_rows
        call = partial(way, state, context, rows.long(), *gate)
    measure(f"mix {shape.name} {dtype}", call)


# ------------------------------------------------------------------------------------------- host time


def _where(backend: str) -> torch.device:
    return CPU if backend in ("cpu", "eager") else GPU


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu", "eager"])
@pytest.mark.parametrize("path", ["direct", "torch op"])
def test_host_time_of_the_fused_op(measure, backend, path):
    """``direct`` is inference; ``torch op`` is the way of autograd and torch.compile."""
    _needs(backend)
    (x, *_) = inputs.make_inputs(TINY, "float32", _where(backend), 0)
    if path == "torch op":
        x.q.requires_grad_()
    call = attention.fused_call(x, backend)

    def with_grad():
        with torch.enable_grad():
            call()

    try:
        measure("host time: slowfast_cross_attention", with_grad if path == "torch op" else call)
    except NotImplementedError as limit:
        pytest.skip(str(limit))


@pytest.mark.parametrize("way", ["kept", "Triton's own"])
def test_host_time_of_triton_s_launches(measure, way, monkeypatch):
    """A fused call's, without its checks and what a driver does: a pretended one takes them, on a CPU."""
    pytest.importorskip("triton")
    from triton.compiler import CompiledKernel
    from triton_launches import pretend_driver

    from slowfast_kernels.calls import FusedOptions, FusedTensors
    from slowfast_kernels.triton import prepare_cross_attention
    from slowfast_kernels.triton._launch import Launch

    pretend_driver(monkeypatch).launches = deque(maxlen=2)
    if way != "kept":
        monkeypatch.setattr(Launch, "__call__", Launch._through_triton)
    (x, *_) = inputs.make_inputs(TINY, "float32", CPU, 0)
    places = (x.q, x.slow_kv, x.cu_slow, x.text_rows, x.cu_text, None, None, None, None)
    tensors = FusedTensors(x.state, *places, x.gate_weight, x.gate_bias, x.warm_up, None)
    run = prepare_cross_attention(tensors, FusedOptions(None, 0, "tanh", True, "triton"))
    run(tensors)
    monkeypatch.setattr(CompiledKernel, "_init_handles", lambda self: None)  # else made anew: no module is loaded
    measure("host time: two Triton launches", partial(run, tensors))


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu", "eager"])
def test_host_time_of_the_mix(measure, backend):
    _needs(backend)
    state, context, rows, *gate = mix._make(MixShape(1, 1, 256), "float32", _where(backend))
    measure(
        "host time: gated_residual_mix", partial(sk.gated_residual_mix, state, context, rows, *gate, backend=backend)
    )


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu", "eager"])
def test_host_time_of_pooling(measure, backend):
    _needs(backend)
    shape = PoolShape((4,), (2, 2), channels=256, temporal_stride=2)
    frames = torch.randn(4, 4, 256, device=_where(backend))
    measure("host time: slowfast_pool", pool.pool_call(shape, frames, backend))
