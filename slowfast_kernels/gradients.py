"""What backward passes of the kernels share on the host: memory for gradients, and gradients as kernels read them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .calls import AttentionTensors, MixTensors


def row_major(x: Tensor) -> Tensor:
    """``x`` [rows, C] with each row a run of C elements, a copy only where they are not; of any row stride, 0 too."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


def new_gradients(inputs: Iterable[Tensor | None], needs: Iterable[bool]) -> tuple[Tensor | None, ...]:
    """Memory, contiguous, for the gradients of those inputs that need one; None for the others."""
    return tuple([new_like(x) if need else None for x, need in zip(inputs, needs, strict=True)])


def new_like(x: Tensor) -> Tensor:
    """Contiguous memory; of the ways to ask for it, the one that costs the host half of the others."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def attention_differentiable(inputs: AttentionTensors) -> tuple[Tensor | None, ...]:
    """In the order of its gradients."""
    return inputs.q, inputs.slow_kv, inputs.slow_values


def attention_needs(inputs: AttentionTensors, needs: Iterable[bool]) -> tuple[bool, ...]:
    """``needs`` without those of arguments that the call does not have."""
    return _present(attention_differentiable(inputs), needs)


def zero_attention_gradients(inputs: AttentionTensors, needs: Iterable[bool]) -> tuple[Tensor | None, ...]:
    """Those of a call in which nothing is attended, or whose results have no gradient."""
    found = new_gradients(attention_differentiable(inputs), attention_needs(inputs, needs))
    return tuple(None if x is None else x.zero_() for x in found)


def mix_differentiable(inputs: MixTensors) -> tuple[Tensor | None, ...]:
    """In the order of its gradients."""
    return *inputs[:2], *inputs[3:]


def mix_needs(inputs: MixTensors, needs: Iterable[bool]) -> tuple[bool, ...]:
    """``needs`` without those of arguments that the call does not have."""
    return _present(mix_differentiable(inputs), needs)


def _present(inputs: Iterable[Tensor | None], needs: Iterable[bool]) -> tuple[bool, ...]:
    return tuple(need and x is not None for x, need in zip(inputs, needs, strict=True))


def mix_partial_stride(channels: int, sums_weight: bool) -> int:
    """Floats of a row of the mix's partial sums: the weight's, if asked for, and four that hold bias and warm-up."""
    return (-(-channels // 4) * 4 if sums_weight else 0) + 4
