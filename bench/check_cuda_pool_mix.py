"""Checks and times the CUDA pool and gated-mix kernels on this machine's GPU: ``python -m bench.check_cuda_pool_mix``.

First parity: every case against eager in float64, in bfloat16, float16 and float32, with NaN in every input element
that must not be read, NaN in the outputs and canaries around them. Then times against the roofline: a CUDA graph of
launches over rotated inputs, which the L2 cannot hold, median of replays, beside the copy bandwidth of the same run.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager
from functools import partial
from statistics import median
from unittest import mock

import torch
from torch import Tensor

import slowfast_kernels as sk
from slowfast_kernels import cuda, eager
from slowfast_kernels.dtypes import KERNEL_DTYPES
from slowfast_kernels.gate import WEIGHTED_GATES, Gate
from slowfast_kernels.pool_plan import make_pool_plan

ROTATION_BYTES = 400e6  # several times the L2 of any GPU
CANARY = 77.0

# frame_counts, grid, (pool, sampling, temporal, spatial, min_fast_frames), C, norm_eps
POOL_CASES = {
    "released model": ((8,), (18, 18), (2, 1, 4, 1, 1), 3584, 1e-6),
    "no norm": ((8,), (18, 18), (2, 1, 4, 1, 1), 3584, None),
    "no pooling": ((5,), (4, 4), (1, 1, 1, 1, 1), 256, 1e-6),
    "odd grid drops a row and a column": ((4,), (5, 5), (2, 1, 2, 1, 1), 64, 1e-6),
    "stride 3": ((4,), (10, 10), (3, 1, 2, 1, 1), 96, 1e-5),
    "fast cells with partial ones": ((6,), (18, 18), (2, 1, 3, 2, 1), 128, 1e-6),
    "fast cells of 3, no norm": ((3,), (8, 8), (1, 1, 2, 3, 1), 72, None),
    "idle frames": ((11,), (6, 6), (2, 3, 1, 1, 1), 64, 1e-6),
    "idle tail": ((7,), (6, 6), (2, 1, 4, 1, 1), 64, 1e-6),
    "overlapping windows": ((7,), (6, 6), (2, 1, 4, 1, 5), 64, 1e-6),
    "164 frames": ((164,), (2, 2), (1, 8, 1, 1, 1), 32, 1e-6),
    "videos and images": ((1, 5, 1, 2, 9), (6, 6), (2, 1, 2, 1, 2), 80, 1e-6),
    "images and cells": ((1, 5, 1), (9, 9), (3, 1, 2, 2, 1), 80, 1e-6),
    "oblong image": ((1,), (3, 7), (2, 1, 1, 1, 1), 64, 1e-6),
    "one token": ((1,), (1, 1), (1, 1, 1, 1, 1), 8, 1e-6),
    "7 channels": ((5,), (6, 6), (2, 1, 2, 1, 1), 7, 1e-6),
    "1000 channels": ((5,), (6, 6), (2, 1, 2, 1, 1), 1000, 1e-6),
    "4104 channels": ((4,), (4, 4), (2, 1, 2, 1, 1), 4104, 1e-6),
    "8192 channels": ((4,), (4, 4), (2, 1, 2, 1, 1), 8192, 1e-6),
    "9000 channels": ((4,), (4, 4), (2, 1, 2, 1, 1), 9000, 1e-6),
}

# rows, Nt, C, gate dtype is float32, gate, warm_up, warm_up_tanh
MIX_CASES = {
    "decode": (1, 1, 3584, False, "tanh", True, True),
    "every row, permuted": (300, 300, 3584, False, "tanh", True, True),
    "float32 gate": (33, 33, 3584, True, "tanh", True, True),
    "some rows": (1500, 64, 3584, True, "tanh", True, True),
    "half the rows": (1001, 500, 896, False, "tanh", True, True),
    "no text row": (300, 0, 256, False, "tanh", True, True),
    **{f"{gate} gate": (40, 17, 256, False, gate, True, True) for gate in WEIGHTED_GATES},
    "no warm-up": (40, 17, 256, False, "tanh", False, True),
    "plain warm-up": (40, 17, 256, True, "tanh", True, False),
    "7 channels": (40, 17, 7, True, "tanh", True, True),
    "7 channels, every row": (40, 40, 7, False, "tanh", True, True),
    "4104 channels": (19, 9, 4104, False, "tanh", True, True),
    "8192 channels": (19, 9, 8192, True, "tanh", True, True),
    "9000 channels": (19, 9, 9000, True, "tanh", True, True),
    "more rows than a block's table": (900_000, 5000, 8, False, "tanh", True, True),
}

# rows, Nt, microseconds wanted
MIX_TIMES = ((1, 1, 4), (64, 64, 4), (1024, 1024, 9), (8192, 8192, 65), (1424, 64, 12), (16384, 8192, 108))


@contextmanager
def guarded_outputs():
    """Outputs start as NaN, between canaries: an element left out or written outside shows."""
    buffers = []

    def new_empty(like: Tensor, *shape, **_):
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 128,), CANARY, dtype=like.dtype, device=like.device)
        buffer[64 : 64 + count] = float("nan")
        buffers.append(buffer)
        return buffer[64 : 64 + count].view(shape)

    with mock.patch.object(torch.Tensor, "new_empty", new_empty):
        yield
    for buffer in buffers:
        edges = torch.cat([buffer[:64], buffer[-64:]])
        assert (edges == CANARY).all(), "a kernel wrote outside its output"


def surrounded(x: Tensor, layout: str) -> Tensor:
    """``x`` with another layout, in a buffer of NaN: "dense", "padded" rows, or "unaligned" storage."""
    if layout == "dense":
        return x
    pad = {"padded": 8, "unaligned": 1}[layout]
    buffer = torch.full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1] + 8), float("nan"), dtype=x.dtype, device=x.device)
    view = buffer[..., : x.shape[-2], pad : pad + x.shape[-1]]
    return view.copy_(x)


def check_close(got: Tensor, eager_result: Tensor, exact: Tensor) -> float:
    """Error over its bound: 2 x eager's error in the same dtype plus a tiny atol; float32 within 1e-5."""
    assert torch.isfinite(got).all(), "NaN or Inf in the output"
    bound = 2 * (eager_result.double() - exact).abs().max().item() + 1e-6
    if got.dtype == torch.float32:
        bound = 1e-5 * max(1.0, exact.abs().max().item())
    return (got.double() - exact).abs().max().item() / bound


def check_pool(case: tuple, dtype: torch.dtype, layout: str, device: str) -> float:
    counts, grid, options, channels, eps = case
    plan = make_pool_plan(counts, grid, *options)
    x = torch.randn(sum(counts), *grid, channels, device=device).to(dtype)
    for video in plan.videos:  # tokens beyond the last whole pooling cell are dropped: they must not be read
        used = [n * video.pool_stride for n in video.slow_grid]
        mine = x[video.first_frame : video.first_frame + video.num_frames]
        mine[:, used[0] :] = float("nan")
        mine[:, :, used[1] :] = float("nan")
    frames = surrounded(x.flatten(1, 2), layout)
    with guarded_outputs():
        slow, cu_slow, fast, cu_fast = cuda.pool(frames, plan, eps)
    exact, same = eager.pool(frames.double(), plan, eps), eager.pool(frames, plan, eps)
    assert cu_slow.tolist() == exact[1].tolist()
    assert cu_fast.tolist() == exact[3].tolist()
    return max(check_close(got, same[i], exact[i]) for i, got in ((0, slow), (2, fast)))


def mix_inputs(rows, num_text, channels, float_gate, warm_up, dtype, device):
    state, context = (torch.randn(n, channels, device=device).to(dtype) for n in (rows, num_text))
    text_rows = torch.randperm(rows, device=device)[:num_text].int()
    gate_dtype = torch.float32 if float_gate else dtype
    weight = (torch.randn(1, channels, device=device) * channels**-0.5).to(gate_dtype)
    bias, warm = (torch.tensor([v], device=device).to(gate_dtype) for v in (0.3, 0.7))
    return state, context, text_rows, weight, bias, warm if warm_up else None


def check_mix(case: tuple, dtype: torch.dtype, layout: str, device: str) -> float:
    rows, num_text, channels, float_gate, gate, warm_up, warm_up_tanh = case
    inputs = mix_inputs(rows, num_text, channels, float_gate, warm_up, dtype, device)
    state, context, text_rows, *parameters = inputs
    copied = torch.ones(rows, dtype=torch.bool, device=device)
    copied[text_rows.long()] = False
    state[copied, 0] = float("nan")  # a copy is a copy, whatever the bits
    state, context = surrounded(state, layout), surrounded(context, layout)
    options = {"gate": gate, "warm_up_tanh": warm_up_tanh}
    with guarded_outputs():
        out = sk.gated_residual_mix(state, context, text_rows, *parameters, **options, backend="cuda")
    assert torch.equal(out[copied].nan_to_num(CANARY), state[copied].nan_to_num(CANARY)), "a copied row differs"
    if not num_text:
        return 0.0
    wide = Gate.of(*(x if x is None else x.double() for x in parameters), **options)
    exact = eager.gated_residual_mix(state.double(), context.double(), text_rows, wide)
    same = eager.gated_residual_mix(state, context, text_rows, Gate.of(*parameters, **options))
    return check_close(*(x[text_rows.long()] for x in (out, same, exact)))


def check_parity(device: str) -> bool:
    good = True
    for op, cases, check in (("pool", POOL_CASES, check_pool), ("mix", MIX_CASES, check_mix)):
        for name, case in cases.items():
            worst = 0.0
            for dtype in KERNEL_DTYPES:
                for layout in ("dense", "padded", "unaligned"):
                    if "table" in name and (layout, dtype) != ("dense", torch.bfloat16):
                        continue
                    try:
                        worst = max(worst, check(case, dtype, layout, device))
                    except Exception as error:  # one failure must not hide the other cases
                        worst = float("inf")
                        print(f"     {op}: {name}, {dtype}, {layout}: {type(error).__name__}: {error}")
            good &= worst <= 1
            print(f"{'ok  ' if worst <= 1 else 'FAIL'} {op}: {name}: worst error / bound = {worst:.2f}", flush=True)
    return good


def check_large() -> None:
    """More than 2^31 elements: the last frame and the last row are where a 32-bit offset would miss."""
    frames = torch.zeros(2400, 256, 3584, dtype=torch.bfloat16, device="cuda")
    last = torch.randn(4, 256, 3584, device="cuda").bfloat16()
    frames[-4:] = last
    options = (2, 1, 4, 1, 1)
    slow, _, fast, _ = cuda.pool(frames, make_pool_plan((2400,), (16, 16), *options), 1e-6)
    expected = cuda.pool(last, make_pool_plan((4,), (16, 16), *options), 1e-6)
    assert torch.equal(slow[-256:], expected[0])
    assert torch.equal(fast[-64:], expected[2])
    state = frames.view(-1, 3584)
    rows = state.shape[0]
    inputs = mix_inputs(1, 1, 3584, False, True, torch.bfloat16, "cuda")
    text_rows = torch.tensor([rows - 1], dtype=torch.int32, device="cuda")
    out = sk.gated_residual_mix(state, inputs[1], text_rows, *inputs[3:], backend="cuda")
    small = sk.gated_residual_mix(state[-1:], *inputs[1:], backend="cuda")
    assert torch.equal(out[-1:], small)
    assert torch.equal(out[-1024:-1], state[-1024:-1])
    print("ok   more than 2^31 elements")


def check_streams() -> None:
    """Graph replay with new data, a side stream, bitwise repeatability, and the second GPU if there is one."""
    plan = make_pool_plan((8,), (18, 18), 2, 1, 4, 1, 1)
    frames = torch.randn(8, 324, 3584, device="cuda").bfloat16()
    first = cuda.pool(frames, plan, 1e-6)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        again = cuda.pool(frames, plan, 1e-6)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda.pool(frames, plan, 1e-6)
    frames.copy_(torch.randn_like(frames))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, cuda.pool(frames, plan, 1e-6), strict=True))
    if torch.cuda.device_count() > 1:
        there = cuda.pool(frames.to("cuda:1"), plan, 1e-6)
        assert all(torch.equal(a, b.to("cuda:0")) for a, b in zip(captured, there, strict=True))
    print("ok   graph replay, side stream, same bits")


def time_graph(call, sets: list[tuple], replays: int = 15) -> float:
    """Microseconds a call: a graph that calls ``call(*inputs)`` once for each of ``sets``, median of replays."""
    for inputs in sets[:2]:
        call(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(*inputs) for inputs in sets]  # alive, so that the outputs rotate too
    times = []
    for _ in range(replays + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / len(sets))
    del kept
    return median(times[2:])


def print_time(name: str, microseconds: float, moved: float, target: float, copy: float) -> None:
    rate = moved / microseconds / 1e3
    verdict = "ok  " if microseconds <= target else "MISS"
    speed = f"{rate:.0f} GB/s, {rate / copy:.0%} of copy"
    print(f"{verdict} {name}: {microseconds:.1f} us (target {target}), {speed}", flush=True)


def time_pool(copy: float) -> None:
    for frames_count, side, target in ((64, 18, 75), (128, 18, 145), (1536, 16, 1340)):
        plan = make_pool_plan((frames_count,), (side, side), 2, 1, 4, 1, 1)
        sets = []
        for _ in range(2):
            frames = torch.randn(frames_count, side * side, 3584, device="cuda", dtype=torch.bfloat16)
            outputs = [frames.new_empty(n, 3584) for n in (plan.num_slow, plan.num_fast)]
            sets.append((frames, plan, 1e-6, *outputs))
        moved = sum(2 * x.numel() for x in (sets[0][0], *sets[0][3:]))
        name = f"pool {frames_count} frames of {side}x{side}x3584"
        print_time(f"{name}, kernel", time_graph(cuda.launch_pool, sets), moved, target, copy)
        print_time(f"{name}, op", time_graph(cuda.pool, [s[:3] for s in sets]), moved, target, copy)


def time_mix(copy: float) -> None:
    for rows, num_text, target in MIX_TIMES:
        moved = 2 * 3584 * (2 * rows + num_text)
        count = min(256, max(2, int(ROTATION_BYTES / moved)))
        sets = [mix_inputs(rows, num_text, 3584, False, True, torch.bfloat16, "cuda") for _ in range(count)]
        microseconds = time_graph(partial(sk.gated_residual_mix, backend="cuda"), sets)
        print_time(f"mix {num_text} of {rows} rows of 3584", microseconds, moved, target, copy)


def copy_bandwidth() -> float:
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    targets = [(torch.empty_like(source), source) for _ in range(2)]
    return 2 * source.numel() / time_graph(torch.Tensor.copy_, targets) / 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("parity", "time"))
    only = parser.parse_args().only
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    good = True
    if only != "time":
        good = check_parity("cuda")
        check_streams()
        check_large()
        torch.cuda.empty_cache()
    if only != "parity":
        copy = copy_bandwidth()
        print(f"     copy: {copy:.0f} GB/s")
        time_pool(copy)
        time_mix(copy)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
