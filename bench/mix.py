"""Gate and residual mix alone, against the best PyTorch composition and torch.compile of it.

Floor: state read and written, context read, over the copy bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import slowfast_kernels as sk

from .attention import our_backends
from .runner import Contender, Runner, Variant, relative_error
from .selection import parse_mix, select
from .shapes import BYTES, MIX, MixShape, mix_cost
from .timing import num_input_sets

OP = "mix"


def _gate(picked: Tensor, weight: Tensor, bias: Tensor, warm_up: Tensor) -> Tensor:
    return F.linear(picked, weight, bias).tanh() * warm_up.tanh()


def all_rows(state, context, rows, weight, bias, warm_up):
    """Every row is a text row: no index at all."""
    return torch.addcmul(state, _gate(state, weight, bias, warm_up), context)


def copied_rows(state, context, rows, weight, bias, warm_up):
    """A copy of the state with the text rows overwritten."""
    picked = state.index_select(0, rows)
    mixed = torch.addcmul(picked, _gate(picked, weight, bias, warm_up), context)
    return state.index_copy(0, rows, mixed)


def added_rows(state, context, rows, weight, bias, warm_up):
    """g * context added onto a copy of the state."""
    gate = _gate(state.index_select(0, rows), weight, bias, warm_up)
    return state.index_add(0, rows, gate * context)


def run(runner: Runner) -> None:
    shapes = select(MIX, runner.shapes, parse_mix, not runner.is_gpu)
    if not shapes:
        return
    backends = our_backends(runner, OP)
    if not runner.is_gpu and runner.wants_peer("torch-compile"):
        runner.absent(OP, "torch-compile", "timed on a GPU only (its C++ compilation would outlast the run)")
    for shape in shapes:
        for dtype in runner.dtypes:
            _run_shape(runner, shape, dtype, backends)


def _make(shape: MixShape, dtype: str, device: torch.device) -> tuple[Tensor, ...]:
    def random(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, device=device, dtype=getattr(torch, dtype)) * scale

    if shape.num_text == shape.rows:
        rows = torch.arange(shape.rows, dtype=torch.int32, device=device)
    else:
        rows = torch.randperm(shape.rows, device=device)[: shape.num_text].sort().values.int()
    gate = random(1, shape.channels, scale=0.01), random(1), random(1)
    return random(shape.rows, shape.channels), random(shape.num_text, shape.channels), rows, *gate


def _run_shape(runner: Runner, shape: MixShape, dtype: str, backends: list[str]) -> None:
    peers = [
        name for name in ("torch", "torch-compile") if runner.wants_peer(name) and (runner.is_gpu or name == "torch")
    ]
    bytes_per_set = (shape.rows + shape.num_text) * shape.channels * BYTES[dtype]
    count = num_input_sets(bytes_per_set, runner.journal.meta["cache_bytes"])
    sets = [_make(shape, dtype, runner.device) for _ in range(count)]
    state, context, rows, *gate = (x.float() if x.is_floating_point() else x.long() for x in sets[0])
    reference = copied_rows(state, context, rows, *gate)
    cost = mix_cost(shape, dtype)

    def ours(backend: str) -> Contender:
        def build():
            calls = [partial(sk.gated_residual_mix, *inputs, backend=backend) for inputs in sets]
            return calls, lambda: relative_error(calls[0](), reference)

        return Contender(backend, [Variant("", build)], cost, "ours")

    def build_theirs(function: Callable, compiled: bool):
        if compiled:
            torch.compiler.reset()
            function = torch.compile(function, dynamic=False)
        calls = [partial(function, s, c, r.long(), w, b, u) for s, c, r, w, b, u in sets]
        return calls, lambda: relative_error(calls[0](), reference)

    ways = [all_rows] if shape.num_text == shape.rows else [copied_rows, added_rows]

    def theirs(name: str) -> Contender:
        variants = [Variant(way.__name__, partial(build_theirs, way, name == "torch-compile")) for way in ways]
        return Contender(name, variants, cost)

    runner.compare(OP, shape.name, dtype, [*map(ours, backends), *map(theirs, peers)])
