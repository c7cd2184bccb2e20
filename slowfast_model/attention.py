"""Self-attention as in Qwen2, and the hybrid attention of arXiv 2504.01328 (section 3.2) on top of it.

Between self-attention and ``o_proj`` a hybrid layer adds, on the text rows, the layer's own query attending the slow
tokens, through a learned gate. That is one call of ``slowfast_cross_attention``; at decode its floor is one read of the
layer's slow KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slowfast_kernels as sk
from slowfast_kernels.eager import ACTIVATIONS

from .cache import LayerCache, SlowContext
from .config import SlowFastConfig
from .decode import decode_layer, has_plain_weights
from .kernels import add_and_normalise, fused_silu_mul, rotate_and_fill, scaled_columns
from .layers import MLP, RMSNorm, Rope, apply_rope
from .plain import can_be_plain, is_plain
from .prefill import projects_at_once


def _in_one_dtype(
    weight: Tensor, bias: Tensor, warm_up: Tensor | None, state: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The kernel reads a gate's weights in one type, that of the state or float32: the widest that one is kept in.

    Where autocast computes in another half type than the weights', that is float32.
    """
    if weight.dtype == bias.dtype == state and (warm_up is None or warm_up.dtype == state):
        return weight, bias, warm_up
    widest = torch.promote_types(weight.dtype, bias.dtype)
    if warm_up is not None:
        widest = torch.promote_types(widest, warm_up.dtype)
    if widest not in (state, torch.float32):
        widest = torch.promote_types(widest, state)
    return weight.to(widest), bias.to(widest), None if warm_up is None else warm_up.to(widest)


def gate_arguments(
    gate_proj: nn.Module, warm_up: Tensor | None, gate: str, state: Tensor, text_rows: Tensor
) -> tuple[Tensor | None, ...]:
    """Gate weight, gate bias, warm-up factor and gate values of the attention op.

    A plain ``gate_proj`` gives its weights, for the kernel to read; any other is called, and gives values [Nt] after
    the activation, in the type that the kernel would have computed them in.
    """
    if is_plain(gate_proj, nn.Sequential) and len(gate_proj) == 1:
        (linear,) = gate_proj
        if is_plain(linear, nn.Linear) and linear.bias is not None:
            return *_in_one_dtype(linear.weight, linear.bias, warm_up, state.dtype), None
    rows = state.index_select(0, text_rows)
    computed = torch.promote_types(state.dtype, torch.float32)
    weights = [p for p in gate_proj.parameters() if p.is_floating_point()]
    if weights and all(p.dtype == computed for p in weights):  # kept in float32 beside a half precision model
        rows = rows.to(computed)
    value = ACTIVATIONS[gate].apply(gate_proj(rows).flatten().to(computed))
    return None, None, None if warm_up is None else warm_up.to(computed), value


def project_folded(tokens: Tensor, projection: nn.Linear, factor: Tensor, *, fused: bool) -> Tensor:
    """``projection(tokens * factor)``, factor [C], in one GEMM and without a pass over the tokens [Ns, C].

    The product of factor and weight is formed afresh, a read of the projection a prefill, so that nothing can go stale.
    """
    return F.linear(tokens, scaled_columns(projection.weight, factor, fused=fused), projection.bias)


@can_be_plain
class SelfAttention(nn.Module):
    """Causal grouped-query attention with rotary embedding."""

    def __init__(self, config: SlowFastConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)

    def attend(self, x: Tensor, rope: Rope, cache: LayerCache | None, fused: bool = False) -> tuple[Tensor, Tensor]:
        """x [B, L, C] after the norm -> attention output before ``o_proj`` [B, L, Hq * D], and q [B, L, Hq, D].

        Padding must be on the right: then causality alone hides it from the valid rows, and no mask is built.
        ``fused``: what ``kernels.fuses`` says of x.
        """
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None and cache.is_decoding:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
            return cache.append_and_attend(q, k, v).flatten(2), q
        q, k = rotate_and_fill(q, k, v, rope, cache, fused=fused)
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2), q

    def forward(self, x: Tensor, rope: Rope, cache: LayerCache | None, fused: bool = False) -> Tensor:
        return self.o_proj(self.attend(x, rope, cache, fused)[0])


@can_be_plain
class HybridAttention(SelfAttention):
    """Adds ``cross_attn_kv_proj``, ``cross_attn_gate_proj`` and, in the warm-up types, ``cross_attn_warm_up_gate``."""

    def __init__(self, config: SlowFastConfig) -> None:
        super().__init__(config)
        self.num_kv_heads = config.num_key_value_heads
        self.gate, self.warm_up_tanh = config.gate, not config.updates_every_row
        self.cross_attn_kv_proj = nn.Linear(config.hidden_size, 2 * self.num_kv_heads * self.head_dim)
        # the gate reads the attention output, before o_proj
        self.cross_attn_gate_proj = nn.Sequential(nn.Linear(config.num_attention_heads * config.head_dim, 1))
        self.cross_attn_warm_up_gate = nn.Parameter(torch.zeros(1)) if config.has_warm_up else None

    def project_slow(self, tokens: Tensor, norm_weight: Tensor | None, fused: bool = False) -> Tensor:
        """K and V of normalised slow tokens [Ns, C], as [Ns, Hkv, 2, D]: interleaved as the projection writes them.

        ``norm_weight`` [C]: the tokens lack the norm's weight, so the projection carries it.
        """
        proj = self.cross_attn_kv_proj
        kv = proj(tokens) if norm_weight is None else project_folded(tokens, proj, norm_weight, fused=fused)
        return kv.reshape(-1, self.num_kv_heads, 2, self.head_dim)

    def gating(self, state: Tensor, text_rows: Tensor) -> tuple[Tensor | None, ...]:
        """``gate_arguments`` of this layer."""
        gate_proj, warm_up = self.cross_attn_gate_proj, self.cross_attn_warm_up_gate
        return gate_arguments(gate_proj, warm_up, self.gate, state, text_rows)

    def add_slow(self, state: Tensor, q: Tensor, slow_kv: Tensor, slow: SlowContext, backend: str | None) -> Tensor:
        """The attention output ``state`` [rows, Hq * D] with gated attention of q [rows, Hq, D] to the slow tokens."""
        *gating, value = self.gating(state, slow.text_rows)
        return sk.slowfast_cross_attention(
            state,
            q,
            slow_kv,
            slow.cu_slow,
            slow.text_rows,
            slow.cu_text,
            *gating,
            slow_end=slow.slow_end,
            slow_pieces=slow.pieces,
            gate=self.gate,
            gate_value=value,
            warm_up_tanh=self.warm_up_tanh,
            backend=backend,
        )

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        cache: LayerCache | None,
        slow: SlowContext | None = None,
        slow_tokens: Tensor | None = None,
        norm_weight: Tensor | None = None,
        backend: str | None = None,
        fused: bool = False,
    ) -> Tensor:
        """``slow_tokens``, ``norm_weight``: as in ``project_slow``; None where ``slow`` or ``cache`` has K and V."""
        a, q = self.attend(x, rope, cache, fused)
        if slow is not None:
            new = slow.kv if slow_tokens is None else self.project_slow(slow_tokens, norm_weight, fused)
            if new is None:
                slow_kv = cache.slow_kv
            else:
                slow_kv = new.to(q.dtype)
                if cache is not None:
                    slow_kv = cache.add_slow(slow_kv, slow.slots)
            a = self.add_slow(a.flatten(0, 1), q.flatten(0, 1), slow_kv, slow, backend).view_as(a)
        return self.o_proj(a)


@can_be_plain
class DecoderLayer(nn.Module):
    """One Qwen2 decoder layer; ``hybrid`` gives it cross-attention to the slow tokens."""

    def __init__(self, config: SlowFastConfig, layer: int) -> None:
        super().__init__()
        self.is_hybrid = layer in config.hybrid_layers
        self.self_attn = (HybridAttention if self.is_hybrid else SelfAttention)(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rms_norm_eps = config.rms_norm_eps

    @property
    def folds_norm(self) -> bool:
        """Whether slow tokens that are normalised once for all layers do for this one: nothing but weights follows."""
        norm, proj = self.input_layernorm, getattr(self.self_attn, "cross_attn_kv_proj", None)
        return is_plain(norm, RMSNorm) and norm.eps == self.rms_norm_eps and is_plain(proj, nn.Linear)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        slow: SlowContext | None = None,
        cache: LayerCache | None = None,
        backend: str | None = None,
        fused: bool = False,
    ) -> Tensor:
        """x [B, L, C] -> [B, L, C]. ``slow`` None: a plain Qwen2 layer. ``cache``: filled, or added to and read.

        ``fused``: ``kernels.fuses`` says so of x, and this layer is nothing but its modules.
        """
        if cache is not None and cache.step.by_gemv and has_plain_weights(self, x):
            return decode_layer(self, x, rope, slow, cache, backend)
        hybrid_inputs = ()
        if self.is_hybrid and slow is not None:
            tokens = norm_weight = None
            if slow.tokens is not None and slow.tokens_are_normalised and self.folds_norm:
                tokens, norm_weight = slow.tokens, self.input_layernorm.weight
            elif slow.tokens is not None:
                tokens = self.input_layernorm(slow.tokens)
            hybrid_inputs = (slow, tokens, norm_weight, backend)
        attention, mlp = self.self_attn, self.mlp  # a wrapper of one is not told how
        attends = {"fused": True} if fused and is_plain(attention, type(attention)) else {}
        multiplies = {"product": fused_silu_mul} if fused and is_plain(mlp, MLP) else {}
        attended = attention(self.input_layernorm(x), rope, cache, *hybrid_inputs, **attends)
        x, after = add_and_normalise(x, attended, self.post_attention_layernorm, fused=fused)
        return x + mlp(after, **multiplies)


def project_slow_at_once(layers: Sequence[nn.Module], tokens: Tensor, *, fused: bool) -> list[Tensor | None]:
    """K and V [Ns, Hkv, 2, D] of normalised slow ``tokens`` [Ns, C] for each hybrid layer, as views of one product
    [Ns, layers * 2 Hkv D].

    None for every layer where each makes its own: by ``prefill.projects_at_once``, and where weights cannot be read
    from outside of a layer's call (hooked, wrapped, sharded or on another device).
    """
    apart = [None] * len(layers)
    hybrid = [i for i, layer in enumerate(layers) if isinstance(layer, DecoderLayer) and layer.is_hybrid]
    if not projects_at_once(tokens, len(hybrid)) or not all(_is_readable(layers[i], tokens) for i in hybrid):
        return apart
    attentions = [layers[i].self_attn for i in hybrid]
    weights, biases = zip(*((a.cross_attn_kv_proj.weight, a.cross_attn_kv_proj.bias) for a in attentions), strict=True)
    if len({weight.dtype for weight in weights}) > 1:
        return apart
    folded = weights[0].new_empty(len(hybrid), *weights[0].shape)
    for into, weight, i in zip(folded, weights, hybrid, strict=True):
        scaled_columns(weight, layers[i].input_layernorm.weight, into, fused=fused)
    kv = F.linear(tokens, folded.flatten(0, 1), torch.cat(biases))
    made = kv.unflatten(-1, (len(hybrid), attentions[0].num_kv_heads, 2, attentions[0].head_dim)).unbind(1)
    for i, part in zip(hybrid, made, strict=True):
        apart[i] = part
    return apart


def _is_readable(layer: DecoderLayer, tokens: Tensor) -> bool:
    """No hook or wrapper does something to a layer's weights first, and they are beside the tokens."""
    if not (is_plain(layer, DecoderLayer) and is_plain(layer.self_attn, HybridAttention)):
        return False
    proj = layer.self_attn.cross_attn_kv_proj
    weights = (proj.weight, proj.bias, layer.input_layernorm.weight)
    return all(x is not None and x.device == tokens.device for x in weights)
