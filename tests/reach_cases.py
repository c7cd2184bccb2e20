"""What the tests of other models share: attention under a dense mask in float64, and how such a batch is handed over.

These models come as padded batches [B, n] with a mask, so their reference is just that; the ops get the same as ragged
rows, ranges and pieces.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HEADS, DIM = (4, 2), 64  # Hq, Hkv, D: what every backend takes


def dense_attention(q: Tensor, keys: Tensor, values: Tensor, sees: Tensor, scale: float) -> Tensor:
    """Differentiable context [B, n, Hq, D] in float64; 0 in rows that see nothing.

    Args:
        q: [B, n, Hq, D].
        keys, values: [B, S, Hkv, D].
        sees: bool [B, n, S].
    """
    heads_per_kv = q.shape[2] // keys.shape[2]
    keys, values = (x.double().repeat_interleave(heads_per_kv, 2) for x in (keys, values))
    scores = torch.einsum("bnhd,bshd->bhns", q.double(), keys) * scale
    sees = sees[:, None]
    is_blind = ~sees.any(-1, keepdim=True)
    probs = scores.masked_fill(~(sees | is_blind), -torch.inf).softmax(-1).masked_fill(is_blind, 0)
    return torch.einsum("bhns,bshd->bnhd", probs, values)


def int32(values, device: torch.device) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device)


class Reading(NamedTuple):
    """Which text rows read which slow tokens: the ops' arguments after q and slow_kv."""

    cu_slow: Tensor
    text_rows: Tensor
    cu_text: Tensor
    slow_begin: Tensor | None = None
    slow_end: Tensor | None = None
    slow_pieces: Tensor | None = None

    @property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        return self[:3]

    @property
    def selection(self) -> dict[str, Tensor | None]:
        return dict(zip(self._fields[3:], self[3:], strict=True))

    @classmethod
    def of_padded(cls, batch: int, text: int, slow: int, device: torch.device, **selection: Tensor) -> Reading:
        """``batch`` sequences of ``text`` rows and ``slow`` tokens each; selection [B, n]."""
        starts = torch.arange(batch + 1, device=device)
        rows = torch.arange(batch * text, device=device)
        given = {name: x.flatten().int() for name, x in selection.items()}
        return cls((starts * slow).int(), rows.int(), (starts * text).int(), **given)


def between(begin: Tensor, end: Tensor, tokens: int) -> Tensor:
    """The mask [..., tokens] of rows that see begin <= token < end."""
    token = torch.arange(tokens, device=begin.device)
    return (begin[..., None] <= token) & (token < end[..., None])


def static_cache_tokens(x: Tensor) -> Tensor:
    """transformers' K or V [B, Hkv, S, D] in place as slow tokens [Ns, Hkv, D]: sequence b's begin at b * Hkv * S.

    Tokens of stride D, heads of stride S * D: Ns is as many as stay within the cache, most of them nobody's.
    """
    batch, heads, capacity, dim = x.shape
    assert x.is_contiguous()
    tokens = (batch - 1) * heads * capacity + capacity
    return x.as_strided((tokens, heads, dim), (dim, capacity * dim, 1))
