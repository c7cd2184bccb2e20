"""slowfast_cross_attention: attention over the slow tokens, gate and mix, as one op."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import eager
from ..gate import GATES, Gate
from . import checks
from .attention import (
    addresses_aligned,
    attention_call,
    check_attention,
    check_attention_data,
    text_cross_attention,
)
from .dispatch import (
    SignatureCache,
    backend_for,
    check_backend_name,
    needs_formula,
    refuse_tangents,
    requested_backend,
    run_op,
    signature,
)
from .gated_mix import absent_as_none, check_gate, gated_residual_mix, present


def slowfast_cross_attention(
    state: Tensor,
    q: Tensor,
    slow_kv: Tensor,
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    warm_up: Tensor | None,
    *,
    softmax_scale: float | None = None,
    num_splits: int = 0,
    gate: str = "tanh",
    warm_up_tanh: bool = True,
    gate_value: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """What a hybrid layer adds between self-attention and ``o_proj`` (arXiv 2504.01328, section 3.2).

    Equal to ``gated_residual_mix(state, text_cross_attention(q, ...), ...)`` with the context kept on chip where the
    backend can.

    Args:
        state: self-attention output before ``o_proj`` [rows, C], C = Hq * D; q's dtype.
        q, slow_kv, cu_slow, text_rows, cu_text, softmax_scale, num_splits: as in ``text_cross_attention``.
        gate_weight, gate_bias, warm_up, gate, warm_up_tanh, gate_value: as in ``gated_residual_mix``.
        backend: "cuda", "triton", "cpu", "eager", or None (automatic).

    Returns:
        A new tensor [rows, C]; rows outside ``text_rows`` are copied.

    Raises:
        ValueError, TypeError, NotImplementedError: as the two ops.
    """
    softmax_scale = None if softmax_scale is None else checks.as_float("softmax_scale", softmax_scale)
    num_splits = checks.as_int("num_splits", num_splits)
    warm_up_tanh = checks.as_bool("warm_up_tanh", warm_up_tanh)
    checks.check_option("gate", gate, GATES)
    check_backend_name(backend)
    gating = (gate_weight, gate_bias, warm_up, gate_value)
    tensors = (state, q, slow_kv, cu_slow, text_rows, cu_text, *gating)
    if needs_formula(*tensors):
        scale, checked = _check(*tensors, softmax_scale, num_splits, gate, warm_up_tanh)
        check_attention_data(*tensors[1:6])
        return eager.slowfast_cross_attention(*tensors[:6], checked, scale, num_splits)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
        # Keep the context for the backward pass instead of computing it twice.
        options = {"softmax_scale": softmax_scale, "num_splits": num_splits, "backend": backend}
        context = text_cross_attention(q, slow_kv, cu_slow, text_rows, cu_text, **options)
        options = {"gate": gate, "warm_up_tanh": warm_up_tanh, "gate_value": gate_value, "backend": backend}
        return gated_residual_mix(state, context, text_rows, gate_weight, gate_bias, warm_up, **options)
    options = (softmax_scale, num_splits, gate, warm_up_tanh, backend)
    return run_op(torch.ops.slowfast.cross_attention, _run, lambda *a: _check(*a[:-1]), tensors, *options)


def _check(
    state, q, slow_kv, cu_slow, text_rows, cu_text, gate_weight, gate_bias, warm_up, gate_value,
    softmax_scale, num_splits, gate, warm_up_tanh,
) -> tuple[float, Gate]:  # fmt: skip
    scale = check_attention(q, slow_kv, cu_slow, text_rows, cu_text, softmax_scale, num_splits)
    checks.check_tensor("state", state, 2, "[rows, Hq * D]")
    checks.check_like("state", state, "q", q)
    if state.shape[0] != q.shape[0] or state.shape[1] != q.shape[1] * q.shape[2]:
        checks.fail("state", state, f"shape [{q.shape[0]}, {q.shape[1] * q.shape[2]}] (rows and Hq * D of q)")
    gating = (gate_weight, gate_bias, warm_up, gate_value)
    return scale, check_gate(state, text_rows.shape[0], *gating, gate, warm_up_tanh)


_signatures = SignatureCache()


def _run(
    state: Tensor,
    q: Tensor,
    slow_kv: Tensor,
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    warm_up: Tensor | None,
    gate_value: Tensor | None,
    softmax_scale: float | None,
    num_splits: int,
    gate: str,
    warm_up_tanh: bool,
    backend: str | None,
) -> Tensor:
    attention = (q, slow_kv, cu_slow, text_rows, cu_text)
    gating = (gate_weight, gate_bias, warm_up, gate_value)
    tensors = (state, *attention, *gating)
    refuse_tangents(*tensors)
    vectors = (state,) if gate_weight is None else (state, gate_weight)
    options = (softmax_scale, num_splits, gate, requested_backend(backend), addresses_aligned(q, slow_kv, *vectors))
    key = (signature(*tensors), options)
    found = _signatures.get(key)
    if found is None:
        scale, _ = _check(*tensors, softmax_scale, num_splits, gate, warm_up_tanh)
        batch = cu_text.shape[0] - 1
        call = attention_call("slowfast_cross_attention", q, slow_kv, text_rows, batch, scale, *vectors)
        found = _signatures.remember(key, (scale, backend_for(call, q.device, backend)))
    scale, module = found
    check_attention_data(*attention)
    return module.slowfast_cross_attention(state, *attention, Gate.of(*gating, gate, warm_up_tanh), scale, num_splits)


_fused_op = torch.library.custom_op("slowfast::cross_attention", _run, mutates_args=())


@_fused_op.register_fake
def _fused_fake(state, *arguments):
    _check(state, *arguments[:-1])
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
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    warm_up: Tensor | None,
    gate_value: Tensor | None,
    softmax_scale: float,
    gate: str,
    warm_up_tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    attention = (q, slow_kv, cu_slow, text_rows, cu_text)
    refuse_tangents(grad, state, q, slow_kv, gate_weight, gate_bias, warm_up, gate_value)
    checked = Gate.of(gate_weight, gate_bias, warm_up, gate_value, gate, warm_up_tanh)
    context, _ = eager.text_cross_attention(*attention, softmax_scale, False, 0)
    mixed = eager.gated_residual_mix_backward(grad, state, context.flatten(1), text_rows, checked)
    grad_q, grad_kv = eager.text_cross_attention_backward(
        mixed.context.reshape(context.shape), None, *attention, softmax_scale
    )
    return present(state, mixed.state, grad_q, grad_kv, *mixed[2:])


@_fused_backward_op.register_fake
def _(
    grad, state, q, slow_kv, cu_slow, text_rows, cu_text, gate_weight, gate_bias, warm_up, gate_value,
    softmax_scale, gate, warm_up_tanh,
):  # fmt: skip
    arguments = (state, q, slow_kv, gate_weight, gate_bias, warm_up, gate_value)
    return present(state, *(None if x is None else x.new_empty(x.shape) for x in arguments))


def _setup_context(ctx, inputs, output):
    *tensors, softmax_scale, _, ctx.gate, ctx.warm_up_tanh, _ = inputs
    ctx.softmax_scale = tensors[1].shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    *tensors, gate_weight, gate_bias, warm_up, gate_value = ctx.saved_tensors
    gating = (gate_weight, gate_bias, warm_up, gate_value)
    gradients = torch.ops.slowfast.cross_attention_backward(
        grad, *tensors, *gating, ctx.softmax_scale, ctx.gate, ctx.warm_up_tanh
    )
    return *gradients[:3], *[None] * 3, *absent_as_none(gating, gradients[3:]), *[None] * 5


_fused_op.register_autograd(_backward, setup_context=_setup_context)
