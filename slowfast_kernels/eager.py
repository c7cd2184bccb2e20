"""The oracle: every op in plain PyTorch, forward and backward, clear before fast.

What is computed here is the definition; kernels are tested against it. Works on any device and in float64.
Functions take validated tensors (see ``ops``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import AttentionTensors
from .gate import Gate
from .pool_plan import PoolPlan, VideoPlan


def _without_autocast(op: Callable) -> Callable:
    """Autocast would narrow the products that are widened here; an op's precision is its arguments'."""

    @wraps(op)
    def exact(first: Tensor | tuple[Tensor, ...], *args):
        device = (first if isinstance(first, Tensor) else first[0]).device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return op(first, *args)
        return op(first, *args)

    return exact


def _fp32_or_wider(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def integers(x: Tensor) -> list[int]:
    """``x.tolist()`` of an index tensor [n]; PyTorch's own fails inside torch.func's transforms up to 2.9."""
    if torch._C._are_functorch_transforms_active():
        return [value.item() for value in x.unbind()]
    return x.tolist()


# ---------------------------------------------------------------------------------------------- pooling


def _pool_cells(x: Tensor, stride: int) -> Tensor:
    """[T, h, w, C] -> [T, h // stride, w // stride, C], floor average pooling."""
    if stride == 1:
        return x
    return F.avg_pool2d(x.permute(0, 3, 1, 2), stride).permute(0, 2, 3, 1)


def _slow_frames(frames: Tensor, video: VideoPlan, grid: tuple[int, int]) -> Tensor:
    """Slow tokens of one video before the norm, [T, h, w, C], widened."""
    mine = _fp32_or_wider(frames[video.first_frame : video.first_frame + video.num_frames])
    return _pool_cells(mine.reshape(video.num_frames, *grid, -1), video.pool_stride)


def _inverse_rms(tokens: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(tokens.pow(2).mean(-1, keepdim=True) + eps)


@_without_autocast
def pool(frames: Tensor, plan: PoolPlan, norm_eps: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """frames [F, H * W, C] -> slow [Ns, C], cu_slow, fast [Nf, C], cu_fast (prefix sums int32 [B + 1])."""
    slow, fast = [], []
    for video in plan.videos:
        tokens = _slow_frames(frames, video, plan.grid)
        normed = tokens if norm_eps is None else tokens * _inverse_rms(tokens, norm_eps)
        slow.append(normed.reshape(-1, frames.shape[-1]).to(frames.dtype))
        averaged = torch.stack([tokens[list(window)].mean(0) for window in video.windows])
        fast.append(_pool_cells(averaged, plan.spatial_stride).reshape(-1, frames.shape[-1]).to(frames.dtype))
    _, _, cu_slow, cu_fast = plan.tables(frames.device)
    return torch.cat(slow), cu_slow.clone(), torch.cat(fast), cu_fast.clone()


def _unpool_cells(grad: Tensor, stride: int, grid: tuple[int, int]) -> Tensor:
    """Transpose of ``_pool_cells`` onto [T, *grid, C]."""
    if stride == 1:
        return grad
    spread = grad.repeat_interleave(stride, 1).repeat_interleave(stride, 2) / stride**2
    return F.pad(spread, (0, 0, 0, grid[1] - spread.shape[2], 0, grid[0] - spread.shape[1]))


@_without_autocast
def pool_backward(
    grad_slow: Tensor, grad_fast: Tensor, frames: Tensor, plan: PoolPlan, norm_eps: float | None
) -> Tensor:
    """Gradient of ``pool`` with respect to ``frames``."""
    channels = frames.shape[-1]
    grads = []
    for video in plan.videos:
        shape = (video.num_frames, *video.slow_grid, channels)
        upstream = _fp32_or_wider(grad_slow[video.first_slow : video.first_slow + video.num_slow]).reshape(shape)
        if norm_eps is not None:
            tokens = _slow_frames(frames, video, plan.grid)
            inv_rms = _inverse_rms(tokens, norm_eps)
            normed = tokens * inv_rms
            upstream = inv_rms * (upstream - normed * (upstream * normed).mean(-1, keepdim=True))
        else:
            upstream = upstream.clone()
        fast = grad_fast[video.first_fast : video.first_fast + video.num_fast]
        fast = _fp32_or_wider(fast).reshape(len(video.windows), *video.fast_grid, channels)
        fast = _unpool_cells(fast, plan.spatial_stride, video.slow_grid)
        for grad, window in zip(fast, video.windows, strict=True):
            upstream[list(window)] += grad / len(window)
        grads.append(_unpool_cells(upstream, video.pool_stride, plan.grid).reshape(video.num_frames, -1, channels))
    return torch.cat(grads).to(frames.dtype)


# -------------------------------------------------------------------------------------------- attention


def _sequences(cu_slow: Tensor, cu_text: Tensor):
    slow, text = integers(cu_slow), integers(cu_text)
    for b in range(len(slow) - 1):
        yield slice(slow[b], slow[b + 1]), slice(text[b], text[b + 1])


def _heads_of(slow_kv: Tensor, tokens: slice, num_q_heads: int) -> tuple[Tensor, Tensor]:
    """K and V of one sequence as [Hq, N, D], a KV head repeated for each of its query heads."""
    keys, values = slow_kv[tokens].unbind(2)
    heads_per_kv = num_q_heads // slow_kv.shape[1]
    return tuple(x.transpose(0, 1).repeat_interleave(heads_per_kv, 0) for x in (keys, values))


@_without_autocast
def text_cross_attention(inputs: AttentionTensors, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """context [Nt, Hq, D] and lse [Nt, Hq] float32."""
    q, slow_kv, cu_slow, text_rows, cu_text = inputs
    contexts, lses = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros(0, q.shape[1], dtype=torch.float32)]
    for tokens, texts in _sequences(cu_slow, cu_text):
        query = q[text_rows[texts].long()]  # [n, Hq, D]
        if tokens.start == tokens.stop:
            contexts.append(torch.zeros_like(query))
            lses.append(torch.full_like(query[..., 0], float("-inf"), dtype=torch.float32))
            continue
        keys, values = _heads_of(slow_kv, tokens, q.shape[1])
        query, keys, values = (_fp32_or_wider(x) for x in (query.transpose(0, 1), keys, values))
        scores = query @ keys.transpose(1, 2) * softmax_scale
        contexts.append((scores.softmax(-1) @ values).transpose(0, 1).to(q.dtype))
        lses.append(scores.logsumexp(-1).transpose(0, 1).float())
    return torch.cat(contexts), torch.cat(lses)


@_without_autocast
def text_cross_attention_backward(
    grad_context: Tensor, grad_lse: Tensor | None, inputs: AttentionTensors, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to ``q`` (zero outside the text rows) and ``slow_kv``; scores are recomputed."""
    q, slow_kv, cu_slow, text_rows, cu_text = inputs
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_q = torch.zeros(q.shape, dtype=wide, device=q.device)
    grad_kv = torch.zeros(slow_kv.shape, dtype=wide, device=q.device)
    num_kv_heads = slow_kv.shape[1]
    for tokens, texts in _sequences(cu_slow, cu_text):
        if tokens.start == tokens.stop or texts.start == texts.stop:
            continue
        rows = text_rows[texts].long()
        keys, values = (x.to(wide) for x in _heads_of(slow_kv, tokens, q.shape[1]))
        query = q[rows].transpose(0, 1).to(wide)
        upstream = grad_context[texts].transpose(0, 1).to(wide)
        probs = (query @ keys.transpose(1, 2) * softmax_scale).softmax(-1)
        grad_probs = upstream @ values.transpose(1, 2)
        grad_scores = grad_probs - (grad_probs * probs).sum(-1, keepdim=True)
        if grad_lse is not None:
            grad_scores = grad_scores + grad_lse[texts].transpose(0, 1).to(wide).unsqueeze(-1)
        grad_scores = grad_scores * probs * softmax_scale
        grad_q.index_add_(0, rows, (grad_scores @ keys).transpose(0, 1))
        for index, grad in enumerate((grad_scores.transpose(1, 2) @ query, probs.transpose(1, 2) @ upstream)):
            grad_kv[tokens, :, index] = grad.unflatten(0, (num_kv_heads, -1)).sum(1).transpose(0, 1)
    return grad_q.to(q.dtype), grad_kv.to(slow_kv.dtype)


# ------------------------------------------------------------------------------------------- gated mix


class _Activation(NamedTuple):
    apply: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]  # of the activated value, not of its argument


ACTIVATIONS = {
    "tanh": _Activation(torch.tanh, lambda act: 1 - act**2),
    "linear": _Activation(lambda pre: pre, torch.ones_like),
    "sigmoid": _Activation(torch.sigmoid, lambda act: act * (1 - act)),
}


def _activated(picked: Tensor, gate: Gate) -> Tensor:
    """Gates [Nt] before the warm-up factor; ``picked`` [Nt, C] are the text rows of the state, widened."""
    if gate.kind == "given":
        return gate.value.to(picked.dtype)
    if gate.kind == "none":
        return torch.ones_like(picked[:, 0])
    pre = picked @ gate.weight.reshape(-1).to(picked.dtype) + gate.bias.to(picked.dtype)
    return ACTIVATIONS[gate.kind].apply(pre)


def _warm_up_factor(like: Tensor, gate: Gate) -> Tensor:
    """factor(warm_up), [1] or a scalar, in the dtype of ``like``."""
    if gate.warm_up is None:
        return like.new_ones(1)
    warm_up = gate.warm_up.to(like.dtype)
    return warm_up.tanh() if gate.warm_up_tanh else warm_up


@_without_autocast
def gated_residual_mix(state: Tensor, context: Tensor, text_rows: Tensor, gate: Gate) -> Tensor:
    """state [rows, C] with ``g * context`` [Nt, C] added on the text rows; a new tensor."""
    rows = text_rows.long()
    picked, mixed = (_fp32_or_wider(x) for x in (state[rows], context))
    g = _activated(picked, gate) * _warm_up_factor(picked, gate)
    return state.index_copy(0, rows, (picked + g[:, None] * mixed).to(state.dtype))


class MixGradients(NamedTuple):
    """Of ``gated_residual_mix``, in its arguments' shapes and dtypes; None where there was no argument."""

    state: Tensor
    context: Tensor
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    warm_up: Tensor | None
    gate_value: Tensor | None


@_without_autocast
def gated_residual_mix_backward(
    grad: Tensor, state: Tensor, context: Tensor, text_rows: Tensor, gate: Gate
) -> MixGradients:
    """Gradients of ``gated_residual_mix`` for the gradient ``grad`` [rows, C] of its result."""
    rows = text_rows.long()
    picked, upstream, mixed = (_fp32_or_wider(x) for x in (state[rows], grad[rows], context))
    act, factor = _activated(picked, gate), _warm_up_factor(picked, gate)
    grad_gate = (upstream * mixed).sum(-1)
    grad_act = grad_gate * factor
    grad_state, grad_weight, grad_bias, grad_warm, grad_value = _fp32_or_wider(grad), None, None, None, None
    if gate.weight is not None:
        grad_pre = grad_act * ACTIVATIONS[gate.kind].slope(act)
        weight = gate.weight.reshape(-1).to(picked.dtype)
        grad_state = grad_state.index_add(0, rows, grad_pre[:, None] * weight)
        grad_weight = (grad_pre[:, None] * picked).sum(0).reshape(gate.weight.shape).to(gate.weight.dtype)
        grad_bias = grad_pre.sum().reshape(gate.bias.shape).to(gate.bias.dtype)
    if gate.warm_up is not None:
        slope = 1 - factor**2 if gate.warm_up_tanh else torch.ones_like(factor)
        grad_warm = (grad_gate * act * slope).sum().reshape(gate.warm_up.shape).to(gate.warm_up.dtype)
    if gate.value is not None:
        grad_value = grad_act.to(gate.value.dtype)
    return MixGradients(
        grad_state.to(state.dtype, copy=gate.weight is None),  # never the upstream gradient itself
        ((act * factor)[:, None] * upstream).to(context.dtype),
        grad_weight,
        grad_bias,
        grad_warm,
        grad_value,
    )


# ---------------------------------------------------------------------------------------------- fused


def slowfast_cross_attention(state: Tensor, inputs: AttentionTensors, gate: Gate, softmax_scale: float) -> Tensor:
    """Attention, gate and mix: what one hybrid layer adds to a Qwen2 layer between attention and ``o_proj``."""
    context, _ = text_cross_attention(inputs, softmax_scale)
    return gated_residual_mix(state, context.flatten(1), inputs.text_rows, gate)
