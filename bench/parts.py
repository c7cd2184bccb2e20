"""Where the slow path's time goes in a prefill: each of its parts on the device, alone and in turns, beside its floor.

A part is what a prefill of the whole model does, with that prefill's own tensors: pooling (spatial, then temporal with
the norm), keys and values of all hybrid layers with the norm's weight folded in, attention, and attention with gate and
mix as the one op that it is. The projector is on both sides of the pair and stands beside them. What the pair's wall
time has beyond the parts is the host's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .runner import Contender, Runner, Variant
from .shapes import AttentionShape, Cost, ModelShape, PoolShape, attention_cost, pool_cost, projection_cost, vision_cost
from .timing import Call

OP = "parts"
PROJECTOR, POOL, KV, ATTENTION, FUSED = "projector", "pool", "K and V", "attention", "attention with gate and mix"


@contextmanager
def _recorded(owner: object, name: str):
    """Calls of ``owner.name`` in the block, as functions that make them again."""
    calls: list[Call] = []
    original = getattr(owner, name)

    def record(*args, **options):
        calls.append(lambda: original(*args, **options))
        return original(*args, **options)

    setattr(owner, name, record)
    try:
        yield calls
    finally:
        setattr(owner, name, original)


def _all(calls: list[Call]) -> Call:
    return lambda: [call() for call in calls]


def part_calls(model: nn.Module, ids: Tensor, features: list[Tensor]) -> tuple[dict[str, Call], str]:
    """A call for each part of the prefill of one prompt, and in which order the prefill does its work."""
    import slowfast_kernels as sk
    from slowfast_model.attention import project_slow_at_once

    config, decoder = model.config, model.model
    recorded = (_recorded(sk, "slowfast_pool"), *(_recorded(nn.functional, name) for name in ("linear", "gelu")))
    with recorded[0] as pools, recorded[1] as linears, recorded[2] as gelus:
        x, _, slow = model.prepare(ids, features, None, None)
    hybrid = [decoder.layers[i].self_attn for i in config.hybrid_layers]
    norms = [decoder.layers[i].input_layernorm.weight for i in config.hybrid_layers]
    made = [kv for kv in project_slow_at_once(decoder.layers, slow) if kv is not None]

    def keys_and_values() -> list[Tensor]:
        if made:
            return [kv for kv in project_slow_at_once(decoder.layers, slow) if kv is not None]
        return [a.project_slow(slow.tokens, w) for a, w in zip(hybrid, norms, strict=True)]

    caches = keys_and_values()
    rows = x.shape[0] * x.shape[1]
    q = torch.randn(rows, config.num_attention_heads, config.head_dim, device=x.device).to(caches[0].dtype)
    where = (slow.cu_slow, slow.text_rows, slow.cu_text)

    def attention() -> list[Tensor]:
        return [sk.text_cross_attention(q, kv, *where, backend=model.backend) for kv in caches]

    def fused() -> list[Tensor]:
        state, mixed = q.flatten(1), []
        for a, kv in zip(hybrid, caches, strict=True):
            *gating, value = a.gating(state, slow.text_rows)
            options = {"gate": a.gate, "gate_value": value, "warm_up_tanh": a.warm_up_tanh, "backend": model.backend}
            mixed.append(sk.slowfast_cross_attention(state, q, kv, *where, *gating, **options))
        return mixed

    order = "pooled before the last linear layer" if len(pools) == 2 else "pooled after the projector"
    order += ", K and V " + ("in one product" if made else "a layer at a time")
    calls = {
        PROJECTOR: _all(linears + gelus),
        POOL: _all(pools),
        KV: keys_and_values,
        ATTENTION: attention,
        FUSED: fused,
    }
    return calls, order


def part_costs(shape: ModelShape, dtype: str) -> dict[str, Cost]:
    """The least work of each part."""
    heads, layers = shape.heads, range(shape.num_hybrid)
    side = 2 * shape.slow_side
    # more frames to a window than there are: they are averaged to ``fast_frames``
    windows = {"temporal_stride": 2**20, "min_fast_frames": shape.fast_frames}
    pool = PoolShape((shape.frames,), (side, side), shape.hidden, pool_stride=2, **windows)
    rows = AttentionShape.even(1, shape.text, shape.num_slow, heads)
    nothing = Cost(0, 0, 0)
    return {
        PROJECTOR: vision_cost(shape, dtype, shape.num_slow),
        POOL: pool_cost(pool, dtype),
        KV: sum((projection_cost(shape.num_slow, shape.hidden, heads, dtype) for _ in layers), nothing),
        ATTENTION: sum((attention_cost(rows, dtype, fused=False) for _ in layers), nothing),
        FUSED: sum((attention_cost(rows, dtype, fused=True) for _ in layers), nothing),
    }


def run(runner: Runner, model: nn.Module, shape: ModelShape, dtype: str, prompt) -> None:
    """A row for each part of the slow path of one prompt (``model.Prompt``)."""
    costs = part_costs(shape, dtype)
    if all(runner.is_done(OP, shape.name, dtype, who) for who in costs):
        return
    calls, order = part_calls(model, prompt.ids, prompt.features())
    contenders = [
        Contender(who, [Variant(order, _build(calls[who]))], cost, "base" if who == PROJECTOR else "ours")
        for who, cost in costs.items()
    ]
    runner.compare(OP, shape.name, dtype, contenders)


def _build(call: Call) -> Callable[[], tuple[list[Call], Callable[[], float]]]:
    """What a part computes is the model's, whose logits the pair checks."""
    return lambda: ([call], lambda: 0.0)
