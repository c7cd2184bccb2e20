"""One decoded token a sample through a layer's weights, read once by GEMV kernels with all that stands around them.

A step of a few rows is bound by that read. cuBLAS takes 1.3 to 1.4 times as long in many small launches; here a layer
is four launches and its attention: norm, q, k, v, rotation and the write to the cache; o_proj and the residual; norm,
gate, up and SiLU; down_proj and the residual. A hybrid layer adds its one call between attention and o_proj.

The kernels are ``slowfast_kernels.triton.gemv``'s, since any model has such layers; which of a model's modules may be
handed to them, and when a step is better left to cuBLAS, is decided here. A layer with a module that is more than its
weights (adapted, quantised, hooked, offloaded) is called as before, and the others are not.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from slowfast_kernels.heuristics.gemv import MOST_ROWS, ROWS_THAT_PAY

from .cache import LayerCache, SlowContext
from .kernels import triton_limit
from .layers import MLP, RMSNorm, Rope
from .plain import is_plain


class Layer(Protocol):
    """What is read of a ``DecoderLayer``."""

    is_hybrid: bool
    self_attn: nn.Module
    mlp: MLP
    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm


def gemv_limit(x: Tensor, backend: str | None) -> str | None:
    """What keeps a step with the embeddings x [B, C] from these kernels, and the way out; None: nothing does."""
    limit = triton_limit(x, backend)
    if limit is None and len(x) > MOST_ROWS:
        limit = f"got a batch of {len(x)}, want at most {MOST_ROWS}"
    return limit


def cublas_pays(x: Tensor) -> str | None:
    """Why a step with the embeddings x [B, C] is left to cuBLAS unless the kernels are asked for; None: it is not."""
    batch, most = len(x), ROWS_THAT_PAY[x.element_size()]
    if batch > most:
        return f"got a batch of {batch}, for which cuBLAS is faster (from {most + 1} on)"
    return None


def _fits(linear: nn.Module, x: Tensor) -> bool:
    """A plain linear layer with its weights in the activations' dtype, on their device."""
    if not is_plain(linear, nn.Linear):
        return False
    weights = (linear.weight,) if linear.bias is None else (linear.weight, linear.bias)
    return all(w.dtype == x.dtype and w.device == x.device for w in weights)


def has_plain_weights(layer: Layer, x: Tensor) -> bool:
    """Whether ``decode_layer`` computes what calling the modules of ``layer`` would, on x [B, 1, C]."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return (
        is_plain(attention, type(attention))
        and is_plain(mlp, MLP)
        and all(is_plain(norm, RMSNorm) and norm.weight.dtype == x.dtype for norm in norms)
        and all(_fits(m, x) for m in (*projections, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        and len({projection.bias is None for projection in projections}) == 1
        and mlp.gate_proj.bias is None
        and mlp.up_proj.bias is None
    )


def decode_layer(
    layer: Layer, x: Tensor, rope: Rope, slow: SlowContext | None, cache: LayerCache, backend: str | None
) -> Tensor:
    """``DecoderLayer.forward`` of x [B, 1, C], one new token of each sample, after ``has_plain_weights``."""
    from slowfast_kernels.triton import gemv  # where it is known to import

    attention, mlp = layer.self_attn, layer.mlp
    before, after = (gemv.Norm(n.weight, n.eps) for n in (layer.input_layernorm, layer.post_attention_layernorm))
    qkv = [gemv.Projection(m.weight, m.bias) for m in (attention.q_proj, attention.k_proj, attention.v_proj)]
    rows = x.flatten(0, 1)
    q = gemv.rotated_qkv(rows, qkv, rope, cache.step.slots, cache.kv.flatten(0, 1), before)
    a = cache.attend(q).flatten(1)
    if layer.is_hybrid and slow is not None:
        a = attention.add_slow(a, q, cache.slow_kv, slow, backend)
    rows = gemv.linear(a, gemv.Projection(attention.o_proj.weight, attention.o_proj.bias), residual=rows)
    inner = gemv.gated_up(rows, mlp.gate_proj.weight, mlp.up_proj.weight, after)
    return gemv.linear(inner, gemv.Projection(mlp.down_proj.weight, mlp.down_proj.bias), residual=rows)[:, None]


def project(head: nn.Module, x: Tensor, by_gemv: bool) -> Tensor:
    """``head(x)`` of x [B, C]: the logits of a step."""
    if not (by_gemv and _fits(head, x)):
        return head(x)
    from slowfast_kernels.triton import gemv

    return gemv.linear(x, gemv.Projection(head.weight, head.bias))
