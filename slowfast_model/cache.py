"""The two caches of generation: the LM's own keys and values, and the slow KV cache of the hybrid layers.

Both hold K and V interleaved a head, [tokens, Hkv, 2, D]: the layout that ``cross_attn_kv_proj`` writes and that the
attention kernels read in place. The self-attention cache is static, so that one captured decode step serves all tokens.
A decode step reads the live part once: 2 * tokens * Hkv * D elements a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import slowfast_kernels as sk


@dataclass
class SlowContext:
    """What the hybrid layers attend, for the rows of one call.

    ``tokens`` [Ns, C] make K and V in the first call; decoding reads the layers' caches and has none.
    ``text_rows`` [Nt] are rows of the flattened [B * L, C] state, sequence by sequence as ``cu_text`` [B + 1] counts.
    """

    cu_slow: Tensor
    text_rows: Tensor
    cu_text: Tensor
    tokens: Tensor | None = None
    tokens_are_normalised: bool = False  # divided by their RMS, without a layer's weight: inference
    slow_end: Tensor | None = None  # [Nt], how many of its sequence's slow tokens each row sees; None: all
    pieces: Tensor | None = None  # [P, 2], where a layer's K and V lie, and what ``cu_slow`` counts; None: one by one


class DecodeStep:
    """Where the tokens of a decode step go, and what they attend: the same in every layer."""

    def __init__(self, batch: int, capacity: int, device: torch.device, backend: str | None) -> None:
        self.capacity, self.backend = capacity, backend
        self._starts = torch.arange(batch, device=device) * capacity
        self._slots = torch.arange(capacity, device=device)
        # A kernel's sequence is a contiguous range. So every sequence is two: its live part, which its query attends,
        # and the unused rest, which has no query.
        self.queries = torch.arange(batch, dtype=torch.int32, device=device)
        self.cu_queries = torch.arange(2 * batch + 1, dtype=torch.int32, device=device).add(1) // 2
        self.rows = self.cu_slots = self.mask = None  # None: prefill

    def begin(self, position: Tensor) -> None:
        """Append one token a sequence at ``position`` [B] int64."""
        self.rows = self._starts + position
        if self.backend == "eager":
            self.mask = (self._slots <= position[:, None])[:, None, None]
        else:
            ends = torch.stack([self.rows + 1, self._starts + self.capacity], 1).flatten()
            self.cu_slots = F.pad(ends, (1, 0)).int()


@dataclass
class LayerCache:
    """One layer's keys and values. A layer gets its own and looks nothing up by its number: compiled, layers share.

    ``kv`` [B, capacity, Hkv, 2, D] are the LM's; ``slow_kv`` [Ns, Hkv, 2, D] a hybrid layer's, from its prefill on.
    """

    kv: Tensor
    step: DecodeStep
    slow_kv: Tensor | None = None

    @property
    def is_decoding(self) -> bool:
        return self.step.rows is not None

    def fill(self, k: Tensor, v: Tensor) -> None:
        """Prefill: k, v [B, L, Hkv, D] become positions 0..L-1. Padding at the end is overwritten by later tokens."""
        self.kv[:, : k.shape[1], :, 0] = k
        self.kv[:, : v.shape[1], :, 1] = v

    def append_and_attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, 1, Hq, D], k, v [B, 1, Hkv, D] of the step -> attention output [B, 1, Hq, D]."""
        step = self.step
        slots = self.kv.view(-1, *self.kv.shape[2:])
        slots.index_copy_(0, step.rows, torch.stack([k[:, 0], v[:, 0]], 2))
        if step.backend == "eager":
            keys, values = self.kv.transpose(1, 2).unbind(3)
            out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, step.mask, enable_gqa=True)
            return out.transpose(1, 2)
        cu = (step.cu_slots, step.queries, step.cu_queries)
        return sk.text_cross_attention(q[:, 0], slots, *cu, backend=step.backend)[:, None]


class KVCache:
    """The caches of all layers for ``batch`` sequences of at most ``capacity`` positions each."""

    def __init__(
        self,
        num_layers: int,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        backend: str | None = None,
    ) -> None:
        self.step = DecodeStep(batch, capacity, device, backend)
        # zeros, not empty: a masked position must not hold a NaN, which SDPA would multiply by 0
        shape = (batch, capacity, num_kv_heads, 2, head_dim)
        kv = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers))
        self.layers = [LayerCache(x, self.step) for x in kv]
