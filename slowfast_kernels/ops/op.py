"""An op as its callers, PyTorch and the backends see it. Each file here describes one; what is common is here.

A call's way: the eager formula under function transforms and tangents, the registered op where PyTorch must see the
call, else straight to ``run``. ``run`` keeps one prepared call a signature: arguments checked, backend chosen, tiles
and argument block fixed; what is left to a later call of that signature is its addresses.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..heuristics import OpCall
from .dispatch import (
    SignatureCache,
    backend_for,
    backend_module,
    needs_formula,
    needs_torch_op,
    refuse_tangents,
    requested_backend,
    signature,
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


class Op:
    """What differs between ops. Arguments are the named tuples of ``calls``.

    ``name``: of the public function, in messages. ``torch_name``: under ``torch.ops.slowfast``, and of the backends'
    ``prepare_*``. ``returns``: the schema's result. ``differentiable``: tensors that have gradients.
    ``has_gradient``: results that have them (default: all).
    """

    name: str
    torch_name: str
    tensors: type
    options: type
    returns: str
    differentiable: tuple[str, ...]
    has_gradient: tuple[int, ...]

    def check(self, tensors, options) -> None:
        """Everything but data; lengths may be symbolic.

        Raises:
            ValueError, TypeError: an argument that no backend takes.
        """
        raise NotImplementedError

    def check_data(self, tensors) -> None:
        """What lies in tensors, on a CPU (and on a GPU under SLOWFAST_DEBUG=1)."""
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

    def gradients(self, grads, tensors, options) -> tuple[Tensor | None, ...]:
        """For each of ``differentiable``; None where there was no tensor."""
        raise NotImplementedError

    def __init__(self):
        arguments = f"{_schema(self.tensors)}, {_schema(self.options)}"
        grads = ", ".join(f"Tensor? grad_{i}" for i in self.has_gradient)
        gradients = ", ".join(["Tensor"] * len(self.differentiable))
        gradients = gradients if len(self.differentiable) == 1 else f"({gradients})"
        self.registered = self._register("", self._registered, self._fake, f"({arguments}) -> {self.returns}")
        self.backward = self._register(
            "_backward", self._registered_backward, self._fake_backward, f"({grads}, {arguments}) -> {gradients}"
        )
        self.registered.register_autograd(self._backward, setup_context=self._setup_context)
        self.prepared = SignatureCache()

    def _register(self, suffix: str, implementation: Callable, fake: Callable, schema: str):
        name = f"slowfast::{self.torch_name}{suffix}"
        op = torch.library.custom_op(name, implementation, mutates_args=(), schema=schema)
        op.register_fake(fake)
        return op

    # ------------------------------------------------------------------------------------------- the call

    def __call__(self, tensors, options):
        """The result of the public function's checked-by-value arguments; ``None`` for what was not asked for."""
        if torch.compiler.is_compiling():
            return self.registered(*tensors, *options)
        if needs_formula(*tensors):
            self.check(tensors, options)
            self.check_data(tensors)
            return self.formula(tensors, options)
        if not needs_torch_op(*tensors):
            return self.run(tensors, options)
        try:
            plain = (x.clone() if isinstance(x, Tensor) and x._is_zerotensor() else x for x in tensors)
            return self.registered(*plain, *options)
        except Exception as error:
            failure = error
        self.check(tensors, options)  # PyTorch refuses what does not fit a schema in words of its own
        raise failure

    def run(self, tensors, options):
        key = (signature(tensors), options, requested_backend(options.backend))
        prepared = self.prepared.get(key)
        if prepared is None:
            self.check(tensors, options)
            prepared = self.prepared.remember(key, self.prepare(tensors, options))
        self.check_data(tensors)
        return prepared(tensors)

    def prepare(self, tensors, options) -> Callable:
        """A function of tensors with this signature, of which ``check`` has passed."""
        backend = backend_for(self.facts(tensors, options), tensors[0].device, options.backend)
        if backend == "eager":
            return lambda tensors: self.formula(tensors, options)
        return getattr(backend_module(backend), f"prepare_{self.torch_name}")(tensors, options)

    # ------------------------------------------------------------------------------- what PyTorch is told

    def _split(self, arguments: tuple):
        count = len(self.tensors._fields)
        return self.tensors(*arguments[:count]), self.options(*arguments[count:])

    def _registered(self, *arguments):
        tensors, options = self._split(arguments)
        refuse_tangents(*tensors)
        return _present(tensors[0], self.run(tensors, options), torch.float32)

    def _fake(self, *arguments):
        tensors, options = self._split(arguments)
        self.check(tensors, options)
        return self.fake(tensors, options)

    def _registered_backward(self, *arguments):
        grads, rest = arguments[: len(self.has_gradient)], arguments[len(self.has_gradient) :]
        tensors, options = self._split(rest)
        refuse_tangents(*grads, *tensors)
        gradients = _present(tensors[0], self.gradients(grads, tensors, options))
        return gradients[0] if len(gradients) == 1 else gradients

    def _fake_backward(self, *arguments):
        tensors, _ = self._split(arguments[len(self.has_gradient) :])
        inputs = (getattr(tensors, name) for name in self.differentiable)
        gradients = _present(tensors[0], tuple(None if x is None else x.new_empty(x.shape) for x in inputs))
        return gradients[0] if len(gradients) == 1 else gradients

    def _setup_context(self, ctx, inputs, output):
        tensors, ctx.options = self._split(inputs)
        ctx.save_for_backward(*tensors)
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*(x for i, x in enumerate(output) if i not in self.has_gradient))

    def _backward(self, ctx, *grads):
        tensors = self.tensors(*ctx.saved_tensors)
        found = self.backward(*(grads[i] for i in self.has_gradient), *tensors, *ctx.options)
        found = dict(zip(self.differentiable, found if isinstance(found, (tuple, list)) else (found,), strict=True))
        gradients = (None if x is None else found.get(name) for name, x in zip(tensors._fields, tensors, strict=True))
        return *gradients, *[None] * len(ctx.options)


def _present(like: Tensor, results, dtype: torch.dtype | None = None):
    """A registered op returns tensors: an empty one stands for what is None."""
    if isinstance(results, Tensor):
        return results
    return tuple(like.new_empty(0, dtype=dtype) if x is None else x for x in results)
