"""Sweep tiles of the GEMV kernels over the launches of a 7B's decode step, at batches 1 to 32.

Up to ``ROWS_OF_CUDA_CORES`` rows on CUDA cores, and from 2 rows on with tensor cores.

    python -m bench.tune_gemv [--out FILE] [--batches 1 2 4 8 16 32] [--launches qkv o gate_up down head]

For each launch and batch: what ``heuristics.gemv`` chooses, the best found, and cuBLAS on the same weights in one
product, without norm, bias, SiLU and residual. Weights are rotated past L2, launches follow one another as in a step.
Every configuration must give the first one's answer. The tables of ``heuristics.gemv``, and the batch from which cuBLAS
is faster, come from this. Kernels compile in parallel before any is timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from slowfast_kernels.heuristics.gemv import (
    FEWEST_PROGRAMS,
    ROWS_OF_CUDA_CORES,
    GemvConfig,
    GemvShape,
    gemv_config,
)
from slowfast_kernels.heuristics.triton import next_power_of_2
from slowfast_kernels.triton import gemv
from slowfast_kernels.triton.gemv import Norm, Projection

from . import tuning
from .registry import DECODE
from .timing import num_input_sets, time_calls

MODEL = DECODE[0].model
HIDDEN, HEADS = MODEL.hidden, MODEL.heads
SHAPES = {
    "qkv": GemvShape((HEADS.num_q + 2 * HEADS.num_kv) * HEADS.dim, HIDDEN),
    "o": GemvShape(HIDDEN, HEADS.channels),
    "gate_up": GemvShape(2 * MODEL.intermediate, HIDDEN),
    "down": GemvShape(HIDDEN, MODEL.intermediate),
    "head": GemvShape(MODEL.vocab, HIDDEN),
}
PAIRED = ("qkv", "gate_up")  # two tiles a program
MOST_SUMS = 96  # float32 registers a thread: more are spilled
MOST_BYTES = 144 * 1024  # of a program's tiles under way: of most an SM holds two


def candidates(name: str, batch: int) -> list[GemvConfig]:
    """What ``heuristics.gemv`` chooses first, then the others, none twice."""
    configs = [gemv_config(SHAPES[name], batch, 2)]
    if batch <= ROWS_OF_CUDA_CORES:
        configs += cuda_core_candidates(name, batch)
    if batch > 1:
        configs += tensor_core_candidates(name, batch)
    return list(dict.fromkeys(configs))


def cuda_core_candidates(name: str, batch: int) -> Iterator[GemvConfig]:
    """Every tile whose sums fit the registers."""
    block_m = next_power_of_2(batch)
    for block_n, block_k, num_warps, stages in product((1, 2, 4, 8, 16, 32), (256, 512, 1024), (2, 4, 8), (2, 4)):
        sums = block_m * block_n * block_k / (32 * num_warps)
        if 2 <= sums <= MOST_SUMS and (name not in PAIRED or block_n > 1):
            yield GemvConfig(block_m, block_n, block_k, num_warps, stages)


def tensor_core_candidates(name: str, batch: int) -> Iterator[GemvConfig]:
    """Every tile that makes programs enough for the GPU and leaves room for another one on most SMs."""
    block_m = max(16, next_power_of_2(batch))
    for block_n, (block_k, num_warps), stages in product((16, 32, 64, 128), ((128, 2), (128, 4), (256, 4)), (3, 5)):
        fits = (block_m + block_n) * block_k * 2 * stages <= MOST_BYTES
        if fits and SHAPES[name].outputs >= FEWEST_PROGRAMS * block_n and (name not in PAIRED or block_n > 16):
            yield GemvConfig(block_m, block_n, block_k, num_warps, stages, tensor_cores=True)


class Inputs:
    """Weights and activations of one launch: ``launch`` is the kernel's, ``product`` cuBLAS's of all its weights."""

    def __init__(self, name: str, batch: int, device: torch.device) -> None:
        shape = SHAPES[name]
        self.weight = torch.randn(shape, device=device, dtype=torch.bfloat16) * shape.inputs**-0.5
        self.x = torch.randn(batch, shape.inputs, device=device, dtype=torch.bfloat16)
        self.launch = {
            "qkv": self._qkv,
            "o": self._with_residual,
            "gate_up": self._gate_up,
            "down": self._with_residual,
            "head": self._head,
        }[name](batch, partial(torch.randn, device=device, dtype=torch.bfloat16))

    def product(self) -> Tensor:
        return F.linear(self.x, self.weight)

    def _qkv(self, batch: int, randn: Callable[..., Tensor]) -> Callable[[], Tensor]:
        widths = [HEADS.num_q * HEADS.dim, HEADS.num_kv * HEADS.dim, HEADS.num_kv * HEADS.dim]
        qkv = [Projection(w, randn(len(w))) for w in self.weight.split(widths)]
        rope, cache = (randn(batch, HEADS.dim), randn(batch, HEADS.dim)), randn(batch, HEADS.num_kv, 2, HEADS.dim)
        slots = torch.arange(batch, device=self.x.device)
        return partial(gemv.rotated_qkv, self.x, qkv, rope, slots, cache, Norm(randn(HIDDEN), 1e-6))

    def _gate_up(self, batch: int, randn: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return partial(gemv.gated_up, self.x, *self.weight.chunk(2), Norm(randn(HIDDEN), 1e-6))

    def _with_residual(self, batch: int, randn: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return partial(gemv.linear, self.x, Projection(self.weight), residual=randn(batch, HIDDEN))

    def _head(self, batch: int, randn: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return partial(gemv.linear, self.x, Projection(self.weight))


def compile_in_parallel(names: list[str], batches: list[int], device: torch.device) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, batch in product(names, batches):
            launch = Inputs(name, batch, device).launch
            for future in [pool.submit(launch, config=config) for config in candidates(name, batch)]:
                future.result()
    torch.cuda.synchronize()


def sweep(name: str, batch: int, device: torch.device, cache_bytes: int, budget_s: float) -> dict:
    """Microseconds of every candidate, the own one first. AssertionError: one gives another answer."""
    sets = [Inputs(name, batch, device) for _ in range(num_input_sets(SHAPES[name].read_bytes(2), cache_bytes))]
    configs, answer, rows = candidates(name, batch), sets[0].launch().float(), []
    for config in configs:
        difference = float((sets[0].launch(config=config).float() - answer).norm() / answer.norm())
        if not difference <= 1e-2:
            raise AssertionError(f"{name} of {batch}: {config} differs from {configs[0]} by {difference:.3g}")
        timing = time_calls([partial(inputs.launch, config=config) for inputs in sets], device, budget_s)
        rows.append({"us": timing.median_us, **asdict(config)})
    cublas = time_calls([inputs.product for inputs in sets], device, budget_s).median_us
    best = min(rows, key=lambda row: row["us"])
    return {"launch": name, "batch": batch, "own": rows[0], "best": best, "cublas_us": cublas, "all": rows}


def show(entry: dict, read_bytes: int) -> str:
    def text(row: dict) -> str:
        tile = "n{block_n} k{block_k} w{num_warps} s{num_stages}".format(**row)
        return f"{row['us']:8.2f} us  {tile}{' dot' if row['tensor_cores'] else ''}"

    rate = read_bytes / entry["best"]["us"] / 1e3
    own, best, cublas = text(entry["own"]), text(entry["best"]), entry["cublas_us"]
    return f"{entry['launch']:8} {entry['batch']:3}  own {own}   best {best} ({rate:.0f} GB/s)   cuBLAS {cublas:.2f} us"


def main() -> None:
    parser = tuning.command_line(__doc__)
    parser.add_argument("--batches", nargs="+", type=int, default=[shape.batch for shape in DECODE])
    parser.add_argument("--launches", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    arguments = parser.parse_args()
    device = tuning.the_gpu(parser)
    facts, entries = torch.cuda.get_device_properties(device), []
    compile_in_parallel(arguments.launches, arguments.batches, device)
    for batch, name in product(arguments.batches, arguments.launches):
        entries.append(sweep(name, batch, device, facts.L2_cache_size, arguments.budget))
        print(show(entries[-1], SHAPES[name].read_bytes(2)), flush=True)
        tuning.write(arguments.out, device, launches=entries)


if __name__ == "__main__":
    main()
