"""One decoded token of the base model at batches 1 to 32, attention and greedy sampling included, and the slow path's.

Contenders take turns on the same weights: our step by GEMV kernels, our step by cuBLAS, the latter fused by
torch.compile, gpt-fast's way and transformers (``decode_peers``). A turn is a row of tokens, each fed with the one
before, and nobody waits for the device in between, as in a generation. The floor is one read of weights and cache at
the read rate of the same run.

What the slow path adds is measured in pairs, as in ``model``, and held to the read of its own cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from . import model as model_bench
from .decode_peers import (
    PeerSession,
    compiled,
    plain_step,
    transformers_step,
    transformers_version,
)
from .hf import why_absent
from .runner import Contender, Runner, Variant, relative_error
from .selection import decode_shapes
from .shapes import DecodeShape, decode_cost
from .timing import Call, Lane, wall_lane

OP, SLOW_OP = "decode-step", "decode-slow"
TOKENS = 4  # a turn
TURNS = 30
ROUNDING = 1e-3  # relative, of float32 through a whole model
STEPS = TOKENS * (TURNS + 4) + 2  # that a session has room for: those of the turns, of warming up, of the check
SLOW_FRAMES = (128, 1536)


def run(runner: Runner) -> None:
    shapes = decode_shapes(runner.shapes, not runner.is_gpu)
    if not shapes:
        return
    dtype = runner.dtypes[0]
    models = model_bench.Models.of(shapes[0].model, dtype, runner.device)
    for shape in shapes:
        base_step(runner, models.base, shape, dtype)
    slow_path(runner, models, shapes[0], dtype)


# --------------------------------------------------------------------------------------------------- base model


def base_step(runner: Runner, model, shape: DecodeShape, dtype: str) -> None:
    from slowfast_model import DecodeSession
    from slowfast_model.decode import gemv_limit

    ids = torch.randint(shape.model.vocab, (shape.batch, shape.cached), device=runner.device)
    make = partial(DecodeSession, model, ids, max_new_tokens=STEPS)
    first = make(gemv=False)
    token = first.most_likely
    expected = exact_logits(model, ids, token)
    tolerance = max(2 * relative_error(first.step(token), expected), ROUNDING)
    limit = gemv_limit(model.model.embed_tokens(token), model.backend)
    capacity = first.cache.step.capacity
    del first

    def ours(gemv: bool, compile_step: bool = False):
        if gemv and limit is not None:
            raise NotImplementedError(limit)
        session = make(gemv=gemv)
        if runner.is_gpu:
            session.capture(compile_step=compile_step)
        return session

    def peer(step_of: Callable) -> PeerSession:
        session = make(gemv=False)
        return PeerSession(compiled(step_of(session), runner.device), session.logits)

    graph = "graph" if runner.is_gpu else "eager step"
    whole = "torch.compile" if runner.is_gpu else "eager step"
    entries = [
        ("gemv", "ours", graph, partial(ours, True)),
        ("cublas", "base", graph, partial(ours, False)),
    ]
    if runner.is_gpu and runner.wants_peer("torch-compile"):
        entries.append(("cublas, compiled", "peer", f"torch.compile, {graph}", partial(ours, False, True)))
    if runner.wants_peer("gpt-fast"):
        entries.append(("gpt-fast", "peer", whole, partial(peer, plain_step)))
    absent = why_absent()
    if absent is None and runner.wants_peer("transformers"):
        step_of = partial(transformers_step, input_ids=ids, capacity=capacity)
        entries.append(("transformers", "peer", f"{whole}, {transformers_version()}", partial(peer, step_of)))
    elif runner.wants_peer("transformers"):
        runner.absent(OP, "transformers", absent)
    cost = decode_cost(shape, dtype)
    contenders = [
        Contender(who, [_variant(label, build, token, expected)], cost, kind, tolerance=tolerance)
        for who, kind, label, build in entries
    ]
    turns = TURNS // 3 if runner.quick else TURNS
    rows = runner.compare(OP, shape.name, dtype, contenders, base="cublas", lane=partial(_lane, runner, turns))
    for row in rows:
        if row.ok and row.floor_us:
            print(f"  {row.who}: {row.median_us / row.floor_us:.2f}x the read of weights and cache", flush=True)


def exact_logits(model, ids: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Of the step after ``ids`` that takes ``token``, in float32: contenders may err twice as much as cuBLAS does."""
    from slowfast_model import DecodeSession

    return DecodeSession(copy.deepcopy(model).float(), ids, max_new_tokens=2, gemv=False).step(token)


def _variant(label: str, make: Callable, token: torch.Tensor, expected: torch.Tensor) -> Variant:
    def build() -> tuple[list[Call], Callable[[], float]]:
        session = make()
        error = relative_error(session.step(token), expected)

        def call() -> torch.Tensor:
            for _ in range(TOKENS):
                session.step(session.most_likely)
            return session.most_likely

        for _ in range(2):  # what torch.compile records, it records in its second and third call
            call()
        return [call], lambda: error

    return Variant(label, build)


def _lane(runner: Runner, turns: int, calls: list[Call]) -> Lane:
    lane = wall_lane(calls, runner.device, model_bench.BUDGET_S, turns)
    return lane._replace(turn=lambda: [seconds / TOKENS for seconds in lane.turn()])


# ---------------------------------------------------------------------------------------------------- slow path


def slow_path(runner: Runner, models: model_bench.Models, shape: DecodeShape, dtype: str) -> None:
    """What slow tokens add to a step of one prompt, held to the read of their keys and values."""
    for frames in SLOW_FRAMES if runner.is_gpu else SLOW_FRAMES[:1]:
        each = replace(shape.model, frames=frames)
        prompts = model_bench._prompts(each, dtype, runner.device)[:2]
        for row in model_bench.measure(runner, models, each, dtype, SLOW_OP, prompts, {}):
            if row.added:
                added, read = row.added["median_us"], row.extra["slow_read_us"]
                print(f"  {each.num_slow} slow tokens add {added:.1f} us, {added / read:.2f}x their read", flush=True)
