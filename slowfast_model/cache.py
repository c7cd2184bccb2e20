"""The two caches of generation: the LM's own keys and values, and the slow KV cache of the hybrid layers.

Both hold K and V interleaved a head, [tokens, Hkv, 2, D]: the layout that ``cross_attn_kv_proj`` writes and that the
attention kernels read in place. The self-attention cache is static, so that one captured decode step serves all tokens.
A decode step reads the live part once: 2 * tokens * Hkv * D elements a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import slowfast_kernels as sk


@dataclass
class SlowContext:
    """What the hybrid layers attend, for the rows of one call.

    ``tokens`` [Ns, C] make K and V in the first call; ``kv`` keeps them by layer, [Ns, Hkv, 2, D], for decoding.
    ``text_rows`` [Nt] are rows of the flattened [B * L, C] state, sequence by sequence as ``cu_text`` [B + 1] counts.
    """

    cu_slow: Tensor
    text_rows: Tensor
    cu_text: Tensor
    tokens: Tensor | None = None
    tokens_are_normalised: bool = False  # divided by their RMS, without a layer's weight: inference
    kv: dict[int, Tensor] = field(default_factory=dict)


class SelfKVCache:
    """Keys and values of ``batch`` sequences, ``capacity`` positions each; sequence b's next position is its length."""

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
        self.capacity, self.backend = capacity, backend
        # zeros, not empty: a masked position must not hold a NaN, which SDPA would multiply by 0
        shape = (batch, capacity, num_kv_heads, 2, head_dim)
        self.kv = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self._starts = torch.arange(batch, device=device) * capacity
        self._slots = torch.arange(capacity, device=device)
        # A kernel's sequence is a contiguous range. So every sequence is two: its live part, which its query attends,
        # and the unused rest, which has no query.
        self._queries = torch.arange(batch, dtype=torch.int32, device=device)
        self._cu_queries = torch.arange(2 * batch + 1, dtype=torch.int32, device=device).add(1) // 2
        self._rows = self._cu_slots = self._mask = None

    @property
    def is_decoding(self) -> bool:
        return self._rows is not None

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Prefill: k, v [B, L, Hkv, D] become positions 0..L-1. Padding at the end is overwritten by later tokens."""
        self.kv[layer][:, : k.shape[1], :, 0] = k
        self.kv[layer][:, : v.shape[1], :, 1] = v

    def begin_step(self, position: Tensor) -> None:
        """Prepare, once for all layers, to append one token a sequence at ``position`` [B] int64."""
        self._rows = self._starts + position
        if self.backend == "eager":
            self._mask = (self._slots <= position[:, None])[:, None, None]
        else:
            ends = torch.stack([self._rows + 1, self._starts + self.capacity], 1).flatten()
            self._cu_slots = F.pad(ends, (1, 0)).int()

    def append_and_attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, 1, Hq, D], k, v [B, 1, Hkv, D] of the step -> attention output [B, 1, Hq, D]."""
        kv = self.kv[layer]
        slots = kv.view(-1, *kv.shape[2:])
        slots.index_copy_(0, self._rows, torch.stack([k[:, 0], v[:, 0]], 2))
        if self.backend == "eager":
            keys, values = kv.transpose(1, 2).unbind(3)
            out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, self._mask, enable_gqa=True)
            return out.transpose(1, 2)
        cu = (self._cu_slots, self._queries, self._cu_queries)
        return sk.text_cross_attention(q[:, 0], slots, *cu, backend=self.backend)[:, None]
