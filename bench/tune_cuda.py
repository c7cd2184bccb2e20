"""Sweep the Hopper attention's splits over the shapes of the registry: correctness first, then the best of each.

    python -m bench.tune_cuda [--out FILE] [--seconds-per-shape S]

Prints, for every shape, the heuristic's own choice and the best found, so that heuristics.py can be corrected.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, replace

import torch

from slowfast_kernels import cuda, eager
from slowfast_kernels.heuristics import HopperConfig, hopper_attention_config

SHAPES = [
    (1, 1, 5184), (1, 1, 10368), (1, 1, 98304), (16, 1, 10368), (1, 64, 5184), (1, 64, 10368),
    (1, 256, 10368), (8, 64, 10368), (1, 64, 98304), (1, 256, 98304), (1, 1024, 98304),
]  # fmt: skip
L2_BYTES = 50 * 2**20


class Problem:
    """One shape's tensors: enough KV sets that none is still in L2 when its turn comes again."""

    def __init__(self, batch, text, slow, hq=28, hkv=4, dim=128, dtype=torch.bfloat16):
        self.shape = (batch, text, slow, hq, hkv, dim)
        kv_bytes = batch * slow * hkv * 2 * dim * 2
        self.sets = max(2, min(24, 3 * L2_BYTES // kv_bytes + 1))
        make = {"device": "cuda", "dtype": dtype}
        rows = batch * text
        self.q = torch.randn(rows, hq, dim, **make)
        self.state = torch.randn(rows, hq * dim, **make)
        self.kv = [torch.randn(batch * slow, hkv, 2, dim, **make) for _ in range(self.sets)]
        self.cu_slow = torch.arange(0, batch + 1, device="cuda", dtype=torch.int32) * slow
        self.cu_text = torch.arange(0, batch + 1, device="cuda", dtype=torch.int32) * text
        self.rows = torch.arange(rows, device="cuda", dtype=torch.int32)
        self.gate = (torch.randn(1, hq * dim, **make) * 0.02, torch.randn(1, **make), torch.randn(1, **make))
        self.out = torch.empty_like(self.state)

    def config(self) -> HopperConfig:
        batch, text, slow, *heads = self.shape
        return hopper_attention_config(batch * text, batch * slow, batch, *heads)

    def run(self, config, index=0, context=None, fused=True):
        mix = (self.state, self.out, *self.gate, True, True) if fused else None
        scale = self.shape[5] ** -0.5
        arguments = (self.q, self.kv[index], self.cu_slow, self.rows, self.cu_text, scale, 0)
        cuda._attend(*arguments, context=context, mix=mix, config=config)

    def references(self):
        """Context and mixed state in float64."""
        state, q, kv, *gate = (x.double() for x in (self.state, self.q, self.kv[0], *self.gate))
        scale = self.shape[5] ** -0.5
        context, _ = eager.text_cross_attention(q, kv, self.cu_slow, self.rows, self.cu_text, scale, False, 0)
        return context, eager.gated_residual_mix(state, context.flatten(1), self.rows, *gate, "tanh", True)

    def check(self, config, references) -> str:
        context, mixed = references
        got = torch.full_like(self.q, float("nan"))
        self.out.fill_(float("nan"))
        self.run(config, context=got)
        error = (got.double() - context).norm() / context.norm()
        rounding = (mixed.to(self.out.dtype).double() - mixed).norm()
        return f"context error {error:.2e}, mixed error / rounding {(self.out.double() - mixed).norm() / rounding:.3f}"

    def microseconds(self, config, seconds=0.03, fused=True) -> float:
        context = None if fused else torch.empty_like(self.q)
        for i in range(2):
            self.run(config, i % self.sets, context, fused)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        launches = self.sets
        with torch.cuda.graph(graph):
            for i in range(launches):
                self.run(config, i, context, fused)
        graph.replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        total = 0.0
        while total < seconds * 1e3 or len(times) < 3:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            total += start.elapsed_time(end)
            times.append(start.elapsed_time(end) * 1e3 / launches)
        return statistics.median(times)


def name(config: HopperConfig) -> str:
    half = f" h{config.half_groups}{' paired' * config.paired_halves}" if config.half_groups else ""
    whole = f" w{config.whole_units}" if config.whole_units else ""
    length = f" l{config.long_blocks}" if config.long_blocks else ""
    return f"c{config.cluster_size} g{config.num_groups}{half}{whole}{length}"


def candidates(problem: Problem):
    base = problem.config()
    batch, text, slow, hq, hkv, _ = problem.shape
    rows = text * hq // hkv
    tiles = batch * -(-rows // (64 * base.consumers)) * hkv
    blocks = -(-slow // (32 if base.consumers == 1 else 176))
    halves = batch == 1 and base.consumers == 2 and 0 < rows % 128 <= 64
    yield base
    for step in (-6, -3, 3, 6) if base.long_blocks else ():
        yield replace(base, long_blocks=max(1, base.long_blocks + step))
    even = replace(base, whole_units=0, long_blocks=0)
    for cluster in (1, 2, 4, 8, 16):
        for groups in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 28, 33):
            options = [(0, False)]
            if halves:
                options += [(max(1, round(groups * x)), False) for x in (0.55, 0.7)] + [(groups, True)] * (cluster > 1)
            for half_groups, paired in dict.fromkeys(options):
                splits = cluster * groups
                clusters = tiles * groups
                if half_groups:
                    clusters = (tiles - hkv) * groups + half_groups * (hkv // 2 if paired else hkv)
                ctas = clusters * cluster
                waves = -(-ctas // (264 if base.consumers == 1 else 132))
                few_waves = waves <= (12 if tiles > 100 else 3 if slow > 50000 else 1)
                full = ctas >= 0.8 * waves * 132 or (base.consumers == 1 and ctas >= 60)
                config = replace(
                    even, cluster_size=cluster, num_groups=groups, half_groups=half_groups, paired_halves=paired
                )
                if splits <= blocks and few_waves and full and config != base:
                    yield config


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    parser.add_argument("--seconds-per-shape", type=float, default=4.0)
    parser.add_argument("--check-only", action="store_true")
    args = parser.parse_args()
    results = []
    for shape in SHAPES:
        problem = Problem(*shape)
        small = shape[1] * shape[2] < 2**23
        configs = list(candidates(problem))
        if small:
            references = problem.references()
            for config in configs[:: max(1, len(configs) // 4)]:
                print(f"  {name(config)}: {problem.check(config, references)}", flush=True)
            del references
        if args.check_only:
            continue
        budget = args.seconds_per_shape / max(1, len(configs)) / 2
        timed = [(problem.microseconds(c, min(0.05, budget)), c) for c in configs]
        flops = 4 * shape[0] * shape[1] * 28 * 128 * shape[2]
        own = timed[0]
        best = sorted(timed, key=lambda t: t[0])[:6]
        results.append({"shape": shape, "timed": [(us, asdict(c)) for us, c in timed]})
        kv = shape[0] * shape[2] * 4 * 2 * 128 * 2
        print(f"{shape}: own {own[0]:.1f} us ({name(own[1])}); best "
              + "; ".join(f"{us:.1f} {name(c)}" for us, c in best)
              + f"; without mix {problem.microseconds(best[0][1], 0.03, fused=False):.1f}"
              + f" | {flops / best[0][0] / 1e6:.0f} TFLOP/s {kv / best[0][0] / 1e3:.0f} GB/s", flush=True)  # fmt: skip
        del problem
    if args.out:
        with open(args.out, "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main()
