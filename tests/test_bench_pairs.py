"""Contenders of one comparison take turns, and what slow-fast adds to the base LLM is measured in pairs."""

from __future__ import annotations

import contextlib
import types
from dataclasses import replace

import pytest
import torch
from bench_cases import CPU

from bench import attention, layer, mix, model, parts, pool, shapes, timing
from bench.registry import TINY_MODEL
from bench.runner import Contender, DeviceLost, Journal, Runner, Variant
from bench.shapes import Cost, PoolShape

SHAPES = [replace(TINY_MODEL, frames=frames, hidden=64, intermediate=128, vocab=64) for frames in (2, 5)]
SHAPES = [replace(shape, heads=shapes.Heads(4, 2, 16), fast_frames=2, text=9) for shape in SHAPES]


class HeatingMachine:
    """Every call makes it slower: by a tenth of a percent of itself, for whoever comes next."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def lane(self, calls, turns: int = 40) -> timing.Lane:
        who, seconds = calls[0]()

        def turn() -> list[float]:
            self.calls.append(who)
            return [seconds * (1 + 0.001 * len(self.calls))]

        return timing.Lane(turn, turns, "wall")


def _contender(who: str, call, kind: str = "ours", error: float = 0.0) -> Contender:
    return Contender(who, [Variant("", lambda: ([call], lambda: error))], Cost(1, 1, 0), kind)


def _pair(run, ours, base, lane, **options) -> dict:
    contenders = [_contender("slow-fast", ours), _contender("base LLM", base, "base", **options)]
    rows = run.compare("op", "shape", "float32", contenders, base="base LLM", lane=lane)
    return {row.who: row for row in rows}


def test_a_pair_takes_turns_and_tells_what_one_adds_however_hot_the_machine_gets(run):
    machine = HeatingMachine()
    rows = _pair(run, lambda: ("A", 1.1), lambda: ("B", 1.0), machine.lane)
    assert machine.calls == ["A", "B"] * 40
    added = rows["slow-fast"].added
    assert added["to"] == "base LLM"
    assert added["pairs"] == 40
    assert added["percent"] == pytest.approx(10, abs=0.2)  # a call is 0.1% hotter than the one before
    assert added["p20_percent"] < added["percent"] < added["p80_percent"]
    assert added["median_us"] == pytest.approx(added["percent"] / 100 * rows["base LLM"].median_us, rel=1e-3)
    assert rows["base LLM"].added is None


def test_measured_one_after_the_other_the_same_machine_would_have_told_otherwise(run):
    machine = HeatingMachine()
    medians = []
    for who, seconds in (("A", 1.1), ("B", 1.0)):
        contender = _contender(who, lambda who=who, seconds=seconds: (who, seconds))
        medians += [row.median_us for row in run.compare("op", "shape", "float32", [contender], lane=machine.lane)]
    assert abs(medians[0] / medians[1] - 1.1) > 0.03


def test_a_pair_ends_with_the_one_that_has_fewer_turns(run):
    machine = HeatingMachine()

    def lane(calls):
        return machine.lane(calls, {"A": 7, "B": 4}[calls[0]()[0]])

    _pair(run, lambda: ("A", 1.0), lambda: ("B", 1.0), lane)
    assert machine.calls == ["A", "B"] * 4


def test_without_its_base_a_contender_has_its_time_and_no_difference(run):
    machine = HeatingMachine()
    rows = _pair(run, lambda: ("A", 1.0), lambda: ("B", 1.0), machine.lane, error=1.0)
    assert rows["base LLM"].status.startswith("wrong")
    assert rows["slow-fast"].ok
    assert rows["slow-fast"].added is None


def test_who_fails_in_its_turn_leaves_the_others_in(run):
    turns = []

    def lane(calls):
        def turn():
            turns.append(calls[0]())
            if turns[-1] == "B" and turns.count("B") == 2:
                raise RuntimeError("gave up")
            return [1.0]

        return timing.Lane(turn, 4, "wall")

    contenders = [_contender(who, lambda who=who: who) for who in "ABC"]
    rows = {row.who: row for row in run.compare("op", "shape", "float32", contenders, lane=lane)}
    assert "".join(turns[:7]) == "ABCABCA"
    assert rows["B"].status == "failed: RuntimeError: gave up"
    assert rows["B"].median_us is None
    assert (rows["A"].samples, rows["C"].samples) == (4, 4)


def test_a_crash_in_a_turn_is_laid_to_the_one_whose_turn_it_was_and_the_others_are_measured_again(run):
    class Killed(BaseException):
        pass

    def lane(calls):
        turns = iter([1.0, 1.0])

        def turn():
            if (second := next(turns, None)) is None and calls[0]() == "B":
                raise Killed
            return [second or 1.0]

        return timing.Lane(turn, 4, "wall")

    contenders = [_contender(who, lambda who=who: who) for who in "ABC"]
    with pytest.raises(Killed):
        run.compare("op", "shape", "float32", contenders, lane=lane)
    resumed = Runner(CPU, ["float32"], Journal(run.journal.path), quick=True)
    assert [(row.who, row.status.split(":")[0]) for row in resumed.journal.rows] == [("B", "crashed")]
    rows = resumed.compare("op", "shape", "float32", contenders, lane=lane)
    assert [(row.who, row.status) for row in rows] == [("A", "ok"), ("C", "ok")]


def test_a_lost_device_is_laid_to_the_one_whose_turn_it_was(run, monkeypatch):
    def lost():
        raise DeviceLost("an illegal address")

    def lane(calls):
        def turn():
            if calls[0]() == "B":
                raise RuntimeError("an illegal address")
            return [1.0]

        return timing.Lane(turn, 2, "wall")

    monkeypatch.setattr(run, "recover", lost)
    with pytest.raises(DeviceLost):
        run.compare("op", "shape", "float32", [_contender(who, lambda who=who: who) for who in "ABC"], lane=lane)
    assert [(row.who, row.status.split(":")[0]) for row in run.journal.rows] == [("B", "crashed")]


@pytest.mark.parametrize(
    ("op", "text", "peers"),
    [
        (attention, "1x2x9@4/2/16", {"torch"}),
        (pool, "2x4x4", {"torch"}),
        (mix, "2of3@8", {"torch"}),
        (layer, "1x2x9@4/2/16", {"official"}),
    ],
    ids=["attention", "pool", "mix", "layer"],
)
def test_ours_and_the_peers_of_an_op_are_of_one_comparison(run, monkeypatch, op, text, peers):
    compared = []
    monkeypatch.setattr(attention, "_run_host", lambda *_: None)
    monkeypatch.setattr(run, "compare", lambda *args, **_: compared.append({each.who for each in args[3]}))
    run.shapes = [text]
    op.run(run)
    ours = set(attention.our_backends(run, "any")) - ({"eager"} if op is layer else set())
    assert ours | peers in compared
    if op is layer:
        assert {"official", "gemm"} in compared


# -------------------------------------------------------------------------------------------- arithmetic


def test_a_difference_is_taken_pair_by_pair_and_what_has_no_pair_is_left_out():
    found = timing.difference([2.0, 3.0, 5.0, 99.0], [1.0, 1.0, 4.0])
    assert (found.median_us, found.pairs) == (1e6, 3)
    assert found.percent == pytest.approx(100)  # the base's median is 1 s
    assert found.p20_us <= found.median_us <= found.p80_us
    assert found.p80_percent == pytest.approx(found.p80_us / 1e4)


def test_one_pair_is_its_own_difference():
    found = timing.difference([3.0], [2.0])
    assert (found.p20_us, found.median_us, found.p80_us, found.percent, found.pairs) == (1e6, 1e6, 1e6, 50.0, 1)


@pytest.fixture
def wall(monkeypatch):
    """Wall lanes over a clock that only the call, its answer's wait and nothing else moves."""
    now = types.SimpleNamespace(s=0.0, pending=0.0, calls=0)

    def wait(_):
        now.s, now.pending = now.s + now.pending, 0.0

    monkeypatch.setattr(timing, "synchronize", wait)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now.s)

    def lane(launch_s: float, device_s, budget_s: float = 3.0, most: int = 30) -> timing.Lane:
        def call():
            now.s += launch_s
            now.pending += device_s() if callable(device_s) else device_s
            now.calls += 1

        return timing.wall_lane([call], CPU, budget_s, most)

    lane.now = now
    return lane


def test_wall_time_is_launches_and_the_wait_for_the_answer(wall):
    assert wall(0.001, 0.02).turn() == pytest.approx([0.021])


def test_a_wall_lane_starts_from_an_idle_device(wall):
    lane = wall(0.001, 0.02)
    wall.now.pending = 5.0  # what someone before it has left in the queue
    assert lane.turn() == pytest.approx([0.021])


@pytest.mark.parametrize(("device_s", "turns"), [(0.01, 30), (0.25, 12), (0.9, 3), (2.0, 1), (9.0, 1)])
def test_a_wall_lane_has_the_turns_that_its_budget_pays_for(wall, device_s, turns):
    assert wall(0.0, device_s).turns == turns


def test_a_first_call_that_takes_long_leaves_the_lane_its_turns(wall):
    slow_start = iter([2.0])
    lane = wall(0.0, lambda: next(slow_start, 0.05))
    assert lane.turns == 30


def test_a_call_that_takes_the_budget_is_made_once(wall):
    lane = wall(0.0, 4.0)
    assert lane.turn() == [4.0]
    assert wall.now.calls == 1


def test_the_collector_rests_while_turns_are_taken_and_not_after(run):
    import gc

    seen = []
    lane = timing.Lane(lambda: seen.append(gc.isenabled()) or [1.0], 1, "wall")
    run.compare("op", "shape", "float32", [_contender("A", lambda: None)], lane=lambda calls: lane)
    assert seen == [False]
    assert gc.isenabled()


# ------------------------------------------------------------------------------------------------- model


@pytest.fixture
def measured(run, monkeypatch):
    """The model's benchmark over two tiny shapes: rows by (op, shape, who), and the order of all calls."""
    monkeypatch.setattr(model, "model_shapes", lambda *_: SHAPES)
    monkeypatch.setattr(model, "PAIRS", 9)
    monkeypatch.setattr(model, "BUDGET_S", 600.0)  # of three pairs, on however busy a machine
    run.shapes = ["2", "5"]  # no demonstration
    with torch.no_grad():
        model.run(run, None)
    return {(row.op, row.shape, row.who): row for row in run.journal.rows}


def test_the_model_s_benchmark_measures_slow_fast_and_base_in_pairs_at_every_point(measured):
    points = {(op, shape) for op, shape, _ in measured}
    assert points == {(op, shape.name) for op in ("prefill", "decode") for shape in SHAPES}
    for op, shape in points:
        ours, base, alone = (measured[op, shape, who] for who in ("slow-fast", "base LLM", "all tokens"))
        assert ours.ok
        assert ours.samples == base.samples == ours.added["pairs"] == 3
        assert ours.added["to"] == "base LLM"
        assert base.added is None
        assert alone.added is None
        assert {row.method for row in (ours, base, alone)} == {"wall"}


def test_what_slow_fast_adds_in_flop(measured):
    """Keys and values, attention, the slow tokens' norm, and the projector's last layer on more than fast tokens."""
    for shape in SHAPES:
        ours, base = (measured["prefill", shape.name, who].extra["model_flops"] for who in ("slow-fast", "base LLM"))
        costs = parts.part_costs(shape, "float32", pools_twice=True)
        windows = {"temporal_stride": 2**20, "min_fast_frames": shape.fast_frames}
        frames, side = (shape.frames,), shape.slow_side
        to_slow = PoolShape(frames, (2 * side, 2 * side), shape.hidden, 2, sampling_stride=2**20, temporal_stride=1)
        to_fast = PoolShape(frames, (side, side), shape.hidden, pool_stride=1, **windows)
        straight = PoolShape(frames, (2 * side, 2 * side), shape.hidden, 2, **windows)
        pooling = shapes.pool_cost(to_slow, "float32", normed=False).flops + shapes.pool_cost(to_fast, "float32").flops
        pooling -= shapes.pool_cost(straight, "float32", normed=False).flops
        projector = 2 * shape.hidden**2 * (shape.num_slow - shape.num_fast)
        attended = costs["K and V"].flops + costs["attention with gate and mix"].flops
        assert ours - base == attended + pooling + projector


def test_every_point_of_a_curve_is_of_the_same_variant(measured):
    variants = {}
    for (op, _, _), row in measured.items():
        variants.setdefault(op, set()).add(row.variant)
    assert {op: len(labels) for op, labels in variants.items()} == {"prefill": 1, "decode": 1}


def test_the_base_is_the_same_weights_and_video_without_a_slow_path():
    with torch.no_grad():
        models = model.Models.of(SHAPES[0], "float32", CPU)
        ours, base, _ = (model._session(models, prompt) for prompt in model._prompts(SHAPES[0], "float32", CPU))
        for layer in models.slow_fast.model.layers:  # without it the two are one
            if layer.is_hybrid:
                layer.self_attn.cross_attn_warm_up_gate.zero_()
        closed = model._session(models, model._prompts(SHAPES[0], "float32", CPU)[0])
    weights = {name: x.data_ptr() for name, x in models.slow_fast.named_parameters()}
    assert {name: x.data_ptr() for name, x in models.base.named_parameters()} == {
        name: address for name, address in weights.items() if ".cross_attn_" not in name
    }
    assert any(".mm_projector." in name for name in weights)
    assert ours.position.tolist() == closed.position.tolist()
    assert ours.position.tolist() == base.position.tolist() == [SHAPES[0].text + SHAPES[0].num_fast]
    assert ours.cache.step.capacity == base.cache.step.capacity
    assert ours.slow is not None
    assert base.slow is None


class FakeSession:
    """A decode session on a GPU, as far as the benchmark looks at it."""

    def __init__(self, *_) -> None:
        self.logits, self.compiled = torch.zeros(1, 4), []

    def capture(self, *, compile_step: bool) -> None:
        self.compiled.append(compile_step)
        SESSIONS.append(self)

    def step(self, token: torch.Tensor) -> torch.Tensor:
        ORDER.append(id(self))
        return self.logits


SESSIONS: list[FakeSession] = []
ORDER: list[int] = []


@pytest.mark.parametrize(("op", "compiled"), [("decode", False), ("decode-compiled", True)])
def test_on_a_gpu_both_sides_steps_are_captured_before_either_is_timed(run, monkeypatch, op, compiled):
    monkeypatch.setattr(model, "_session", FakeSession)
    monkeypatch.setattr(run, "is_gpu", True)
    SESSIONS.clear()
    ORDER.clear()
    pair = model._prompts(SHAPES[0], "float32", CPU)[:2]
    model.measure(run, None, SHAPES[0], "float32", op, pair, {})
    assert [session.compiled for session in SESSIONS] == [[compiled], [compiled]]
    ours, base = map(id, SESSIONS)
    assert ORDER[-6:] == [ours, base] * 3
    assert {row.variant for row in run.journal.rows} == {"torch.compile, graph" if compiled else "graph"}


def test_a_session_has_room_for_every_step_of_its_lane():
    assert model.DECODE_STEPS >= model.PAIRS + 3  # the check, and two steps that make the lane ready


def test_compiled_steps_are_measured_at_some_points_of_the_curve_and_are_rows_of_their_own(run, monkeypatch):
    monkeypatch.setattr(model, "_session", FakeSession)
    monkeypatch.setattr(model.Models, "of", lambda *_: None)
    monkeypatch.setattr(run, "is_gpu", True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 60, 1 << 60))
    monkeypatch.setattr(model, "model_shapes", lambda *_: [replace(SHAPES[0], frames=n) for n in (64, 128, 1536)])
    monkeypatch.setattr(model, "kernel_lane", lambda calls, turns: timing.Lane(lambda: [1.0], turns, "kernels"))
    run.shapes = ["64", "128", "1536"]
    model.run(run, None)
    assert {row.shape for row in run.journal.rows if row.op == "prefill-gpu"} == {"128 frames", "1536 frames"}
    compiled = {row.shape for row in run.journal.rows if row.variant.startswith("torch.compile")}
    assert compiled == {"128 frames", "1536 frames"}
    assert {row.shape for row in run.journal.rows if row.op == "decode-compiled"} == compiled


def test_the_gpu_time_of_a_prefill_is_the_union_of_its_kernels_and_copies_in_pairs(run, monkeypatch):
    """Kernels of two streams may overlap, and what runs on the host is no GPU time."""
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def span(start, end, device=cuda):
        return types.SimpleNamespace(time_range=types.SimpleNamespace(start=start, end=end), device_type=device)

    spans = [span(100, 130), span(0, 50, cpu), span(110, 120), span(125, 140), span(200, 210)]
    profile = contextlib.nullcontext(types.SimpleNamespace(events=lambda: spans))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(model, "_session", FakeSession)
    model.measure(run, None, SHAPES[0], "float32", "prefill-gpu", model._prompts(SHAPES[0], "float32", CPU)[:2], {})
    ours, base = run.journal.rows
    assert (ours.median_us, base.median_us, ours.method) == (50.0, 50.0, "kernels")
    assert (ours.added["median_us"], ours.added["pairs"]) == (0.0, model.PROFILED)
    spans[:] = spans[1:2]
    with pytest.raises(NotImplementedError, match="no kernel"):
        timing.kernel_lane([lambda: None], turns=3)


@pytest.mark.parametrize("kernel", ["flash_attention", "cudnn_attention", "efficient_attention", None])
def test_attention_of_fewer_kv_heads_is_counted_whichever_kernel_computes_it(kernel):
    """Without a GPU by shapes alone; the CPU's own kernel on numbers."""
    device = "meta" if kernel else "cpu"
    q, (k, v) = torch.randn(2, 6, 5, 16, device=device), torch.randn(2, 2, 2, 7, 16, device=device)
    with model.flop_counter() as counter:
        if kernel is None:
            torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            arguments = () if kernel == "flash_attention" else (None, True)
            getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}")(q, k, v, *arguments)
    assert counter.get_total_flops() == 4 * 2 * 6 * 5 * 7 * 16
