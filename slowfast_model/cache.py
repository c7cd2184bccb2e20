"""The two caches of generation: the LM's own keys and values, and the slow KV cache of the hybrid layers.

Both hold K and V interleaved a head, [tokens, Hkv, 2, D]: the layout that ``cross_attn_kv_proj`` writes and that the
attention kernels read in place. The self-attention cache is static, so that one captured decode step serves all tokens.
A decode step reads the live part once: 2 * tokens * Hkv * D elements a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import slowfast_kernels as sk

from .transfer import ON_HOST, to_device, upload


@dataclass
class SlowContext:
    """What the hybrid layers attend, for the rows of one call.

    ``tokens`` [Ns, C] make K and V in the call that brings them, or ``kv`` has those of the layer that it is for;
    decoding reads the layers' caches and has neither.
    ``text_rows`` [Nt] are rows of the flattened [B * L, C] state, sequence by sequence as ``cu_text`` [B + 1] counts.
    """

    cu_slow: Tensor
    text_rows: Tensor
    cu_text: Tensor
    tokens: Tensor | None = None
    tokens_are_normalised: bool = False  # divided by their RMS, without a layer's weight: inference
    slow_end: Tensor | None = None  # [Nt], how many of its sequence's slow tokens each row sees; None: all
    pieces: Tensor | None = None  # [P, 2], where a layer's K and V lie, and what ``cu_slow`` counts; None: in a row
    slots: Tensor | None = None  # [Ns] int64, where a layer's cache takes K and V of ``tokens``; None: they become it
    kv: Tensor | None = None  # [Ns, Hkv, 2, D] of new tokens, made with those of other layers


@dataclass(frozen=True)
class SlowSlots:
    """Where the slow tokens of each sample lie in a hybrid layer's cache: in one run a sample, in every layer alike.

    ``held``: slow tokens of each sample. ``room``: slots of each sample, so that shapes and addresses stay as tokens
    come; None: as many as it holds, and a cache that grows is laid out anew.
    """

    held: Sequence[int]
    room: int | None = None

    def grown(self, counts: Sequence[int]) -> SlowSlots:
        """With so many more tokens of each sample."""
        return SlowSlots([a + b for a, b in zip(self.held, counts, strict=True)], self.room)

    @property
    def sizes(self) -> list[int]:
        """Slots of each sample, used or not."""
        return list(self.held) if self.room is None else [self.room] * len(self.held)

    def numbers(self, first: Sequence[int], last: Sequence[int]) -> Tensor:
        """Slots int64 of the tokens first[b] <= j < last[b] of each sample b, sample by sample."""
        runs = zip(accumulate(self.sizes, initial=0), first, last, strict=False)
        return torch.cat([torch.arange(begin + i, begin + j, **ON_HOST) for begin, i, j in runs])

    def sequences(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """``cu_slow`` and ``pieces`` of a SlowContext."""
        bounds = torch.tensor([0, *accumulate(self.sizes)], dtype=torch.int32, **ON_HOST)
        if self.room is None:
            return to_device(bounds, device), None
        every = torch.arange(len(bounds), dtype=torch.int32, device=device)
        return every, to_device(torch.stack([bounds[:-1], bounds[1:]], 1), device)


@dataclass(frozen=True)
class NewRows:
    """Rows of a call that are tokens and no padding: ``rows`` int32 of [B * width], ``cu_rows`` [B + 1] a sample."""

    rows: Tensor
    cu_rows: Tensor
    width: int

    @classmethod
    def of(cls, lengths: Sequence[int], width: int, device: torch.device) -> NewRows:
        """The first ``lengths`` rows of each sample."""
        rows = np.concatenate([np.arange(b * width, b * width + n, dtype=np.int32) for b, n in enumerate(lengths)])
        return cls(*upload([rows, np.array([0, *accumulate(lengths)], np.int32)], device), width)

    @property
    def last(self) -> Tensor:
        """The last row of each sample."""
        return self.rows[self.cu_rows[1:].long() - 1]


class Appending:
    """Where new tokens go in the LM's cache, and what they attend: the same in every layer."""

    def __init__(self, capacity: int, backend: str | None) -> None:
        self.capacity, self.backend = capacity, backend
        self.new: NewRows | None = None  # None: prefill
        self.slots = self.ends = self.mask = None
        self.by_gemv = False  # layers that can run as the kernels of ``decode``

    def lay_out(self, batch: int, device: torch.device) -> None:
        """What every ``begin`` reads. A prefill reads none of it, so that it may be made while the GPU is busy."""
        starts = np.arange(batch, dtype=np.int64) * self.capacity
        # The slots of a sequence are a piece of the cache, of which each new token sees a range: what is before it.
        pieces = np.stack([starts, starts + self.capacity], 1).astype(np.int32)
        places = upload([starts, pieces, np.arange(batch + 1, dtype=np.int32)], device)
        self._starts, self.pieces, self.cu_pieces = places
        self._positions = torch.arange(self.capacity, device=device)
        self._one_each = NewRows.of([1] * batch, 1, device)

    def begin(self, position: Tensor, new: NewRows | None = None) -> None:
        """Append tokens from ``position`` [B] int64 on: one a sequence, or those of ``new``."""
        self.by_gemv = False
        if new is None:
            self.new, starts, place, last = self._one_each, self._starts, position, position[:, None]
        else:
            rows = new.rows.long()
            sample = rows // new.width
            self.new, starts, place = new, self._starts[sample], position[sample] + rows % new.width
            last = position[:, None] + torch.arange(new.width, device=position.device)
        self.slots = starts + place
        if self.backend == "eager":
            self.mask = (self._positions <= last[..., None])[:, None]
        else:
            self.ends = (place + 1).int()


@dataclass
class LayerCache:
    """One layer's keys and values. A layer gets its own and looks nothing up by its number: compiled, layers share.

    ``kv`` [B, capacity, Hkv, 2, D] are the LM's; ``slow_kv`` [slots, Hkv, 2, D] a hybrid layer's, from its first video.
    """

    kv: Tensor
    step: Appending
    slow_kv: Tensor | None = None

    @property
    def is_decoding(self) -> bool:
        return self.step.new is not None

    def fill(self, k: Tensor, v: Tensor) -> None:
        """Prefill: k, v [B, L, Hkv, D] become positions 0..L-1. Padding at the end is overwritten by later tokens."""
        self.kv[:, : k.shape[1], :, 0] = k
        self.kv[:, : v.shape[1], :, 1] = v

    def append_and_attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, L, Hq, D], k, v [B, L, Hkv, D] of new tokens -> attention output [B, L, Hq, D], on padding anything."""
        step, rows = self.step, self.step.new.rows
        is_padded = rows.shape[0] < q.shape[0] * q.shape[1]
        slots = self.kv.view(-1, *self.kv.shape[2:])
        kv = torch.stack([k, v], 3).flatten(0, 1)
        # padding is not written: it could lie past the capacity
        slots.index_copy_(0, step.slots, kv.index_select(0, rows) if is_padded else kv)
        if step.backend == "eager":
            keys, values = self.kv.transpose(1, 2).unbind(3)
            out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, step.mask, enable_gqa=True)
            return out.transpose(1, 2)
        context = self.attend(q.flatten(0, 1))
        if is_padded:
            context = torch.zeros_like(q.flatten(0, 1)).index_copy(0, rows.long(), context)
        return context.view(q.shape)

    def attend(self, q: Tensor) -> Tensor:
        """Rows q [B * L, Hq, D] of new tokens whose keys and values are here -> [tokens, Hq, D], padding left out."""
        step, slots = self.step, self.kv.view(-1, *self.kv.shape[2:])
        sequences = (step.cu_pieces, step.new.rows, step.new.cu_rows)
        selection = {"slow_end": step.ends, "slow_pieces": step.pieces}
        return sk.text_cross_attention(q, slots, *sequences, **selection, backend=step.backend)

    def add_slow(self, kv: Tensor, slots: Tensor | None) -> Tensor:
        """``kv`` [Ns, Hkv, 2, D] of new slow tokens go to ``slots``, or become the cache; returns the cache."""
        if slots is None:
            self.slow_kv = kv
        else:
            self.slow_kv.index_copy_(0, slots, kv)
        return self.slow_kv

    def lay_out_slow(self, size: int, where: Tensor) -> None:
        """A cache of ``size`` slots; the tokens of the present one, if there is one, go to ``where``."""
        before, self.slow_kv = self.slow_kv, self.kv.new_zeros(size, *self.kv.shape[2:])
        if before is not None:
            self.slow_kv.index_copy_(0, where, before)


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
        self.step = Appending(capacity, backend)
        # zeros, not empty: a masked position must not hold a NaN, which SDPA would multiply by 0
        shape = (batch, capacity, num_kv_heads, 2, head_dim)
        kv = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        torch._foreach_zero_(kv)  # a few launches for all of them
        self.layers = [LayerCache(x, self.step) for x in kv]
