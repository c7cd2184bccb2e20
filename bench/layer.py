"""The slow path of one hybrid layer: ours from the slow KV cache against the released code's sequence of operations.

At decode ours is the fused op alone, since keys and values are cached. At prefill it is one GEMM (norm weight folded,
slow tokens normalised while pooling) and the fused op. The released code normalises, projects, repeats the heads,
unpads, attends, gates and scatters, in each layer and for each generated token; it is rewritten here from what it
computes, as a baseline, host syncs included. ``kv`` rows time the projection apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import fused_call, our_backends
from .inputs import AttentionInputs, make_inputs, reference_context, reference_mixed
from .registry import LAYER
from .runner import Contender, Runner, Variant, relative_error
from .selection import parse_attention, select
from .shapes import AttentionShape, attention_cost, projection_cost

OP = "layer"
EPS = 1e-6


@dataclass(frozen=True)
class LayerInputs:
    """What the layer is handed before any projection, and the attention inputs that follow from it."""

    slow: Tensor  # [Ns, C], raw pooled vision features
    normalised: Tensor  # [Ns, C], slow / rms(slow)
    norm_weight: Tensor  # [C]
    kv_weight: Tensor  # [2 * Hkv * D, C]
    folded: Tensor  # kv_weight * norm_weight
    attention: AttentionInputs
    rotated: list[AttentionInputs]  # as many more as keep the cached-KV timing cold


def make_layer_inputs(shape: AttentionShape, dtype: str, device: torch.device, cache_bytes: float) -> LayerInputs:
    heads, torch_dtype = shape.heads, getattr(torch, dtype)
    width = 2 * heads.num_kv * heads.dim
    slow = torch.randn(shape.num_slow, heads.channels, device=device, dtype=torch_dtype)
    norm_weight = (1 + 0.1 * torch.randn(heads.channels, device=device)).to(torch_dtype)
    kv_weight = (torch.randn(width, heads.channels, device=device) * heads.channels**-0.5).to(torch_dtype)
    normalised = F.rms_norm(slow, (heads.channels,), eps=EPS)
    folded = kv_weight * norm_weight
    first, *rotated = make_inputs(shape, dtype, device, cache_bytes)
    cached = F.linear(normalised, folded).view(-1, heads.num_kv, 2, heads.dim)
    return LayerInputs(slow, normalised, norm_weight, kv_weight, folded, _with_kv(first, cached), rotated)


def _with_kv(inputs: AttentionInputs, slow_kv: Tensor) -> AttentionInputs:
    return AttentionInputs(**{**vars(inputs), "slow_kv": slow_kv})


def official_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def official_layer(layer: LayerInputs, text_mask: Tensor) -> Tensor:
    """One batch of padded sequences [B, L] the way the released code goes about it -> new state [B * L, C]."""
    inputs = layer.attention
    batch, heads = inputs.shape.batch, inputs.shape.heads
    normalised = official_norm(layer.slow, layer.norm_weight)
    kv = F.linear(normalised, layer.kv_weight).view(batch, -1, heads.num_kv, 2, heads.dim)
    query = inputs.q.view(batch, -1, heads.num_q, heads.dim)
    state = inputs.state.view(batch, -1, heads.channels)
    gating = inputs.gate_weight, inputs.gate_bias, inputs.warm_up
    return official_cross_attention(state, query, kv, text_mask, *gating).flatten(0, 1)


def official_cross_attention(
    state: Tensor, query: Tensor, kv: Tensor, text_mask: Tensor, weight: Tensor, bias: Tensor, warm_up: Tensor
) -> Tensor:
    """state [B, L, C], query [B, L, Hq, D], kv [B, N, Hkv, 2, D], text_mask [B, L] bool -> new state [B, L, C]"""
    heads_per_kv = query.shape[2] // kv.shape[2]
    keys, values = (x.repeat_interleave(heads_per_kv, 2) for x in kv.unbind(3))  # repeat_kv, materialised
    lengths = text_mask.sum(1)
    longest = int(lengths.max().item())  # the first host sync
    unpadded = query[text_mask]  # boolean indexing: the second
    padded = query.new_zeros(len(query), longest, *query.shape[2:])
    valid = torch.arange(longest, device=query.device) < lengths[:, None]
    padded[valid] = unpadded
    context = F.scaled_dot_product_attention(padded.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
    context = context.transpose(1, 2)[valid].flatten(1)
    picked = state[text_mask]
    gate = torch.tanh(F.linear(picked, weight, bias)) * torch.tanh(warm_up)
    scattered = torch.zeros_like(state)
    scattered[text_mask] = gate * context
    return state + scattered


def run(runner: Runner) -> None:
    shapes = select(LAYER, runner.shapes, parse_attention, not runner.is_gpu)
    if not shapes:
        return
    backends = [name for name in our_backends(runner, OP) if name != "eager"]
    for shape in shapes:
        for dtype in runner.dtypes[:1]:
            _run_shape(runner, shape, dtype, backends)


def _run_shape(runner: Runner, shape: AttentionShape, dtype: str, backends: list[str]) -> None:
    layer = make_layer_inputs(shape, dtype, runner.device, runner.journal.meta["cache_bytes"])
    inputs, heads = layer.attention, shape.heads
    reference = reference_mixed(inputs, reference_context(inputs))
    decode = attention_cost(shape, dtype, fused=True)
    projection = projection_cost(shape.num_slow, heads.channels, heads, dtype)
    cached, fresh = f"{shape.name} cached KV", f"{shape.name} with projection"

    def project() -> Tensor:
        return F.linear(layer.normalised, layer.folded).view(-1, heads.num_kv, 2, heads.dim)

    def from_cache(backend: str) -> Contender:
        def build():
            calls = [fused_call(x, backend) for x in (inputs, *layer.rotated)]
            return calls, lambda: relative_error(calls[0](), reference)

        return Contender(backend, [Variant("", build)], decode, "ours")

    def with_projection(backend: str) -> Contender:
        def call() -> Tensor:
            return fused_call(_with_kv(inputs, project()), backend)()

        variant = Variant("", lambda: ([call], lambda: relative_error(call(), reference)))
        return Contender(backend, [variant], decode + projection, "ours")

    at_decode, projections = [from_cache(backend) for backend in backends], []
    if runner.wants_peer("official"):
        mask = torch.ones(shape.batch, shape.num_text // shape.batch, dtype=torch.bool, device=runner.device)
        official = partial(official_layer, layer, mask)
        variant = Variant(
            "every token, every layer", lambda: ([official], lambda: relative_error(official(), reference))
        )
        at_decode.append(Contender("official", [variant], decode, capturable=False))

        def normalise_and_project() -> Tensor:
            return F.linear(official_norm(layer.slow, layer.norm_weight), layer.kv_weight)

        def error() -> float:
            return relative_error(normalise_and_project(), project().flatten(1))

        variant = Variant("norm, then GEMM", lambda: ([normalise_and_project], error))
        projections.append(Contender("official", [variant], projection))
    gemm = Variant("folded weight", lambda: ([project], lambda: relative_error(project(), inputs.slow_kv)))
    projections.append(Contender("gemm", [gemm], projection, "ours"))

    runner.compare(OP, cached, dtype, at_decode)
    runner.compare(OP, fresh, dtype, [with_projection(backend) for backend in backends])
    runner.compare("kv", shape.name, dtype, projections)
