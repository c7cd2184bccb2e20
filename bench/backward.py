"""Gradients of an op: a step (forward + backward) and the backward pass alone, made, checked and observed alike.

Calls are autograd's own, ``torch.autograd.grad`` over static leaves, so that a CUDA graph can hold them. Beside its
time a row tells how much memory a call takes over its inputs, and whether further calls give the same bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from slowfast_kernels.ops.dispatch import choice_for
from slowfast_kernels.ops.explain import FUNCTIONS
from slowfast_kernels.ops.op import OPS

from .runner import Contender, Row, Runner, Variant, relative_error
from .shapes import Cost
from .timing import Call

PARTS = (STEP, BACKWARD) = ("step", "backward")
OPS_OF = {op: tuple(f"{op}-{part}" for part in PARTS) for op in ("attention", "pool", "mix")}
MORE_RUNS = 3  # whose bits are held against those of the first


class Passes(Protocol):
    """Both passes over one input set."""

    def forward(self) -> tuple[Sequence[Tensor], object]:
        """(results, what the backward pass is handed)"""

    def backward(self, kept: object, again: bool) -> Sequence[Tensor]:
        """Gradients; ``again``: ``kept`` will serve another call."""


@dataclass(frozen=True, eq=False)
class Differentiated:
    """``function`` of ``leaves``, and the gradients for those of its results, ``upstream``."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]
    around: Callable[[], AbstractContextManager] = nullcontext  # of either pass

    def forward(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        with torch.enable_grad(), self.around():
            results = self.function(*self.leaves)
        results = (results,) if isinstance(results, Tensor) else results
        return results, results

    def backward(self, kept: tuple[Tensor, ...], again: bool) -> tuple[Tensor, ...]:
        with self.around():
            return torch.autograd.grad(kept, self.leaves, self.upstream, retain_graph=again)


def differentiated(
    function: Callable, inputs: Iterable[Tensor], upstream: Iterable[Tensor], around: Callable = nullcontext
) -> Differentiated:
    """``inputs`` become leaves and are not copied."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    return Differentiated(function, leaves, tuple(upstream), around)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """PyTorch's own ops choose kernels that give the same bits, and do nothing else for it: no memory is filled."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills


# ---------------------------------------------------------------------------------------------- calls


def call_of(passes: Passes, part: str) -> Call:
    """A call that returns tensors: of a step results and gradients, of the backward pass gradients."""
    return partial(_step, passes) if part == STEP else _backward_alone(passes)


def _step(passes: Passes) -> tuple[Tensor, ...]:
    results, kept = passes.forward()
    return *results, *passes.backward(kept, again=False)


def _backward_alone(passes: Passes) -> Callable[[], Sequence[Tensor]]:
    """A call whose forward pass was made before, on the stream that it is called on: autograd's nodes stay on theirs,
    and none may leave a stream that is captured.
    """
    kept: dict[object, object] = {}

    def call() -> Sequence[Tensor]:
        stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        if stream not in kept:
            kept.clear()
            kept[stream] = passes.forward()[1]
        return passes.backward(kept[stream], again=True)

    return call


# ---------------------------------------------------------------------------------------- what is seen


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(*(x.detach().contiguous().view(torch.uint8) for x in (a, b)))


def observe(call: Call, device: torch.device) -> dict[str, int | bool]:
    """``same_bits`` of further calls, ``result_bytes`` and, on a GPU, ``peak_bytes``: memory over what is there."""
    first = call()
    facts: dict[str, int | bool] = {"result_bytes": sum(x.nbytes for x in first)}
    more = (call() for _ in range(MORE_RUNS))
    facts["same_bits"] = all(same_bits(a, b) for answer in more for a, b in zip(first, answer, strict=True))
    del first
    if device.type == "cuda":
        facts["peak_bytes"] = peak_bytes(call)
    return facts


def peak_bytes(call: Call) -> int:
    """What the call's allocations add to those of now, at most; its answer is held until it ends."""
    return peak_and_left_bytes(call)[0]


def peak_and_left_bytes(call: Call) -> tuple[int, int]:
    """What the call's allocations add to those of now: at most, and for its answer, when it has ended."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    answer = call()
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    del answer
    return found


# --------------------------------------------------------------------------------------- who competes


class Way(NamedTuple):
    """One way to run a competitor. ``build`` takes the part that will be timed and gives the passes over every input
    set, and what makes of results and gradients the tensors that the reference has.
    """

    label: str
    build: Callable[[str], tuple[list[Passes], Callable[[Sequence[Tensor]], Sequence[Tensor]]]]


class Competitor(NamedTuple):
    who: str
    ways: Callable[[str], Iterable[Way]]  # of a part
    kind: str = "peer"
    capturable: bool = True
    facts: Mapping[str, object] = MappingProxyType({})


def compare(
    runner: Runner,
    op: str,
    shape: str,
    dtype: str,
    competitors: Sequence[Competitor],
    reference: Sequence[Tensor],
    costs: Mapping[str, Cost],
) -> list[Row]:
    """Rows of both parts: ``op`` "-step" and "-backward"."""
    rows = []
    for part in PARTS:
        contenders = [_contender(competitor, part, reference, costs[part]) for competitor in competitors]
        looked_at = partial(observe, device=runner.device)
        rows += runner.compare(f"{op}-{part}", shape, dtype, contenders, sustained=True, observe=looked_at)
    return rows


def is_done(runner: Runner, op: str, shape: str, dtype: str, names: Iterable[str]) -> bool:
    return all(runner.is_done(each, shape, dtype, who) for each in OPS_OF[op] for who in names)


def _contender(competitor: Competitor, part: str, reference: Sequence[Tensor], cost: Cost) -> Contender:
    def variant(way: Way) -> Variant:
        def build() -> tuple[list[Call], Callable[[], float]]:
            every, to_answers = way.build(part)

            def check() -> float:
                results, kept = every[0].forward()
                found = (*results, *every[0].backward(kept, again=part == BACKWARD))
                answers = to_answers([x.detach() for x in found])
                return max(relative_error(got, want) for got, want in zip(answers, reference, strict=True))

            return [call_of(passes, part) for passes in every], check

        return Variant(way.label, build)

    variants = map(variant, competitor.ways(part))
    return Contender(competitor.who, variants, cost, competitor.kind, competitor.capturable, facts=competitor.facts)


class Choice(NamedTuple):
    """What a call of ours runs, asked for ``backend`` (None: automatic)."""

    who: str
    backend: str | None
    forward: str
    backward: str

    @property
    def label(self) -> str:
        return f"{self.forward}, backward {self.backward}"


def named_arguments(op: str, *arguments, **options) -> dict[str, object]:
    """Of a public function's call, by their names and with its defaults."""
    given = inspect.signature(FUNCTIONS[op]).bind(*arguments, **options)
    given.apply_defaults()
    return given.arguments


def choices(op: str, backends: Iterable[str], *arguments, **options) -> list[Choice]:
    """The automatic choice of a public function's call, then what ``backends`` run that is not the same."""
    given = named_arguments(op, *arguments, **options)
    found: dict[tuple[str, str], Choice] = {}
    for who, backend in (("auto", None), *((name, name) for name in backends)):
        tensors, called = OPS[op].bind(given | {"backend": backend})
        try:
            forward = choice_for(OPS[op].facts(tensors, called), tensors[0].device, backend).backend
            pair = forward, OPS[op].backward_choice(tensors, called).backend
        except NotImplementedError:
            pair = who, who  # the call says why
        found.setdefault(pair, Choice(who, backend, *pair))
    return list(found.values())


def ours(
    choice: Choice, every: Callable[[], list[Passes]], to_answers: Callable = tuple, eager_is_capturable: bool = False
) -> Competitor:
    """Of one way; ``every`` makes its passes over all input sets."""
    way = Way(choice.label, lambda part: (every(), to_answers))
    capturable = eager_is_capturable or "eager" not in (choice.forward, choice.backward)
    return Competitor(choice.who, lambda part: [way], "ours", capturable)


def compiled(function: Callable, part: str) -> Callable:
    """torch.compile's. Gradients of one forward pass can be taken again only if it gives no buffers away."""
    from torch._functorch import config

    torch.compiler.reset()
    inner = torch.compile(function, dynamic=False)

    def call(*arguments, **options):
        with config.patch(donated_buffer=part == STEP):
            return inner(*arguments, **options)

    return call
