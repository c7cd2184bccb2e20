"""bench train: contenders train one model alike but for the slow path, in turns, and rows say what it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench_cases import CPU

from bench import backward_tables, plots, report, selection, timing, train
from bench.registry import TINY_MODEL
from bench.runner import Row
from bench.shapes import Heads, TrainShape

MODEL = replace(TINY_MODEL, frames=4, hidden=64, intermediate=96, vocab=64, heads=Heads(4, 2, 16), text=9)
SHAPE = TrainShape(replace(MODEL, fast_frames=2, vision_channels=24), 2)
WAYS = {way.who: way for way in train.WAYS}


@pytest.fixture(scope="module")
def training():
    torch.manual_seed(0)
    return train.Training(SHAPE, "float32", CPU)


def test_every_contender_has_the_gradients_of_the_eager_formulas_with_checkpointing_and_without(training):
    for who, way in WAYS.items():
        for checkpointing in (False, True):
            assert train.Step(training, way, checkpointing).error() <= 1, (who, checkpointing)


def test_a_wrong_slow_path_is_seen(training, monkeypatch):
    official = train.official_cross_attention
    monkeypatch.setattr(train, "official_cross_attention", lambda state, *rest: state + 0.9 * official(state, *rest))
    assert train.Step(training, WAYS["official"], False).error() > 1


def test_without_its_slow_path_the_model_trains_on_the_same_rows(training):
    with training.as_in(WAYS[train.BASE], False):
        without = training.loss()
        assert not any(layer.is_hybrid for layer in training.hybrid_layers)
    assert len(training.hybrid_layers) == 2
    assert all(layer.is_hybrid for layer in training.hybrid_layers)
    assert abs(without - training.loss()) > 1e-6


def test_a_step_trains_and_leaves_the_model_as_it_was(training):
    before = [x.clone() for x in training.model.parameters()]
    loss = train.Step(training, WAYS["official"], True)()
    assert not loss.requires_grad
    assert any(not torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True))
    assert all(x.grad is None for x in training.model.parameters())
    assert training.model.backend is None
    assert not training.model.model.gradient_checkpointing
    assert not any("forward" in vars(layer) for layer in training.model.model.layers)


def test_what_a_hybrid_layer_saves_is_counted_once_and_parameters_are_not(training):
    auto, without = (training.saved_bytes(WAYS[who]) for who in ("auto", train.BASE))
    assert len(auto) == len(without) == 2
    rows, slow, size = 2 * (9 + 2 * 9), 2 * 4 * 9, 4
    for mine, base in zip(auto, without, strict=True):
        assert mine - base >= slow * (64 + 64) * size  # normalised tokens; K and V of two heads
        assert mine - base < 4 * slow * (64 + 64) * size
        assert rows * 64 * size < base < 60 * rows * 96 * size
    assert auto[0] > auto[1]  # the slow tokens themselves, which all hybrid layers share
    assert training.saved_bytes(WAYS["official"])[1] > auto[1]  # K and V repeated for each head
    assert not any("forward" in vars(layer) for layer in training.model.model.layers)
    half = train.Training(replace(SHAPE, batch=1), "float32", CPU).saved_bytes(WAYS[train.BASE])
    assert 2 * half[1] == without[1]  # of activations alone; the first layer saves the rotary tables for all


@pytest.fixture
def measured(run, monkeypatch):
    monkeypatch.setattr(selection, "TRAIN_ON_CPU", [SHAPE])
    train.run(run)
    return run


def test_training_is_measured_in_turns_against_the_same_model_without_a_slow_path(measured):
    rows = {(row.shape, row.who): row for row in measured.journal.rows}
    assert set(rows) == {(shape, who) for shape in ("2x9x4f", "2x9x4f checkpointing") for who in WAYS}
    for (shape, who), row in rows.items():
        assert row.ok
        assert row.method == "wall"
        assert row.floor_us > 0
        assert (row.added is None) == (who == train.BASE)
        assert ("saved_bytes" in row.extra) == (shape == "2x9x4f")
    assert rows["2x9x4f", "auto"].added["to"] == train.BASE
    assert rows["2x9x4f", "auto"].floor_us > rows["2x9x4f", train.BASE].floor_us
    assert rows["2x9x4f", "auto"].extra["slow_tokens"] == 2 * 4 * 9


def test_what_was_measured_builds_no_model_again(measured, monkeypatch):
    monkeypatch.setattr(train, "Training", lambda *_: pytest.fail("made again"))
    train.run(measured)


def test_peers_that_a_run_does_not_want_do_not_train(run, monkeypatch):
    seen = []
    monkeypatch.setattr(selection, "TRAIN_ON_CPU", [SHAPE])
    monkeypatch.setattr(run, "compare", lambda *args, **_: seen.append([each.who for each in args[3]]))
    run.peers = set()
    train.run(run)
    assert seen == [["auto", "eager", train.BASE]] * 2


def test_on_a_gpu_the_time_of_a_step_s_kernels_is_measured_too(run, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "train_shapes", lambda *_: [SHAPE])
    monkeypatch.setattr(train, "Training", lambda *_: None)
    monkeypatch.setattr(run, "is_gpu", True)

    def compare(op, shape, dtype, contenders, *, base, lane, observe):
        seen.append((op, shape, lane.func, observe))

    monkeypatch.setattr(run, "compare", compare)
    train.run(run)
    assert seen == [
        ("train", "2x9x4f", timing.wall_lane, train.observe),
        ("train", "2x9x4f checkpointing", timing.wall_lane, train.observe),
        ("train-gpu", "2x9x4f", timing.kernel_lane, None),
    ]


# ---------------------------------------------------------------------------------------- tables, plots


@pytest.fixture
def rows():
    added = {"to": train.BASE, "median_us": 1e4, "p20_us": 9e3, "p80_us": 1.1e4}
    added |= {"percent": 5.3, "p20_percent": 4.7, "p80_percent": 5.8, "pairs": 20}
    made = []
    for shape in ("4x256x128f", "4x256x128f checkpointing"):
        for who, way in WAYS.items():
            extra = {"held_bytes": 13 << 30, "peak_bytes": 30 << 30}
            extra |= {"saved_bytes": [400 << 20, 300 << 20]} if "check" not in shape else {}
            row = Row("train", shape, "bfloat16", who, way.kind, median_us=2e5, floor_us=1.5e5, extra=extra)
            made.append(replace(row, added=None if who == train.BASE else added))
    return made


@pytest.mark.parametrize("brief", [False, True])
def test_the_table_gives_time_what_the_slow_path_adds_and_memory(rows, journal, brief):
    header, first, *lines = backward_tables.train_table(rows, "train", brief)
    cells = dict(zip(header, first, strict=True))
    assert (cells["ms"], cells["floor ms"], cells["added ms"], cells["added"]) == ("200.0", "150.0", "+10.000", "+5.3%")
    assert (cells["held GiB"], cells["peak GiB over it"], cells["hybrid layers save MiB"]) == (
        "13.0",
        "30.0",
        "400 / 300",
    )
    last = dict(zip(header, lines[-1], strict=True))
    assert (last["who"], last["added"], last["hybrid layers save MiB"]) == (train.BASE, "", "")
    text = report.markdown(journal.meta, rows, brief)
    assert report.OP_TITLES["train"] in text
    assert all(said in text for said in (backward_tables.TURNS, backward_tables.HELD, backward_tables.SAVED))


def test_plots_of_training_have_time_and_memory(rows, journal, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    assert [path.name for path in plots.plot(tmp_path, journal.meta, rows)] == ["train.png"]
    figure = plots._plot_train(plt, rows)
    assert [axis.containers[0][0].get_width() for axis in figure.axes] == [200, 30]
    plt.close(figure)
