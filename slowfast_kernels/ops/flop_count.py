"""FLOP counts of the registered ops for ``torch.utils.flop_counter``, whose module is loaded late.

Importing it imports Triton, which importing this package does not do. So the formulas are handed over when that module
is imported, whether before this package or after it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

import torch

from .op import OPS, Op

_COUNTER = "torch.utils.flop_counter"


def _formula_of(op: Op, count: Callable, num_before: int) -> Callable[..., int]:
    """``count``, a method of ``op``, of the registered op's arguments; tensors come as their shapes."""
    names = (*op.tensors._fields, *op.options._fields)

    def formula(*arguments, out_shape=None, **named) -> int:
        given = dict(zip(names, arguments[num_before:], strict=False)) | named
        shapes, options = (kind(*(given[name] for name in kind._fields)) for kind in (op.tensors, op.options))
        return count(shapes, options)

    return formula


def _register(counter: ModuleType) -> None:
    for op in OPS.values():
        formulas = {
            op.torch_name: _formula_of(op, op.flops, 0),
            f"{op.torch_name}_backward": _formula_of(op, op.backward_flops, op.num_given + 1),
        }
        for name, formula in formulas.items():
            packet = getattr(torch.ops.slowfast, name)
            if packet not in counter.flop_registry:
                counter.register_flop_formula(packet)(formula)


class _AtImport(MetaPathFinder):
    """Finds the counter's module as Python would, and registers the formulas once it has been executed."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec


def register_formulas() -> None:
    """Now if the counter's module is there, else as soon as it is."""
    counter = sys.modules.get(_COUNTER)
    if counter is not None:
        _register(counter)
    else:
        sys.meta_path.insert(0, _AtImport())
