"""slowfast_cross_attention: attention over the slow tokens, gate and mix, as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import eager
from . import checks
from .attention import (
    addresses_aligned,
    attention_call,
    check_attention,
    check_attention_data,
    text_cross_attention,
)
from .dispatch import SignatureCache, backend_for, needs_torch_op, requested_backend, signature
from .gated_mix import check_gate, gated_residual_mix


def slowfast_cross_attention(
    state: Tensor,
    q: Tensor,
    slow_kv: Tensor,
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    warm_up: Tensor | None,
    *,
    softmax_scale: float | None = None,
    num_splits: int = 0,
    gate: str = "tanh",
    warm_up_tanh: bool = True,
    backend: str | None = None,
) -> Tensor:
    """What a hybrid layer adds between self-attention and ``o_proj`` (arXiv 2504.01328, section 3.2).

    Equal to ``gated_residual_mix(state, text_cross_attention(q, ...), ...)`` with the context kept on chip where the
    backend can.

    Args:
        state: self-attention output before ``o_proj`` [rows, C], C = Hq * D; q's dtype.
        q, slow_kv, cu_slow, text_rows, cu_text, softmax_scale, num_splits: as in ``text_cross_attention``.
        gate_weight, gate_bias, warm_up, gate, warm_up_tanh: as in ``gated_residual_mix``.
        backend: "cuda", "triton", "cpu", "eager", or None (automatic).

    Returns:
        A new tensor [rows, C]; rows outside ``text_rows`` are copied.

    Raises:
        ValueError, TypeError, NotImplementedError: as the two ops.
    """
    attention = (q, slow_kv, cu_slow, text_rows, cu_text)
    gating = (gate_weight, gate_bias, warm_up)
    if needs_torch_op(state, q, slow_kv, *gating):
        differentiable = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (state, q, slow_kv, *gating)
        )
        if differentiable:  # keep the context for the backward pass instead of computing it twice
            context = text_cross_attention(
                *attention, softmax_scale=softmax_scale, num_splits=num_splits, backend=backend
            )
            return gated_residual_mix(
                state, context, text_rows, *gating, gate=gate, warm_up_tanh=warm_up_tanh, backend=backend
            )
        return torch.ops.slowfast.cross_attention(
            state, *attention, *gating, softmax_scale, num_splits, gate, warm_up_tanh, backend
        )
    return _run(state, *attention, *gating, softmax_scale, num_splits, gate, warm_up_tanh, backend)


def _check(
    state, q, slow_kv, cu_slow, text_rows, cu_text, gate_weight, gate_bias, warm_up, softmax_scale, num_splits, gate
) -> float:
    scale = check_attention(q, slow_kv, cu_slow, text_rows, cu_text, softmax_scale, num_splits)
    checks.check_tensor("state", state, 2, "[rows, Hq * D]")
    checks.check_like("state", state, "q", q)
    if state.shape[0] != q.shape[0] or state.shape[1] != q.shape[1] * q.shape[2]:
        checks.fail("state", state, f"shape [{q.shape[0]}, {q.shape[1] * q.shape[2]}] (rows and Hq * D of q)")
    check_gate(state, gate_weight, gate_bias, warm_up, gate)
    return scale


_signatures = SignatureCache()


def _run(
    state: Tensor,
    q: Tensor,
    slow_kv: Tensor,
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    warm_up: Tensor | None,
    softmax_scale: float | None,
    num_splits: int,
    gate: str,
    warm_up_tanh: bool,
    backend: str | None,
) -> Tensor:
    attention = (q, slow_kv, cu_slow, text_rows, cu_text)
    gating = (gate_weight, gate_bias, warm_up)
    aligned = addresses_aligned(q, slow_kv, state, gate_weight)
    options = (softmax_scale, num_splits, gate, requested_backend(backend), aligned)
    key = (signature(state, *attention, *gating), options)
    found = _signatures.get(key)
    if found is None:
        scale = _check(state, *attention, *gating, softmax_scale, num_splits, gate)
        batch = cu_text.shape[0] - 1
        call = attention_call("slowfast_cross_attention", q, slow_kv, text_rows, batch, scale, state, gate_weight)
        found = _signatures.remember(key, (scale, backend_for(call, q.device, backend)))
    scale, module = found
    check_attention_data(*attention)
    return module.slowfast_cross_attention(state, *attention, *gating, scale, num_splits, gate, warm_up_tanh)


_fused_op = torch.library.custom_op("slowfast::cross_attention", _run, mutates_args=())


@_fused_op.register_fake
def _fused_fake(state, *arguments):
    _check(state, *arguments[:11])
    return state.new_empty(state.shape)


@torch.library.custom_op("slowfast::cross_attention_backward", mutates_args=())
def _fused_backward_op(
    grad: Tensor,
    state: Tensor,
    q: Tensor,
    slow_kv: Tensor,
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    warm_up: Tensor | None,
    softmax_scale: float,
    gate: str,
    warm_up_tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    attention = (q, slow_kv, cu_slow, text_rows, cu_text)
    context, _ = eager.text_cross_attention(*attention, softmax_scale, False, 0)
    grad_state, grad_context, *grads = eager.gated_residual_mix_backward(
        grad, state, context.flatten(1), text_rows, gate_weight, gate_bias, warm_up, gate, warm_up_tanh
    )
    grad_q, grad_kv = eager.text_cross_attention_backward(
        grad_context.reshape(context.shape), None, *attention, softmax_scale
    )
    *grads, grad_warm = grads
    return grad_state, grad_q, grad_kv, *grads, gate_bias.new_empty(0) if grad_warm is None else grad_warm


@_fused_backward_op.register_fake
def _(grad, state, q, slow_kv, cu_slow, text_rows, cu_text, gate_weight, gate_bias, warm_up, scale, gate, warm_up_tanh):
    grads = [x.new_empty(x.shape) for x in (state, q, slow_kv, gate_weight, gate_bias)]
    return *grads, gate_bias.new_empty(0 if warm_up is None else warm_up.shape)


def _setup_context(ctx, inputs, output):
    *tensors, softmax_scale, _, ctx.gate, ctx.warm_up_tanh, _ = inputs
    ctx.softmax_scale = tensors[1].shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    grads = torch.ops.slowfast.cross_attention_backward(
        grad, *ctx.saved_tensors, ctx.softmax_scale, ctx.gate, ctx.warm_up_tanh
    )
    grad_state, grad_q, grad_kv, grad_weight, grad_bias, grad_warm = grads
    grad_warm = None if ctx.saved_tensors[8] is None else grad_warm
    return grad_state, grad_q, grad_kv, None, None, None, grad_weight, grad_bias, grad_warm, *[None] * 5


_fused_op.register_autograd(_backward, setup_context=_setup_context)
