"""Sweep tiles and splits of the Triton attention, gate and mix included, over the attention table's shapes.

    python -m bench.tune_triton [--out FILE] [--shapes 1x64x10368 ...] [--budget SECONDS]

For each shape: what ``heuristics`` chooses, the best found, and that one without dependent launch and without
prefetch. Every configuration must give the heuristic's answer first, and that one is checked against float32. Tables
and constants in heuristics/triton.py come from this. A minute on one GPU; kernels compile in parallel before any is
timed.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
import triton

from slowfast_kernels.calls import AttentionTensors, FusedTensors
from slowfast_kernels.gate import Gate
from slowfast_kernels.heuristics.triton import (
    AttentionConfig,
    padded_head_dim,
    tile_shared_bytes,
    triton_attention_config,
)
from slowfast_kernels.triton import attention
from slowfast_kernels.triton._common import describe

from . import tuning
from .inputs import AttentionInputs, make_inputs
from .shapes import AttentionShape
from .timing import time_calls

# (block_m, block_n, num_warps, num_stages) worth a try, by packed rows of a sequence
FEW_ROWS = [
    (16, 32, 4, 4), (16, 64, 2, 3), (16, 64, 4, 3), (16, 64, 4, 4), (16, 64, 4, 5), (16, 128, 4, 3), (16, 128, 8, 3),
    (32, 64, 4, 3), (64, 64, 4, 3),
]  # fmt: skip
MANY_ROWS = [
    (64, 32, 4, 4), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 128, 4, 3), (128, 32, 8, 4),
    (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3),
]  # fmt: skip


def fused(config: AttentionConfig, inputs: AttentionInputs) -> torch.Tensor:
    gate = Gate.of(inputs.gate_weight, inputs.gate_bias, inputs.warm_up)
    tensors = FusedTensors.of(inputs.state, AttentionTensors(*inputs.attention), gate)
    return attention.Attention(tensors, gate=gate, config=config).attend_and_mix(tensors, gate)


def own_config(shape: AttentionShape, device: torch.device) -> AttentionConfig:
    heads, facts = shape.heads, describe(device)
    return triton_attention_config(
        shape.num_text, shape.num_slow, shape.batch, heads.num_q, heads.num_kv, heads.dim, 2,
        facts.num_sms, 0, facts.shared_bytes,
    )  # fmt: skip


def candidates(shape: AttentionShape, device: torch.device) -> list[AttentionConfig]:
    """The heuristic's choice first; then every tile with the splits that give an SM one to eight programs."""
    own, facts, heads = own_config(shape, device), describe(device), shape.heads
    heads_per_kv = heads.num_q // heads.num_kv
    configs = {own: None}
    for tile in FEW_ROWS if max(shape.text) * heads_per_kv <= 32 else MANY_ROWS:
        if tile_shared_bytes(tile, padded_head_dim(heads.dim), 2) > facts.shared_bytes:
            continue
        config = AttentionConfig(tile[0], tile[1], 1, *tile[2:])
        programs = config.num_tiles(shape.num_text, shape.batch, heads_per_kv) * heads.num_kv
        most = max(shape.slow) // config.block_n
        for per_sm in (0.5, 1, 1.5, 2, 3, 4, 6, 8):
            splits = int(per_sm * facts.num_sms / programs)
            if splits <= most:
                configs[replace(config, num_splits=max(1, splits))] = None
    return list(configs)


def compile_in_parallel(shapes: list[AttentionShape], device: torch.device) -> None:
    """Short sequences run the same kernels: slow tokens are no part of a kernel's key, nor are splits beyond 64."""

    def key(shape: AttentionShape, config: AttentionConfig) -> tuple[AttentionShape, AttentionConfig]:
        splits = min(64, 1 << (config.num_splits - 1).bit_length())
        return replace(shape, slow=(64,) * shape.batch), replace(config, num_splits=splits)

    def run(shape: AttentionShape, config: AttentionConfig) -> None:
        fused(config, make_inputs(shape, "bfloat16", device, cache_bytes=0)[0])

    keys = {key(shape, config) for shape in shapes for config in candidates(shape, device)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for future in [pool.submit(run, *each) for each in keys]:
            future.result()
    torch.cuda.synchronize()


def tune(sets: list[AttentionInputs], device: torch.device, budget_s: float) -> dict:
    configs = candidates(sets[0].shape, device)
    rows = tuning.sweep(configs, fused, sets, device, budget_s)
    _, best = rows[0]
    without = {}
    for feature in ("dependent_launch", "prefetch"):
        with patch.object(attention, "describe", lambda d, off=feature: replace(describe(d), **{off: False})):
            calls = [partial(fused, best, inputs) for inputs in sets]
            without[feature] = time_calls(calls, device, budget_s).median_us
    return tuning.report(rows, configs[0]) | {"best_without_us": without}


def show(entry: dict) -> str:
    text = "{us:7.1f} us  m{block_m} n{block_n} w{num_warps} s{num_stages} splits {num_splits}"
    lines = [f"  heuristic {text.format(**entry['heuristic'])}", f"  best      {text.format(**entry['best'])}"]
    lines += [f"            {us:7.1f} us  without {feature}" for feature, us in entry["best_without_us"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    tuning.run(__doc__, tune, show, compile_in_parallel, triton=triton.__version__)
