"""Exact answers in float64, written apart from the package, and the rule that every backend is held to.

The rule: the error against the exact answer is at most twice the error of the eager op in the same dtype, or what
rounding the output and, in attention, the probabilities to that dtype costs alone (the eager op rounds its output
only); in float32 it is at most 1e-5. A rounding is off by 0.42 units roundoff, root mean square, so the largest of some
100 000 sums of them, 4.5 standard deviations out, is twice the root of the squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FLOAT32_TOLERANCE = 1e-5


class Attended(NamedTuple):
    context: Tensor  # [Nt, Hq, D]
    lse: Tensor  # [Nt, Hq]
    noise: Tensor  # [Nt, Hq, D]: 2 sqrt(sum (p v)^2), what roundings of each p add up to, over the unit roundoff


def attention(
    q: Tensor, slow_kv: Tensor, cu_slow: Tensor, text_rows: Tensor, cu_text: Tensor, softmax_scale: float | None = None
) -> Attended:
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    heads_per_kv = q.shape[1] // slow_kv.shape[1]
    slow, text = cu_slow.tolist(), cu_text.tolist()
    parts = []
    for b in range(len(slow) - 1):
        query = (
            q[text_rows[text[b] : text[b + 1]].long()].double().unflatten(1, (-1, heads_per_kv))
        )  # [n, Hkv, heads_per_kv, D]
        keys, values = slow_kv[slow[b] : slow[b + 1]].double().unbind(2)  # [N, Hkv, D]
        scores = torch.einsum("thgd,nhd->thgn", query, keys) * scale
        probs = scores.softmax(-1)
        context = torch.einsum("thgn,nhd->thgd", probs, values)
        noise = 2 * torch.einsum("thgn,nhd->thgd", probs**2, values**2).sqrt()
        parts.append((context.flatten(1, 2), scores.logsumexp(-1).flatten(1, 2), noise.flatten(1, 2)))
    return Attended(*(torch.cat(column) for column in zip(*parts, strict=True)))


def visible_attention(
    q: Tensor,
    slow_kv: Tensor | tuple[Tensor, Tensor],
    cu_slow: Tensor,
    text_rows: Tensor,
    cu_text: Tensor,
    softmax_scale: float | None = None,
    *,
    slow_begin: Tensor | None = None,
    slow_end: Tensor | None = None,
    slow_pieces: Tensor | None = None,
) -> Attended:
    """Row by row over the tokens that it sees and no others: there is no mask here. Differentiable."""
    keys, values = slow_kv if isinstance(slow_kv, tuple) else slow_kv.unbind(2)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    heads_per_kv = q.shape[1] // keys.shape[1]
    slow, text = cu_slow.tolist(), cu_text.tolist()
    parts = []
    for b in range(len(slow) - 1):
        tokens = list(range(slow[b], slow[b + 1]))
        if slow_pieces is not None:
            tokens = [
                token for begin, end in slow_pieces[slow[b] : slow[b + 1]].tolist() for token in range(begin, end)
            ]
        for i in range(text[b], text[b + 1]):
            begin = 0 if slow_begin is None else max(int(slow_begin[i]), 0)
            end = len(tokens) if slow_end is None else max(int(slow_end[i]), 0)
            seen = tokens[begin:end]
            if not seen:
                nothing = torch.zeros(q.shape[1:], dtype=torch.float64, device=q.device)
                parts.append((nothing, nothing[:, 0] - torch.inf, nothing))
                continue
            mine = q[int(text_rows[i])].double().unflatten(0, (-1, heads_per_kv))  # [Hkv, heads_per_kv, D]
            k, v = keys[seen].double(), values[seen].double()  # [n, Hkv, D]
            scores = torch.einsum("hgd,nhd->hgn", mine, k) * scale
            probs = scores.softmax(-1)
            context = torch.einsum("hgn,nhd->hgd", probs, v)
            noise = 2 * torch.einsum("hgn,nhd->hgd", probs.detach() ** 2, v.detach() ** 2).sqrt()
            parts.append((context.flatten(0, 1), scores.logsumexp(-1).flatten(), noise.flatten(0, 1)))
    if not parts:
        nothing = torch.zeros(0, *q.shape[1:], dtype=torch.float64, device=q.device)
        return Attended(nothing, nothing[..., 0], nothing)
    return Attended(*(torch.stack(column) for column in zip(*parts, strict=True)))


def gated_mix(
    state: Tensor,
    context: Tensor,
    text_rows: Tensor,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    warm_up: Tensor | None,
    gate: str = "tanh",
    warm_up_tanh: bool = True,
    gate_value: Tensor | None = None,
) -> Tensor:
    rows = text_rows.long()
    picked = state.double()[rows]
    if gate_value is not None:
        g = gate_value.double()[:, None]
    elif gate == "none":
        g = picked.new_ones(len(rows), 1)
    else:
        g = (picked * gate_weight.double().flatten()).sum(-1, keepdim=True) + gate_bias.double()
        g = {"tanh": torch.tanh, "linear": lambda x: x, "sigmoid": torch.sigmoid}[gate](g)
    if warm_up is not None:
        g = g * (warm_up.double().tanh() if warm_up_tanh else warm_up.double())
    return state.double().index_copy(0, rows, picked + g * context.double().flatten(1))


def pool(
    frames: Tensor,
    frame_counts: Sequence[int],
    grid: tuple[int, int],
    pool_stride: int = 1,
    sampling_stride: int = 1,
    temporal_stride: int = 1,
    spatial_stride: int = 1,
    min_fast_frames: int = 1,
    norm_eps: float | None = None,
) -> tuple[Tensor, list[int], Tensor, list[int]]:
    """slow, tokens of each video, fast, tokens of each video; step by step as the released code describes it."""
    slow, fast = [], []
    for clip in frames.double().split(list(frame_counts)):
        x = clip.unflatten(1, grid).permute(3, 0, 1, 2)  # [C, T, H, W]
        is_video = x.shape[1] > 1
        if is_video and pool_stride > 1:
            x = F.avg_pool3d(x, (1, pool_stride, pool_stride))
        slow.append(x.permute(1, 2, 3, 0).flatten(0, 2))
        if is_video and sampling_stride > 1 and x.shape[1] >= min_fast_frames:
            count = max(x.shape[1] // sampling_stride, min_fast_frames)
            step = x.shape[1] / count
            x = x[:, [int(i * step) for i in range(count)]]
        if is_video and temporal_stride > 1:
            count = x.shape[1]
            if count // temporal_stride >= min_fast_frames:
                x = F.avg_pool3d(x, (temporal_stride, 1, 1))
            else:
                x = F.adaptive_avg_pool3d(x, (min(count, min_fast_frames), *x.shape[2:]))
        x = F.avg_pool3d(x, (1, spatial_stride, spatial_stride))
        fast.append(x.permute(1, 2, 3, 0).flatten(0, 2))
    slow_tokens = torch.cat(slow)
    if norm_eps is not None:
        slow_tokens = slow_tokens / (slow_tokens.pow(2).mean(-1, keepdim=True) + norm_eps).sqrt()
    return slow_tokens, [len(x) for x in slow], torch.cat(fast), [len(x) for x in fast]


# --------------------------------------------------------------------------------------------- the rule


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _largest(x: Tensor) -> Tensor:
    return x.abs().max() if x.numel() else x.new_zeros(())


def allowed(actual: Tensor, eager: Tensor | None, exact: Tensor, noise: Tensor | None = None) -> Tensor:
    """The largest error that the rule grants, as a tensor on the device (no sync).

    ``eager`` None: ``actual`` is the eager op's, and rounding alone is allowed.
    """
    if actual.dtype == torch.float32 and (eager is None or eager.dtype == torch.float32):
        return exact.new_full((), FLOAT32_TOLERANCE)
    scale = _largest(exact) if noise is None else _largest(exact) + _largest(noise)
    rounding = unit_roundoff(actual.dtype) * scale
    if eager is not None:
        rounding = torch.maximum(2 * _largest(eager.double() - exact), rounding)
    return rounding + 1e-6


def excess(actual: Tensor, eager: Tensor | None, exact: Tensor, noise: Tensor | None = None) -> Tensor:
    """Error over what is allowed: the rule holds if it is <= 1. NaN breaks it."""
    return _largest(actual.double() - exact) / allowed(actual, eager, exact, noise)


def assert_accurate(actual: Tensor, eager: Tensor | None, exact: Tensor, noise: Tensor | None = None) -> None:
    assert actual.shape == exact.shape
    assert eager is None or actual.dtype == eager.dtype
    ratio = float(excess(actual, eager, exact, noise))
    assert ratio <= 1, f"error is {ratio:.3g} of what is allowed ({float(_largest(actual.double() - exact)):.3g})"


def assert_lse_accurate(actual: Tensor, eager: Tensor, exact: Tensor, relative: float = 0.0) -> None:
    """lse is float32 for every input dtype; -inf exactly where there is no slow token.

    ``relative``: allowed besides, of the largest one, where scores are so large that they cost float32 itself digits.
    """
    assert actual.dtype == torch.float32
    empty = exact == -torch.inf
    assert torch.equal(actual == -torch.inf, empty)
    got, plain, want = (x[~empty].double() for x in (actual, eager, exact))
    allowed = max(FLOAT32_TOLERANCE, 2 * float(_largest(plain - want))) + relative * float(_largest(want))
    assert float(_largest(got - want)) <= allowed


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit: NaN equals NaN, 0 differs from -0."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
