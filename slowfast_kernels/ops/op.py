"""An op as its callers, PyTorch and the backends see it. Each file here describes one; what is common is here.

A call's way: the eager formula under function transforms and tangents, the registered op where PyTorch must see the
call, else straight to ``run``, as a node of autograd's graph where autograd follows. ``run`` keeps one prepared call a
signature: arguments checked, backend chosen, tiles and argument block fixed; what is left to a later call of that
signature is its addresses.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import profiler

from .. import observe
from .._extension import extension, missing_reason
from ..call_plan import CallPlan
from ..calls import BackwardTensors
from ..heuristics.backends import BackendChoice, OpCall, unsupported_reason
from .checks import DataRule, is_debugging, reads_device_data
from .dispatch import (
    SignatureCache,
    backend_for,
    backend_module,
    choice_for,
    is_differentiated,
    is_watched,
    needs_formula,
    needs_torch_op,
    read_plain,
    refuse_tangents,
    requested_backend,
    signature,
    why,
)

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    float: "float",
    float | None: "float?",
    str: "str",
    str | None: "str?",
    Sequence[int]: "SymInt[]",
}


def _schema(arguments: type) -> str:
    """ "Tensor q, Tensor slow_kv, ..." of a named tuple's fields."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in typing.get_type_hints(arguments).items())


OPS: dict[str, Op] = {}  # by the names of their public functions


class Op:
    """What differs between ops. Arguments are the named tuples of ``calls``.

    ``name``: of the public function, in messages. ``torch_name``: under ``torch.ops.slowfast``, and of the backends'
    ``prepare_*``. ``returns``: the schema's result. ``differentiable``: tensors that have gradients.
    ``has_gradient``: results that have them. ``saves``: results that the backward pass reads. ``by_value``: of the
    public function's options, given by their names, the named tuple of what they are now.
    """

    name: str
    torch_name: str
    tensors: type
    options: type
    returns: str
    differentiable: tuple[str, ...]
    has_gradient: tuple[int, ...]
    saves: tuple[int, ...] = ()
    by_value: Callable

    def check(self, tensors, options) -> None:
        """Everything but data; lengths may be symbolic.

        Raises:
            ValueError, TypeError: an argument that no backend takes.
        """
        raise NotImplementedError

    def data_rules(self, tensors) -> tuple[DataRule, ...]:
        """What must lie in tensors of which ``check`` has passed; of a signature the same."""
        raise NotImplementedError

    def facts(self, tensors, options) -> OpCall:
        """What the choice of a backend depends on."""
        raise NotImplementedError

    def formula(self, tensors, options):
        """The result by the eager formula."""
        raise NotImplementedError

    def fake(self, tensors, options):
        """Tensors of the result's shapes."""
        raise NotImplementedError

    def gradients(self, call: BackwardTensors, options, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """By the eager formula, as ``run_backward``; what no ``needs`` asks for may be there too."""
        raise NotImplementedError

    def flops(self, shapes, options) -> int:
        """Of one call with tensors of ``shapes`` (None: not given); lengths that only data tells are taken for even."""
        raise NotImplementedError

    def backward_flops(self, shapes, options) -> int:
        """Of a backward pass for all that is differentiable."""
        raise NotImplementedError

    def parts(self, tensors, options) -> list[tuple[Op, tuple, tuple]]:
        """The calls (op, tensors, options) that the public function makes instead of this one; none: it makes this."""
        return []

    def __init__(self):
        OPS[self.name] = self
        self.qualified_name = f"slowfast::{self.torch_name}"
        self.places = [self.tensors._fields.index(name) for name in self.differentiable]
        arguments = f"{_schema(self.tensors)}, {_schema(self.options)}"
        given = [f"Tensor? grad_{i}" for i in self.has_gradient] + [f"Tensor? result_{i}" for i in self.saves]
        gradients = ", ".join(["Tensor"] * len(self.differentiable))
        gradients = gradients if len(self.differentiable) == 1 else f"({gradients})"
        self.registered = self._register("", self._registered, self._fake, f"({arguments}) -> {self.returns}")
        self.backward = self._register(
            "_backward",
            self._registered_backward,
            self._fake_backward,
            f"({', '.join(given)}, bool[] needs, {arguments}) -> {gradients}",
        )
        self.registered.register_autograd(self._backward, setup_context=self._setup_context)
        self.node = _node_of(self)
        self.prepared = SignatureCache()

    def _register(self, suffix: str, implementation: Callable, fake: Callable, schema: str):
        op = torch.library.custom_op(f"{self.qualified_name}{suffix}", implementation, mutates_args=(), schema=schema)
        op.register_fake(fake)
        return op

    # ------------------------------------------------------------------------------------------- the call

    def bind(self, given: dict[str, object]) -> tuple[tuple, tuple]:
        """(tensors, options) of the public function's arguments by their names, as it hands them on."""
        options = self.by_value(**{name: given[name] for name in self.options._fields})
        return self.tensors(*(given[name] for name in self.tensors._fields)), options

    def __call__(self, tensors, options):
        """The result of the public function's checked-by-value arguments; ``None`` for what was not asked for."""
        if torch.compiler.is_compiling():
            return self.registered(*tensors, *options)
        if needs_formula(*tensors):
            self.check(tensors, options)
            self.check_data(tensors)
            return self._run_formula(tensors, options)
        read = None if is_watched() else read_plain(tensors)
        if read or not needs_torch_op(*tensors):
            if is_differentiated(tensors):
                return self.node.apply(options, *tensors)
            return self.run_seen(tensors, options, read)
        try:
            plain = (x.clone() if isinstance(x, Tensor) and x._is_zerotensor() else x for x in tensors)
            return self.registered(*plain, *options)
        except Exception as error:
            failure = error
        self.check(tensors, options)  # PyTorch refuses what does not fit a schema in words of its own
        raise failure

    def run_seen(self, tensors, options, read: tuple | None = None):
        """``run``, which a profiler sees by the name by which it sees the registered op."""
        if profiler._is_profiler_enabled:
            with profiler.record_function(self.qualified_name):
                return self.run(tensors, options, read)
        return self.run(tensors, options, read)

    def run(self, tensors, options, read: tuple | None = None):
        """``read``: the tensors' ``signature``, where it is known."""
        facts, addresses = read or signature(tensors) or (None, None)
        key = (facts, options, requested_backend(options.backend))
        kept = self.prepared.get(key)
        if kept is None:
            self.check(tensors, options)
            prepared = self.observed(self.prepare(tensors, options), tensors, options)
            kept = prepared, self._quick_check(tensors)
            if facts is not None:
                self.prepared.remember(key, kept)
        prepared, holds = kept
        if addresses is None or not holds(addresses):
            self.check_data(tensors)
        return prepared(tensors, addresses)

    def check_data(self, tensors) -> None:
        """What lies in tensors, on a CPU (and on a GPU under SLOWFAST_DEBUG=1).

        Raises:
            ValueError: a number that does not fit the others.
        """
        if reads_device_data(tensors[0]):
            for rule in self.data_rules(tensors):
                rule.check(tensors)

    def _quick_check(self, tensors) -> Callable[[bytes], bool]:
        """Of addresses of tensors with this signature: True only if ``check_data`` would pass."""
        if not tensors[0].is_cpu:
            return lambda addresses: not is_debugging()
        if missing_reason() is not None:
            return lambda addresses: False
        counted = [(rule, getattr(tensors, rule.name).numel()) for rule in self.data_rules(tensors)]
        places = self.tensors._fields.index
        return extension().index_check([(rule.kind, places(rule.name), n, rule.total) for rule, n in counted])

    def prepare(self, tensors, options) -> Callable:
        """A function of tensors with this signature, of which ``check`` has passed, and of their addresses."""
        backend = backend_for(self.facts(tensors, options), tensors[0].device, options.backend)
        if backend == "eager":
            return lambda tensors, addresses=None: self.formula(tensors, options)
        return self._prepare_on(backend, tensors, options)

    def _prepare_on(self, backend: str, tensors, options) -> Callable:
        return getattr(backend_module(backend), f"prepare_{self.torch_name}")(tensors, options)

    def plan(self, backend: str, tensors, options) -> CallPlan:
        """What ``backend`` would do, of which the limits have been asked. No kernel runs."""
        if backend == "eager":
            return EAGER_PLAN
        return self._prepare_on(backend, tensors, options).describe()

    # --------------------------------------------------------------------------------------- backward

    def run_backward(self, call: BackwardTensors, options, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """The gradients of ``differentiable``; None where there was no tensor or ``needs`` is False."""
        signatures = map(signature, call)
        facts = tuple([None if read is None else read[0] for read in signatures])
        key = (facts, options, needs, requested_backend(options.backend))
        prepared = self.prepared.get(key)
        if prepared is None:
            prepared = self._prepare_backward(call, options, needs)
            if None not in facts:
                self.prepared.remember(key, prepared)
        return prepared(call)

    def _prepare_backward(self, call: BackwardTensors, options, needs: tuple[bool, ...]) -> Callable:
        choice = self.backward_choice(call.inputs, options)
        if choice.backend == "eager":

            def run(call: BackwardTensors) -> tuple[Tensor | None, ...]:
                found = self.gradients(call, options, needs)
                return tuple(x if is_needed else None for x, is_needed in zip(found, needs, strict=True))

        else:
            prepare = getattr(backend_module(choice.backend), f"prepare_{self.torch_name}_backward")
            run = prepare(call, options, needs)
        return self._observed_backward(run, call, choice)

    def backward_choice(self, tensors, options) -> BackendChoice:
        """The backend that was asked for if it has a kernel for these gradients, else the fastest that has one."""
        facts, device = self.facts(tensors, options)._replace(backward=True), tensors[0].device
        asked = requested_backend(options.backend)
        if asked is not None and unsupported_reason(asked, facts) is not None:
            asked = None
        return choice_for(facts, device, asked)

    def _observed_backward(self, run: Callable, call: BackwardTensors, choice: BackendChoice) -> Callable:
        if not observe.IS_ON:
            return run
        names = tuple(f"grad_{i}" for i in self.has_gradient) + tuple(f"result_{i}" for i in self.saves)
        names += self.tensors._fields
        if observe.LOG:
            flat = (*call.grads, *call.results, *call.inputs)
            text = f"{self.name} backward({observe.listed(names, flat)}): {choice.backend}"
            observe.log_once(text + _passed_over(choice.rejected))
        seen = observe.observed(
            lambda flat: run(self._backward_tensors(flat)),
            f"{self.name} backward",
            names,
            f"{self.qualified_name}_backward",
        )
        return lambda call: seen((*call.grads, *call.results, *call.inputs))

    # ------------------------------------------------------------------------------------------- seen

    def observed(self, call: Callable, tensors, options) -> Callable:
        """``call``, a function of tensors, as the environment wants it seen (``observe``)."""
        if observe.LOG:
            choice = choice_for(self.facts(tensors, options), tensors[0].device, requested_backend(options.backend))
            self._log(tensors, options, choice.backend, why(choice, options.backend), choice.rejected)
        return observe.observed(call, self.name, self.tensors._fields, self.qualified_name)

    def _run_formula(self, tensors, options):
        if observe.LOG:
            self._log(tensors, options, "eager", "torch.func or a forward-mode tangent", {})
        call = observe.observed(
            lambda tensors: self.formula(tensors, options), self.name, self.tensors._fields, self.qualified_name
        )
        if profiler._is_profiler_enabled:
            with profiler.record_function(self.qualified_name):
                return call(tensors)
        return call(tensors)

    def _log(self, tensors, options, backend: str, reason: str, rejected: dict[str, str]) -> None:
        observe.log_once(f"{self.call_text(tensors, options)}: {backend}, {reason}{_passed_over(rejected)}")

    def call_text(self, tensors, options) -> str:
        """The call on one line: tensors by type and shape, options that are given by value."""
        given = [f"{name}={value!r}" for name, value in options._asdict().items() if value is not None]
        return f"{self.name}({', '.join((observe.listed(self.tensors._fields, tensors), *given))})"

    # ------------------------------------------------------------------------------- what PyTorch is told

    def _split(self, arguments: tuple):
        count = len(self.tensors._fields)
        options = (tuple(x) if isinstance(x, list) else x for x in arguments[count:])
        return self.tensors(*arguments[:count]), self.options(*options)

    def _registered(self, *arguments):
        tensors, options = self._split(arguments)
        refuse_tangents(*tensors)
        return _present(tensors[0], self.run(tensors, options), torch.float32)

    def _fake(self, *arguments):
        tensors, options = self._split(arguments)
        self.check(tensors, options)
        return self.fake(tensors, options)

    def _split_backward(self, arguments: tuple) -> tuple[BackwardTensors, tuple, tuple[bool, ...]]:
        """(what it is called with, options, needs) of the registered backward's arguments."""
        num_given = self.num_given
        tensors, options = self._split(arguments[num_given + 1 :])
        return self._backward_tensors((*arguments[:num_given], *tensors)), options, tuple(arguments[num_given])

    def _backward_tensors(self, flat: tuple) -> BackwardTensors:
        """Of gradients, results and tensors one after the other."""
        num_grads, num_given = len(self.has_gradient), self.num_given
        return BackwardTensors(flat[:num_grads], flat[num_grads:num_given], self.tensors(*flat[num_given:]))

    @property
    def num_given(self) -> int:
        """Arguments of the registered backward before ``needs`` and those of the op."""
        return len(self.has_gradient) + len(self.saves)

    def _registered_backward(self, *arguments):
        call, options, needs = self._split_backward(arguments)
        refuse_tangents(*call.grads, *call.inputs)
        gradients = _present(call.inputs[0], self.run_backward(call, options, needs))
        return gradients[0] if len(gradients) == 1 else gradients

    def _fake_backward(self, *arguments):
        call, _, needs = self._split_backward(arguments)
        inputs = (getattr(call.inputs, name) if is_needed else None for name, is_needed in self._wanted(needs))
        gradients = _present(call.inputs[0], tuple(None if x is None else x.new_empty(x.shape) for x in inputs))
        return gradients[0] if len(gradients) == 1 else gradients

    def _wanted(self, needs: tuple[bool, ...]) -> zip[tuple[str, bool]]:
        return zip(self.differentiable, needs, strict=True)

    def _setup_context(self, ctx, inputs, output):
        self.keep(ctx, *self._split(inputs), output)

    def keep(self, ctx, tensors, options, output) -> None:
        """What the backward pass of a call reads."""
        backend = requested_backend(options.backend)  # what is around it now
        ctx.options = options if backend == options.backend else options._replace(backend=backend)
        results = output if isinstance(output, tuple) else (output,)
        ctx.save_for_backward(*tensors, *(results[i] for i in self.saves))
        if len(results) > len(self.has_gradient):
            ctx.mark_non_differentiable(*(x for i, x in enumerate(results) if i not in self.has_gradient))
        ctx.set_materialize_grads(False)

    def _backward(self, ctx, *grads):
        asked = ctx.needs_input_grad[: len(self.tensors._fields)]
        return *self.gradients_of(ctx, grads, asked, self._backward_registered), *[None] * len(ctx.options)

    def gradients_of(self, ctx, grads, asked: Sequence[bool], backward: Callable) -> tuple[Tensor | None, ...]:
        """Of every tensor of a call that was kept in ``ctx``, None where it is not ``asked`` for, by ``backward``."""
        gradients, grads = [None] * len(asked), tuple([grads[i] for i in self.has_gradient])
        if all(grad is None for grad in grads):
            return tuple(gradients)
        saved = ctx.saved_tensors  # which can be read once, under checkpointing
        call = BackwardTensors(grads, saved[len(asked) :], self.tensors(*saved[: len(asked)]))
        found = backward(call, ctx.options, tuple([asked[place] for place in self.places]))
        for place, gradient in zip(self.places, found, strict=True):
            if asked[place]:
                gradients[place] = gradient
        return tuple(gradients)

    def _backward_registered(self, call: BackwardTensors, options, needs: tuple[bool, ...]) -> Sequence[Tensor]:
        found = self.backward(*call.grads, *call.results, list(needs), *call.inputs, *options)
        return found if isinstance(found, (tuple, list)) else (found,)

    def backward_seen(self, call: BackwardTensors, options, needs: tuple[bool, ...]) -> Sequence[Tensor | None]:
        """``run_backward``, as ``__call__`` is ``run``."""
        given = (*call.grads, *call.results, *call.inputs)
        if (
            torch.is_grad_enabled()  # for second derivatives, which the registered op refuses in its words
            or needs_formula(*given)
            or needs_torch_op(*given)
            or any(x is not None and is_legacy_batchedtensor(x) for x in call.grads)  # is_grads_batched=True
        ):
            return self._backward_registered(call, options, needs)
        if profiler._is_profiler_enabled:
            with profiler.record_function(f"{self.qualified_name}_backward"):
                return self.run_backward(call, options, needs)
        return self.run_backward(call, options, needs)


def _node_of(op: Op) -> type[torch.autograd.Function]:
    """What autograd follows of a call that PyTorch need not see otherwise. It computes what the registered op does, and
    spares its way through the dispatcher, which takes longer than a small call's kernels."""

    def forward(ctx, options, *tensors):
        tensors = op.tensors(*tensors)
        results = op.run_seen(tensors, options)
        op.keep(ctx, tensors, options, results)
        return results

    def backward(ctx, *grads):
        return None, *op.gradients_of(ctx, grads, ctx.needs_input_grad[1:], op.backward_seen)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"slowfast_{op.torch_name}_", (torch.autograd.Function,), methods)  # a graph prints Backward behind it


EAGER_PLAN = CallPlan(workspace_bytes=None, notes=("PyTorch's own ops, a sequence after the other",))


def _passed_over(rejected: dict[str, str]) -> str:
    return "".join(f"; not {name}: {limit}" for name, limit in rejected.items())


def _present(like: Tensor, results, dtype: torch.dtype | None = None):
    """A registered op returns tensors: an empty one stands for what is None."""
    if isinstance(results, Tensor):
        return results
    return tuple(like.new_empty(0, dtype=dtype) if x is None else x for x in results)
