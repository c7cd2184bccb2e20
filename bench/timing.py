"""How a call is timed: cold caches, medians, device time apart from host time.

Device time on a GPU is CUDA-graph replay over rotated inputs: one graph holds a call for every input set (several
rounds, at least a millisecond), so launch gaps on the host vanish and no call finds its inputs in L2. A call that
can't be captured (it syncs with the host) is timed with events around a round. On a CPU: perf_counter a call.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

COLD_FACTOR = 2.5  # rotated inputs add up to this many times the last-level cache
MAX_SETS = 64
MIN_ROUND_S = 1e-3  # device time of one graph replay; its start-up (a few us) is then under 1%


@dataclass(frozen=True)
class Timing:
    """Microseconds a call."""

    median_us: float
    p20_us: float
    p80_us: float
    samples: int
    method: str  # "graph", "events", "clock"


def summarize(seconds: Sequence[float], method: str) -> Timing:
    if len(seconds) == 1:
        us = seconds[0] * 1e6
        return Timing(us, us, us, 1, method)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(statistics.median(seconds) * 1e6, fifths[0] * 1e6, fifths[3] * 1e6, len(seconds), method)


def num_input_sets(bytes_per_set: float, cache_bytes: float) -> int:
    """Input sets to rotate so that a round streams COLD_FACTOR caches; 1 where one set already does."""
    return max(1, min(MAX_SETS, math.ceil(COLD_FACTOR * cache_bytes / max(bytes_per_set, 1))))


def time_calls(calls: Sequence[Call], device: torch.device, budget_s: float, capturable: bool = True) -> Timing:
    """Time one op whose rotated input sets are bound in ``calls``, for about ``budget_s`` seconds."""
    if device.type == "cuda":
        return _time_cuda(calls, budget_s, capturable)
    return time_serial(calls, device, budget_s)


def _clock(call: Call) -> float:
    """Host seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def time_serial(calls: Sequence[Call], device: torch.device, budget_s: float, most: int = 2000) -> Timing:
    """Time call after call, each alone; a call too slow to be repeated within the budget gives one sample."""
    gpu = device.type == "cuda"
    measure, method = (_elapsed, "events") if gpu else (_clock, "clock")
    first = measure(calls[0])
    if first > max(2 * budget_s, 0.3):
        return summarize([first], method)  # neither warming up nor noise matters here
    seconds: list[float] = []
    end = time.perf_counter() + budget_s
    while len(seconds) < min(3, most) or (time.perf_counter() < end and len(seconds) < most):
        seconds.append(measure(calls[(len(seconds) + 1) % len(calls)]))
    return summarize(seconds, method)


def _time_cuda(calls: Sequence[Call], budget_s: float, capturable: bool) -> Timing:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (calls[0], *calls):  # compiles, loads, allocates
            call()
        estimate = _elapsed(lambda: [call() for call in calls])
        graph = _capture(calls, max(1, math.ceil(MIN_ROUND_S / estimate)), stream) if capturable else None
        if graph is None:
            rounds = max(3, min(100, int(budget_s / estimate)))
            seconds = [_elapsed(lambda: [call() for call in calls]) / len(calls) for _ in range(rounds)]
        else:
            replay, count = graph
            estimate = min(_elapsed(replay) for _ in range(2))
            rounds = max(5, min(200, int(budget_s / estimate)))
            seconds = [_elapsed(replay) / count for _ in range(rounds)]
    torch.cuda.current_stream().wait_stream(stream)
    return summarize(seconds, "events" if graph is None else "graph")


def _capture(calls: Sequence[Call], rounds: int, stream) -> tuple[Call, int] | None:
    """(replay, calls a replay); None where the calls can't be captured: the row then says "events"."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
    except RuntimeError:
        torch.cuda.synchronize()  # raises if the failure was more than a refused capture
        return None
    return graph.replay, rounds * len(calls)


def _elapsed(work: Call) -> float:
    """Device seconds of ``work`` on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def time_host(call: Call, device: torch.device, calls_per_batch: int = 50, budget_s: float = 0.2) -> Timing:
    """Host time of a call: what Python and the launch cost while the device keeps up.

    Batches are short enough to fit the launch queue, so the host never waits for the device inside one.
    """
    for _ in range(3):
        call()
    seconds: list[float] = []
    end = time.perf_counter() + budget_s
    collecting = gc.isenabled()
    gc.disable()
    try:
        while not seconds or (time.perf_counter() < end and len(seconds) < 50):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls_per_batch):
                call()
            seconds.append((time.perf_counter() - start) / calls_per_batch)
    finally:
        if collecting:
            gc.enable()
        synchronize(device)
    return summarize(seconds, "clock")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
