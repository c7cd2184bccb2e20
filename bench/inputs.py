"""Random inputs of the attention ops, rotated for cold caches, and the float32 reference of every answer."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .shapes import AttentionShape
from .timing import num_input_sets

REFERENCE_ROWS = 64  # text rows scored at once, so that the reference fits beside the largest shape


@dataclass(frozen=True)
class AttentionInputs:
    """One input set. Every row of q and state is a text row."""

    shape: AttentionShape
    q: Tensor  # [Nt, Hq, D]
    slow_kv: Tensor  # [Ns, Hkv, 2, D]
    cu_slow: Tensor
    text_rows: Tensor
    cu_text: Tensor
    state: Tensor  # [Nt, C]
    gate_weight: Tensor  # [1, C]
    gate_bias: Tensor  # [1]
    warm_up: Tensor  # [1]

    @property
    def attention(self) -> tuple[Tensor, ...]:
        """What attention alone takes."""
        return self.q, self.slow_kv, self.cu_slow, self.text_rows, self.cu_text

    @property
    def keys(self) -> Tensor:
        """[B, N, Hkv, D], a view; sequences of one length only."""
        return self.slow_kv[:, :, 0].unflatten(0, (self.shape.batch, -1))

    @property
    def values(self) -> Tensor:
        return self.slow_kv[:, :, 1].unflatten(0, (self.shape.batch, -1))

    @property
    def query(self) -> Tensor:
        """[B, n, Hq, D], a view."""
        return self.q.unflatten(0, (self.shape.batch, -1))


def prefix_sums(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    sums = [0]
    for length in lengths:
        sums.append(sums[-1] + length)
    return torch.tensor(sums, dtype=torch.int32, device=device)


def make_inputs(shape: AttentionShape, dtype: str, device: torch.device, cache_bytes: float) -> list[AttentionInputs]:
    """As many fresh random input sets as stream through the cache between two uses of one."""
    torch_dtype, heads = getattr(torch, dtype), shape.heads
    generator = torch.Generator(device).manual_seed(zlib.crc32(shape.name.encode()))

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, dtype=torch_dtype, device=device, generator=generator) * scale

    shared = {
        "cu_slow": prefix_sums(shape.slow, device),
        "cu_text": prefix_sums(shape.text, device),
        "text_rows": torch.arange(shape.num_text, dtype=torch.int32, device=device),
        "gate_weight": random(1, heads.channels, scale=0.01),
        "gate_bias": torch.full((1,), 0.5, dtype=torch_dtype, device=device),
        "warm_up": torch.full((1,), 0.7, dtype=torch_dtype, device=device),
    }
    return [
        AttentionInputs(
            shape=shape,
            q=random(shape.num_text, heads.num_q, heads.dim),
            slow_kv=random(shape.num_slow, heads.num_kv, 2, heads.dim),
            state=random(shape.num_text, heads.channels),
            **shared,
        )
        for _ in range(num_input_sets(shape.kv_bytes(dtype), cache_bytes))
    ]


def reference_context(inputs: AttentionInputs, begin: Tensor | None = None, end: Tensor | None = None) -> Tensor:
    """context [Nt, Hq, D] in float32, a few rows at a time.

    ``begin`` and ``end`` [Nt]: row i sees the tokens begin[i] <= j < end[i] of its sequence; 0 where it sees none.
    """
    shape, scale = inputs.shape, inputs.shape.heads.dim**-0.5
    heads_per_kv = shape.heads.num_q // shape.heads.num_kv
    context = torch.zeros(inputs.q.shape, dtype=torch.float32, device=inputs.q.device)
    first_row = first_token = 0
    for rows, tokens in zip(shape.text, shape.slow, strict=True):
        keys, values = (x.float() for x in inputs.slow_kv[first_token : first_token + tokens].permute(2, 1, 0, 3))
        for start in range(first_row, first_row + rows, REFERENCE_ROWS):
            stop = min(start + REFERENCE_ROWS, first_row + rows)
            query = _packed(inputs.q[start:stop].float(), heads_per_kv)
            scores = query @ keys.transpose(1, 2) * scale  # [Hkv, heads_per_kv * rows, tokens]
            if begin is None or end is None:
                probs = scores.softmax(-1)
            else:
                hidden = ~visible(begin[start:stop], end[start:stop], tokens).repeat(heads_per_kv, 1)
                probs = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)
            context[start:stop] = _unpacked(probs @ values, heads_per_kv)
        first_row, first_token = first_row + rows, first_token + tokens
    return context


def _packed(x: Tensor, heads_per_kv: int) -> Tensor:
    """[rows, Hq, D] -> [Hkv, heads_per_kv * rows, D]"""
    return x.unflatten(1, (-1, heads_per_kv)).permute(1, 2, 0, 3).flatten(1, 2)


def _unpacked(x: Tensor, heads_per_kv: int) -> Tensor:
    """Back again."""
    return x.unflatten(1, (heads_per_kv, -1)).permute(2, 0, 1, 3).flatten(1, 2)


class Gradients(NamedTuple):
    """What a step of attention gives."""

    context: Tensor  # [Nt, Hq, D]
    q: Tensor
    keys: Tensor  # [Ns, Hkv, D]
    values: Tensor


def reference_gradients(inputs: AttentionInputs, upstream: Tensor) -> Gradients:
    """For the gradient ``upstream`` [Nt, Hq, D] of the context; float32 (float64 of float32), a few rows at a time."""
    shape, scale = inputs.shape, inputs.shape.heads.dim**-0.5
    heads_per_kv = shape.heads.num_q // shape.heads.num_kv
    wide = torch.float64 if inputs.q.dtype == torch.float32 else torch.float32
    query_like, kv_like = (torch.empty_like(x, dtype=wide) for x in (inputs.q, inputs.slow_kv[:, :, 0]))
    found = Gradients(*(torch.zeros_like(x) for x in (query_like, query_like, kv_like, kv_like)))
    first_row = first_token = 0
    for rows, tokens in zip(shape.text, shape.slow, strict=True):
        mine = slice(first_token, first_token + tokens)
        keys, values = (x.to(wide) for x in inputs.slow_kv[mine].permute(2, 1, 0, 3))  # [Hkv, tokens, D]
        for start in range(first_row, first_row + rows, REFERENCE_ROWS):
            part = slice(start, min(start + REFERENCE_ROWS, first_row + rows))
            query, grad = (_packed(x[part].to(wide), heads_per_kv) for x in (inputs.q, upstream))
            probs = (query @ keys.transpose(1, 2) * scale).softmax(-1)
            context = probs @ values
            grad_scores = probs * (grad @ values.transpose(1, 2) - (grad * context).sum(-1, keepdim=True)) * scale
            found.context[part] = _unpacked(context, heads_per_kv)
            found.q[part] = _unpacked(grad_scores @ keys, heads_per_kv)
            found.keys[mine] += (grad_scores.transpose(1, 2) @ query).transpose(0, 1)
            found.values[mine] += (probs.transpose(1, 2) @ grad).transpose(0, 1)
        first_row, first_token = first_row + rows, first_token + tokens
    return found


def visible(begin: Tensor, end: Tensor, tokens: int) -> Tensor:
    """bool [rows, tokens]"""
    token = torch.arange(tokens, device=begin.device)
    return (begin[:, None] <= token) & (token < end[:, None])


def reference_gate(inputs: AttentionInputs) -> Tensor:
    """g [Nt, 1] in float32."""
    pre = inputs.state.float() @ inputs.gate_weight.float().reshape(-1, 1) + inputs.gate_bias.float()
    return pre.tanh() * inputs.warm_up.float().tanh()


def reference_mixed(inputs: AttentionInputs, context: Tensor) -> Tensor:
    """state + g * context in float32."""
    return inputs.state.float() + reference_gate(inputs) * context.flatten(1)
