"""The ceilings of this machine, measured in the run that is held to them: reading, copying, a GEMM.

Datasheet rates are never reached; a row's percentage is of what the best simple code reached here and now.
They are timed in the same short bursts as the rows (``timing``), so at the same clock.
"""

from __future__ import annotations

import torch

from .shapes import Ceilings
from .timing import Call, time_calls

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is not None:

    @triton.jit
    def _read_kernel(x, out, block: tl.constexpr, blocks_each: tl.constexpr):
        """out[program] = sum of blocks_each * block int32 words: reads and next to nothing else."""
        first = tl.program_id(0).to(tl.int64) * (block * blocks_each)
        offsets = first + tl.arange(0, block)
        total = tl.zeros([block], tl.int32)
        for i in range(blocks_each):
            total += tl.load(x + offsets + i * block)
        tl.store(out + tl.program_id(0), tl.sum(total))


def triton_read_sum(words: torch.Tensor, block: int = 2048, blocks_each: int = 8) -> torch.Tensor:
    """Sums of consecutive chunks of an int32 tensor, by the kernel that measures the read ceiling."""
    programs = words.numel() // (block * blocks_each)
    out = torch.empty(programs, dtype=torch.int32, device=words.device)
    _read_kernel[(programs,)](words, out, block, blocks_each, num_warps=8)
    return out


def _bandwidths(device: torch.device, budget_s: float) -> tuple[float, float]:
    """(read, copy) in GB/s over a buffer far larger than any cache."""
    gpu = device.type == "cuda"
    words = 2**28 if gpu else 2**25  # 1 GiB, 128 MiB
    source = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32, device=device)
    target = source.clone()  # written once, so that no page fault is timed
    floats, vector = torch.rand(words, device=device), torch.rand(4096, device=device)

    def gbps(call: Call, moved: float) -> float:
        return moved / time_calls([call], device, budget_s).p20_us / 1e3

    readers = [lambda: floats.sum(), lambda: floats.amax(), lambda: torch.mv(floats.view(-1, 4096), vector)]
    if gpu and triton is not None:
        readers.append(lambda: triton_read_sum(source))
    read = max(gbps(call, source.nbytes) for call in readers)
    copiers = [lambda: target.copy_(source), lambda: torch.neg(source, out=target)]
    return read, max(gbps(call, 2 * source.nbytes) for call in copiers)


def _gemm_tflops(device: torch.device, dtype: str, budget_s: float) -> float:
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return 2.0 * size**3 / time_calls([lambda: a @ b.t()], device, budget_s).p20_us / 1e6


def measure(device: torch.device, dtypes: list[str], quick: bool = False) -> Ceilings:
    """Best of several simple codes for each ceiling; the 20th percentile, since a ceiling is what was reached."""
    budget = 0.05 if quick else 0.2
    read, copy = _bandwidths(device, budget)
    gemm = {dtype: round(_gemm_tflops(device, dtype, budget), 3) for dtype in dtypes}
    return Ceilings(round(read, 1), round(copy, 1), gemm)
