"""explain: what a call would do, without doing it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..call_plan import CallPlan
from ..heuristics.backends import BACKENDS
from ..messages import describe
from .attention import text_cross_attention
from .dispatch import choice_for, is_differentiated, needs_formula, needs_torch_op, requested_backend, signature, why
from .fused import slowfast_cross_attention
from .gated_mix import gated_residual_mix
from .merge import merge_attention
from .op import EAGER_PLAN, OPS, Op
from .pool import slowfast_pool

FUNCTIONS = {
    function.__name__: function
    for function in (
        slowfast_pool,
        text_cross_attention,
        gated_residual_mix,
        slowfast_cross_attention,
        merge_attention,
    )
}


@dataclass(frozen=True, kw_only=True)
class Explanation(CallPlan):
    """How a call would run and why so; ``print`` it. Beside what ``CallPlan`` has (tiles, num_splits, grid, ...):

    ``op``: the function's name. ``call``: its arguments by type and shape. ``backend``: what runs it, and ``reason``
    why; None where nothing runs: the tensors have shapes alone. ``rejected``: each faster backend, and why not it.
    ``route``: how the call gets there. ``backward``: what its backward pass runs. ``parts``: the calls that it is made
    of, if it is not one; ``backend`` and the numbers are then theirs.
    """

    op: str
    call: str
    backend: str | None
    reason: str
    rejected: Mapping[str, str]
    route: str
    backward: str
    parts: tuple[Explanation, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "rejected", MappingProxyType(dict(self.rejected)))

    def __str__(self) -> str:
        lines = [self.call, _line("backend", f"{self.backend or 'none'}, {self.reason}")]
        if not self.parts:
            lines += [_line(f"not {backend}", reason) for backend, reason in self.rejected.items()]
            lines += self._plan_lines()
        lines += [_line("route", self.route), _line("backward", self.backward)]
        for part in self.parts:
            lines += [f"  {line}" for line in str(part).splitlines()]
        return "\n".join(lines)

    def _plan_lines(self) -> list[str]:
        lines = []
        if self.tiles:
            lines.append(_line("tiles", ", ".join(f"{name} {value}" for name, value in self.tiles.items())))
        if self.num_splits is not None:
            lines.append(_line("splits", str(self.num_splits)))
        if self.grid is not None:
            lines.append(_line("grid", " x ".join(map(str, self.grid))))
        if self.workspace_bytes is not None:
            lines.append(_line("workspace", f"{self.workspace_bytes} bytes"))
        return lines + [_line("note", note) for note in self.notes]


def _line(name: str, text: str) -> str:
    return f"  {name:<11}{text}"


def explain(op: str | Callable, /, *arguments, **options) -> Explanation:
    """Which backend a call would take, how it would be cut, and why the faster backends are passed over.

    No kernel runs, and nothing on a GPU is read (under SLOWFAST_DEBUG=1 row indices and prefix sums are, as in a call).
    What is around it counts as it does for a call: ``use_backend``, ``no_grad``, ``torch.func`` transforms.

    Args:
        op: the name of a public op ("text_cross_attention"), or the function.
        arguments, options: those of the call.

    Returns:
        An ``Explanation``: attributes to ask, a text to print.

    Raises:
        ValueError: ``op`` is none of the ops.
        ValueError, TypeError, NotImplementedError: what the call itself would raise.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", None)
    function = FUNCTIONS.get(name)
    if function is None or not (isinstance(op, str) or op is function):
        raise ValueError(f"op: got {describe(op)}, want one of {', '.join(FUNCTIONS)}")
    try:
        given = inspect.signature(function).bind(*arguments, **options)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    given.apply_defaults()
    called = OPS[name]
    return _explain(called, *called.bind(given.arguments))


def _explain(op: Op, tensors: tuple, options: tuple) -> Explanation:
    parts = tuple(_explain(*part) for part in op.parts(tensors, options))
    if parts:
        return _of_parts(op, tensors, options, parts)
    op.check(tensors, options)
    facts = {"op": op.name, "call": op.call_text(tensors, options)}
    if needs_formula(*tensors):
        op.check_data(tensors)
        why_not = "only PyTorch's own ops can carry tangents and transforms"
        rejected = dict.fromkeys(BACKENDS[:-1], why_not)
        route = "the eager formula, whatever backend is asked for"
        return _made(
            facts | {"backward": "autograd's, of the formula"},
            "eager",
            "torch.func or a forward-mode tangent",
            rejected,
            route,
            EAGER_PLAN,
        )
    route = _route_of(op, tensors)
    if _has_shapes_alone(tensors):
        facts["backward"] = "none runs"
        return _made(facts, None, "the tensors have shapes and no numbers: nothing runs", {}, route, CallPlan())
    op.check_data(tensors)
    facts["backward"] = _backward_of(op, tensors, options)
    choice = choice_for(op.facts(tensors, options), tensors[0].device, requested_backend(options.backend))
    plan = op.plan(choice.backend, tensors, options)
    return _made(facts, choice.backend, why(choice, options.backend), choice.rejected, route, plan)


def _made(
    facts: dict, backend: str | None, reason: str, rejected: Mapping[str, str], route: str, plan: CallPlan
) -> Explanation:
    chosen = {"backend": backend, "reason": reason, "rejected": rejected, "route": route}
    return Explanation(**facts, **chosen, **vars(plan))


def _of_parts(op: Op, tensors: tuple, options: tuple, parts: tuple[Explanation, ...]) -> Explanation:
    """What attends comes first, and its numbers stand for the call's."""
    backends = list(dict.fromkeys(part.backend for part in parts))
    sizes = [part.workspace_bytes for part in parts]
    rejected = {backend: reason for part in reversed(parts) for backend, reason in part.rejected.items()}
    return Explanation(
        op=op.name,
        call=op.call_text(tensors, options),
        backend=None if None in backends else ", ".join(backends),
        reason="as its parts",
        rejected=rejected,
        route=f"{' and '.join(part.op for part in parts)}, so that the context is kept for the backward pass",
        backward="its parts'",
        parts=parts,
        tiles=parts[0].tiles,
        num_splits=parts[0].num_splits,
        grid=parts[0].grid,
        workspace_bytes=None if None in sizes else max(sizes),
    )


def _has_shapes_alone(tensors: tuple) -> bool:
    given = [x for x in tensors if x is not None]
    return any(isinstance(x, FakeTensor) or x.is_meta for x in given) or signature(tensors) is None


def _route_of(op: Op, tensors: tuple) -> str:
    if not needs_torch_op(*tensors):
        if is_differentiated(tensors):
            return f"directly to the backend, as a node of autograd's graph: {_followed(op, tensors)}"
        return "directly to the backend: nothing that PyTorch must see"
    return f"the registered op {op.qualified_name}: {_why_registered(op, tensors)}"


def _why_registered(op: Op, tensors: tuple) -> str:
    """The first reason of ``needs_torch_op``, in words."""
    meta = [name for name, x in zip(op.tensors._fields, tensors, strict=True) if x is not None and x.is_meta]
    if meta:
        return f"{meta[0]} is on the meta device"
    modes = _get_current_dispatch_mode_stack()
    if modes:
        return f"the dispatch mode {type(modes[-1]).__name__} is on"
    named = {name: x for name, x in zip(op.tensors._fields, tensors, strict=True) if isinstance(x, Tensor)}
    subclasses = [name for name, x in named.items() if type(x) not in (Tensor, torch.nn.Parameter)]
    if subclasses:
        return f"{subclasses[0]} is a {type(named[subclasses[0]]).__name__}"
    return "a trace is made, or a tensor's memory is not what it is (negated, all zero)"


def _followed(op: Op, tensors: tuple) -> str:
    named = zip(op.tensors._fields, tensors, strict=True)
    return f"autograd follows {', '.join(name for name, x in named if isinstance(x, Tensor) and x.requires_grad)}"


def _backward_of(op: Op, tensors: tuple, options: tuple) -> str:
    backend = op.backward_choice(tensors, options).backend
    runs = f"{op.qualified_name}_backward, on {'the eager formula' if backend == 'eager' else backend}"
    if is_differentiated(tensors):
        return runs
    return f"none, for no argument asks for a gradient (else {runs})"
