"""What a decoded token is measured beside: the same weights as others decode them, each with a static cache.

``plain_step``: gpt-fast's way, a plain function compiled whole with mode="reduce-overhead", q, k and v in one product,
attention by SDPA under a mask over the whole cache. ``transformers_step``: its Qwen2 with a StaticCache, compiled
likewise. Both choose the largest logit inside what is compiled. On a CPU neither is compiled.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from slowfast_model import DecodeSession

from .hf import counts_cache_positions

Step = Callable[[Tensor], tuple[Tensor, Tensor]]  # token [B] -> logits [B, V], the most likely ids [B]


class PeerSession:
    """A step with the face that a benchmark needs of a ``DecodeSession``."""

    def __init__(self, step: Step, logits: Tensor) -> None:
        self._step, self.most_likely = step, logits.argmax(-1)

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        logits, most_likely = self._step(token)
        self.most_likely = most_likely.clone()  # the next replay writes there
        return logits


def compiled(step: Step, device: torch.device) -> Step:
    if device.type == "cpu":
        return step
    return torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)


def _at_fixed_addresses(*tensors: Tensor) -> None:
    """A graph that torch.compile records reads and writes these where they are; others it would copy, or refuse."""
    for x in tensors:
        torch._dynamo.mark_static_address(x)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def plain_step(session: DecodeSession) -> Step:
    """Of the weights and caches of ``session``, after its prefill of prompts of one length."""
    model, config = session.model, session.model.config
    dim, num_q, num_kv = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    device, dtype = session.logits.device, session.logits.dtype
    caches = [
        tuple(x.transpose(1, 2).contiguous() for x in cache.kv.unbind(3)) for cache in session.cache.layers
    ]  # K and V [B, Hkv, capacity, D]
    capacity = caches[0][0].shape[2]
    frequency = config.rope_theta ** (-torch.arange(0, dim, 2, device=device).float() / dim)
    angles = torch.outer(torch.arange(capacity, device=device).float(), frequency).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    position, every = session.position[:1].clone(), torch.arange(capacity, device=device)
    fused = []
    for layer in model.model.layers:
        projections = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        fused.append((torch.cat([p.weight for p in projections]), torch.cat([p.bias for p in projections])))

    _at_fixed_addresses(cos, sin, position, every, *(x for pair in (*caches, *fused) for x in pair))

    def step(token: Tensor) -> tuple[Tensor, Tensor]:
        x = F.embedding(token, model.model.embed_tokens.weight)[:, None]
        turn, mask = (cos[position], sin[position]), (every <= position)[None, None, None]
        for layer, (weight, bias), (keys, values) in zip(model.model.layers, fused, caches, strict=True):
            norm, mlp = layer.input_layernorm, layer.mlp
            qkv = F.linear(F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps), weight, bias)
            heads = qkv.unflatten(-1, (-1, dim)).transpose(1, 2)
            q, k, v = heads.split([num_q, num_kv, num_kv], 1)
            keys.index_copy_(2, position, _rotated(k, *turn))
            values.index_copy_(2, position, v)
            a = F.scaled_dot_product_attention(_rotated(q, *turn), keys, values, mask, enable_gqa=True)
            x = x + F.linear(a.transpose(1, 2).flatten(2), layer.self_attn.o_proj.weight)
            norm = layer.post_attention_layernorm
            h = F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
            h = F.silu(F.linear(h, mlp.gate_proj.weight)) * F.linear(h, mlp.up_proj.weight)
            x = x + F.linear(h, mlp.down_proj.weight)
        norm = model.model.norm
        x = F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
        logits = F.linear(x, model.lm_head.weight)[:, 0]
        position.add_(1)
        return logits, logits.argmax(-1)

    return step


def transformers_step(session: DecodeSession, input_ids: Tensor, capacity: int) -> Step:
    """transformers' Qwen2 on the weights of ``session``'s model, prefilled with ``input_ids`` [B, L] of text."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, StaticCache

    from slowfast_model.hf._versions import CACHE

    ours, device = session.model, input_ids.device
    config = Qwen2Config(
        vocab_size=ours.config.vocab_size,
        hidden_size=ours.config.hidden_size,
        intermediate_size=ours.config.intermediate_size,
        num_hidden_layers=ours.config.num_hidden_layers,
        num_attention_heads=ours.config.num_attention_heads,
        num_key_value_heads=ours.config.num_key_value_heads,
        rope_theta=ours.config.rope_theta,
        rms_norm_eps=ours.config.rms_norm_eps,
        max_position_embeddings=capacity,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        dtype=session.logits.dtype,
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    weights = ours.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its frequencies are in no state dict
    model.eval()
    cache = StaticCache(config=config, max_cache_len=capacity)
    options = {CACHE: cache, "use_cache": True}
    counts = counts_cache_positions()  # outside of what is compiled: it imports

    def forward(ids: Tensor, positions: Tensor) -> Tensor:
        where = {"cache_position": positions} if counts else {}
        return model(ids, position_ids=positions[None], logits_to_keep=1, **options, **where).logits[:, -1]

    length = input_ids.shape[1]
    forward(input_ids, torch.arange(length, device=device))
    position = torch.tensor([length], device=device)
    _at_fixed_addresses(position)

    def step(token: Tensor) -> tuple[Tensor, Tensor]:
        logits = forward(token[:, None], position)
        position.add_(1)
        return logits, logits.argmax(-1)

    return step


def transformers_version() -> str:
    return importlib.metadata.version("transformers")
