"""How a call is timed: cold caches, medians, device time apart from host time.

Device time on a GPU is CUDA-graph replay over rotated inputs: one graph holds a call for every input set (several
rounds, at least a millisecond), so launch gaps on the host vanish and no call finds its inputs in L2. A call that
can't be captured is timed with events around a round, which a sleeping kernel holds back until the host has launched it
(where the call waits for the device, host time remains). On a CPU: perf_counter a call.

A GPU at its power limit lowers its clock after some 30 ms of tensor work and recovers within 50 ms of rest, so whoever
is measured longest would look slowest. Samples therefore come in short bursts of replays with a rest before each, as
many for every contender; what is left of the speed without rest is a figure of its own, ``sustained_us``.

Rests do not undo minutes of drift (temperature, a neighbour on the host), so contenders that will be compared are made
ready first, each a ``Lane``, and then take turns: A B A B. Where only a difference counts, it is taken turn by turn.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, pairwise
from typing import NamedTuple

import torch

Call = Callable[[], object]

COLD_FACTOR = 2.5  # rotated inputs add up to this many times the last-level cache
MAX_SETS = 64
MIN_ROUND_S = 1e-3  # device time of one graph replay; its start-up (a few us) is then under 1%
REST_S = 0.08  # the device idles before a burst: longer than its clock takes to recover
BURST_S = 0.02  # device time of a burst: shorter than its clock takes to fall
MOST_BURSTS = 5
MOST_CALLS = 2000  # of a lane on a CPU
SUSTAINED_S = 0.3  # without rest; the clock has settled by the second half, which counts
MOST_SLEEP_S = 0.03  # of the kernel that holds back a round which is no graph
SLEEP_HZ = 2e9  # no GPU's clock, in which that kernel counts, is faster by much


@dataclass(frozen=True)
class Timing:
    """Microseconds a call."""

    median_us: float
    p20_us: float
    p80_us: float
    samples: int
    method: str  # "graph", "events", "kernels": device time; "clock": a CPU's; "wall": from call to answer
    sustained_us: float | None = None  # after a while without rest; graphs only, where asked for


@dataclass(frozen=True)
class Difference:
    """How much longer a call takes than the other one of its turn; percent are of the other's median."""

    median_us: float
    p20_us: float
    p80_us: float
    percent: float
    p20_percent: float
    p80_percent: float
    pairs: int


class Lane(NamedTuple):
    """A contender made ready (kernels loaded, graph captured) that takes its turn when told."""

    turn: Callable[[], list[float]]  # seconds of each of the calls that one turn makes
    turns: int  # how many it has
    method: str
    sustain: Callable[[], float] | None = None  # seconds of a call after a while without rest
    calls: Sequence[Call] = ()  # kept: a graph of them reads what they hold, and holds none of it itself


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


def difference(seconds: Sequence[float], base: Sequence[float]) -> Difference:
    """Of two lanes' samples, the i-th of both being of the same turn; where one has more, its last are of no pair."""
    pairs = list(zip(seconds, base, strict=False))
    apart = summarize([a - b for a, b in pairs], "")
    percent = 100 / (statistics.median(b for _, b in pairs) * 1e6)
    us = (apart.median_us, apart.p20_us, apart.p80_us)
    return Difference(*us, *(percent * x for x in us), len(pairs))


def num_input_sets(bytes_per_set: float, cache_bytes: float) -> int:
    """Input sets to rotate so that a round streams COLD_FACTOR caches; 1 where one set already does."""
    return max(1, min(MAX_SETS, math.ceil(COLD_FACTOR * cache_bytes / max(bytes_per_set, 1))))


# ------------------------------------------------------------------------------------------------- lanes


def make_lane(calls: Sequence[Call], device: torch.device, budget_s: float, capturable: bool = True) -> Lane:
    """One op whose rotated input sets are bound in ``calls``; its turns take about ``budget_s``, rests not counted."""
    lane = _cuda_lane(calls, budget_s, capturable) if device.type == "cuda" else clock_lane(calls, budget_s)
    return lane._replace(calls=calls)


def time_calls(
    calls: Sequence[Call], device: torch.device, budget_s: float, capturable: bool = True, sustained: bool = False
) -> Timing:
    """Time one op alone; ``sustained`` asks for that figure too: None on a CPU and for calls that no graph holds."""
    return time_lane(make_lane(calls, device, budget_s, capturable), sustained)


def time_lane(lane: Lane, sustained: bool = False) -> Timing:
    """All turns of one lane, one after another."""
    seconds = [s for _ in range(lane.turns) for s in lane.turn()]
    return with_sustained(summarize(seconds, lane.method), lane) if sustained else summarize(seconds, lane.method)


def with_sustained(timing: Timing, lane: Lane) -> Timing:
    return replace(timing, sustained_us=lane.sustain() * 1e6) if lane.sustain else timing


def clock_lane(calls: Sequence[Call], budget_s: float) -> Lane:
    """A turn on a CPU: call after call for a part of the budget. A call too slow to be repeated gives one sample."""
    first = _clock(calls[0])
    if first > max(2 * budget_s, 0.3):
        return Lane(lambda: [first], 1, "clock")  # neither warming up nor noise matters here
    rotated = cycle([*calls[1:], calls[0]])

    def turn() -> list[float]:
        seconds: list[float] = []
        end = time.perf_counter() + budget_s / MOST_BURSTS
        while not seconds or (time.perf_counter() < end and len(seconds) < MOST_CALLS / MOST_BURSTS):
            seconds.append(_clock(next(rotated)))
        return seconds

    return Lane(turn, MOST_BURSTS, "clock")


def wall_lane(calls: Sequence[Call], device: torch.device, budget_s: float, most: int) -> Lane:
    """A turn is one call as its caller sees it: from an idle device until the answer is there, launches included.

    The lane has 1 to ``most`` turns, as many as the budget pays for. A call that takes all of it is made once, here.
    """
    (call,) = calls

    def wall() -> float:
        synchronize(device)
        start = time.perf_counter()
        answer = call()
        synchronize(device)
        seconds = time.perf_counter() - start
        del answer  # freed when the clock stands
        return seconds

    first = wall()
    if first > budget_s:
        return Lane(lambda: [first], 1, "wall")
    turns = int(budget_s / wall())  # of the second: the first may have loaded kernels
    return Lane(lambda: [wall()], max(1, min(most, turns)), "wall")


def kernel_lane(calls: Sequence[Call], turns: int) -> Lane:
    """A turn is the time in which kernels and copies of one call keep the GPU busy, as the profiler saw them.

    Events around a call that waits for the host would count the GPU's idle gaps too.
    """
    (call,) = calls

    def busy() -> float:
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        on_gpu = [e.time_range for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        if not on_gpu:
            raise NotImplementedError("the profiler saw no kernel (is CUPTI missing or not allowed?)")
        return covered((span.start, span.end) for span in on_gpu) * 1e-6

    busy()  # the first starts the profiler, for seconds
    return Lane(lambda: [busy()], turns, "kernels")


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end)."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _clock(call: Call) -> float:
    """Host seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_lane(calls: Sequence[Call], budget_s: float, capturable: bool) -> Lane:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (calls[0], *calls):  # compiles, loads, allocates
            call()
        torch.cuda.empty_cache()  # what other lanes left cached, a capture could not take back
        graph = _capture(calls, 1, stream) if capturable else None
        if graph is not None:
            # from a replay and not from the calls: those of a small shape take the host far longer than the device
            rounds = math.ceil(MIN_ROUND_S / min(_burst(graph[0], 2)))
            graph = _capture(calls, rounds, stream) if rounds > 1 else graph
        replay, count = graph or (lambda: [call() for call in calls], len(calls))
        measure = partial(_burst, replay) if graph else _held_back(replay)

    def burst(times: int) -> list[float]:
        with torch.cuda.stream(stream):
            return measure(times)

    return burst_lane(burst, _rest, count, budget_s, "graph" if graph else "events")


def burst_lane(
    burst: Callable[[int], list[float]], rest: Callable[[], None], count: int, budget_s: float, method: str
) -> Lane:
    """A turn on a GPU: a rest, then a burst. ``burst(n)`` gives the seconds of each of n replays of ``count`` calls."""
    plan = plan_bursts(min(burst(2)), budget_s)

    def turn() -> list[float]:
        rest()
        return [s / count for s in burst(plan.replays)[plan.skipped :]]

    def sustain() -> float:
        rest()  # so that every lane starts alike, whoever was before it
        return statistics.median(burst(plan.sustained)[plan.sustained // 2 :]) / count

    return Lane(turn, plan.bursts, method, sustain if method == "graph" else None)


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


def _held_back(work: Call) -> Callable[[int], list[float]]:
    """``_burst`` of ``work`` whose launches take the host long: the device sleeps until they are queued."""
    torch.cuda.synchronize()
    cycles = int(SLEEP_HZ * min(MOST_SLEEP_S, 1.5 * _clock(work)))

    def burst(times: int) -> list[float]:
        seconds = []
        for _ in range(times):
            torch.cuda._sleep(cycles)
            seconds += _burst(work, 1)
        return seconds

    return burst


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
    with no_collection():
        while not seconds or (time.perf_counter() < end and len(seconds) < 50):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls_per_batch):
                call()
            seconds.append((time.perf_counter() - start) / calls_per_batch)
    synchronize(device)
    return summarize(seconds, "clock")


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's garbage collector stands still: its pauses are nobody's time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
