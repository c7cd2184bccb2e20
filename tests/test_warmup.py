"""warmup leaves nothing for the first call of a CUDA graph capture to do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from targets import HAS_GPU

import slowfast_kernels as sk


@pytest.mark.parametrize("op", ["slowfast_cross_attention", "gated_residual_mix"])
def test_it_runs_the_op_for_every_class_of_shapes(op, monkeypatch):
    """Rows of all sequences, and, where slow tokens are attended, one split and many."""
    seen = []
    module = sys.modules["slowfast_kernels.ops.warmup"]
    real = getattr(module, op)

    def record(state, second, third, *rest, **options):
        slow = third.shape if op == "slowfast_cross_attention" else None
        seen.append((state.shape[0], slow and (slow[0], slow[1]), state.dtype, options["backend"]))
        return real(state, second, third, *rest, **options)

    monkeypatch.setattr(module, op, record)
    arguments = {"dtype": torch.float32, "device": "cpu", "text_rows": (1, 3), "batch_sizes": (1, 2)}
    sk.warmup(4, 2, 16, **arguments, backend="eager")
    attends = op == "slowfast_cross_attention"
    expected = {
        (b * n, (b * s, 2) if attends else None, torch.float32, "eager")
        for b in (1, 2)
        for n in (1, 3)
        for s in (32, 4096)
    }
    assert set(seen) == expected


def test_bad_shapes_raise_as_the_ops_do():
    with pytest.raises(ValueError, match="multiple"):
        sk.warmup(3, 2, 16, dtype=torch.float32, device="cpu")


CAPTURE = """
import torch, slowfast_kernels as sk
sk.warmup(28, 4, 128, text_rows=(1, 64), backend={backend!r})
make = dict(dtype=torch.bfloat16, device="cuda")
for rows in (1, 64):
    state, kv = torch.randn(rows, 3584, **make), torch.randn(5000, 4, 2, 128, **make)
    gating = torch.randn(1, 3584, **make) * 0.02, torch.randn(1, **make), torch.randn(1, **make)
    places = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 5000], list(range(rows)), [0, rows])]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sk.slowfast_cross_attention(state, state.view(rows, 28, 128), kv, *places, *gating, backend={backend!r})
    graph.replay()
    want = sk.slowfast_cross_attention(state, state.view(rows, 28, 128), kv, *places, *gating, backend={backend!r})
    assert torch.equal(out, want), (out - want).abs().max()
"""


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="torch finds no GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_first_call_after_it_can_be_captured_in_a_graph(backend):
    if backend == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the CUDA attention is for Hopper")
    code = CAPTURE.format(backend=backend)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
