"""Where the slow path's time goes in a prefill: each of its parts on the device, alone and in turns, beside its floor.

A part is what a prefill of the whole model does, with that prefill's own tensors: pooling (spatial, then temporal with
the norm), keys and values of all hybrid layers with the norm's weight folded in, attention, and attention with gate and
mix as the one op that it is. The projector's hidden layers are on both sides of the pair and stand beside them; its
last one is the slow path's too, but for the fast tokens, which are all that the base LLM has of it. What the pair's
wall time has beyond the parts is the host's.

A floor is the least work in the order that the prefill takes: pooling in two calls, with the projector's last linear
layer between them, moves the slow tokens twice more than one call that reads all features.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .runner import Contender, Runner, Variant
from .shapes import (
    BYTES,
    AttentionShape,
    Cost,
    ModelShape,
    PoolShape,
    attention_cost,
    layer_costs,
    pool_cost,
    projection_cost,
)
from .timing import Call

OP = "parts"
PROJECTOR, LAST, POOL, KV = "projector", "projector's last layer", "pool", "K and V"
ATTENTION, FUSED = "attention", "attention with gate and mix"
PARTS = (PROJECTOR, LAST, POOL, KV, ATTENTION, FUSED)
PRODUCTS = ("linear", "addmm")  # as a linear layer's are recorded


class _Made(NamedTuple):
    """A call that was made, and how to make it again."""

    name: str
    again: Call


@contextmanager
def _recorded(*functions: tuple[object, str]):
    """Calls of ``owner.name`` of all ``functions`` in the block, in order."""
    calls: list[_Made] = []
    originals = [getattr(owner, name) for owner, name in functions]

    def recorder(name: str, original: Callable):
        def record(*args, **options):
            calls.append(_Made(name, lambda: original(*args, **options)))
            return original(*args, **options)

        return record

    for (owner, name), original in zip(functions, originals, strict=True):
        setattr(owner, name, recorder(name, original))
    try:
        yield calls
    finally:
        for (owner, name), original in zip(functions, originals, strict=True):
            setattr(owner, name, original)


def _all(calls: list[Call]) -> Call:
    return lambda: [call() for call in calls]


class Order(NamedTuple):
    """In which order a prefill does its work."""

    runs: int  # of frames, projected one after the other
    pools_twice: bool  # spatially, then over time
    pools_first: bool  # before the projector's last linear layer
    kv_at_once: bool

    def __str__(self) -> str:
        pooled = "pooled before the last linear layer" if self.pools_first else "pooled after the projector"
        runs = f" in {self.runs} runs" if self.runs > 1 else ""
        return f"{pooled}{runs}, K and V {'in one product' if self.kv_at_once else 'a layer at a time'}"


def _num_layers(projector: nn.Module) -> int:
    return sum(isinstance(x, nn.Linear) for x in projector.modules())


def _order(made: list[_Made], projector: nn.Module, kv_at_once: bool) -> Order:
    """``made``: the calls of a projector and of the pooling of its one video."""
    names = [call.name for call in made]
    num_pools, num_layers = names.count("slowfast_pool"), _num_layers(projector)
    products = sum(name in PRODUCTS for name in names)
    before_pool = sum(name in PRODUCTS for name in names[: names.index("slowfast_pool")])
    runs = products // max(num_layers, 1)
    return Order(max(runs, 1), num_pools > 1, num_pools > 1 and before_pool < num_layers, kv_at_once)


def _of_last_layer(made: list[_Made], projector: nn.Module) -> list[_Made]:
    """Of the calls of a projector those of its last linear layer, one a run."""
    num_layers = _num_layers(projector)
    products = [call for call in made if call.name in PRODUCTS]
    return products[num_layers - 1 :: num_layers]


def part_calls(model: nn.Module, ids: Tensor, features: list[Tensor]) -> tuple[dict[str, Call], Order]:
    """A call for each part of the prefill of one prompt, and in which order the prefill does its work."""
    import slowfast_kernels as sk
    from slowfast_model.attention import project_slow_at_once
    from slowfast_model.kernels import fuses
    from slowfast_model.prefill import projects_at_once

    config, decoder = model.config, model.model
    functions = ((nn.functional, "linear"), (torch, "addmm"), (nn.functional, "gelu"), (sk, "slowfast_pool"))
    with _recorded(*functions) as made:
        x, _, slow = model.prepare(ids, features, None, None)
    hybrid = [decoder.layers[i].self_attn for i in config.hybrid_layers]
    norms = [decoder.layers[i].input_layernorm.weight for i in config.hybrid_layers]
    at_once, in_one_launch = projects_at_once(slow.tokens, len(hybrid)), fuses(slow.tokens, model.backend)

    def keys_and_values() -> list[Tensor]:
        made = [kv for kv in project_slow_at_once(decoder.layers, slow.tokens, fused=in_one_launch) if kv is not None]
        return made or [a.project_slow(slow.tokens, w, in_one_launch) for a, w in zip(hybrid, norms, strict=True)]

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

    pools = [call for call in made if call.name == "slowfast_pool"]
    last = _of_last_layer(made, decoder.mm_projector)
    calls = {
        PROJECTOR: _all([call.again for call in made if call not in pools and call not in last]),
        LAST: _all([call.again for call in last]),
        POOL: _all([call.again for call in pools]),
        KV: keys_and_values,
        ATTENTION: attention,
        FUSED: fused,
    }
    return calls, _order(made, decoder.mm_projector, at_once)


def part_costs(shape: ModelShape, dtype: str, pools_twice: bool) -> dict[str, Cost]:
    """The least work of each part, of a prefill that pools spatially and over time in two calls or in one."""
    heads, layers = shape.heads, range(shape.num_hybrid)
    side = 2 * shape.slow_side
    # more frames to a window than there are: they are averaged to ``fast_frames``
    windows = {"temporal_stride": 2**20, "min_fast_frames": shape.fast_frames}
    pool = pool_cost(PoolShape((shape.frames,), (side, side), shape.hidden, pool_stride=2, **windows), dtype)
    if pools_twice:
        slow = Cost(0, 0, shape.num_slow * shape.hidden * BYTES[dtype])
        over_time = PoolShape((shape.frames,), (shape.slow_side,) * 2, shape.hidden, pool_stride=1, **windows)
        pool = Cost(pool.flops, pool.read, 0) + slow + pool_cost(over_time, dtype)
    rows = AttentionShape.even(1, shape.text, shape.num_slow, heads)
    nothing = Cost(0, 0, 0)
    first, last = layer_costs(shape, dtype, shape.num_slow)
    return {
        PROJECTOR: first,
        LAST: last,
        POOL: pool,
        KV: sum((projection_cost(shape.num_slow, shape.hidden, heads, dtype) for _ in layers), nothing),
        ATTENTION: sum((attention_cost(rows, dtype, fused=False) for _ in layers), nothing),
        FUSED: sum((attention_cost(rows, dtype, fused=True) for _ in layers), nothing),
    }


def run(runner: Runner, model: nn.Module, shape: ModelShape, dtype: str, prompt) -> None:
    """A row for each part of the slow path of one prompt (``model.Prompt``)."""
    if all(runner.is_done(OP, shape.name, dtype, who) for who in PARTS):
        return
    calls, order = part_calls(model, prompt.ids, prompt.features())
    costs = part_costs(shape, dtype, order.pools_twice)
    beyond_base = {"beyond_base": 1 - shape.num_fast / shape.num_slow}  # of its tokens
    contenders = []
    for who in PARTS:
        kind, facts = "base" if who == PROJECTOR else "ours", beyond_base if who == LAST else {}
        contenders.append(Contender(who, [Variant(str(order), _build(calls[who]))], costs[who], kind, facts=facts))
    runner.compare(OP, shape.name, dtype, contenders)


def _build(call: Call) -> Callable[[], tuple[list[Call], Callable[[], float]]]:
    """What a part computes is the model's, whose logits the pair checks."""
    return lambda: ([call], lambda: 0.0)
