"""What a benchmark leaves behind: tables, result files of this version and of older ones, plots."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial

import bench_cases  # noqa: F401  it finds bench
import pytest

from bench import __main__ as cli
from bench import plots, report
from bench.runner import Row

# Not what the medians of the fixture below would give, 10%: pairs know better.
ADDED = {"to": "base LLM", "median_us": 1970.0, "p20_us": 1900.0, "p80_us": 2040.0}
ADDED |= {"percent": 19.7, "p20_percent": 19.0, "p80_percent": 20.4, "pairs": 30}


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
                row = timed(op, f"{frames} frames", who=who, kind=kind, median_us=us * frames, method="wall")
                made.append(replace(row, extra={"slow_tokens": 64 * frames}, added=ADDED if kind == "ours" else None))
    made.append(Row("attention", "1x1x5184@28/4/128", "bfloat16", "flex", "peer", status="failed: boom"))
    return made


def test_the_table_gives_our_share_of_the_ceiling_and_the_lead_over_the_best_peer(rows):
    header, first, *_ = report.table(rows, "attention")
    cells = dict(zip(header, first, strict=True))
    assert cells["best peer / ours"] == "2.50x"
    assert cells["% of ceiling"] == "50%"
    assert cells["flex us"] == "failed"


def test_peers_are_held_to_ours_without_gate_and_mix_too_but_not_to_what_ours_adds_to(rows):
    alone = replace(rows[1], who="attention alone", kind="base", median_us=8.0)
    header, first, *_ = report.table([*rows, alone], "attention")
    cells = dict(zip(header, first, strict=True))
    assert (cells["best peer / ours"], cells["best peer / attention alone"]) == ("2.50x", "3.12x")
    pair = [replace(row, added=ADDED | {"to": alone.who}) if row.kind == "ours" else row for row in rows]
    assert not any("attention alone" in name and "/" in name for name in report.table([*pair, alone], "attention")[0])


def test_a_row_that_is_not_ok_is_no_best_whatever_its_time(rows):
    fast = Row("pool", "shape", "bfloat16", "flex", "peer", status="wrong: off by 0.5", median_us=0.1)
    assert report.best_of([*rows, fast], "peer").who != "flex"
    assert report.best_of([fast], "peer") is None


def test_what_a_faster_slow_path_saves_has_its_sign(rows):
    faster = {name: -x for name, x in ADDED.items() if name != "to"} | {"to": "base LLM", "pairs": 30}
    rows = [replace(row, added=faster) if row.added else row for row in rows]
    header, first, *_ = report.model_table(rows, "prefill")
    cells = dict(zip(header, first, strict=True))
    assert (cells["added ms"], cells["p20 .. p80"], cells["added"]) == ("-1.970", "-1.900 .. -2.040", "-19.7%")


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


def test_the_model_table_says_what_the_slow_path_adds_by_the_pairs_and_not_by_the_medians(rows, journal):
    for op in ("prefill", "decode"):
        header, _, last = report.model_table(rows, op)
        cells = dict(zip(header, last, strict=True))
        assert (cells["frames"], cells["slow tokens"]) == ("1536", "98304")
        assert (cells["slow-fast ms"], cells["base LLM ms"], cells["all tokens ms"]) == ("1.690", "1.536", "13.82")
        assert (cells["added ms"], cells["p20 .. p80"]) == ("+1.970", "+1.900 .. +2.040")
        assert (cells["added"], cells["pairs"]) == ("+19.7%", "30")
    assert report.PAIRED in report.markdown(journal.meta, rows)
    assert report.PAIRED in report.terminal(journal.meta, rows)


def test_the_model_table_names_what_has_no_time(rows):
    lost = next(row for row in rows if (row.op, row.who, row.shape) == ("decode", "base LLM", "16 frames"))
    lost.status, lost.median_us = "failed: out of memory", None
    next(row for row in rows if (row.op, row.who, row.shape) == ("decode", "slow-fast", "16 frames")).added = None
    header, first, _ = report.model_table(rows, "decode")
    cells = dict(zip(header, first, strict=True))
    assert (cells["base LLM ms"], cells["added"]) == ("failed", "-")


@pytest.fixture
def old_file(rows, journal, tmp_path):
    """A result file from before the pairs: no ``added``, and one point of the decode curve fused by torch.compile."""
    path = tmp_path / "old.json"
    for row in rows:
        row.extra = {}
        if row.op == "decode":
            row.variant = "torch.compile, graph" if row.shape == "16 frames" and row.who != "all tokens" else "graph"
    report.save_json(path, journal.meta, rows)
    data = json.loads(path.read_text())
    for row in data["rows"]:
        del row["added"]
    path.write_text(json.dumps(data))
    return path


def test_an_old_file_is_printed_and_says_that_its_model_was_not_measured_in_pairs(old_file):
    text = report.markdown(*report.load_json(old_file))
    assert text.count(report.NOT_PAIRED) == 3
    assert report.PAIRED not in text
    assert "%" not in text.split("Model prefill")[1]  # nothing about what is added


def test_an_old_file_s_compiled_points_leave_the_curve_and_become_rows_of_their_own(old_file):
    _, loaded = report.load_json(old_file)
    assert [line[0] for line in report.model_table(loaded, "decode-compiled")[1:]] == ["16"]
    header, first, _ = report.model_table(loaded, "decode")
    cells = dict(zip(header, first, strict=True))
    assert (cells["slow-fast ms"], cells["all tokens ms"]) == ("", "0.1440")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("# a readme", "no JSON"),
        ("[1, 2]", "TypeError"),
        ('{"rows": []}', "KeyError: 'meta'"),
        ('{"meta": {"device": "x"}, "rows": []}', "KeyError"),
        ('{"meta": {}, "rows": [{"op": "pool", "next": 1}]}', "rows with next, which a newer version wrote"),
        ('{"meta": {}, "rows": [{"op": "pool"}]}', "missing"),
    ],
    ids=["text", "list", "no meta", "half a meta", "newer", "half a row"],
)
def test_what_is_no_result_file_is_refused_in_one_line_that_names_it(tmp_path, capsys, text, reason):
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", str(path)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line
    assert reason in line


def test_the_demonstration_table_says_how_far_each_backend_is_from_eager(rows):
    extra = {"max_difference": 8.1e-07, "equal_ids": 24, "ids": 24, "largest_gap": 0.0}
    name = "bikes.mp4 32 frames"
    rows.append(Row("demo", name, "float32", "cpu", "ours", median_us=100.0, extra=extra))
    assert report.demo_table(rows)[1] == [name, "float32", "cpu", "8.1e-07", "24 of 24", "0", "100.0"]


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
    written = plots.plot(tmp_path, journal.meta, rows)
    assert [path.name for path in written] == ["attention.png", "pool_mix.png", "model.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


@pytest.fixture
def model_axes(rows):
    plt = pytest.importorskip("matplotlib.pyplot")
    rows += [replace(row, op="decode-compiled") for row in rows if row.op == "decode" and row.kind != "peer"]
    figure = plots._plot_model(plt, rows)
    yield figure.axes
    plt.close(figure)


def test_the_model_s_panels_have_ticks_to_read_values_off(model_axes):
    for axis in model_axes:
        low, high = axis.get_ylim()
        labels = zip(axis.get_yticks(), axis.get_yticklabels(), strict=True)
        assert sum(low <= tick <= high for tick, label in labels if label.get_text()) >= 4


@pytest.mark.parametrize(
    ("low", "high"), [(7.1, 9.8), (6.6, 7.4), (4.3, 10.2), (26, 5900), (0.02, 3e6), (7.29, 7.36), (99, 101)]
)
def test_a_value_axis_has_some_round_ticks_whatever_its_range(low, high):
    pytest.importorskip("matplotlib")
    ticks = plots._value_ticks(low, high)
    assert 4 <= len(ticks) <= 14
    assert low <= ticks[0] < ticks[-1] <= high
    assert len({f"{tick:g}" for tick in ticks}) == len(ticks)


def test_compiled_steps_are_lines_of_their_own(model_axes):
    prefill, decode = ({line.get_label() for line in axis.get_lines()} for axis in model_axes)
    assert {"slow-fast", "base LLM", "slow-fast, compiled", "base LLM, compiled"} <= decode
    assert not any("compiled" in label for label in prefill)


def test_no_plot_is_drawn_without_rows_for_it(journal, tmp_path):
    pytest.importorskip("matplotlib")
    assert plots.plot(tmp_path, journal.meta, []) == []


def test_without_matplotlib_the_result_is_written_and_the_plots_are_named_as_missing(
    rows, journal, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    target = tmp_path / "new" / "x.json"
    args = cli.parser().parse_args(["model", "--json", str(target), "--plot", str(tmp_path)])
    assert cli.finish(args, journal.meta, rows, ["model"]) == 0
    assert report.load_json(target)[1] == rows
    assert "no plots" in capsys.readouterr().out
    assert cli.main(["report", str(target)]) == 0
    assert cli.main(["report", str(target), "--plot", str(tmp_path)]) == 1
