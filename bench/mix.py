"""Gate and residual mix alone, against the best PyTorch composition and torch.compile of it; its gradients too.

Floor: state read and written, context read, over the copy bandwidth; of the backward pass the gradient read and that of
the state written, and on the text rows state and context read and the context's gradient written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import slowfast_kernels as sk
from slowfast_kernels import eager
from slowfast_kernels.gate import Gate

from . import backward
from .attention import our_backends
from .backward import BACKWARD, STEP, Choice, Competitor, Way, differentiated
from .peers import compositions
from .registry import MIX
from .runner import Contender, Runner, Variant, relative_error
from .selection import parse_mix, select
from .shapes import BYTES, MixShape, mix_backward_cost, mix_cost
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
    _run(runner, OP, _run_shape)


def run_backward(runner: Runner) -> None:
    _run(runner, f"{OP}-{STEP}", _run_backward)


def _run(runner: Runner, op: str, run_shape: Callable) -> None:
    shapes = select(MIX, runner.shapes, parse_mix, not runner.is_gpu)
    if not shapes:
        return
    backends, peers = our_backends(runner, op), compositions(runner, op)
    for shape in shapes:
        for dtype in runner.dtypes:
            run_shape(runner, shape, dtype, backends, peers)


def _make(shape: MixShape, dtype: str, device: torch.device) -> tuple[Tensor, ...]:
    def random(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, device=device, dtype=getattr(torch, dtype)) * scale

    if shape.num_text == shape.rows:
        rows = torch.arange(shape.rows, dtype=torch.int32, device=device)
    else:
        rows = torch.randperm(shape.rows, device=device)[: shape.num_text].sort().values.int()
    gate = random(1, shape.channels, scale=0.01), random(1), random(1)
    return random(shape.rows, shape.channels), random(shape.num_text, shape.channels), rows, *gate


def _make_sets(runner: Runner, shape: MixShape, dtype: str) -> list[tuple[Tensor, ...]]:
    bytes_per_set = (shape.rows + shape.num_text) * shape.channels * BYTES[dtype]
    count = num_input_sets(bytes_per_set, runner.journal.meta["cache_bytes"])
    return [_make(shape, dtype, runner.device) for _ in range(count)]


def _ways(shape: MixShape) -> list[Callable[..., Tensor]]:
    return [all_rows] if shape.num_text == shape.rows else [copied_rows, added_rows]


def _run_shape(runner: Runner, shape: MixShape, dtype: str, backends: list[str], peers: list[str]) -> None:
    sets = _make_sets(runner, shape, dtype)
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

    def theirs(name: str) -> Contender:
        compiled = name == "torch-compile"
        variants = [Variant(way.__name__, partial(build_theirs, way, compiled)) for way in _ways(shape)]
        return Contender(name, variants, cost)

    runner.compare(OP, shape.name, dtype, [*map(ours, backends), *map(theirs, peers)])


# --------------------------------------------------------------------------------------------- gradients


def _run_backward(runner: Runner, shape: MixShape, dtype: str, backends: list[str], peers: list[str]) -> None:
    sets = _make_sets(runner, shape, dtype)
    mine = backward.choices("gated_residual_mix", backends, *sets[0])
    if backward.is_done(runner, OP, shape.name, dtype, [*(choice.who for choice in mine), *peers]):
        return
    upstream = [torch.randn_like(state) for state, *_ in sets]

    def passes(function: Callable, long_rows: bool = False) -> list[backward.Passes]:
        """Of functions of (state, context, rows, weight, bias, warm-up), rows being no leaf."""
        every = []
        for (state, context, rows, *gate), grad in zip(sets, upstream, strict=True):
            rows = rows.long() if long_rows else rows
            mixed = partial(_with_rows, function, rows)
            every.append(differentiated(mixed, (state, context, *gate), [grad]))
        return every

    def ours(choice: Choice) -> Competitor:
        function = partial(sk.gated_residual_mix, backend=choice.backend)
        return backward.ours(choice, partial(passes, function), _answers, eager_is_capturable=True)

    def theirs(name: str) -> Competitor:
        def build(way: Callable, part: str):
            function = backward.compiled(way, part) if name == "torch-compile" else way
            return passes(function, long_rows=True), _answers

        return Competitor(name, lambda part: [Way(way.__name__, partial(build, way)) for way in _ways(shape)])

    backward_cost = mix_backward_cost(shape, dtype)
    costs = {STEP: mix_cost(shape, dtype) + backward_cost, BACKWARD: backward_cost}
    competitors = [*map(ours, mine), *map(theirs, peers)]
    reference = reference_gradients(sets[0], upstream[0])
    backward.compare(runner, OP, shape.name, dtype, competitors, _answers(reference), costs)


def _answers(found: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gate's gradients as one: a bias's alone is a sum that may be near zero, and then all rounding."""
    mixed, state, context, *gate = found
    return mixed, state, context, torch.cat([x.flatten() for x in gate])


def _with_rows(function: Callable, rows: Tensor, state: Tensor, context: Tensor, *gate: Tensor) -> Tensor:
    return function(state, context, rows, *gate)


def reference_gradients(inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
    """(mixed state, gradients of state, context, gate weight, bias and warm-up), by the eager formula in float64."""
    state, context, rows, *gate = (x.double() if x.is_floating_point() else x for x in inputs)
    mixed = eager.gated_residual_mix(state, context, rows, Gate.of(*gate))
    *found, _ = eager.gated_residual_mix_backward(upstream.double(), state, context, rows, Gate.of(*gate))
    return mixed, *found
