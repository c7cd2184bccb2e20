"""slowfast_cross_attention: attention over the slow tokens, gate and mix, as one op."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from .. import eager, flops
from ..calls import AttentionOptions, BackwardTensors, FusedOptions, FusedTensors, MixOptions, MixTensors, scale_of
from ..gate import GATES, Gate
from ..heuristics.backends import OpCall
from . import checks
from .attention import (
    attention_facts,
    attention_rules,
    check_attention,
    keys_and_values,
    pairs_of,
    text_cross_attention,
    with_keys_and_values,
)
from .dispatch import check_backend_name, follows_gradients
from .gated_mix import check_gate, gated_residual_mix
from .op import OPS, Op


def slowfast_cross_attention(
    state: Tensor,
    q: Tensor,
    slow_kv: Tensor | tuple[Tensor, Tensor],
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    warm_up: Tensor | None,
    *,
    slow_begin: Tensor | None = None,
    slow_end: Tensor | None = None,
    slow_pieces: Tensor | None = None,
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
        q, slow_kv, cu_slow, text_rows, cu_text, slow_begin, slow_end, slow_pieces, softmax_scale, num_splits: as in
            ``text_cross_attention``.
        gate_weight, gate_bias, warm_up, gate, warm_up_tanh, gate_value: as in ``gated_residual_mix``.
        backend: "cuda", "triton", "cpu", "eager", or None (automatic).

    Returns:
        A new tensor [rows, C]; rows outside ``text_rows`` and rows that see no slow token are copied. (Where gradients
        follow a call without ranges and pieces, rows of a sequence without slow tokens get 0 times their gate added:
        -0.0 becomes 0.0.)

    Raises:
        ValueError, TypeError, NotImplementedError: as the two ops.
    """
    options = _by_value(softmax_scale, num_splits, gate, warm_up_tanh, backend)
    gating = (gate_weight, gate_bias, warm_up, gate_value)
    keys, values = keys_and_values(slow_kv)
    places = (q, keys, cu_slow, text_rows, cu_text, values, slow_begin, slow_end, slow_pieces)
    tensors = FusedTensors(state, *places, *gating)
    if not follows_gradients(tensors):
        return _OP(tensors, options)
    selection = {"slow_begin": slow_begin, "slow_end": slow_end, "slow_pieces": slow_pieces}
    attend = {"softmax_scale": options.softmax_scale, "num_splits": options.num_splits, "backend": backend}
    attend |= selection | {"return_lse": True}
    context, lse = text_cross_attention(q, slow_kv, cu_slow, text_rows, cu_text, **attend)
    mix = partial(gated_residual_mix, gate=gate, warm_up_tanh=options.warm_up_tanh, backend=backend)
    if all(x is None for x in selection.values()):  # a property of a named tuple is no bool to dynamo before torch 2.7
        return mix(state, context, text_rows, gate_weight, gate_bias, warm_up, gate_value=gate_value)
    made = Gate.of(*gating, gate, options.warm_up_tanh)
    clean = eager.without_blind_rows(state, text_rows, made, lse)
    mixed = mix(clean.state, context, text_rows, gate_weight, gate_bias, warm_up, gate_value=clean.gate.value)
    return clean.keep(mixed, state)


def _by_value(
    softmax_scale: object, num_splits: object, gate: object, warm_up_tanh: object, backend: str | None
) -> FusedOptions:
    softmax_scale = None if softmax_scale is None else checks.as_float("softmax_scale", softmax_scale)
    num_splits = checks.as_int("num_splits", num_splits)
    warm_up_tanh = checks.as_bool("warm_up_tanh", warm_up_tanh)
    checks.check_option("gate", gate, GATES)
    check_backend_name(backend)
    return FusedOptions(softmax_scale, num_splits, gate, warm_up_tanh, backend)


class _Fused(Op):
    name, torch_name = "slowfast_cross_attention", "cross_attention"
    tensors, options = FusedTensors, FusedOptions
    returns = "Tensor"
    differentiable = ("state", "q", "slow_kv", "slow_values", "gate_weight", "gate_bias", "warm_up", "gate_value")
    has_gradient = (0,)
    by_value = staticmethod(_by_value)

    def bind(self, given: dict[str, object]) -> tuple[FusedTensors, FusedOptions]:
        return super().bind(with_keys_and_values(given))

    def parts(self, tensors: FusedTensors, options: FusedOptions) -> list[tuple[Op, tuple, tuple]]:
        if not follows_gradients(tensors):
            return []
        attention, mix = OPS["text_cross_attention"], OPS["gated_residual_mix"]
        attend = AttentionOptions(options.softmax_scale, True, options.num_splits, options.backend)
        attention.check(tensors.attention, attend)  # a context is made for what passes
        context = tensors.q.new_empty(tensors.text_rows.shape[0], tensors.q.shape[1] * tensors.q.shape[2])
        context.requires_grad_(any(x is not None and x.requires_grad for x in tensors.attention))
        gating = (tensors.gate_weight, tensors.gate_bias, tensors.warm_up, tensors.gate_value)
        mixed = MixTensors(tensors.state, context, tensors.text_rows, *gating)
        mixing = MixOptions(options.gate, options.warm_up_tanh, options.backend)
        return [(attention, tensors.attention, attend), (mix, mixed, mixing)]

    def check(self, tensors: FusedTensors, options: FusedOptions) -> None:
        state, q = tensors.state, tensors.q
        checks.check_option("gate", options.gate, GATES)
        check_attention(tensors.attention, options.softmax_scale, options.num_splits)
        checks.check_tensor("state", state, 2, "[rows, Hq * D]")
        checks.check_like("state", state, "q", q)
        if state.shape[0] != q.shape[0] or state.shape[1] != q.shape[1] * q.shape[2]:
            checks.fail("state", state, f"shape [{q.shape[0]}, {q.shape[1] * q.shape[2]}] (rows and Hq * D of q)")
        check_gate(state, tensors.text_rows.shape[0], tensors.gate(options))

    def data_rules(self, tensors: FusedTensors) -> tuple[checks.DataRule, ...]:
        return attention_rules(tensors)

    def facts(self, tensors: FusedTensors, options: FusedOptions) -> OpCall:
        vectors = (x for x in (tensors.state, tensors.gate_weight) if x is not None)
        return attention_facts(self.name, tensors.attention, options.softmax_scale, *vectors)

    def formula(self, tensors: FusedTensors, options: FusedOptions) -> Tensor:
        scale = scale_of(tensors.q, options.softmax_scale)
        return eager.slowfast_cross_attention(tensors.state, tensors.attention, tensors.gate(options), scale)

    def fake(self, tensors: FusedTensors, options: FusedOptions) -> Tensor:
        return tensors.state.new_empty(tensors.state.shape)

    def run_backward(
        self, call: BackwardTensors, options: FusedOptions, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Of the registered op alone, which keeps no context: by its parts. The public function has called them."""
        tensors: FusedTensors = call.inputs
        attention, mix = OPS["text_cross_attention"], OPS["gated_residual_mix"]
        attend = AttentionOptions(options.softmax_scale, True, options.num_splits, options.backend)
        needs_state, needs_attention, needs_gate = needs[0], needs[1:4], needs[4:]
        context, lse = attention.run(tensors.attention, attend)
        clean = eager.without_blind_rows(tensors.state, tensors.text_rows, tensors.gate(options), lse)
        gate = clean.gate
        mixing = MixTensors(
            clean.state, context.flatten(1), tensors.text_rows, gate.weight, gate.bias, gate.warm_up, gate.value
        )
        (grad,) = call.grads
        grad_state, grad_context, *grad_gate = mix.run_backward(
            BackwardTensors((clean.blank(grad),), (), mixing),
            MixOptions(options.gate, options.warm_up_tanh, options.backend),
            (needs_state, any(needs_attention), *needs_gate),
        )
        if grad_state is not None:
            grad_state = clean.keep(grad_state, grad)
        if not any(needs_attention):
            return grad_state, None, None, None, *grad_gate
        attended = BackwardTensors((grad_context.view(context.shape), None), (context, lse), tensors.attention)
        return grad_state, *attention.run_backward(attended, attend, needs_attention), *grad_gate

    def flops(self, shapes: FusedTensors, options: FusedOptions) -> int:
        weighted = shapes.gate_weight is not None
        attended = flops.attention(pairs_of(shapes.attention), *shapes.q[1:])
        return attended + flops.mix(shapes.text_rows[0], shapes.state[1], weighted)

    def backward_flops(self, shapes: FusedTensors, options: FusedOptions) -> int:
        """The context is computed again."""
        pairs, heads = pairs_of(shapes.attention), shapes.q[1:]
        attended = flops.attention(pairs, *heads) + flops.attention_backward(pairs, *heads)
        return attended + flops.mix_backward(shapes.text_rows[0], shapes.state[1], shapes.gate_weight is not None)


_OP = _Fused()
