"""gated_residual_mix: add the cross-attention context to the text rows through a learned scalar gate a row."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import eager
from ..heuristics import OpCall
from . import checks
from .dispatch import (
    SignatureCache,
    backend_for,
    compute_capability,
    needs_torch_op,
    requested_backend,
    signature,
)

GATES = ("tanh", "linear")


def gated_residual_mix(
    state: Tensor,
    context: Tensor,
    text_rows: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    warm_up: Tensor | None,
    *,
    gate: str = "tanh",
    warm_up_tanh: bool = True,
    backend: str | None = None,
) -> Tensor:
    """state[r] + g * context[i] for r = text_rows[i], g = gate(state[r] . gate_weight + gate_bias) * f(warm_up).

    Args:
        state: attention output before ``o_proj`` [rows, C]; float32, bfloat16 or float16.
        context: cross-attention context [Nt, C] or [Nt, Hq, D], state's dtype.
        text_rows: int32 [Nt], distinct rows of ``state``.
        gate_weight: [C] or [1, C] (``cross_attn_gate_proj.0.weight``), state's dtype or float32.
        gate_bias: [1] (``cross_attn_gate_proj.0.bias``), gate_weight's dtype.
        warm_up: [1] (``cross_attn_warm_up_gate``), gate_weight's dtype, or None: no warm-up factor.
        gate: "tanh", or "linear" for the gating types without tanh.
        warm_up_tanh: f is tanh; False: f is the identity (the all-to-media variant).
        backend: "cuda", "triton", "cpu", "eager", or None (automatic).

    Returns:
        A new tensor [rows, C]; rows outside ``text_rows`` are copied.

    Raises:
        ValueError: a wrong shape, device, stride or option; on the CPU (on a GPU under SLOWFAST_DEBUG=1) also row
            indices out of range or repeated.
        TypeError: a wrong dtype.
        NotImplementedError: the backend asked for cannot run this call.
    """
    if isinstance(context, Tensor) and context.dim() == 3:
        context = context.flatten(1)
    arguments = (state, context, text_rows, gate_weight, gate_bias, warm_up, gate, warm_up_tanh, backend)
    if needs_torch_op(state, context, gate_weight, gate_bias, warm_up):
        return torch.ops.slowfast.gated_residual_mix(*arguments)
    return _run(*arguments)


def check_gate(state, gate_weight, gate_bias, warm_up, gate) -> None:
    checks.check_option("gate", gate, GATES)
    channels = state.shape[1]
    checks.check_tensor("gate_weight", gate_weight, (1, 2), f"[{channels}] or [1, {channels}]")
    if gate_weight.shape[-1] != channels or gate_weight.numel() != channels:
        checks.fail("gate_weight", gate_weight, f"shape [{channels}] or [1, {channels}]")
    if gate_weight.dtype not in (state.dtype, torch.float32):
        raise TypeError(f"gate_weight: got {gate_weight.dtype}, want {state.dtype} (the dtype of state) or float32")
    checks.check_device("gate_weight", gate_weight, "state", state)
    for name, x in (("gate_bias", gate_bias), ("warm_up", warm_up)):
        if x is None and name == "warm_up":
            continue
        checks.check_tensor(name, x, (0, 1), "[1]")
        if x.numel() != 1:
            checks.fail(name, x, "shape [1]")
        checks.check_like(name, x, "gate_weight", gate_weight)


def check_mix(state, context, text_rows, gate_weight, gate_bias, warm_up, gate) -> None:
    checks.check_tensor("state", state, 2, "[rows, C]")
    checks.check_float("state", state)
    checks.check_tensor("context", context, 2, "[Nt, C] or [Nt, Hq, D]")
    checks.check_like("context", context, "state", state)
    checks.check_index("text_rows", text_rows, "[Nt]", "state", state)
    if context.shape[1] != state.shape[1] or context.shape[0] != text_rows.shape[0]:
        checks.fail("context", context, f"shape [{text_rows.shape[0]}, {state.shape[1]}] (Nt of text_rows, C of state)")
    check_gate(state, gate_weight, gate_bias, warm_up, gate)


_signatures = SignatureCache()


def _run(
    state: Tensor,
    context: Tensor,
    text_rows: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    warm_up: Tensor | None,
    gate: str,
    warm_up_tanh: bool,
    backend: str | None,
) -> Tensor:
    key = (signature(state, context, text_rows, gate_weight, gate_bias, warm_up), gate, requested_backend(backend))
    module = _signatures.get(key)
    if module is None:
        check_mix(state, context, text_rows, gate_weight, gate_bias, warm_up, gate)
        capability, num_text = compute_capability(state.device), text_rows.shape[0]
        call = OpCall("gated_residual_mix", state.device.type, state.dtype, capability, num_text=num_text)
        module = _signatures.remember(key, backend_for(call, state.device, backend))
    if checks.reads_device_data(state):
        checks.check_rows("text_rows", text_rows, "state", state.shape[0])
    return module.gated_residual_mix(state, context, text_rows, gate_weight, gate_bias, warm_up, gate, warm_up_tanh)


_mix_op = torch.library.custom_op("slowfast::gated_residual_mix", _run, mutates_args=())


@_mix_op.register_fake
def _mix_fake(state, context, text_rows, gate_weight, gate_bias, warm_up, gate, warm_up_tanh, backend):
    check_mix(state, context, text_rows, gate_weight, gate_bias, warm_up, gate)
    return state.new_empty(state.shape)


@torch.library.custom_op("slowfast::gated_residual_mix_backward", mutates_args=())
def _mix_backward_op(
    grad: Tensor,
    state: Tensor,
    context: Tensor,
    text_rows: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    warm_up: Tensor | None,
    gate: str,
    warm_up_tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *grads, grad_warm = eager.gated_residual_mix_backward(
        grad, state, context, text_rows, gate_weight, gate_bias, warm_up, gate, warm_up_tanh
    )
    return *grads, gate_bias.new_empty(0) if grad_warm is None else grad_warm


@_mix_backward_op.register_fake
def _(grad, state, context, text_rows, gate_weight, gate_bias, warm_up, gate, warm_up_tanh):
    grads = [x.new_empty(x.shape) for x in (state, context, gate_weight, gate_bias)]
    return *grads, gate_bias.new_empty(0 if warm_up is None else warm_up.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.gate, ctx.warm_up_tanh, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    state, context, text_rows, gate_weight, gate_bias, warm_up = ctx.saved_tensors
    grads = torch.ops.slowfast.gated_residual_mix_backward(
        grad, state, context, text_rows, gate_weight, gate_bias, warm_up, ctx.gate, ctx.warm_up_tanh
    )
    grad_state, grad_context, grad_weight, grad_bias, grad_warm = grads
    return grad_state, grad_context, None, grad_weight, grad_bias, None if warm_up is None else grad_warm, *[None] * 3


_mix_op.register_autograd(_backward, setup_context=_setup_context)
