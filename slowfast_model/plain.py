"""Whether a module is nothing but its weights, so that a kernel may be given these instead of the module being called.

A hybrid layer folds its norm's weight into the slow projection, and hands its gate's weight to the attention kernel; a
decode step hands all of a layer's weights to its kernels.
Adapters, hooks, parametrisations, quantised or offloaded weights live in a module's call and not in ``weight``: such a
module must be called. This is the one place that decides; it is asked in every layer of every decode step.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .layers import MLP, RMSNorm

# With the forward that each had when this file was read: a class may be given another later.
_FORWARDS = {kind: kind.forward for kind in (nn.Linear, nn.GELU, nn.Sequential, RMSNorm, MLP)}
_WEIGHTS = {nn.Linear: ("weight", "bias"), RMSNorm: ("weight",)}  # as they are registered; others have members alone


def can_be_plain(kind: type[nn.Module], weights: tuple[str, ...] = ()) -> type[nn.Module]:
    """Class decorator: ``is_plain`` may be asked of ``kind``, of which it looks at these weights and at no member."""
    _FORWARDS[kind] = kind.forward
    _WEIGHTS[kind] = weights
    return kind


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """True where calling ``module`` is the forward of ``kind`` (Linear, RMSNorm, a container) on its own weights.

    False for a subclass, a wrapper, or another forward on the instance or the class; for a hook of any kind, on the
    module or on all modules; for a weight that is not an ordinary dense tensor with memory (quantised, on ``meta``,
    distributed); for None. The members of a container are not looked at.
    """
    if type(module) is not kind or kind.forward is not _FORWARDS.get(kind) or _has_hooks(module):
        return False
    # The type is asked for the compiler's sake, which sees a forward replaced after compilation by this alone.
    if "forward" in module.__dict__ or type(module.forward) is not MethodType:
        return False
    if module._compiled_call_impl is not None:
        return False
    weights = module._parameters
    return all(name in weights and _is_ordinary(weights[name]) for name in _WEIGHTS.get(kind, ()))


def _has_hooks(module: nn.Module) -> bool:
    """What ``nn.Module.__call__`` looks at before it takes the short way to ``forward``."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_forward_hooks
        or nn_module._global_backward_pre_hooks
        or nn_module._global_backward_hooks
    )


def _is_ordinary(weight: Tensor | None) -> bool:
    return weight is None or (
        type(weight) in (nn.Parameter, Tensor)
        and weight.layout is torch.strided
        and weight.is_floating_point()
        and weight.is_contiguous()
        and not weight.is_meta
    )
