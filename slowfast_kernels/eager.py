"""The oracle: every op in plain PyTorch, forward and backward, clear before fast.

What is computed here is the definition; kernels are tested against it. Works on any device and in float64.
Functions take validated tensors (see ``ops``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    frames: Tensor, grad_slow: Tensor | None, grad_fast: Tensor | None, plan: PoolPlan, norm_eps: float | None
) -> Tensor:
    """Gradient of ``pool`` with respect to ``frames``."""
    if grad_slow is None:
        grad_slow = frames.new_zeros(plan.num_slow, frames.shape[-1])
    if grad_fast is None:
        grad_fast = frames.new_zeros(plan.num_fast, frames.shape[-1])
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


class _Sequence(NamedTuple):
    """One sequence of a batch: which text rows it has, and where its slow tokens lie, piece after piece."""

    texts: slice
    pieces: list[slice]

    def tokens(self, x: Tensor) -> Tensor:
        """Its rows of ``x`` [Ns, ...], in order."""
        found = [x[piece] for piece in self.pieces]
        return found[0] if len(found) == 1 else torch.cat([x[:0], *found])


def _sequences(inputs: AttentionTensors) -> Iterator[_Sequence]:
    slow, text = integers(inputs.cu_slow), integers(inputs.cu_text)
    bounds = None if inputs.slow_pieces is None else integers(inputs.slow_pieces.flatten())
    for b in range(len(slow) - 1):
        pieces = [slice(slow[b], slow[b + 1])]
        if bounds is not None:
            pieces = [slice(bounds[2 * p], max(bounds[2 * p : 2 * p + 2])) for p in range(slow[b], slow[b + 1])]
        yield _Sequence(slice(text[b], text[b + 1]), pieces)


class _Ranges(NamedTuple):
    """What each of some text rows sees of its sequence, clamped to it; begin >= end: nothing."""

    begin: Tensor  # [n]
    end: Tensor  # [n]

    @property
    def sees(self) -> Tensor:
        return self.begin < self.end

    def by_some(self, num_tokens: int) -> Tensor:
        """Tokens that some row sees, [N]."""
        step = self.sees.int()
        changes = torch.zeros(num_tokens + 1, dtype=torch.int32, device=step.device)
        changes = changes.index_add(0, self.begin, step).index_add(0, self.end, -step)
        return changes.cumsum(0)[:-1] > 0


def _ranges(inputs: AttentionTensors, texts: slice, num_tokens: int) -> _Ranges | None:
    """Of a sequence's text rows; None: each sees everything."""
    if inputs.slow_begin is None and inputs.slow_end is None:
        return None
    rows = inputs.text_rows[texts].long()
    begin = torch.zeros_like(rows) if inputs.slow_begin is None else inputs.slow_begin[texts].long()
    end = torch.full_like(rows, num_tokens) if inputs.slow_end is None else inputs.slow_end[texts].long()
    return _Ranges(begin.clamp(0, num_tokens), end.clamp(0, num_tokens))


_SCORES = 2**26  # of rows that are worked on together: what bounds the memory, 256 MiB in float32


class _Attended(NamedTuple):
    """Some text rows of a sequence against all its tokens; packed rows are (text row, query head of a KV head)."""

    rows: slice  # of text_rows
    query: Tensor  # [Hkv, packed rows, D]
    scores: Tensor  # [Hkv, packed rows, N], scaled; -inf where a row does not see
    sees: Tensor | None  # [packed rows, 1]: whether it sees any token; None: that of every other row

    def only_seeing(self, x: Tensor) -> Tensor:
        """``x`` [Hkv, packed rows, ...], 0 in rows that see nothing, whatever came of them."""
        return x if self.sees is None else torch.where(self.sees, x, 0)

    @property
    def probs(self) -> Tensor:
        return self.only_seeing(self.scores.softmax(-1))


def _packed(x: Tensor, num_kv_heads: int) -> Tensor:
    """[n, Hq, ...] -> [Hkv, n * Hq / Hkv, ...]"""
    return x.unflatten(1, (num_kv_heads, -1)).transpose(0, 1).flatten(1, 2)


def _unpacked(x: Tensor, num_text: int) -> Tensor:
    """The inverse of ``_packed``."""
    return x.unflatten(1, (num_text, -1)).transpose(0, 1).flatten(1, 2)


def _attend(
    inputs: AttentionTensors, sequence: _Sequence, softmax_scale: float
) -> tuple[Tensor, Tensor, Iterator[_Attended]]:
    """K and V [Hkv, N, D] of a sequence, tokens that no row sees as 0, and its rows in parts of bounded memory."""
    keys, values = (_fp32_or_wider(sequence.tokens(x).transpose(0, 1)) for x in (inputs.keys, inputs.values))
    num_kv_heads, num_tokens = keys.shape[:2]
    num_q_heads, texts = inputs.q.shape[1], sequence.texts
    ranges = _ranges(inputs, texts, num_tokens)
    if ranges is not None:
        is_seen = ranges.by_some(num_tokens)[:, None]
        keys, values = (torch.where(is_seen, x, 0) for x in (keys, values))

    def part(first: int, last: int) -> _Attended:
        query = _packed(_fp32_or_wider(inputs.q[inputs.text_rows[first:last].long()]), num_kv_heads)
        if ranges is None:
            return _Attended(slice(first, last), query, query @ keys.transpose(1, 2) * softmax_scale, None)
        mine = slice(first - texts.start, last - texts.start)
        begin, end = (x[mine].repeat_interleave(num_q_heads // num_kv_heads)[:, None] for x in ranges)
        token = torch.arange(num_tokens, device=begin.device)
        query = torch.where(begin < end, query, 0)
        scores = query @ keys.transpose(1, 2) * softmax_scale
        scores = scores.masked_fill((token < begin) | (token >= end), float("-inf"))
        return _Attended(slice(first, last), query, scores, begin < end)

    step = max(1, _SCORES // max(1, num_q_heads * num_tokens))
    starts = range(texts.start, texts.stop, step)
    return keys, values, (part(first, min(first + step, texts.stop)) for first in starts)


@_without_autocast
def text_cross_attention(inputs: AttentionTensors, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """context [Nt, Hq, D] and lse [Nt, Hq] float32."""
    q = inputs.q
    contexts, lses = [q.new_zeros(0, *q.shape[1:])], [q.new_zeros(0, q.shape[1], dtype=torch.float32)]
    for sequence in _sequences(inputs):
        _, values, parts = _attend(inputs, sequence, softmax_scale)
        for part in parts:
            num_text = part.rows.stop - part.rows.start
            contexts.append(_unpacked(part.probs @ values, num_text).to(q.dtype))
            lses.append(_unpacked(part.scores.logsumexp(-1), num_text).float())
    return torch.cat(contexts), torch.cat(lses)


class AttentionGradients(NamedTuple):
    """Of ``text_cross_attention``, in its arguments' shapes, dtypes and layout."""

    q: Tensor | None
    slow_kv: Tensor | None
    slow_values: Tensor | None


@_without_autocast
def text_cross_attention_backward(
    inputs: AttentionTensors,
    grad_context: Tensor | None,
    grad_lse: Tensor | None,
    softmax_scale: float,
    needs: tuple[bool, ...] = (True, True, True),
) -> AttentionGradients:
    """``q``'s is zero outside the text rows; scores are recomputed. ``needs``: which of the three are computed.

    Tokens of several sequences, or of one sequence twice, get the float32 sum over their uses in the order of the
    sequences and pieces, rounded once: the same bits every time, on a GPU too.
    """
    q = inputs.q
    if grad_context is None:
        grad_context = q.new_zeros(()).expand(inputs.text_rows.shape[0], *q.shape[1:])
    wide = torch.promote_types(q.dtype, torch.float32)
    needs_q, needs_kv = needs[0], any(needs[1:])
    grad_q = torch.zeros(q.shape, dtype=wide, device=q.device) if needs_q else None
    grad_k, grad_v = (torch.zeros(inputs.keys.shape if needs_kv else 0, dtype=wide, device=q.device) for _ in range(2))
    for sequence in _sequences(inputs):
        keys, values, parts = _attend(inputs, sequence, softmax_scale)
        mine_k, mine_v = torch.zeros_like(keys), torch.zeros_like(values)
        for part in parts:
            upstream = part.only_seeing(_packed(grad_context[part.rows], keys.shape[0]).to(wide))
            probs = part.probs
            grad_scores = upstream @ values.transpose(1, 2)
            grad_scores = grad_scores - (grad_scores * probs).sum(-1, keepdim=True)
            if grad_lse is not None:
                grad_scores = grad_scores + _packed(grad_lse[part.rows].unsqueeze(-1), keys.shape[0]).to(wide)
            grad_scores = part.only_seeing(grad_scores) * probs * softmax_scale
            if needs_q:
                rows = inputs.text_rows[part.rows].long()
                grad_q[rows] = _unpacked(grad_scores @ keys, len(rows))
            if needs_kv:
                mine_k += grad_scores.transpose(1, 2) @ part.query
                mine_v += probs.transpose(1, 2) @ upstream
        if not needs_kv:
            continue
        first = 0
        for piece in sequence.pieces:
            tokens = slice(first, first + piece.stop - piece.start)
            grad_k[piece] += mine_k[:, tokens].transpose(0, 1)
            grad_v[piece] += mine_v[:, tokens].transpose(0, 1)
            first = tokens.stop
    grad_q = grad_q.to(q.dtype) if needs_q else None
    grad_k, grad_v = (grad.to(q.dtype) if needs_kv else None for grad in (grad_k, grad_v))
    if inputs.slow_values is None:
        return AttentionGradients(grad_q, torch.stack((grad_k, grad_v), 2) if needs_kv else None, None)
    return AttentionGradients(grad_q, grad_k if needs[1] else None, grad_v if needs[2] else None)


# ------------------------------------------------------------------------------------------------ merge


class _Merged(NamedTuple):
    context: Tensor  # [Nt, Hq, D], widened
    lse: Tensor  # [Nt, Hq]
    share_a: Tensor  # [Nt, Hq, 1], of the probability; 0 where there is no token
    share_b: Tensor


def _merge(context_a: Tensor, lse_a: Tensor, context_b: Tensor, lse_b: Tensor) -> _Merged:
    none = float("-inf")
    neither = (lse_a == none) & (lse_b == none)
    some_a, some_b = (torch.where(neither, 0, x) for x in (lse_a, lse_b))  # -inf twice has no derivative for torch.func
    lse = torch.where(neither, none, torch.logaddexp(some_a, some_b))
    more_a = some_a - some_b  # and not each minus their sum, whose rounding grows with it
    share_a, share_b = (torch.where(neither, 0, x.sigmoid()).unsqueeze(-1) for x in (more_a, -more_a))
    context_a, context_b = (
        torch.where(x == none, 0, _fp32_or_wider(context))
        for x, context in ((lse_a.unsqueeze(-1), context_a), (lse_b.unsqueeze(-1), context_b))
    )
    both = share_a * context_a + share_b * context_b
    alone = torch.where(share_a == 0, context_b, context_a)  # its bits, the sign of a zero included
    return _Merged(torch.where((share_a == 0) | (share_b == 0), alone, both), lse, share_a, share_b)


@_without_autocast
def merge_attention(context_a: Tensor, lse_a: Tensor, context_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """context [Nt, Hq, D] and lse [Nt, Hq] over the tokens of a and b together."""
    merged = _merge(context_a, lse_a, context_b, lse_b)
    return merged.context.to(context_a.dtype), merged.lse


@_without_autocast
def merge_attention_backward(
    context_a: Tensor,
    lse_a: Tensor,
    context_b: Tensor,
    lse_b: Tensor,
    grad_context: Tensor | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``merge_attention`` in the order of its arguments; 0 on a side without tokens."""
    grad_context = torch.zeros_like(context_a) if grad_context is None else grad_context
    grad_lse = torch.zeros_like(lse_a) if grad_lse is None else grad_lse
    merged = _merge(context_a, lse_a, context_b, lse_b)
    grad, gradients = _fp32_or_wider(grad_context), []
    for context, lse, share in ((context_a, lse_a, merged.share_a), (context_b, lse_b, merged.share_b)):
        apart = torch.where(share == 0, 0, _fp32_or_wider(context) - merged.context)
        grad_own_lse = share.squeeze(-1) * ((grad * apart).sum(-1) + grad_lse)
        has_share = share.squeeze(-1) > 0
        grad_own = torch.where(share > 0, share * grad, 0)
        gradients += [grad_own.to(context.dtype), torch.where(has_share, grad_own_lse, 0).to(lse.dtype)]
    return tuple(gradients)


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
    context, lse = text_cross_attention(inputs, softmax_scale)
    clean = without_blind_rows(state, inputs.text_rows, gate, lse)
    mixed = gated_residual_mix(clean.state, context.flatten(1), inputs.text_rows, clean.gate)
    return clean.keep(mixed, state)


class _WithoutBlindRows(NamedTuple):
    """The mix's arguments with 0 in the text rows that see no slow token: what those hold is nobody's business."""

    rows: Tensor  # [Nt]
    sees: Tensor  # [Nt]
    state: Tensor
    gate: Gate

    def blank(self, x: Tensor) -> Tensor:
        """``x`` [rows, C] with 0 in the blind rows."""
        return x.index_copy(0, self.rows, torch.where(self.sees[:, None], x[self.rows], 0))

    def keep(self, mixed: Tensor, state: Tensor) -> Tensor:
        """``mixed``, with the blind rows of ``state``, bit for bit."""
        rows = torch.where(self.sees[:, None], mixed[self.rows], state[self.rows])
        return mixed.index_copy(0, self.rows, rows)


def without_blind_rows(state: Tensor, text_rows: Tensor, gate: Gate, lse: Tensor) -> _WithoutBlindRows:
    """A row is blind if its ``lse`` [Nt, Hq] is -inf."""
    clean = _WithoutBlindRows(text_rows.long(), (lse != float("-inf")).any(-1), state, gate)
    if gate.value is not None:
        gate = gate._replace(value=torch.where(clean.sees, gate.value, 0))
    return clean._replace(state=clean.blank(state), gate=gate)
