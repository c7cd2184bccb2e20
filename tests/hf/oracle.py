"""What a slow-fast model must compute, by a dense mask in float64 beside the plain language model's own layers.

It shares nothing with the plug-in but the weights: an attention function of its own, under the untouched model, adds
the slow tokens in the layers that it is told of.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

_LAYERS: dict[int, dict] = {}  # by layer: what to add


def _attention(module, query, key, value, attention_mask, scaling, **kwargs):
    eager = sys.modules[type(module).__module__].eager_attention_forward
    state, weights = eager(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    layer = _LAYERS.get(module.layer_idx)
    if layer is not None:
        state = _with_slow(state, query, scaling, **layer)
    return state, weights


AttentionInterface.register("slow-fast-oracle", _attention)
AttentionMaskInterface.register("slow-fast-oracle", eager_mask)


def _with_slow(state, query, scale, slow, kv_proj, gate_proj, warm_up, sees, gate, factor):
    """state [B, L, Hq, D], query [B, Hq, L, D], slow [Ns, C] normalised, sees [B, L, Ns] bool."""
    dim = query.shape[-1]
    kv = (slow.double() @ kv_proj.weight.double().T + kv_proj.bias.double()).view(len(slow), -1, 2, dim)
    groups = query.shape[1] // kv.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in kv.unbind(2))
    scores = torch.einsum("bhld,nhd->bhln", query.double(), keys) * scale
    blind = ~sees.any(-1)[:, None, :, None]
    probs = scores.masked_fill(~(sees[:, None] | blind), -torch.inf).softmax(-1).masked_fill(blind, 0)
    context = torch.einsum("bhln,nhd->blhd", probs, values)
    flat = state.flatten(2).double()
    value = flat @ gate_proj[0].weight.double().T + gate_proj[0].bias.double()
    value = gate(value) * (1.0 if warm_up is None else factor(warm_up.double()))
    mixed = state.double() + value[..., None] * context
    return mixed.to(state.dtype)


def logits(model, lm: nn.Module, embeddings: Tensor, slow: Tensor, sees: Tensor, **inputs) -> Tensor:
    """Of ``lm``, a plain copy of ``model``'s language model, with the weights that were added to ``model``.

    Args:
        embeddings: [B, L, C], fast tokens in place, before any factor of the decoder's.
        slow: [Ns, C], pooled and projected, before a norm.
        sees: bool [B, L, Ns].
    """
    config = model.slow_fast
    lm.set_attn_implementation("slow-fast-oracle")
    for index, attention in zip(model.config.hybrid_layers, model.hybrid_attentions(), strict=True):
        _LAYERS[index] = {
            "slow": lm.get_decoder().layers[index].input_layernorm(slow),
            "kv_proj": attention.cross_attn_kv_proj,
            "gate_proj": attention.cross_attn_gate_proj,
            "warm_up": attention.cross_attn_warm_up_gate,
            "sees": sees,
            "gate": torch.tanh if config.gate == "tanh" else torch.nn.Identity(),
            "factor": torch.nn.Identity() if config.updates_every_row else torch.tanh,
        }
    try:
        return lm(inputs_embeds=embeddings, use_cache=False, **inputs).logits
    finally:
        _LAYERS.clear()
        lm.set_attn_implementation("eager")
