"""How the benchmark times a call: in bursts at a rested clock, sustained, or by the wall clock."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import types
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed; installed packages keep winning

from bench import timing


def test_percentiles_are_of_the_samples():
    result = timing.summarize([i * 1e-6 for i in range(1, 12)], "clock")
    assert (result.p20_us, result.median_us, result.p80_us) == pytest.approx((3, 6, 9))


def test_input_sets_stream_through_the_cache_between_two_uses():
    assert timing.num_input_sets(10e6, 50e6) * 10e6 >= 2 * 50e6
    assert timing.num_input_sets(200e6, 50e6) == 1
    assert timing.num_input_sets(1, 50e6) == timing.MAX_SETS


class ThrottlingGpu:
    """Replays that take 12% longer after ``falls_s`` of work, until the device has rested for 50 ms."""

    def __init__(self, replay_s: float, launch_s: float = 0.0, falls_s: float = 0.035) -> None:
        self.replay_s, self.launch_s, self.falls_s = replay_s, launch_s, falls_s
        self.busy_s = self.rested_s = 0.0
        self.bursts = []

    def rest(self) -> None:
        self.rested_s += timing.REST_S
        if self.rested_s >= 0.05:
            self.busy_s = 0.0

    def burst(self, times: int) -> list[float]:
        self.bursts.append(times)
        seconds = []
        for i in range(times):
            self.rested_s = 0.0
            work = self.replay_s * (1.12 if self.busy_s > self.falls_s else 1)
            self.busy_s += work
            seconds.append(work + (self.launch_s if i == 0 else 0))
        return seconds

    def time(self, budget_s: float = 0.15, sustained: bool = False, count: int = 1) -> timing.Timing:
        return timing.time_lane(timing.burst_lane(self.burst, self.rest, count, budget_s, "graph"), sustained)


@pytest.mark.parametrize("replay_s", [0.0011, 0.0021, 0.0068, 0.019])
def test_bursts_are_timed_at_the_clock_of_a_rested_device_and_the_sustained_figure_is_not(replay_s):
    gpu = ThrottlingGpu(replay_s)
    gpu.busy_s = 1.0  # whoever came before left the device hot
    result = gpu.time(sustained=True)
    assert result.p20_us == result.p80_us == pytest.approx(replay_s * 1e6)
    assert result.sustained_us == pytest.approx(1.12 * replay_s * 1e6)


def test_the_sustained_figure_is_of_the_second_half():
    result = ThrottlingGpu(0.002, falls_s=0.6 * timing.SUSTAINED_S + timing.BURST_S).time(sustained=True)
    assert result.sustained_us == pytest.approx(1.12 * 2000)


def test_a_longer_budget_does_not_make_a_call_slower():
    assert ThrottlingGpu(0.002).time(0.02).median_us == ThrottlingGpu(0.002).time(10.0).median_us


def test_times_are_those_of_a_call_and_not_of_a_replay_of_many():
    result = ThrottlingGpu(0.002).time(sustained=True, count=40)
    assert result.median_us == pytest.approx(50)
    assert result.sustained_us == pytest.approx(56)


def test_no_sustained_figure_and_no_work_for_it_unless_asked_for():
    gpu = ThrottlingGpu(0.002)
    assert gpu.time().sustained_us is None
    assert max(gpu.bursts) * gpu.replay_s <= timing.BURST_S


def test_the_first_replay_of_a_burst_pays_for_the_launch_and_is_no_sample():
    result = ThrottlingGpu(0.0011, launch_s=1e-4).time()
    assert result.p80_us == pytest.approx(1100)
    assert result.samples == 5 * 17


@pytest.mark.parametrize("replay_s", [0.001, 0.0034, 0.011, 0.02])
def test_a_burst_ends_before_the_clock_falls_and_comes_as_often_for_every_replay(replay_s):
    plan = timing.plan_bursts(replay_s, budget_s=0.15)
    assert plan.bursts == timing.MOST_BURSTS
    assert timing.BURST_S / 2 < plan.replays * replay_s <= timing.BURST_S
    assert plan.skipped == (plan.replays > 1)
    assert plan.sustained * replay_s == pytest.approx(timing.SUSTAINED_S, abs=replay_s)


def test_a_replay_longer_than_a_burst_goes_alone_and_is_a_sample():
    plan = timing.plan_bursts(0.5, budget_s=0.15)
    assert (plan.replays, plan.skipped, plan.sustained) == (1, 0, 2)


def test_a_small_budget_buys_one_burst():
    assert timing.plan_bursts(0.001, budget_s=0.001).bursts == 1
    assert timing.plan_bursts(0.001, budget_s=2 * timing.BURST_S).bursts == 2


def test_a_burst_queues_its_replays_without_waiting_and_times_each_from_the_end_of_the_one_before(monkeypatch):
    log, now = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    def work():
        log.append("work")
        now[0] += len(log)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert timing._burst(work, 3) == pytest.approx([1, 2, 3])
    assert log == ["work", "work", "work", "wait"]


class FakeCuda:
    """Streams, graphs and events of a GPU whose time only replays and eager launches move, in milliseconds."""

    def __init__(self, monkeypatch, refuses_capture: bool = False) -> None:
        self.ms, self.capturing, self.replays, self.sleeps = 0.0, None, 0, []
        fake, nothing = self, contextlib.nullcontext()

        class Graph:
            def __init__(self):
                self.ms = 0.0

            def replay(self):
                fake.ms, fake.replays = fake.ms + self.ms, fake.replays + 1

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                self.at = fake.ms

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        @contextlib.contextmanager
        def capture(graph, stream):
            fake.capturing = graph
            yield
            fake.capturing = None
            if refuses_capture:
                raise RuntimeError("operation not permitted when stream is capturing")

        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        names = {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": lambda s: nothing}
        names |= {"CUDAGraph": Graph, "graph": capture, "Event": Event, "synchronize": lambda: None}
        names |= {"_sleep": self._sleep}
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(timing, "REST_S", 0.0)

    def _sleep(self, cycles: int) -> None:
        self.ms, self.sleeps = self.ms + cycles / timing.SLEEP_HZ * 1e3, [*self.sleeps, cycles]

    def call(self, ms: float, host_ms: float = 0.0):
        """Which takes the device ``ms``; only what it sleeps meanwhile keeps it from waiting for the host."""

        def call():
            if self.capturing:
                self.capturing.ms += ms
                return
            ahead_ms = self.sleeps[-1] / timing.SLEEP_HZ * 1e3 if self.sleeps else 0.0
            time.sleep(host_ms / 1e3)
            self.ms += ms + max(0.0, host_ms - ahead_ms)

        return call


def test_a_gpu_s_lane_replays_a_graph_of_all_calls_and_gives_the_time_of_one(monkeypatch):
    fake = FakeCuda(monkeypatch)
    lane = timing.make_lane([fake.call(0.1), fake.call(0.3)], torch.device("cuda"), budget_s=0.15)
    assert (lane.method, lane.turns) == ("graph", timing.MOST_BURSTS)
    before = fake.replays
    assert lane.turn() == pytest.approx([0.0002] * (fake.replays - before - 1))  # the first is no sample
    assert lane.sustain() == pytest.approx(0.0002)
    assert timing.time_lane(lane, sustained=True).sustained_us == pytest.approx(200)


def test_a_call_that_no_graph_holds_is_timed_by_events_and_has_no_sustained_figure(monkeypatch):
    for refuses, capturable in ((True, True), (False, False)):
        fake = FakeCuda(monkeypatch, refuses)
        lane = timing.make_lane([fake.call(0.5)], torch.device("cuda"), budget_s=0.15, capturable=capturable)
        assert (lane.method, lane.sustain) == ("events", None)
        assert timing.time_lane(lane, sustained=True).median_us == pytest.approx(500)


def test_the_host_s_time_is_no_part_of_a_call_that_no_graph_holds(monkeypatch):
    fake = FakeCuda(monkeypatch)
    lane = timing.make_lane([fake.call(0.5, host_ms=4.0)], torch.device("cuda"), budget_s=0.15, capturable=False)
    assert lane.turn() == pytest.approx([0.0005] * len(lane.turn()))
    assert all(4.0 < cycles / timing.SLEEP_HZ * 1e3 <= timing.MOST_SLEEP_S * 1e3 for cycles in fake.sleeps)


@pytest.mark.parametrize("capturable", [True, False])
def test_what_a_call_holds_lives_as_long_as_its_lane_for_a_graph_holds_none_of_it(monkeypatch, capturable):
    fake, held = FakeCuda(monkeypatch), torch.ones(1)
    alive = weakref.ref(held)
    call = partial(lambda ran, held: ran(), fake.call(0.5), held)
    lane = timing.make_lane([call], torch.device("cuda"), budget_s=0.15, capturable=capturable)
    del call, held
    gc.collect()
    assert alive() is not None
    del lane
    gc.collect()
    assert alive() is None


def test_a_graph_is_replayed_without_sleeps(monkeypatch):
    fake = FakeCuda(monkeypatch)
    timing.make_lane([fake.call(0.5)], torch.device("cuda"), budget_s=0.15).turn()
    assert fake.sleeps == []


def test_a_sleep_is_timed_as_such_and_calls_rotate():
    used = []
    calls = [lambda i=i: (used.append(i), time.sleep(0.002)) for i in range(3)]
    result = timing.time_calls(calls, torch.device("cpu"), budget_s=0.05)
    assert 2000 <= result.p20_us <= result.median_us <= result.p80_us
    assert result.sustained_us is None
    assert set(used) == {0, 1, 2}


def test_a_very_slow_call_is_run_once():
    runs = []
    result = timing.time_calls([lambda: (runs.append(1), time.sleep(0.35))], torch.device("cpu"), budget_s=0.01)
    assert len(runs) == result.samples == 1
