"""How a call is timed: cold caches, medians, device time apart from host time.

Device time on a GPU is CUDA-graph replay over rotated inputs: one graph holds a call for every input set (several
rounds, at least a millisecond), so launch gaps on the host vanish and no call finds its inputs in L2. A call that
can't be captured (it syncs with the host) is timed with events around a round. On a CPU: perf_counter a call.

A GPU at its power limit lowers its clock after some 30 ms of tensor work and recovers within 50 ms of rest, so whoever
is measured longest would look slowest. Samples therefore come in short bursts of replays with a rest before each, as
many for every contender; what is left of the speed without rest is a figure of its own, ``sustained_us``.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch

Call = Callable[[], object]

COLD_FACTOR = 2.5  # rotated inputs add up to this many times the last-level cache
MAX_SETS = 64
MIN_ROUND_S = 1e-3  # device time of one graph replay; its start-up (a few us) is then under 1%
REST_S = 0.08  # the device idles before a burst: longer than its clock takes to recover
BURST_S = 0.02  # device time of a burst: shorter than its clock takes to fall
MOST_BURSTS = 5
SUSTAINED_S = 0.3  # without rest; the clock has settled by the second half, which counts


@dataclass(frozen=True)
class Timing:
    """Microseconds a call."""

    median_us: float
    p20_us: float
    p80_us: float
    samples: int
    method: str  # "graph", "events", "clock"
    sustained_us: float | None = None  # after a while without rest; graphs only, where asked for


class Plan(NamedTuple):
    """How often a graph (or a round of calls) is replayed."""

    bursts: int
    replays: int  # a burst
    skipped: int  # of these, the first that give no sample
    sustained: int  # replays without rest; the second half gives the samples


def plan_bursts(replay_s: float, budget_s: float) -> Plan:
    """A burst for each BURST_S of the budget, each of as many replays as fit BURST_S; a longer replay goes alone.

    The device waits for the host's launch in the first replay after a rest and its clock may still climb, so that one
    is left out wherever others follow; the rest are queued behind each other.
    """
    bursts = max(1, min(MOST_BURSTS, int(budget_s / BURST_S)))
    replays = max(1, int(BURST_S / replay_s))
    return Plan(bursts, replays, min(1, replays - 1), max(2, math.ceil(SUSTAINED_S / replay_s)))


def summarize(seconds: Sequence[float], method: str) -> Timing:
    if len(seconds) == 1:
        us = seconds[0] * 1e6
        return Timing(us, us, us, 1, method)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(statistics.median(seconds) * 1e6, fifths[0] * 1e6, fifths[3] * 1e6, len(seconds), method)


def num_input_sets(bytes_per_set: float, cache_bytes: float) -> int:
    """Input sets to rotate so that a round streams COLD_FACTOR caches; 1 where one set already does."""
    return max(1, min(MAX_SETS, math.ceil(COLD_FACTOR * cache_bytes / max(bytes_per_set, 1))))


def time_calls(
    calls: Sequence[Call], device: torch.device, budget_s: float, capturable: bool = True, sustained: bool = False
) -> Timing:
    """Time one op whose rotated input sets are bound in ``calls``, for about ``budget_s`` seconds, rests not counted.

    ``sustained`` asks for ``sustained_us`` too; it stays None on a CPU and for calls that no graph holds.
    """
    if device.type == "cuda":
        return _time_cuda(calls, budget_s, capturable, sustained)
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


def _time_cuda(calls: Sequence[Call], budget_s: float, capturable: bool, sustained: bool) -> Timing:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (calls[0], *calls):  # compiles, loads, allocates
            call()
        graph = _capture(calls, 1, stream) if capturable else None
        if graph is not None:
            # from a replay and not from the calls: those of a small shape take the host far longer than the device
            rounds = math.ceil(MIN_ROUND_S / min(_burst(graph[0], 2)))
            graph = _capture(calls, rounds, stream) if rounds > 1 else graph
        replay, count = graph or (lambda: [call() for call in calls], len(calls))
        method = "events" if graph is None else "graph"
        timing = time_bursts(partial(_burst, replay), _rest, count, budget_s, method, sustained and graph is not None)
    torch.cuda.current_stream().wait_stream(stream)
    return timing


def time_bursts(
    burst: Callable[[int], list[float]],
    rest: Callable[[], None],
    count: int,
    budget_s: float,
    method: str,
    sustained: bool,
) -> Timing:
    """The protocol of this module. ``burst(n)`` gives the seconds of each of n replays of ``count`` calls."""
    plan = plan_bursts(min(burst(2)), budget_s)
    seconds: list[float] = []
    for _ in range(plan.bursts):
        rest()
        seconds += burst(plan.replays)[plan.skipped :]
    timing = summarize([s / count for s in seconds], method)
    if not sustained:
        return timing
    late = burst(plan.sustained)[plan.sustained // 2 :]
    return replace(timing, sustained_us=statistics.median(late) / count * 1e6)


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


def _burst(work: Call, times: int) -> list[float]:
    """Device seconds of each ``work`` on the current stream, queued back to back; returns when the device is done."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    events[-1].synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def _elapsed(work: Call) -> float:
    """Device seconds of ``work`` on the current stream."""
    return _burst(work, 1)[0]


def _rest() -> None:
    torch.cuda.synchronize()
    time.sleep(REST_S)


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
