"""Self-attention as in Qwen2, and the hybrid attention of arXiv 2504.01328 (section 3.2) on top of it.

Between self-attention and ``o_proj`` a hybrid layer adds, on the text rows, the layer's own query attending the slow
tokens, through a learned gate. That is one call of ``slowfast_cross_attention``; at decode its floor is one read of the
layer's slow KV cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slowfast_kernels as sk

from .cache import SelfKVCache, SlowContext
from .config import SlowFastConfig
from .layers import MLP, RMSNorm, Rope, apply_rope


class SelfAttention(nn.Module):
    """Causal grouped-query attention with rotary embedding."""

    def __init__(self, config: SlowFastConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)

    def attend(self, x: Tensor, rope: Rope, cache: SelfKVCache | None) -> tuple[Tensor, Tensor]:
        """x [B, L, C] after the norm -> attention output before ``o_proj`` [B, L, Hq * D], and q [B, L, Hq, D].

        Padding must be on the right: then causality alone hides it from the valid rows, and no mask is built.
        """
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is not None and cache.is_decoding:
            return cache.append_and_attend(self.layer, q, k, v).flatten(2), q
        if cache is not None:
            cache.fill(self.layer, k, v)
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2), q

    def forward(self, x: Tensor, rope: Rope, cache: SelfKVCache | None) -> Tensor:
        return self.o_proj(self.attend(x, rope, cache)[0])


class HybridAttention(SelfAttention):
    """Adds ``cross_attn_kv_proj``, ``cross_attn_gate_proj`` and, in the warm-up types, ``cross_attn_warm_up_gate``."""

    def __init__(self, config: SlowFastConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.num_kv_heads = config.num_key_value_heads
        self.gate, self.warm_up_tanh = config.gate, not config.updates_every_row
        self.cross_attn_kv_proj = nn.Linear(config.hidden_size, 2 * self.num_kv_heads * self.head_dim)
        # the gate reads the attention output, before o_proj
        self.cross_attn_gate_proj = nn.Sequential(nn.Linear(config.num_attention_heads * config.head_dim, 1))
        self.cross_attn_warm_up_gate = nn.Parameter(torch.zeros(1)) if config.has_warm_up else None

    def project_slow(self, slow: SlowContext, norm: RMSNorm) -> Tensor:
        """K and V of the slow tokens, [Ns, Hkv, 2, D] interleaved as the projection writes them.

        Normalised tokens (inference) meet a projection that carries the norm's weight: one GEMM and no pass over the
        tokens. The product is formed afresh, a read of the projection a prefill, so that nothing can go stale.
        """
        proj = self.cross_attn_kv_proj
        if slow.tokens_are_normalised:
            weight = (proj.weight.float() * norm.weight.float()).to(proj.weight.dtype)
            kv = F.linear(slow.tokens, weight, proj.bias)
        else:
            kv = proj(norm(slow.tokens))
        return kv.view(-1, self.num_kv_heads, 2, self.head_dim)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        cache: SelfKVCache | None,
        slow: SlowContext | None = None,
        slow_kv: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        a, q = self.attend(x, rope, cache)
        if slow_kv is not None:
            gate_proj = self.cross_attn_gate_proj[0]
            a = sk.slowfast_cross_attention(
                a.flatten(0, 1),
                q.flatten(0, 1),
                slow_kv,
                slow.cu_slow,
                slow.text_rows,
                slow.cu_text,
                gate_proj.weight,
                gate_proj.bias,
                self.cross_attn_warm_up_gate,
                gate=self.gate,
                warm_up_tanh=self.warm_up_tanh,
                backend=backend,
            ).view_as(a)
        return self.o_proj(a)


class DecoderLayer(nn.Module):
    """One Qwen2 decoder layer; ``hybrid`` gives it cross-attention to the slow tokens."""

    def __init__(self, config: SlowFastConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.is_hybrid = layer, layer in config.hybrid_layers
        self.self_attn = (HybridAttention if self.is_hybrid else SelfAttention)(config, layer)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        slow: SlowContext | None = None,
        cache: SelfKVCache | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """x [B, L, C] -> [B, L, C]. ``slow`` None: a plain Qwen2 layer. ``cache``: filled, or read while decoding."""
        hybrid_inputs = ()
        if self.is_hybrid and slow is not None:
            slow_kv = slow.kv.get(self.layer)
            if slow_kv is None:
                slow_kv = self.self_attn.project_slow(slow, self.input_layernorm)
            if cache is not None:
                slow.kv[self.layer] = slow_kv
            hybrid_inputs = (slow, slow_kv, backend)
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, *hybrid_inputs)
        return x + self.mlp(self.post_attention_layernorm(x))
