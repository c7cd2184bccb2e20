"""The oracle: every op in plain PyTorch, forward and backward, clear before fast.

What is computed here is the definition; kernels are tested against it. Works on any device and in float64.
Functions take validated tensors (see ``ops``) and the backend signatures that cpu.py, cuda.py and triton/ share.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pool_plan import PoolPlan, VideoPlan


def _fp32_or_wider(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------------------------------------- pooling


def _pool_cells(x: Tensor, stride: int) -> Tensor:
    """[T, h, w, C] -> [T, h // stride, w // stride, C], floor average pooling."""
    if stride == 1:
        return x
    return F.avg_pool2d(x.permute(0, 3, 1, 2), stride).permute(0, 2, 3, 1)


def _slow_frames(frames: Tensor, video: VideoPlan, grid: tuple[int, int]) -> Tensor:
    """Slow tokens of one video before the norm, [T, h, w, C]."""
    mine = frames[video.first_frame : video.first_frame + video.num_frames]
    return _pool_cells(mine.reshape(video.num_frames, *grid, -1), video.pool_stride)


def _rms_norm(x: Tensor, eps: float) -> Tensor:
    wide = _fp32_or_wider(x)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def pool(frames: Tensor, plan: PoolPlan, norm_eps: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """frames [F, H * W, C] -> slow [Ns, C], cu_slow, fast [Nf, C], cu_fast (prefix sums int32 [B + 1])."""
    slow, fast = [], []
    for video in plan.videos:
        tokens = _slow_frames(frames, video, plan.grid)
        slow.append(tokens.reshape(-1, frames.shape[-1]))
        averaged = torch.stack([tokens[list(window)].mean(0) for window in video.windows])
        fast.append(_pool_cells(averaged, plan.spatial_stride).reshape(-1, frames.shape[-1]))
    slow_tokens = torch.cat(slow)
    if norm_eps is not None:
        slow_tokens = _rms_norm(slow_tokens, norm_eps)
    _, _, cu_slow, cu_fast = plan.tables(frames.device)
    return slow_tokens, cu_slow.clone(), torch.cat(fast), cu_fast.clone()


def _unpool_cells(grad: Tensor, stride: int, grid: tuple[int, int]) -> Tensor:
    """Transpose of ``_pool_cells`` onto [T, *grid, C]."""
    if stride == 1:
        return grad
    spread = grad.repeat_interleave(stride, 1).repeat_interleave(stride, 2) / stride**2
    return F.pad(spread, (0, 0, 0, grid[1] - spread.shape[2], 0, grid[0] - spread.shape[1]))


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
            tokens = _fp32_or_wider(_slow_frames(frames, video, plan.grid))
            inv_rms = torch.rsqrt(tokens.pow(2).mean(-1, keepdim=True) + norm_eps)
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
    slow, text = cu_slow.tolist(), cu_text.tolist()
    for b in range(len(slow) - 1):
        yield slice(slow[b], slow[b + 1]), slice(text[b], text[b + 1])


def _heads_of(slow_kv: Tensor, tokens: slice, num_q_heads: int) -> tuple[Tensor, Tensor]:
    """K and V of one sequence as [Hq, N, D], KV heads repeated for their group."""
    keys, values = slow_kv[tokens].unbind(2)
    group = num_q_heads // slow_kv.shape[1]
    return tuple(x.transpose(0, 1).repeat_interleave(group, 0) for x in (keys, values))


def text_cross_attention(
    q: Tensor,
    slow_kv: Tensor,
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    softmax_scale: float,
    return_lse: bool,
    num_splits: int,
) -> tuple[Tensor, Tensor | None]:
    """context [Nt, Hq, D] and, if asked, lse [Nt, Hq] float32. ``num_splits`` has no meaning here."""
    context = q.new_zeros(text_rows.shape[0], *q.shape[1:])
    lse = q.new_full(context.shape[:2], float("-inf"), dtype=torch.float32) if return_lse else None
    for tokens, texts in _sequences(cu_slow, cu_text):
        if tokens.start == tokens.stop or texts.start == texts.stop:
            continue
        keys, values = _heads_of(slow_kv, tokens, q.shape[1])
        query = q[text_rows[texts].long()].transpose(0, 1)  # [Hq, n, D]
        scores = _fp32_or_wider(query @ keys.transpose(1, 2)) * softmax_scale
        context[texts] = (scores.softmax(-1).to(q.dtype) @ values).transpose(0, 1)
        if lse is not None:
            lse[texts] = scores.logsumexp(-1).transpose(0, 1).float()
    return context, lse


def text_cross_attention_backward(
    grad_context: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    slow_kv: Tensor,
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to ``q`` (zero outside the text rows) and ``slow_kv``; scores are recomputed."""
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


def gated_residual_mix(
    state: Tensor,
    context: Tensor,
    text_rows: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    warm_up: Tensor | None,
    gate: str,
    warm_up_tanh: bool,
) -> Tensor:
    """state [rows, C] with ``g * context`` [Nt, C] added on the text rows; a new tensor."""
    rows = text_rows.long()
    picked = state[rows]
    g = F.linear(picked.to(gate_weight.dtype), gate_weight.reshape(1, -1), gate_bias)
    if gate == "tanh":
        g = g.tanh()
    if warm_up is not None:
        g = g * (warm_up.tanh() if warm_up_tanh else warm_up)
    return state.index_copy(0, rows, (picked + g * context).to(state.dtype))


def gated_residual_mix_backward(
    grad: Tensor,
    state: Tensor,
    context: Tensor,
    text_rows: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    warm_up: Tensor | None,
    gate: str,
    warm_up_tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients with respect to state, context, gate_weight, gate_bias and warm_up (None if it was None)."""
    rows = text_rows.long()
    picked, upstream, mixed = (_fp32_or_wider(x) for x in (state[rows], grad[rows], context))
    weight = _fp32_or_wider(gate_weight).reshape(-1)
    pre = picked @ weight + _fp32_or_wider(gate_bias)
    act = pre.tanh() if gate == "tanh" else pre
    factor, factor_slope = torch.ones_like(pre[:1]), None
    if warm_up is not None:
        factor = _fp32_or_wider(warm_up)
        factor_slope = torch.ones_like(factor)
        if warm_up_tanh:
            factor = factor.tanh()
            factor_slope = 1 - factor**2
    grad_gate = (upstream * mixed).sum(-1)
    grad_pre = grad_gate * factor * (1 - act**2 if gate == "tanh" else 1)
    grad_state = _fp32_or_wider(grad).index_add(0, rows, grad_pre[:, None] * weight)
    grad_context = (act * factor)[:, None] * upstream
    grad_weight = (grad_pre[:, None] * picked).sum(0).reshape(gate_weight.shape)
    grad_bias = grad_pre.sum().reshape(gate_bias.shape)
    grad_warm = None
    if warm_up is not None:
        grad_warm = ((grad_gate * act).sum() * factor_slope).reshape(warm_up.shape).to(warm_up.dtype)
    return (
        grad_state.to(state.dtype),
        grad_context.to(context.dtype),
        grad_weight.to(gate_weight.dtype),
        grad_bias.to(gate_bias.dtype),
        grad_warm,
    )


# ---------------------------------------------------------------------------------------------- fused


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
    softmax_scale: float,
    num_splits: int,
    gate: str,
    warm_up_tanh: bool,
) -> Tensor:
    """Attention, gate and mix: what one hybrid layer adds to a Qwen2 layer between attention and ``o_proj``."""
    context, _ = text_cross_attention(q, slow_kv, cu_slow, text_rows, cu_text, softmax_scale, False, num_splits)
    return gated_residual_mix(state, context.flatten(1), text_rows, gate_weight, gate_bias, warm_up, gate, warm_up_tanh)
