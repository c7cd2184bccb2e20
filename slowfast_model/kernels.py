"""Where a layer's own arithmetic may run as Triton kernels: conditions on activations and on what a call asked for.

These kernels (``slowfast_kernels.triton.gemv`` and ``.elementwise``) stand beside the ops of ``sk`` and have neither a
backend of their own nor a gradient. What is asked of modules is asked by ``plain`` and ``decode``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from slowfast_kernels._extension import unavailable_reason
from slowfast_kernels.dtypes import HALF_DTYPES, KERNEL_DTYPES
from slowfast_kernels.ops.dispatch import is_differentiated, needs_formula, needs_torch_op, requested_backend

from .cache import LayerCache
from .layers import RMSNorm, Rope, apply_rope, compute_dtype, silu_mul
from .plain import is_plain


def triton_limit(x: Tensor, backend: str | None) -> str | None:
    """What keeps kernels from activations x, and the way out; None: nothing does."""
    requested = requested_backend(backend)
    if requested not in (None, "triton"):
        return f"got backend {requested!r}, want 'triton' or None (automatic)"
    if requested is None and x.device.type != "cuda":  # of itself nothing runs under Triton's interpreter
        return f"got a model on {x.device}, want a GPU (or backend 'triton' under TRITON_INTERPRET=1)"
    reason = unavailable_reason("triton", x.device)
    if reason is not None:
        return f"got no Triton kernels ({reason})"
    if x.dtype not in KERNEL_DTYPES:
        return f"got {x.dtype}, want {', '.join(map(str, KERNEL_DTYPES))}"
    if compute_dtype(x.dtype, x.device) != x.dtype:
        return "got a call under autocast, want it off"
    if is_differentiated((x,)):
        return "got a call that gradients follow, want it under torch.no_grad()"
    if needs_torch_op(x):
        return "got torch.compile, a trace, a dispatch mode or a tensor subclass, want plain tensors"
    return None


def fuses(x: Tensor, backend: str | None) -> bool:
    """Whether what stands between the products of a layer, whose rows x are, runs as kernels of ``elementwise``.

    Where gradients or tangents are followed it does not, whether x has one or not: a projection's weight may.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return False
    return x.dtype in HALF_DTYPES and not needs_formula(x) and triton_limit(x, backend) is None


def rotate_and_fill(
    q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache | None, *, fused: bool
) -> tuple[Tensor, Tensor]:
    """``apply_rope`` of q and k [B, L, heads, D]; k, and v, also fill the ``cache``. In one launch if it can be."""
    if fused:
        from slowfast_kernels.triton import elementwise  # where it is known to import

        turned = elementwise.rotate(q, k, v, rope, None if cache is None else cache.kv)
        if turned is not None:
            return turned
    q, k = apply_rope(q, rope), apply_rope(k, rope)
    if cache is not None:
        cache.fill(k, v)
    return q, k


def add_and_normalise(x: Tensor, y: Tensor, norm: nn.Module, *, fused: bool) -> tuple[Tensor, Tensor]:
    """x + y of rows [..., C], and ``norm`` of that. In one launch if it can be."""
    if fused and is_plain(norm, RMSNorm):
        from slowfast_kernels.triton import elementwise

        made = elementwise.add_rms_norm(x, y, norm.weight, norm.eps)
        if made is not None:
            return made
    x = x + y
    return x, norm(x)


def fused_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``layers.silu_mul``, in one launch if it can be."""
    from slowfast_kernels.triton import elementwise

    product = elementwise.silu_mul(gate, up)
    return silu_mul(gate, up) if product is None else product


def scaled_columns(weight: Tensor, factor: Tensor, out: Tensor | None = None, *, fused: bool) -> Tensor:
    """weight [N, K] * factor [K], of the weight's type; into ``out`` [N, K], which gradients do not pass, if given."""
    if fused:
        from slowfast_kernels.triton import elementwise

        scaled = elementwise.scale_columns(weight, factor, out)
        if scaled is not None:
            return scaled
    return (weight * factor).to(weight.dtype) if out is None else torch.mul(weight, factor, out=out)
