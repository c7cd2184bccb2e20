"""gated_residual_mix: add the cross-attention context to the text rows through a scalar gate a row."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import eager, flops
from ..calls import BackwardTensors, MixOptions, MixTensors
from ..gate import GATE_CODES, GATES, WEIGHTED_GATES, Gate
from ..heuristics.backends import OpCall
from . import checks
from .dispatch import check_backend_name, compute_capability
from .op import Op


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
        gate: how g is formed, one of ``slowfast_kernels.gate.GATES``, with the formulas there. The released gating
            types have "tanh" or, without tanh in their name, "linear".
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
    options = _by_value(gate, warm_up_tanh, backend)
    return _OP(MixTensors(state, context, text_rows, gate_weight, gate_bias, warm_up, gate_value), options)


def _by_value(gate: object, warm_up_tanh: object, backend: str | None) -> MixOptions:
    warm_up_tanh = checks.as_bool("warm_up_tanh", warm_up_tanh)
    checks.check_option("gate", gate, GATES)
    check_backend_name(backend)
    return MixOptions(gate, warm_up_tanh, backend)


def _with_flat_heads(context: Tensor) -> Tensor:
    try:
        return context.flatten(1) if context.dim() == 3 else context
    except Exception:  # no tensor, or one that has no dimensions to flatten
        checks.check_dense("context", context, "[Nt, C] or [Nt, Hq, D]")
        raise


def check_gate(state: Tensor, num_text: int, gate: Gate) -> None:
    """``gate`` against the state [rows, C] and the text rows [Nt] that it is for."""
    checks.check_option("gate", gate.kind, tuple(GATE_CODES))
    if gate.kind in WEIGHTED_GATES:
        _check_weight(state, gate.weight, gate.bias)
    else:
        why = "gate='none' has no weight" if gate.value is None else "gate_value takes its place"
        for name, x in (("gate_weight", gate.weight), ("gate_bias", gate.bias)):
            if x is not None:
                checks.fail(name, checks.describe(x), f"None ({why})")
    if gate.value is not None:
        checks.check_dense("gate_value", gate.value, f"[{num_text}]")
        if gate.value.shape != (num_text,):
            checks.fail("gate_value", gate.value, f"shape [{num_text}] (Nt of text_rows)")
        _check_gate_dtype("gate_value", gate.value, state)
    if gate.warm_up is not None:
        _check_scalar("warm_up", gate.warm_up)
        if gate.weight is not None:
            checks.check_like("warm_up", gate.warm_up, "gate_weight", gate.weight)
        else:
            _check_gate_dtype("warm_up", gate.warm_up, state)


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


class _Mix(Op):
    name = torch_name = "gated_residual_mix"
    tensors, options = MixTensors, MixOptions
    returns = "Tensor"
    differentiable = ("state", "context", "gate_weight", "gate_bias", "warm_up", "gate_value")
    has_gradient = (0,)
    by_value = staticmethod(_by_value)

    def bind(self, given: dict[str, object]) -> tuple[MixTensors, MixOptions]:
        return super().bind(given | {"context": _with_flat_heads(given["context"])})

    def check(self, tensors: MixTensors, options: MixOptions) -> None:
        state, context, text_rows = tensors[:3]
        checks.check_option("gate", options.gate, GATES)
        checks.check_tensor("state", state, 2, "[rows, C]")
        checks.check_float("state", state)
        checks.check_tensor("context", context, 2, "[Nt, C] or [Nt, Hq, D]")
        checks.check_like("context", context, "state", state)
        checks.check_index("text_rows", text_rows, "[Nt]", "state", state)
        num_text, channels = text_rows.shape[0], state.shape[1]
        if context.shape[1] != channels or context.shape[0] != num_text:
            checks.fail("context", context, f"shape [{num_text}, {channels}] (Nt of text_rows, C of state)")
        check_gate(state, num_text, tensors.gate(options))

    def data_rules(self, tensors: MixTensors) -> tuple[checks.DataRule, ...]:
        return (checks.DataRule("rows", "text_rows", "state", tensors.state.shape[0]),)

    def facts(self, tensors: MixTensors, options: MixOptions) -> OpCall:
        device, num_text = tensors.state.device, tensors.text_rows.shape[0]
        return OpCall(self.name, device.type, tensors.state.dtype, compute_capability(device), num_text=num_text)

    def formula(self, tensors: MixTensors, options: MixOptions) -> Tensor:
        return eager.gated_residual_mix(*tensors[:3], tensors.gate(options))

    def fake(self, tensors: MixTensors, options: MixOptions) -> Tensor:
        return tensors.state.new_empty(tensors.state.shape)

    def gradients(self, call: BackwardTensors, options: MixOptions, needs: tuple[bool, ...]) -> eager.MixGradients:
        inputs = call.inputs
        return eager.gated_residual_mix_backward(*call.grads, *inputs[:3], inputs.gate(options))

    def flops(self, shapes: MixTensors, options: MixOptions) -> int:
        return flops.mix(*shapes.context, weighted=shapes.gate_weight is not None)

    def backward_flops(self, shapes: MixTensors, options: MixOptions) -> int:
        return flops.mix_backward(*shapes.context, weighted=shapes.gate_weight is not None)


_OP = _Mix()
