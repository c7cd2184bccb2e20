"""bench hf and bench mllama: contenders of one set of weights, static caches, in turns; what reports make of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from bench_cases import CPU
from model_cases import one_thread  # noqa: F401
from torch._dynamo.testing import CompileCounter

import slowfast_kernels as sk
from bench import __main__ as cli
from bench import hf, mllama, mllama_shapes, report, runner, selection, timing
from bench.mllama_shapes import MLLAMA_ON_CPU
from bench.registry import TINY_MODEL
from bench.shapes import Heads

pytestmark = pytest.mark.skipif(hf.why_absent() is not None, reason=str(hf.why_absent()))

SHAPE = replace(TINY_MODEL, frames=4, hidden=64, intermediate=96, layers=2, vocab=64, heads=Heads(4, 2, 16), text=12)
SHAPE = replace(SHAPE, fast_frames=2)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return hf.make_model(SHAPE, "float32", CPU)


@pytest.fixture
def sides(model) -> dict[str, hf.Side]:
    return {side.who: side for side in hf.sides_of(model, SHAPE, "float32")}


@pytest.fixture(scope="module")
def images():
    """A tiny Llama-3.2-Vision, where transformers has static caches for it."""
    reason = mllama._why_no_static_cache()
    if reason is not None:
        pytest.skip(reason)
    with torch.no_grad():
        return mllama.make_model(MLLAMA_ON_CPU[0], "float32", CPU)


def test_all_three_answer_as_the_eager_formulas_without_a_cache(sides):
    assert list(sides) == ["slow-fast", "base LM", "plain PyTorch"]
    for side in sides.values():
        prompted = side.make()
        assert prompted.prefill_error() < 1e-5, side.who
        assert prompted.step_error() < 1e-5, side.who
        second = prompted.step().clone()
        ids = torch.cat([prompted.ids, prompted.token, prompted.token], 1)
        assert runner.relative_error(second, prompted.reference(ids)) < 1e-5, side.who


def test_plain_attention_is_another_computation_on_the_same_weights(model, sides, monkeypatch):
    from bench.plain_attention import PlainAttention

    made = {who: side.make() for who, side in sides.items()}
    plain = made["plain PyTorch"].forward.__self__
    assert all(isinstance(attention, PlainAttention) for attention in plain.hybrid_attentions())
    assert not any(isinstance(attention, PlainAttention) for attention in model.hybrid_attentions())
    pairs = zip(plain.parameters(), model.parameters(), strict=True)
    assert all(mine is its for mine, its in pairs)
    called = []
    op = sk.slowfast_cross_attention
    monkeypatch.setattr(sk, "slowfast_cross_attention", lambda *a, **o: called.append(1) or op(*a, **o))
    counts = {}
    for who, prompted in made.items():
        prompted.prefill()
        prompted.step()
        counts[who] = len(called)
        called.clear()
    assert counts == {"slow-fast": 2 * SHAPE.num_hybrid, "base LM": 0, "plain PyTorch": 0}


def test_a_wrong_attention_is_seen(sides, monkeypatch):
    from bench.plain_attention import PlainAttention

    mixed = PlainAttention._mixed
    monkeypatch.setattr(PlainAttention, "_mixed", lambda self, state, *rest: 3 * mixed(self, state, *rest) - 2 * state)
    prompted = sides["plain PyTorch"].make()
    assert min(prompted.prefill_error(), prompted.step_error()) > hf.TOLERANCE["bfloat16"]


@pytest.fixture
def measured(run, monkeypatch):
    monkeypatch.setattr(hf, "PAIRS", 9)
    monkeypatch.setattr(hf, "model_shapes", lambda wanted, on_cpu: [SHAPE])
    hf.run(run)
    return run


def test_prefill_and_decode_are_measured_in_turns_against_the_language_model(measured):
    rows = {(row.op, row.who): row for row in measured.journal.rows}
    assert set(rows) == {
        (op, who) for op in ("hf-prefill", "hf-decode") for who in ("slow-fast", hf.BASE, "plain PyTorch")
    }
    for (op, who), row in rows.items():
        assert (row.status, row.method, row.extra["slow_tokens"]) == ("ok", "wall", SHAPE.num_slow)
        assert (row.added is None) == (who == hf.BASE)
        assert row.floor_us > 0
        assert row.extra.get("how") == ("eager step" if op == "hf-decode" else None)
        assert row.samples == rows[op, hf.BASE].samples > 0
    assert rows["hf-prefill", "slow-fast"].added["to"] == hf.BASE
    assert rows["hf-decode", "slow-fast"].floor_us > rows["hf-decode", hf.BASE].floor_us


def test_a_shape_is_compiled_as_if_it_were_the_first(run):
    counter = CompileCounter()
    double = torch.compile(lambda x: 2 * x, backend=counter)
    double(torch.ones(2))
    hf.measure(run, "hf", "a shape", "float32", [], hf.BASE, {})
    double(torch.ones(2))
    assert counter.frame_count == 2


def test_without_peers_plain_attention_is_left_out(run, monkeypatch):
    monkeypatch.setattr(hf, "PAIRS", 3)
    monkeypatch.setattr(hf, "model_shapes", lambda wanted, on_cpu: [SHAPE])
    run.peers = set()
    hf.run(run)
    assert {row.who for row in run.journal.rows} == {"slow-fast", hf.BASE}


def test_its_shape_is_128_frames_unless_others_are_named(run, monkeypatch):
    seen = []
    monkeypatch.setattr(hf, "make_model", lambda shape, *_: None)
    monkeypatch.setattr(hf, "sides_of", lambda model, shape, dtype: seen.append(shape.frames) or [])
    for shapes in ([], ["5", "7"]):
        run.shapes = shapes
        hf.run(run)
    assert seen == [128, 5, 7]


def test_a_cache_that_is_full_is_an_error_and_a_prefill_begins_anew(sides):
    prompted = sides["base LM"].make()
    prompted.prefill()
    for _ in range(hf.ROOM):
        prompted.step()
    with pytest.raises(RuntimeError, match="is full"):
        prompted.step()
    assert prompted.prefill_error() < 1e-5
    assert (
        hf.ROOM >= hf.PAIRS + 2 + 3 + 2 + 1
    )  # turns; those of the lane, of compiling, of recording again, of the check


def test_on_a_gpu_steps_are_compiled_before_any_is_timed_and_a_prefill_s_kernels_too(run, sides, monkeypatch):
    seen, compiled = [], []
    monkeypatch.setattr(run, "is_gpu", True)
    monkeypatch.setattr(hf.Prompted, "compile", lambda prompted: compiled.append(prompted))

    def compare(op, shape, dtype, contenders, *, base, lane, observe):
        calls = [each.variants[0].build()[0][0] for each in contenders]
        seen.append((op, lane.func, len(compiled)))
        if observe:
            assert [observe(call)["how"] for call in calls] == ["eager step"] * 3

    monkeypatch.setattr(run, "compare", compare)
    hf.measure(run, "hf", "shape", "float32", list(sides.values()), hf.BASE, {})
    assert seen == [
        ("hf-prefill", timing.wall_lane, 0),
        ("hf-decode", timing.wall_lane, 3),
        ("hf-prefill-gpu", timing.kernel_lane, 3),
        ("hf-decode-gpu", timing.kernel_lane, 6),
    ]


@pytest.fixture
def compiles_briefly(monkeypatch):
    """torch.compile without a code generator; the modes that it is asked for."""
    modes = []
    compile_ = torch.compile
    without_inductor = partial(compile_, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda f, mode, **o: modes.append(mode) or without_inductor(f, **o))
    yield modes
    torch.compiler.reset()


def test_compiled_steps_answer_alike(sides, compiles_briefly):
    for who in ("slow-fast", "plain PyTorch"):
        prompted = sides[who].make()
        prompted.prefill()
        prompted.compile()
        assert prompted.how == "torch.compile, CUDA graph"
        assert prompted.step_error() < 1e-5
        prompted.compile()  # has been
    assert compiles_briefly == ["reduce-overhead"] * 2


def test_a_step_that_no_cuda_graph_holds_says_so(sides, monkeypatch):
    from torch._dynamo.utils import counters

    def refuses(forward, **_):
        counters["inductor"]["cudagraph_skips"] += 1
        return forward

    monkeypatch.setattr(torch, "compile", refuses)
    prompted = sides["base LM"].make()
    prompted.prefill()
    prompted.compile()
    assert prompted.how == "torch.compile, 1 CUDA graphs refused"


def test_without_transformers_a_row_says_so(run, monkeypatch):
    monkeypatch.setattr(hf, "why_absent", lambda: "no transformers")
    monkeypatch.setattr(mllama, "why_absent", lambda: "no transformers")
    hf.run(run)
    mllama.run(run)
    assert [(row.op, row.status) for row in run.journal.rows] == [
        ("hf-prefill", "absent: no transformers"),
        ("mllama-prefill", "absent: no transformers"),
    ]


def test_a_run_of_all_leaves_out_what_takes_minutes_to_compile():
    assert {"hf", "mllama"} <= set(cli.BENCHMARKS) - set(cli._chosen(cli.parser().parse_args([])))


# ------------------------------------------------------------------------------------------------ mllama


def test_ours_and_transformers_attention_answer_alike_and_the_images_matter(images):
    ours, base = (side.make() for side in mllama.sides_of(images, MLLAMA_ON_CPU[0], "float32"))
    for prompted in (ours, base):
        assert prompted.prefill_error() < 1e-5
        assert prompted.step_error() < 1e-5
    assert ours.forward.__self__ is not base.forward.__self__
    blind = images(ours.ids, logits_to_keep=1, use_cache=False).logits[:, -1]
    assert runner.relative_error(blind, ours.prefill()) > 0.1


def test_mllama_is_measured_in_turns_against_transformers_own_attention(run, images, monkeypatch):
    monkeypatch.setattr(hf, "PAIRS", 9)
    mllama.run(run)
    rows = {(row.op, row.who): row for row in run.journal.rows}
    assert set(rows) == {(f"mllama-{op}", who) for op in ("prefill", "decode") for who in ("slowfast", "sdpa")}
    assert {row.status for row in rows.values()} == {"ok"}
    assert {row.extra["vision_tokens"] for row in rows.values()} == {2 * 2 * 65}
    assert rows["mllama-decode", "slowfast"].added["to"] == "sdpa"


def test_mllama_s_shape_is_that_of_11_billion():
    shape = mllama_shapes.LLAMA_3_2_VISION_11B
    assert shape.num_vision == 6404
    assert (
        8.5e9 < mllama_shapes.mllama_cost(shape, "bfloat16", decode=True).read / 2 < 10e9
    )  # without the vision encoder
    whole, one = (mllama_shapes.mllama_cost(shape, "bfloat16", decode) for decode in (False, True))
    assert whole.flops > 256 * one.flops
    assert selection.parse_mllama("64x3i").num_vision == 3 * 6404
    assert selection.parse_mllama("64x3") is None
    assert [each.name for each in selection.mllama_shapes(["8x3i"], on_cpu=True)] == ["8x3i"]
    with pytest.raises(ValueError, match="0 images"):
        selection.check_shapes(["8x0i"], ["mllama"])


# ------------------------------------------------------------------------------------------------ report


def test_a_report_tells_what_each_adds_and_how_a_step_was_made(measured):
    added = {"to": hf.BASE, "median_us": 1e3, "p20_us": 5e2, "p80_us": 2e3, "percent": 4.0, "pairs": 9}
    rows = [
        runner.Row("hf-decode", "128 frames", "bfloat16", who, "ours", median_us=7e3, floor_us=5e3, method="wall")
        for who in ("slow-fast", hf.BASE)
    ]
    rows[0] = replace(rows[0], added=added, extra={"slow_tokens": 8192, "how": "torch.compile, CUDA graph"})
    text = report.markdown(measured.journal.meta, rows)
    line = "| 128 frames | bfloat16 | 8192 | slow-fast | 7.000 | +1.000 | +0.500 .. +2.000 | +4.0% | 9 | 5.000 |"
    assert f"{line} torch.compile, CUDA graph |" in text
    assert f"Wall time, from a call to its answer. All took turns; added: to {hf.BASE}." in text
    whole = report.terminal(measured.journal.meta, measured.journal.rows)
    assert all(report.OP_TITLES[op] in whole for op in ("hf-prefill", "hf-decode"))
