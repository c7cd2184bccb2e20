"""The decode benchmark: its shapes and floors, who takes part on what terms, and the sweep of the kernels' tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench_cases import CPU
from model_cases import one_thread  # noqa: F401

import slowfast_model
from bench import decode, decode_peers, model, registry, report, selection, shapes
from bench.registry import DECODE, TINY_MODEL
from bench.runner import Row
from bench.shapes import DecodeShape, Heads
from slowfast_model import DecodeSession

SMALL = replace(
    TINY_MODEL, hidden=64, intermediate=96, vocab=64, layers=2, heads=Heads(4, 2, 16), text=9, fast_frames=2
)
SHAPE = DecodeShape(SMALL, 2, 9)

# ------------------------------------------------------------------------------------------------ floors


def test_a_step_reads_the_weights_once_and_each_prompt_s_cache():
    one, eight = (shapes.decode_cost(replace(DECODE[0], batch=batch), "bfloat16") for batch in (1, 8))
    cache = 1360 * 28 * 2 * 4 * 128 * 2
    assert one.read - cache == pytest.approx(14.14e9, rel=1e-3)
    assert eight.read - one.read == 7 * cache
    assert (eight.flops, eight.written) == (8 * one.flops, 8 * one.written)


def test_the_floor_of_the_kernels_is_that_of_the_benchmark_s_weights():
    from bench.tune_gemv import SHAPES
    from slowfast_kernels.heuristics.gemv import floor_us

    layer = [SHAPES[name] for name in ("qkv", "o", "gate_up", "down")]
    weights = shapes.model_cost(DECODE[0].model, "bfloat16", 0, 0, decode=True).read
    assert floor_us([*28 * layer, SHAPES["head"]], 2, read_gbps=1) == weights / 1e3


def test_slow_tokens_are_held_to_the_read_of_their_cache():
    assert shapes.slow_read_bytes(replace(registry.QWEN2_7B_MODEL, frames=1536), "bfloat16") == 805306368


@pytest.mark.parametrize(
    ("text", "found"), [("4x2000", (4, 2000)), ("1x1360", (1, 1360)), ("4", None), ("1x1x1", None)]
)
def test_a_shape_is_a_batch_and_the_tokens_in_its_cache(text, found):
    shape = selection.parse_decode(text)
    assert (shape and (shape.batch, shape.cached)) == found


def test_a_run_takes_the_batches_of_the_registry_or_those_that_are_named():
    assert [shape.name for shape in selection.decode_shapes([], on_cpu=False)] == [f"{2**i}x1360" for i in range(6)]
    assert {shape.model for shape in selection.decode_shapes([], on_cpu=True)} == {TINY_MODEL}
    assert selection.decode_shapes(["3x7"], on_cpu=True) == [DecodeShape(TINY_MODEL, 3, 7)]


# ------------------------------------------------------------------------------------------- who takes part


@pytest.fixture
def small_model():
    with torch.no_grad():
        yield model.make_model(SMALL, "float32", CPU)


@torch.no_grad()
def test_a_run_measures_all_in_turns_against_our_step_and_says_who_is_not_there(run, small_model, monkeypatch):
    monkeypatch.setattr(decode, "TURNS", 6)
    monkeypatch.setattr(decode, "why_absent", lambda: "transformers is not installed")
    monkeypatch.setattr(decode, "decode_shapes", lambda *_: [SHAPE])
    monkeypatch.setattr(model, "make_model", lambda *_: small_model)
    monkeypatch.setattr(decode, "SLOW_FRAMES", (2, 5))
    monkeypatch.setattr(model, "PAIRS", 9)
    decode.run(run)
    rows = {(row.op, row.who): row for row in run.journal.rows}
    assert rows["decode-step", "transformers"].status == "absent: transformers is not installed"
    assert rows["decode-step", "gemv"].status.startswith("unsupported: got a model on cpu")
    base, peer = rows["decode-step", "cublas"], rows["decode-step", "gpt-fast"]
    assert 1 <= base.samples == peer.samples == peer.added["pairs"] <= 2, "a quick run's"
    assert (base.error, peer.error < 1e-5) == (0, True)
    assert base.floor_us == pytest.approx(
        shapes.decode_cost(SHAPE, "float32").floor_us(run.ceilings, "float32"), abs=1e-3
    )
    slow = rows["decode-slow", "slow-fast"]
    assert slow.shape == "2 frames"
    assert slow.added["to"] == "base LLM"
    assert slow.extra["slow_read_us"] == pytest.approx(2 * 9 * 1 * 2 * 2 * 16 * 4 / 10 / 1e3, abs=1e-3)


def test_a_turn_s_time_is_that_of_a_token(run):
    calls = []
    lane = decode._lane(run, 5, [lambda: calls.append(1)])
    whole = decode.wall_lane([lambda: None], CPU, 1.0, 5)
    assert lane.turns == whole.turns == 5
    (seconds,) = lane.turn()
    assert seconds < 1e-3
    assert len(calls) == 3


def test_a_turn_feeds_each_token_with_the_one_before():
    fed = []

    class Session:
        most_likely = torch.tensor([0])

        def step(self, token):
            fed.append(int(token))
            self.most_likely = token + 1
            return torch.ones(1, 4)

    (call,), check = decode._variant("", Session, torch.tensor([7]), torch.ones(1, 4)).build()
    del fed[:]
    call()
    assert fed == list(range(fed[0], fed[0] + decode.TOKENS))
    assert check() == 0


class FakeSession:
    """A session on a GPU, as far as the benchmark looks at it."""

    def __init__(self, model, ids, *, max_new_tokens: int, gemv: bool) -> None:
        self.gemv, self.compiled, self.left = gemv, None, max_new_tokens
        self.logits, self.most_likely = torch.ones(len(ids), 4), torch.zeros(len(ids), dtype=torch.int64)
        self.cache = type("", (), {"step": type("", (), {"capacity": 99})})
        SESSIONS.append(self)

    def capture(self, *, compile_step: bool) -> None:
        self.compiled = compile_step

    def step(self, token: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        assert self.left >= 0
        return self.logits


SESSIONS: list[FakeSession] = []


@torch.no_grad()
@pytest.mark.parametrize("compiles", [False, True])
def test_on_a_gpu_our_steps_are_captured_with_and_without_the_kernels_and_compiled(
    run, small_model, monkeypatch, compiles
):
    SESSIONS.clear()
    monkeypatch.setattr(slowfast_model, "DecodeSession", FakeSession)
    monkeypatch.setattr(slowfast_model.decode, "gemv_limit", lambda *_: None)
    monkeypatch.setattr(run, "is_gpu", True)
    run.quick, run.peers = False, {"torch-compile"} if compiles else set()
    decode.base_step(run, small_model, SHAPE, "float32")
    expected = {"gemv": (True, False), "cublas": (False, False)}
    if compiles:
        expected["cublas, compiled"] = (False, True)
    made = [(session.gemv, session.compiled) for session in SESSIONS[2:]]  # behind cuBLAS's, and float32's
    assert made == list(expected.values())
    assert [row.who for row in run.journal.rows] == list(expected)
    assert {row.samples for row in run.journal.rows} == {decode.TURNS}


# ------------------------------------------------------------------------------------------------- peers


def _plain(session, ids):
    return decode_peers.plain_step(session)


def _transformers(session, ids):
    pytest.importorskip("transformers")
    return decode_peers.transformers_step(session, ids, session.cache.step.capacity)


@torch.no_grad()
@pytest.mark.parametrize("step_of", [_plain, _transformers])
def test_a_peer_decodes_the_same_weights_to_the_same_logits(step_of, small_model):
    ids = torch.randint(64, (2, 9))
    ours = DecodeSession(small_model, ids, max_new_tokens=4)
    peer = decode_peers.PeerSession(step_of(ours, ids), ours.logits)
    for _ in range(4):
        assert torch.equal(peer.most_likely, ours.most_likely)
        torch.testing.assert_close(peer.step(peer.most_likely), ours.step(ours.most_likely), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_plain_step_is_one_graph(small_model):
    ids = torch.randint(64, (2, 9))
    session = DecodeSession(small_model, ids, max_new_tokens=4)
    torch._dynamo.reset()
    step = torch.compile(decode_peers.plain_step(session), backend="eager", fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            expected = session.step(session.most_likely.clone())
            logits, _ = step(session._token)
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------- report and sweep


def test_the_report_tells_what_slow_tokens_add_in_times_of_their_read():
    added = {"to": "base LLM", "median_us": 300.0, "p20_us": 1, "p80_us": 2, "percent": 1, "pairs": 3}
    facts = {"slow_tokens": 8192, "slow_read_us": 250.0}
    rows = [
        Row("decode-slow", "128 frames", "bfloat16", "slow-fast", "ours", median_us=5300.0, added=added, extra=facts),
        Row("decode-slow", "128 frames", "bfloat16", "base LLM", "base", median_us=5000.0, extra=facts),
    ]
    header, line = report.model_table(rows, "decode-slow")
    assert line[header.index("added / slow cache's read")] == "1.20x"
    rows[0].added = None
    assert "added / slow cache's read" not in report.model_table(rows, "decode-slow")[0]


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 32])
def test_the_sweep_of_a_launch_starts_from_the_plan_and_repeats_nothing(batch):
    pytest.importorskip("triton")
    from bench import tune_gemv
    from slowfast_kernels.heuristics.gemv import gemv_config

    for name, shape in tune_gemv.SHAPES.items():
        configs = tune_gemv.candidates(name, batch)
        assert configs[0] == gemv_config(shape, batch, 2)
        assert len(set(configs)) == len(configs) >= 3
        assert {config.tensor_cores for config in configs} == {1: {False}, 2: {False, True}}.get(batch, {True})
        assert {config.block_m for config in configs if not config.tensor_cores} <= {batch}
        assert {config.block_m for config in configs if config.tensor_cores} <= {max(16, batch)}
        assert name not in tune_gemv.PAIRED or min(config.block_n for config in configs) >= 2


def test_the_sweep_keeps_the_best_and_stops_at_a_wrong_answer(monkeypatch):
    pytest.importorskip("triton")
    from bench import timing, tune_gemv

    us = {2: 5.0, 4: 3.0, 8: 4.0}
    error = {2: 0.0, 4: 0.0, 8: 0.0}

    class Inputs:
        def __init__(self, *_) -> None: ...

        def launch(self, config=None):
            self.config = config
            return torch.ones(3) + (error[config.block_n] if config else 0)

        def product(self): ...

    def time_calls(calls, device, budget_s):
        block_n = getattr(calls[0], "keywords", {}).get("config")
        took = us[block_n.block_n] if block_n else 9.0
        return timing.Timing(took, took, took, 1, "graph")

    monkeypatch.setattr(tune_gemv, "Inputs", Inputs)
    monkeypatch.setattr(tune_gemv, "time_calls", time_calls)
    tried = [tune_gemv.GemvConfig(1, n, 512, 4, 4) for n in us]
    monkeypatch.setattr(tune_gemv, "candidates", lambda *_: tried)
    entry = tune_gemv.sweep("qkv", 1, CPU, 0, 0.1)
    assert (entry["own"]["us"], entry["best"]["us"], entry["best"]["block_n"], entry["cublas_us"]) == (5.0, 3.0, 4, 9.0)
    assert "best     3.00 us  n4 k512 w4 s4 (11010 GB/s)" in tune_gemv.show(entry, 4608 * 3584 * 2)
    error[8] = 0.5
    with pytest.raises(AssertionError, match=r"qkv of 1: .*block_n=8.* differs"):
        tune_gemv.sweep("qkv", 1, CPU, 0, 0.1)
