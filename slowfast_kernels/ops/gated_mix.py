"""gated_residual_mix: add the cross-attention context to the text rows through a scalar gate a row."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import eager
from ..gate import GATES, WEIGHTED_GATES, Gate
from ..heuristics import OpCall
from . import checks
from .dispatch import (
    SignatureCache,
    backend_for,
    check_backend_name,
    compute_capability,
    needs_formula,
    refuse_tangents,
    requested_backend,
    run_op,
    signature,
)


def gated_residual_mix(
    state: Tensor,
    context: Tensor,
    text_rows: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    warm_up: Tensor | None,
    *,
    gate: str = "tanh",
    warm_up_tanh: bool = True,
    gate_value: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """state[r] + g * context[i] for r = text_rows[i]; g = act(state[r] . gate_weight + gate_bias) * f(warm_up).

    Args:
        state: attention output before ``o_proj`` [rows, C]; float32, bfloat16 or float16.
        context: cross-attention context [Nt, C] or [Nt, Hq, D], state's dtype.
        text_rows: int32 [Nt], distinct rows of ``state``.
        gate_weight: [C] or [1, C] (``cross_attn_gate_proj.0.weight``), state's dtype or float32; None for gate="none"
            and with ``gate_value``.
        gate_bias: [1] (``cross_attn_gate_proj.0.bias``), gate_weight's dtype; None where gate_weight is.
        warm_up: [1] (``cross_attn_warm_up_gate``), gate_weight's dtype (without one, state's or float32), or None: no
            warm-up factor.
        gate: how g is formed, one of ``slowfast_kernels.gate.GATES`` (formulas there): "tanh", "linear" for the gating
            types without tanh, "none" for the warm-up factor alone.
        warm_up_tanh: f is tanh; False: f is the identity (the all-to-media variant).
        gate_value: [Nt], state's dtype or float32: gates of the text rows after their activation, formed outside (a
            projection with an adapter, say). g is then gate_value[i] * f(warm_up), and ``gate`` is not applied.
        backend: "cuda", "triton", "cpu", "eager", or None (automatic).

    Returns:
        A new tensor [rows, C]; rows outside ``text_rows`` are copied.

    Raises:
        ValueError: a wrong shape, device, stride or option; a weight where there must be none; on the CPU (on a GPU
            under SLOWFAST_DEBUG=1) also row indices out of range or repeated.
        TypeError: a wrong dtype.
        NotImplementedError: the backend asked for cannot run this call.
    """
    context = _with_flat_heads(context)
    warm_up_tanh = checks.as_bool("warm_up_tanh", warm_up_tanh)
    checks.check_option("gate", gate, GATES)
    check_backend_name(backend)
    gating = (gate_weight, gate_bias, warm_up, gate_value)
    tensors = (state, context, text_rows, *gating)
    if needs_formula(*tensors):
        checked = check_mix(*tensors, gate, warm_up_tanh)
        check_mix_data(state, text_rows)
        return eager.gated_residual_mix(state, context, text_rows, checked)
    return run_op(torch.ops.slowfast.gated_residual_mix, _run, _check, tensors, gate, warm_up_tanh, backend)


def _with_flat_heads(context: Tensor) -> Tensor:
    try:
        return context.flatten(1) if context.dim() == 3 else context
    except Exception:  # no tensor, or one that has no dimensions to flatten
        checks.check_dense("context", context, "[Nt, C] or [Nt, Hq, D]")
        raise


def check_gate(state, num_text, gate_weight, gate_bias, warm_up, gate_value, gate, warm_up_tanh) -> Gate:
    checks.check_option("gate", gate, GATES)
    checked = Gate.of(gate_weight, gate_bias, warm_up, gate_value, gate, warm_up_tanh)
    if checked.kind in WEIGHTED_GATES:
        _check_weight(state, gate_weight, gate_bias)
    else:
        why = "gate='none' has no weight" if gate_value is None else "gate_value takes its place"
        for name, x in (("gate_weight", gate_weight), ("gate_bias", gate_bias)):
            if x is not None:
                checks.fail(name, checks.describe(x), f"None ({why})")
    if gate_value is not None:
        checks.check_dense("gate_value", gate_value, f"[{num_text}]")
        if gate_value.shape != (num_text,):
            checks.fail("gate_value", gate_value, f"shape [{num_text}] (Nt of text_rows)")
        _check_gate_dtype("gate_value", gate_value, state)
    if warm_up is not None:
        _check_scalar("warm_up", warm_up)
        if gate_weight is not None:
            checks.check_like("warm_up", warm_up, "gate_weight", gate_weight)
        else:
            _check_gate_dtype("warm_up", warm_up, state)
    return checked


def _check_weight(state, gate_weight, gate_bias) -> None:
    channels = state.shape[1]
    checks.check_tensor("gate_weight", gate_weight, (1, 2), f"[{channels}] or [1, {channels}]")
    if gate_weight.shape[-1] != channels or gate_weight.numel() != channels:
        checks.fail("gate_weight", gate_weight, f"shape [{channels}] or [1, {channels}]")
    _check_gate_dtype("gate_weight", gate_weight, state)
    _check_scalar("gate_bias", gate_bias)
    checks.check_like("gate_bias", gate_bias, "gate_weight", gate_weight)


def _check_gate_dtype(name: str, x: Tensor, state: Tensor) -> None:
    if x.dtype not in (state.dtype, torch.float32):
        raise TypeError(f"{name}: got {x.dtype}, want {state.dtype} (the dtype of state) or float32")
    checks.check_device(name, x, "state", state)


def _check_scalar(name: str, x: Tensor) -> None:
    checks.check_tensor(name, x, (0, 1), "[1]")
    if x.numel() != 1:
        checks.fail(name, x, "shape [1]")


def check_mix(state, context, text_rows, gate_weight, gate_bias, warm_up, gate_value, gate, warm_up_tanh) -> Gate:
    """Everything but data; returns the gate as backends take it."""
    checks.check_tensor("state", state, 2, "[rows, C]")
    checks.check_float("state", state)
    checks.check_tensor("context", context, 2, "[Nt, C] or [Nt, Hq, D]")
    checks.check_like("context", context, "state", state)
    checks.check_index("text_rows", text_rows, "[Nt]", "state", state)
    if context.shape[1] != state.shape[1] or context.shape[0] != text_rows.shape[0]:
        checks.fail("context", context, f"shape [{text_rows.shape[0]}, {state.shape[1]}] (Nt of text_rows, C of state)")
    return check_gate(state, text_rows.shape[0], gate_weight, gate_bias, warm_up, gate_value, gate, warm_up_tanh)


def _check(state, context, text_rows, gate_weight, gate_bias, warm_up, gate_value, gate, warm_up_tanh, backend) -> None:
    check_mix(state, context, text_rows, gate_weight, gate_bias, warm_up, gate_value, gate, warm_up_tanh)


def check_mix_data(state: Tensor, text_rows: Tensor) -> None:
    if checks.reads_device_data(state):
        checks.check_rows("text_rows", text_rows, "state", state.shape[0])


_signatures = SignatureCache()


def _run(
    state: Tensor,
    context: Tensor,
    text_rows: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    warm_up: Tensor | None,
    gate_value: Tensor | None,
    gate: str,
    warm_up_tanh: bool,
    backend: str | None,
) -> Tensor:
    gating = (gate_weight, gate_bias, warm_up, gate_value)
    tensors = (state, context, text_rows, *gating)
    refuse_tangents(*tensors)
    key = (signature(*tensors), gate, requested_backend(backend))
    module = _signatures.get(key)
    if module is None:
        check_mix(*tensors, gate, warm_up_tanh)
        capability, num_text = compute_capability(state.device), text_rows.shape[0]
        call = OpCall("gated_residual_mix", state.device.type, state.dtype, capability, num_text=num_text)
        module = _signatures.remember(key, backend_for(call, state.device, backend))
    check_mix_data(state, text_rows)
    return module.gated_residual_mix(state, context, text_rows, Gate.of(*gating, gate, warm_up_tanh))


_mix_op = torch.library.custom_op("slowfast::gated_residual_mix", _run, mutates_args=())


@_mix_op.register_fake
def _mix_fake(
    state, context, text_rows, gate_weight, gate_bias, warm_up, gate_value, gate, warm_up_tanh, backend
):  # fmt: skip
    check_mix(state, context, text_rows, gate_weight, gate_bias, warm_up, gate_value, gate, warm_up_tanh)
    return state.new_empty(state.shape)


def present(like: Tensor, *gradients: Tensor | None) -> tuple[Tensor, ...]:
    """A registered op returns tensors: an empty one stands for the gradient of an argument that was None."""
    return tuple(like.new_empty(0) if x is None else x for x in gradients)


def absent_as_none(arguments: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else grad for x, grad in zip(arguments, gradients, strict=True))


@torch.library.custom_op("slowfast::gated_residual_mix_backward", mutates_args=())
def _mix_backward_op(
    grad: Tensor,
    state: Tensor,
    context: Tensor,
    text_rows: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    warm_up: Tensor | None,
    gate_value: Tensor | None,
    gate: str,
    warm_up_tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    refuse_tangents(grad, state, context, gate_weight, gate_bias, warm_up, gate_value)
    checked = Gate.of(gate_weight, gate_bias, warm_up, gate_value, gate, warm_up_tanh)
    return present(state, *eager.gated_residual_mix_backward(grad, state, context, text_rows, checked))


@_mix_backward_op.register_fake
def _(grad, state, context, text_rows, gate_weight, gate_bias, warm_up, gate_value, gate, warm_up_tanh):
    arguments = (state, context, gate_weight, gate_bias, warm_up, gate_value)
    return present(state, *(None if x is None else x.new_empty(x.shape) for x in arguments))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.gate, ctx.warm_up_tanh, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    state, context, text_rows, *gating = ctx.saved_tensors
    gradients = torch.ops.slowfast.gated_residual_mix_backward(
        grad, state, context, text_rows, *gating, ctx.gate, ctx.warm_up_tanh
    )
    return *gradients[:2], None, *absent_as_none(gating, gradients[2:]), *[None] * 3


_mix_op.register_autograd(_backward, setup_context=_setup_context)
