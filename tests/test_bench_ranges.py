"""Benchmarks of ranges, pieces and uneven batches: what they measure, what they hold it to, and how they say so."""

from __future__ import annotations

import pytest
import torch
from bench_cases import CPU
from torch.nn.attention import SDPBackend

from bench import attention, masked_peers, peers, plots, ragged, ranges, report, selection, verdicts
from bench.inputs import make_inputs, reference_context, visible
from bench.runner import Row
from bench.shapes import AttentionShape, Heads, RaggedMix, SweptBatch

TINY = AttentionShape.even(1, 6, 300, Heads(4, 2, 16))


# --------------------------------------------------------------------------------------------- what is run


@pytest.mark.parametrize(("text", "slow"), [(1, 7), (4, 10), (7, 5), (64, 10368)])
def test_rows_see_one_nth_to_all_of_the_video(text, slow):
    end = ranges.prefix_ends(text, slow, CPU).tolist()
    assert end == [(i + 1) * slow // text for i in range(text)]
    assert end[-1] == slow


@pytest.mark.parametrize("tile", [(128, 128), (16, 32), (5, 7), (1, 1), (1000, 1000)])
@pytest.mark.parametrize("heads_per_kv", [1, 7])
def test_the_share_counts_pairs_of_a_tile_and_a_block_in_which_some_row_sees_a_token(tile, heads_per_kv):
    end = ranges.prefix_ends(9, 200, CPU)
    sees = visible(torch.zeros_like(end), end, 200).repeat_interleave(heads_per_kv, 0)
    tiles = [
        sees[i : i + tile[0], j : j + tile[1]] for i in range(0, len(sees), tile[0]) for j in range(0, 200, tile[1])
    ]
    expected = sum(bool(pair.any()) for pair in tiles) / len(tiles)
    assert ranges.seen_share(end.tolist(), 200, heads_per_kv, tile) == pytest.approx(expected)


def test_the_tiles_are_those_of_the_kernels():
    (inputs,) = make_inputs(AttentionShape.even(1, 64, 1000), "bfloat16", CPU, 0)
    assert ranges.tile_of("cuda", inputs) == (128, 128)
    assert ranges.tile_of("eager", inputs) is None
    pytest.importorskip("triton")
    rows, tokens = ranges.tile_of("triton", inputs)
    assert (rows in (16, 32, 64, 128), tokens in (16, 32, 64, 128)) == (True, True)


@pytest.mark.parametrize(
    ("tokens", "length", "pieces", "slab"),
    [
        (300, 300, [(0, 300)], 384),
        (300, 128, [(256, 384), (128, 256), (0, 44)], 384),
        (2592, 1296, [(1408, 2704), (0, 1296)], 2816),
        (256, 128, [(128, 256), (0, 128)], 256),
    ],
)
def test_pieces_lie_backwards_in_whole_blocks_of_their_own(tokens, length, pieces, slab):
    assert ranges.lay_backwards(tokens, length) == (pieces, slab)


def test_the_reference_under_ranges_is_that_of_the_tokens_seen():
    (inputs,) = make_inputs(TINY, "float32", CPU, 0)
    begin, end = torch.tensor([0, 10, 299, 7, 0, 5]), torch.tensor([300, 200, 300, 7, 1, 2])
    got = reference_context(inputs, begin, end)
    for i, (first, last) in enumerate(zip(begin.tolist(), end.tolist(), strict=True)):
        kv = inputs.slow_kv[first:last]
        keys, values = (x.repeat_interleave(2, 1).transpose(0, 1) for x in kv.unbind(2))  # [Hq, N, D]
        probs = (inputs.q[i][:, None] @ keys.transpose(1, 2) / 4).softmax(-1)
        assert torch.allclose(got[i], (probs @ values)[:, 0], atol=1e-6)
    assert not got[3].any()


def by_who(run, op) -> dict[str, Row]:
    return {row.who: row for row in run.journal.rows if row.op == op and row.shape != "all"}


def test_growing_prefixes_run_on_a_cpu_beside_a_peer_under_a_mask(run):
    run.shapes = ["1x6x300@4/2/16"]
    ranges.run(run)
    rows = by_who(run, "ranges")
    assert {"cpu", "cpu-full", "cpu-empty", "eager", "torch"} == set(rows)
    assert [who for who, row in rows.items() if row.ok] == list(rows)
    assert rows["torch"].variant.split()[-1] in ("boolean", "added")
    assert 0 < rows["cpu"].extra["share"] <= 1
    absent = {row.who for row in run.journal.rows if row.shape == "all" and row.op == "ranges"}
    assert {"cuda", "sdpa-flash", "sdpa-efficient", "flex"} <= absent


def test_pieces_run_on_a_cpu_beside_one_range_of_as_many_blocks(run):
    run.shapes = ["1x6x300@4/2/16"]
    ranges.run(run)
    rows = [row for row in run.journal.rows if row.op == "pieces" and row.shape != "all"]
    assert {row.shape.split(" in ")[1] for row in rows} == {"1 of 300", "3 of 128"}
    assert {row.who for row in rows} == {"cpu", "cpu-one-range"}
    assert all(row.ok for row in rows)


def test_uneven_batches_run_on_a_cpu_beside_even_ones(run, monkeypatch):
    mix = RaggedMix("tiny", AttentionShape((2, 0, 1), (50, 9, 0), Heads(4, 2, 16)), TINY, on_cpu=True)
    monkeypatch.setattr(selection, "RAGGED", [mix])
    run.shapes = ["ragged"]
    for step in (attention.run, ragged.run):
        step(run)
    rows = by_who(run, "ragged")
    assert {who: row.status for who, row in rows.items()} == {"cpu": "ok", "cpu-even": "ok"}
    assert {row.op for row in run.journal.rows} == {"ragged"}


def test_a_sweep_of_batches_runs_on_a_cpu_without_eager(run, monkeypatch):
    monkeypatch.setattr(selection, "BATCHES", [SweptBatch((2, 1), (50, 9), Heads(4, 2, 16))])
    run.shapes = ["batches"]
    for step in (attention.run, attention.run_sweep):
        step(run)
    rows = by_who(run, "batches")
    assert rows["cpu"].ok
    assert rows["cpu"].shape == "batches 2x1..2x9..50@4/2/16"
    assert "eager" not in rows
    assert rows["attention alone"].ok
    assert {row.op for row in run.journal.rows} == {"batches"}


def test_what_is_in_the_journal_is_not_measured_again(run):
    run.shapes = ["1x6x300@4/2/16"]
    ranges.run(run)
    before = len(run.journal.rows)
    ranges.run(run)
    assert len(run.journal.rows) == before


PEERS = {peer.name: peer for peer in masked_peers.masked_peers(tuned=False)}


@pytest.mark.parametrize("name", ["torch", "sdpa-efficient", "flex"])
def test_a_peer_that_fails_is_a_row_with_its_reason(run, name, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("it broke")

    monkeypatch.setattr(masked_peers, "sdpa_inputs", broken)
    monkeypatch.setattr("torch.nn.attention.flex_attention.create_block_mask", broken)
    monkeypatch.setattr(ranges, "our_backends", lambda *_: ["eager"])
    monkeypatch.setattr(ranges, "masked_peers", lambda tuned: [PEERS[name]._replace(absent=lambda device: None)])
    run.shapes = ["1x6x300@4/2/16"]
    ranges.run(run)
    rows = by_who(run, "ranges")
    assert "it broke" in rows[name].status
    assert rows["eager"].ok


@pytest.fixture
def masked():
    """Input sets, what they give under growing prefixes, and those."""
    sets = make_inputs(TINY, "float32", CPU, 0)
    prefixes = masked_peers.Prefixes(ranges.prefix_ends(6, 300, CPU), 300)
    return sets, reference_context(sets[0], torch.zeros_like(prefixes.end), prefixes.end), prefixes


def test_a_dense_mask_fits_every_grouping_and_layout(masked):
    ways = tuple(f"{grouping} {layout}" for grouping in ("gqa", "packed", "repeated") for layout in ("hnd", "nhd"))
    variants = list(masked_peers._sdpa_variants(*masked, SDPBackend.MATH, ways))
    assert [variant.label for variant in variants] == [f"{way} {form}" for way in ways for form in ("boolean", "added")]
    for variant in variants:
        _, check = variant.build()
        assert check() < 1e-5, variant.label


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_block_mask_of_growing_prefixes_is_the_dense_mask(masked, monkeypatch):
    """Not compiled: the peer's own function on a CPU, both groupings of heads."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    variants = list(masked_peers._flex_variants(*masked, tuned=False))
    assert [variant.label for variant in variants] == ["packed default", "gqa default"]
    for variant in variants:
        _, check = variant.build()
        assert check() < 1e-5


def test_peers_under_masks_have_names_that_a_run_can_be_asked_for():
    assert {peer.name for peer in masked_peers.masked_peers(tuned=True)} <= set(peers.PEER_NAMES)


# ------------------------------------------------------------------------------------- what it is held to


def row(op, who, us, kind="base", shape="1x64x10368@28/4/128", **extra):
    return Row(op, shape, "bfloat16", who, kind, median_us=us, extra=extra)


@pytest.fixture
def rows():
    made = [
        row("ranges", "cuda", 60.0, "ours", share=0.5),
        row("ranges", "cuda-full", 100.0),
        row("ranges", "cuda-empty", 20.0),
        row("ranges", "flex", 180.0, "peer"),
        row("ranges", "sdpa-math", 900.0, "peer"),
        row("ranges", "triton", 95.0, "ours", share=0.5),
        row("pieces", "cuda", 106.0, "ours"),
        row("pieces", "cuda-one-range", 100.0),
        row("ragged", "cuda", 114.0, "ours", "ragged mix"),
        row("ragged", "cuda-even", 100.0, shape="ragged mix"),
    ]
    verdicts.complete(made)
    return made


def test_a_range_s_target_is_the_empty_call_and_its_share_of_the_rest_and_a_tenth(rows):
    assert rows[0].extra["target_us"] == pytest.approx(1.1 * (20 + 0.5 * 80))
    assert rows[0].extra["meets_target"]
    rows[0].median_us = 66.1
    verdicts.complete(rows)
    assert not rows[0].extra["meets_target"]


def test_a_range_s_lead_is_over_the_best_peer_under_a_mask(rows):
    assert (rows[0].extra["best_peer"], rows[0].extra["lead"], rows[0].extra["meets_lead"]) == ("flex", 3.0, True)
    assert not rows[5].extra["meets_lead"]


def test_what_was_not_measured_has_no_verdict(rows):
    assert "target_us" not in rows[5].extra  # no other rows of that backend
    rows[7].status = "failed: boom"
    rows[6].extra.clear()
    verdicts.complete(rows)
    assert rows[6].extra == {}


@pytest.mark.parametrize(("index", "most"), [(6, 1.05), (8, 1.15)])
def test_pieces_and_uneven_batches_may_take_so_much_longer(rows, index, most):
    for us, holds in ((100 * most, True), (100 * most + 0.1, False)):
        rows[index].median_us = us
        verdicts.complete(rows)
        assert rows[index].extra["ratio"] == pytest.approx(us / 100, abs=1e-4)
        assert rows[index].extra["meets_target"] is holds


def test_tables_give_each_backend_a_line_with_what_it_is_held_to(rows, journal):
    header, cuda, triton = verdicts.table(rows, "ranges")
    cells = dict(zip(header, cuda, strict=True))
    assert (cells["us"], cells["full us"], cells["empty us"], cells["target us"]) == ("60.0", "100.0", "20.0", "66.0")
    assert (cells["met"], cells["best peer"], cells["peer / ours"]) == ("yes", "flex", "3.00x")
    assert dict(zip(header, triton, strict=True))["met"] == ""
    header, line = verdicts.table(rows, "pieces")
    assert dict(zip(header, line, strict=True))["<= 1.05"] == "no"
    for text in (report.terminal(journal.meta, rows), report.markdown(journal.meta, rows)):
        assert all(report.OP_TITLES[op] in text for op in verdicts.OPS)


def test_plots_of_prefixes_and_of_ratios_are_drawn(rows, journal, tmp_path):
    pytest.importorskip("matplotlib")
    written = plots.plot(tmp_path, journal.meta, rows)
    assert [path.name for path in written] == ["ranges.png", "pieces_ragged.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
