"""bench model --parts: each part of a prefill's slow path is what the prefill does, beside its floor and the pair's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench_cases import CPU

from bench import __main__ as cli
from bench import model, parts, parts_tables, plots, registry, report
from bench.registry import TINY_MODEL
from bench.runner import Row
from bench.shapes import Heads
from slowfast_model.prefill import use_order

SHAPE = replace(
    TINY_MODEL, frames=4, hidden=64, intermediate=128, vocab=64, heads=Heads(4, 2, 16), fast_frames=2, text=9
)
TIMES = {
    "projector": 500.0,
    "projector's last layer": 60.0,
    "pool": 40.0,
    "K and V": 100.0,
    "attention": 30.0,
    "attention with gate and mix": 45.0,
}


@pytest.fixture
def prompt():
    return model._prompts(SHAPE, "float32", CPU)[0]


@pytest.fixture
def tiny():
    with torch.no_grad():
        return model.make_model(SHAPE, "float32", CPU)


def _row(op, who, kind, us, **more):
    return Row(op, "128 frames", "bfloat16", who, kind, median_us=us, floor_us=us / 2, **more)


@pytest.fixture
def rows():
    added = {"to": "base LLM", "median_us": 200.0, "p20_us": 190.0, "p80_us": 210.0}
    added |= {"percent": 2.0, "p20_percent": 1.9, "p80_percent": 2.1, "pairs": 30}
    made = [_row("parts", who, "ours", us, variant="in some order") for who, us in TIMES.items()]
    made[1].extra["beyond_base"] = 0.75
    made.append(_row("prefill", "slow-fast", "ours", 10200.0, added=added, extra={"model_flops": 1.03e13}))
    made.append(_row("prefill", "base LLM", "base", 10000.0, extra={"model_flops": 1e13}))
    return made


@torch.no_grad()
def test_the_parts_of_a_prefill_are_measured_with_its_own_tensors(run, tiny, prompt):
    parts.run(run, tiny, SHAPE, "float32", prompt)
    assert [row.who for row in run.journal.rows] == list(TIMES)
    assert all(row.ok and row.median_us and row.floor_us for row in run.journal.rows)
    measured = len(run.journal.rows)
    parts.run(run, tiny, SHAPE, "float32", prompt)
    assert len(run.journal.rows) == measured


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("once", [False, True])
@torch.no_grad()
def test_the_parts_are_of_the_order_that_the_prefill_takes_and_say_which(tiny, prompt, first, once):
    with use_order(pool_first=first, one_kv_product=once):
        calls, order = parts.part_calls(tiny, prompt.ids, prompt.features())
        session = model._session(model.Models(tiny, None), prompt)
        caches = [layer.slow_kv for layer in session.cache.layers if layer.slow_kv is not None]
        for made, cache in zip(calls["K and V"](), caches, strict=True):
            assert torch.equal(made, cache)
    assert len(calls["pool"]()) == 1 + first
    assert str(order).startswith("pooled before" if first else "pooled after")
    assert ("in one product" in str(order)) == once
    assert order.pools_twice == first
    assert "runs" not in str(order)
    assert len(calls["projector"]()) == 2  # a linear layer, and what is between it and the last
    (last,) = calls["projector's last layer"]()
    assert last.shape == (SHAPE.num_slow * (1 if first else 4), SHAPE.hidden)
    assert len(calls["attention"]()) == len(calls["attention with gate and mix"]()) == SHAPE.num_hybrid


@pytest.mark.parametrize("first", [False, True])
@torch.no_grad()
def test_the_parts_of_a_prefill_in_runs_are_of_all_runs(tiny, first):
    shape = replace(SHAPE, frames=6)
    prompt = model._prompts(shape, "float32", CPU)[0]
    with use_order(pool_first=first):
        whole, _ = parts.part_calls(tiny, prompt.ids, prompt.features())
    with use_order(pool_first=first, working_bytes=3 * 36 * 2 * 64 * 4):
        calls, order = parts.part_calls(tiny, prompt.ids, prompt.features())
    assert (order.runs, order.pools_first, order.pools_twice) == (2, first, True)
    assert "in 2 runs" in str(order)
    for name in ("projector", "projector's last layer"):
        assert len(calls[name]()) == 2 * len(whole[name]())
    assert len(calls["pool"]()) == 3
    for made, wanted in zip(calls["K and V"](), whole["K and V"](), strict=True):
        torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_runs_are_counted_with_the_flop_of_all_frames_at_once(tiny, prompt):
    counted = []
    for working_bytes in (2**40, 1):
        with use_order(working_bytes=working_bytes):
            counted.append(model._work(lambda: model._session(model.Models(tiny, None), prompt)))
    # but for a fast token more of each run, that nobody reads
    assert counted[0]["model_flops"] == pytest.approx(counted[1]["model_flops"], rel=1e-3)
    assert "transient_bytes" not in counted[1]  # of a CPU nobody tells


def test_gate_and_mix_are_what_the_one_op_takes_beyond_attention_and_the_rest_is_the_hosts(rows):
    (point,) = parts_tables.split(rows)
    assert (point.frames, point.base_us, point.wall_percent, point.gpu_percent) == (128, 10000.0, 2.0, None)
    assert point.us["gate and mix"] == 15.0
    assert point.us["projector's last layer"] == 45.0  # of the slow tokens that the base LLM does not have
    assert point.us["host and the rest"] == 200.0 - 100.0 - 45.0 - 45.0
    assert point.flop_percent == pytest.approx(3.0)


def test_without_its_pair_or_all_of_its_parts_a_prefill_has_no_host_time_and_no_point(rows):
    alone = [row for row in rows if row.op == "parts"]
    (point,) = parts_tables.split(alone)
    assert "host and the rest" not in point.us
    assert (point.base_us, point.wall_percent, point.flop_percent) == (None, None, None)
    assert parts_tables.split(alone[1:]) == []


def test_the_table_has_a_line_for_each_part_and_one_for_the_slow_path_with_their_floors(rows):
    header, *lines = parts_tables.table(rows)
    cells = {line[2]: dict(zip(header, line, strict=True)) for line in lines}
    assert list(cells) == [*TIMES, "slow path"]
    assert (cells["K and V"]["us"], cells["K and V"]["of the floor"]) == ("100.0", "2.00x")
    assert cells["slow path"]["us"] == "245.0"  # the projector's last layer, pool, K and V, and the one op
    assert cells["slow path"]["<= 1.15x"] == ""  # of a long prefill alone
    assert "over caches MiB" not in header


@pytest.mark.parametrize(("us", "held"), [(100.0, "no"), (20.0, "yes")])
def test_the_slow_path_of_a_long_prefill_is_held_to_the_floors_sum_and_tells_its_memory(rows, us, held):
    for row in rows:
        row.shape = "1536 frames"
        row.floor_us = {"pool": 40.0, "K and V": 20.0, "attention with gate and mix": 45.0}.get(row.who, row.median_us)
        row.median_us = us if row.who == "K and V" else row.median_us
    rows[-2].extra["transient_bytes"] = 800 << 20
    header, *lines = parts_tables.table(rows)
    cells = {line[2]: dict(zip(header, line, strict=True)) for line in lines}
    assert [cells[who]["<= 1.15x"] for who in TIMES] == [""] * len(TIMES)
    assert (cells["slow path"]["floor us"], cells["slow path"]["<= 1.15x"]) == ("165.0", held)
    assert [line["over caches MiB"] for line in cells.values()] == [""] * len(TIMES) + ["800"]


def test_the_model_table_tells_time_and_flop_side_by_side(rows):
    header, line = report.model_table(rows, "prefill")
    cells = dict(zip(header, line, strict=True))
    assert (cells["added"], cells["added FLOP"], cells["TFLOP"]) == ("+2.0%", "+3.00%", "10.3")
    assert "over caches MiB" not in cells
    rows[-2].extra["transient_bytes"] = 3 << 20
    header, line = report.model_table(rows, "prefill")
    assert dict(zip(header, line, strict=True))["over caches MiB"] == "3"


def test_the_picture_stacks_the_parts_and_shows_time_and_flop(rows):
    plt = pytest.importorskip("matplotlib.pyplot")
    figure = plots._plot_parts(plt, rows)
    stacked, added = figure.axes
    heights = {bars.get_label(): bars.patches[0].get_height() for bars in stacked.containers}
    assert heights["K and V"] == pytest.approx(1.0)  # percent of the base's prefill
    assert heights["host and the rest"] == pytest.approx(0.1)
    assert {line.get_label() for line in added.get_lines()} == {"wall time, in pairs", "FLOP, as the paper counts"}
    plt.close(figure)
    assert plots._plot_parts(plt, rows[:-2]) is None


def test_the_floors_of_the_parts_are_those_of_the_operations():
    costs = parts.part_costs(registry.QWEN2_7B_MODEL, "bfloat16", pools_twice=False)
    num_slow = 128 * 64
    assert costs["K and V"].flops == 4 * 2 * num_slow * 3584 * 1024
    assert costs["pool"].read == 128 * 256 * 3584 * 2
    assert costs["projector"].flops == 2 * 3584 * 128 * 256 * 3072
    assert costs["projector's last layer"].flops == 2 * 3584 * num_slow * 3584
    twice = parts.part_costs(registry.QWEN2_7B_MODEL, "bfloat16", pools_twice=True)
    slow = num_slow * 3584 * 2  # bytes, written by the first call and read by the second
    assert (twice["pool"].read, twice["pool"].written) == (costs["pool"].read + slow, costs["pool"].written + slow)
    assert all(twice[who] == costs[who] for who in parts.PARTS if who != "pool")


def test_parts_are_of_the_model_alone(capsys):
    with pytest.raises(SystemExit):
        cli.main(["pool", "--parts"])
    assert "--parts: got it for pool, want model or all" in capsys.readouterr().err
