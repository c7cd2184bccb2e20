"""Sweep the splits of the Hopper attention, gate and mix included, over the attention table's shapes.

    python -m bench.tune_cuda [--out FILE] [--shapes 1x64x10368 ...] [--budget SECONDS]

For each shape: what ``heuristics`` chooses and the best found. Every configuration must give the heuristic's answer
first, and that one is checked against float32. Constants in heuristics/cuda.py come from this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from slowfast_kernels import cuda
from slowfast_kernels.calls import AttentionTensors, FusedTensors
from slowfast_kernels.gate import Gate
from slowfast_kernels.heuristics.cuda import HOPPER_SMS, HopperConfig, hopper_attention_config

from . import tuning
from .inputs import AttentionInputs
from .shapes import AttentionShape

GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28, 33)


def fused(config: HopperConfig, inputs: AttentionInputs) -> torch.Tensor:
    out = torch.empty_like(inputs.state)
    gate = Gate.of(inputs.gate_weight, inputs.gate_bias, inputs.warm_up)
    tensors = FusedTensors.of(inputs.state, AttentionTensors(*inputs.attention), gate)
    cuda.Attention(tensors, gate=gate, config=config)(tensors, out=out)
    return out


def own_config(shape: AttentionShape) -> HopperConfig:
    heads = shape.heads
    return hopper_attention_config(shape.num_text, shape.num_slow, shape.batch, heads.num_q, heads.num_kv, heads.dim)


def candidates(shape: AttentionShape) -> Iterator[HopperConfig]:
    """The heuristic's choice first; then its neighbours, and every equal split that fills the GPU a few times."""
    own = own_config(shape)
    yield own
    yield replace(own, gates_first=not own.gates_first)
    for step in (-6, -3, 3, 6) if own.long_blocks else ():
        yield replace(own, long_blocks=max(1, own.long_blocks + step))
    even = replace(own, whole_units=0, long_blocks=0)
    yield from (config for config in equal_splits(shape, even) if config != own)
    rows = sum(shape.text) * shape.heads.num_q // shape.heads.num_kv  # packed, of one KV head
    if rows > 64 * shape.batch:  # more fill two consumers
        return
    other = 3 - own.consumers
    max_tiles = (rows + shape.batch * (64 * other - 1)) // (64 * other)
    yield from equal_splits(shape, HopperConfig(other, 1, 1, max_tiles, kv_evict_first=own.kv_evict_first))


def equal_splits(shape: AttentionShape, plan: HopperConfig) -> Iterator[HopperConfig]:
    """``plan`` in clusters and equal groups that fill the GPU a few times."""
    rows = max(shape.text) * shape.heads.num_q // shape.heads.num_kv
    tiles = shape.batch * -(-rows // (64 * plan.consumers)) * shape.heads.num_kv
    blocks = -(-max(shape.slow) // plan.block_n)
    pairs_halves = plan.consumers == 2 and 0 < rows % 128 <= 64
    idle = shape.batch * (shape.heads.num_kv // 2) if pairs_halves else 0
    slots = HOPPER_SMS * (2 if plan.consumers == 1 else 1)
    most_waves = 12
    if tiles <= 100:
        most_waves = 3 if max(shape.slow) > 50000 else 1
    for cluster_size in (1, 2, 4, 8):
        for groups in GROUPS:
            ctas = (tiles - idle) * groups * cluster_size
            waves = -(-ctas // slots)
            fills = ctas >= 60 if plan.consumers == 1 else ctas >= 0.8 * waves * slots
            if cluster_size * groups <= blocks and waves <= most_waves and fills:
                yield replace(plan, cluster_size=cluster_size, num_groups=groups)


def tune(sets: list[AttentionInputs], device: torch.device, budget_s: float) -> dict:
    cuda._counters_of_device.clear()  # every captured launch keeps counters for good; those of past shapes are unused
    configs = list(candidates(sets[0].shape))
    return tuning.report(tuning.sweep(configs, fused, sets, device, budget_s), configs[0])


def show(entry: dict) -> str:
    def line(name: str, row: dict) -> str:
        plan = "{consumers} consumers cluster {cluster_size} groups {num_groups}".format(**row)
        if row["long_blocks"]:
            plan += " whole {whole_units} long {long_blocks}".format(**row)
        return f"  {name:9} {row['us']:7.1f} us  {plan}{' gates first' if row['gates_first'] else ''}"

    return "\n".join([line("heuristic", entry["heuristic"])] + [line("best", row) for row in entry["all"][:5]])


if __name__ == "__main__":
    tuning.run(__doc__, tune, show)
