"""merge_attention: attention over two sets of tokens from attention over each, by their log-sum-exps."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import eager, flops
from ..calls import BackwardTensors, MergeOptions, MergeTensors
from ..heuristics.backends import OpCall
from . import checks
from .dispatch import check_backend_name, compute_capability
from .op import Op


def merge_attention(
    context_a: Tensor, lse_a: Tensor, context_b: Tensor, lse_b: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """What attention over the tokens of a and of b together gives, from what it gives over each.

    For slow tokens that lie in several places (host memory, other GPUs), and for one softmax over video and text.
    Associative to rounding, so that any number of parts can be merged.

    Args:
        context_a, context_b: contexts over disjoint sets of tokens [Nt, Hq, D]; float32, bfloat16 or float16.
        lse_a, lse_b: their log-sum-exps [Nt, Hq], float32, natural logarithm; -inf: no token, whatever the context is.
        backend: "cuda", "triton", "cpu", "eager", or None (automatic).

    Returns:
        context [Nt, Hq, D] in the contexts' dtype and lse [Nt, Hq] float32. Where one side has no token, the other's
        bits; where neither has, context 0 and lse -inf.

    Raises:
        ValueError: a wrong shape, device or stride.
        TypeError: a wrong dtype.
        NotImplementedError: the backend asked for cannot run this call.
    """
    return tuple(_OP(MergeTensors(context_a, lse_a, context_b, lse_b), _by_value(backend)))


def _by_value(backend: str | None) -> MergeOptions:
    check_backend_name(backend)
    return MergeOptions(backend)


class _Merge(Op):
    name = torch_name = "merge_attention"
    tensors, options = MergeTensors, MergeOptions
    returns = "(Tensor, Tensor)"
    differentiable = MergeTensors._fields
    has_gradient = (0, 1)
    by_value = staticmethod(_by_value)

    def check(self, tensors: MergeTensors, options: MergeOptions) -> None:
        context_a = tensors.context_a
        checks.check_tensor("context_a", context_a, 3, "[Nt, Hq, D]")
        checks.check_float("context_a", context_a)
        checks.check_tensor("context_b", tensors.context_b, 3, "[Nt, Hq, D]")
        checks.check_like("context_b", tensors.context_b, "context_a", context_a)
        if tensors.context_b.shape != context_a.shape:
            checks.fail("context_b", tensors.context_b, f"shape {list(context_a.shape)} (that of context_a)")
        for name in ("lse_a", "lse_b"):
            lse = getattr(tensors, name)
            checks.check_tensor(name, lse, 2, "[Nt, Hq]")
            if lse.dtype != torch.float32:
                raise TypeError(f"{name}: got {lse.dtype}, want float32")
            checks.check_device(name, lse, "context_a", context_a)
            if lse.shape != context_a.shape[:2]:
                checks.fail(name, lse, f"shape {list(context_a.shape[:2])} (Nt and Hq of context_a)")

    def data_rules(self, tensors: MergeTensors) -> tuple[checks.DataRule, ...]:
        return ()  # contexts and log-sum-exps may be anything

    def facts(self, tensors: MergeTensors, options: MergeOptions) -> OpCall:
        device = tensors.context_a.device
        return OpCall(self.name, device.type, tensors.context_a.dtype, compute_capability(device))

    def formula(self, tensors: MergeTensors, options: MergeOptions) -> tuple[Tensor, Tensor]:
        return eager.merge_attention(*tensors)

    def fake(self, tensors: MergeTensors, options: MergeOptions) -> tuple[Tensor, Tensor]:
        context, lse = tensors[:2]
        return context.new_empty(context.shape), lse.new_empty(lse.shape)

    def gradients(self, call: BackwardTensors, options: MergeOptions, needs: tuple[bool, ...]) -> tuple[Tensor, ...]:
        return eager.merge_attention_backward(*call.inputs, *call.grads)

    def flops(self, shapes: MergeTensors, options: MergeOptions) -> int:
        return flops.merge(*shapes.context_a)

    def backward_flops(self, shapes: MergeTensors, options: MergeOptions) -> int:
        return flops.merge_backward(*shapes.context_a)


_OP = _Merge()
