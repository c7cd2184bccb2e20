"""Cross-attention to the slow tokens as a user of transformers would write it, in the place of the package's op.

scaled_dot_product_attention of the text rows over the same K and V, then gate and mix in PyTorch: one video, one
sample, no padding, so that no mask is needed and SDPA has all of its kernels to choose from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slowfast_model.hf.attention import HybridAttention, subclass_of


class PlainAttention(HybridAttention):
    """Of the gate that the released models have: tanh, with a warm-up factor."""

    def read(self, state: Tensor, query: Tensor, reading, scale: float | None) -> Tensor:
        key, value = self.slow_kv(reading, state).permute(2, 1, 0, 3)[:, None]  # [1, Hkv, Ns, D] each
        flat = state.flatten(2)
        if flat.shape[1] == 1:
            return self._mixed(flat, query, key, value, scale).view(state.shape)
        begin = 0 if reading.begin is None else reading.begin
        rows = (reading.end > begin).nonzero().squeeze(1)
        mixed = self._mixed(flat[:, rows], query[:, :, rows], key, value, scale)
        return flat.index_copy(1, rows, mixed).view(state.shape)

    def _mixed(self, state: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        context = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)
        gate = torch.tanh(self.cross_attn_gate_proj(state)) * torch.tanh(self.cross_attn_warm_up_gate)
        return state + gate * context.transpose(1, 2).flatten(2)


def use_plain_attention(model):
    """Let the hybrid layers of a SlowFastVLForConditionalGeneration attend so; returns ``model``."""
    for attention in model.hybrid_attentions():
        attention.__class__ = subclass_of(type(attention)._plain_class, PlainAttention)
    return model
