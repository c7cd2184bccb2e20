"""How a decode step's linear layers are cut: tiles, the batch up to which they pay, and the floor they are held to.

Tiles of a 7B's launches at 1 and 2 rows, rules for tensor cores, and the batch are measured on an H100
(``bench/tune_gemv.py``); those of float32 from 8 rows on are predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from .triton import next_power_of_2

MOST_ROWS = 32  # that a kernel takes: a program holds all of them beside each weight
# A weight costs a multiplication a row on CUDA cores: four rows take longer than cuBLAS (gate and up 130 us, cuBLAS
# 98), two as long, with the norm, the bias, SiLU and the residual inside (100 and 98 us).
ROWS_OF_CUDA_CORES = 2
FEWEST_PROGRAMS = 70  # of tensor cores: fewer do not draw the read rate
# By bytes an element. Steps of a 7B by tensor cores and by cuBLAS: 4 rows 5915 and 7436 us, 32 rows 6873 and 8496.
ROWS_THAT_PAY = {2: MOST_ROWS, 4: 2}


@dataclass(frozen=True)
class GemvConfig:
    """Tiles of one launch: a program takes ``block_n`` rows of the weights (of pairs, both count) over their length."""

    block_m: int  # rows of the activations, padded: all of them; tensor cores want 16 or more
    block_n: int
    block_k: int  # channels at a time
    num_warps: int
    num_stages: int
    tensor_cores: bool = False  # form the products, of 16-bit types; else CUDA cores in float32


class GemvShape(NamedTuple):
    """The weights that one launch reads: ``outputs`` rows of ``inputs`` channels, of several projections together."""

    outputs: int
    inputs: int

    def read_bytes(self, element_size: int) -> int:
        return self.outputs * self.inputs * element_size


# (block_n, block_k, num_warps) of a 7B's launches by rows of activations: q, k and v; o; gate and up; down; head.
_MEASURED = {
    1: {
        GemvShape(4608, 3584): (4, 256, 4),
        GemvShape(3584, 3584): (4, 512, 4),
        GemvShape(37888, 3584): (4, 512, 4),
        GemvShape(3584, 18944): (4, 1024, 4),
        GemvShape(152064, 3584): (2, 512, 4),
    },
    2: {
        GemvShape(4608, 3584): (4, 256, 2),
        GemvShape(3584, 3584): (4, 512, 2),
        GemvShape(37888, 3584): (8, 256, 4),
        GemvShape(3584, 18944): (4, 512, 4),
        GemvShape(152064, 3584): (2, 1024, 2),
    },
}
# Of other shapes and of float32: what is within 4% of the best of those on average, or, from 8 rows on, predicted. A
# program's float32 sums stay in registers (none is spilled, the suite compiles them) in a layout that weights are
# loaded in, 8 or 16 bytes a thread.
_BY_ROWS = {
    1: (4, 256, 4),
    2: (4, 512, 2),
    4: (4, 256, 4),
    8: (8, 256, 4),
    16: (4, 256, 4),
    32: (2, 128, 4),
}


@lru_cache(maxsize=4096)
def gemv_config(shape: GemvShape, batch: int, element_size: int) -> GemvConfig:
    """For ``batch`` rows of activations of so many bytes an element.

    Raises:
        ValueError: not 1 to ``MOST_ROWS`` of them.
    """
    if not 1 <= batch <= MOST_ROWS:
        raise ValueError(f"batch: got {batch}, want 1 to {MOST_ROWS} (torch.nn.functional.linear takes more)")
    if batch > ROWS_OF_CUDA_CORES and element_size == 2:
        config = _tensor_core_config(shape, batch)
    else:
        block_m = next_power_of_2(batch)
        block_n, block_k, num_warps = _MEASURED.get(block_m, {}).get(shape, _BY_ROWS[block_m])
        config = GemvConfig(block_m, block_n, block_k, num_warps, num_stages=4)
    return replace(config, block_k=min(config.block_k, max(32, next_power_of_2(shape.inputs))))


def _tensor_core_config(shape: GemvShape, batch: int) -> GemvConfig:
    """50 to 150 KB of weights under way an SM, in two or three programs: within 4% of the best of a 7B's launches.

    What widens (q, k and v; gate and up) has a norm inside, and is faster with two warps, a third at 8 rows of q, k and
    v. Every program reads all activations from L2: at most the bytes of its weights, half of them up to 16 rows and
    where there are outputs enough for taller tiles. ``block_k`` is at least 64 a warp, two elements a thread: the
    norm's weight is then copied ahead as the others are (a head, the tallest, has no norm).
    """
    block_m = max(16, next_power_of_2(batch))
    if shape.outputs >= 65536:
        return GemvConfig(block_m, 64, 128, 4, 4, tensor_cores=True)
    if shape.outputs <= shape.inputs:
        return GemvConfig(block_m, 16 if batch <= 8 else 32, 256, 4, 4, tensor_cores=True)
    block_n = 64 if block_m == 16 and shape.outputs >= 64 * FEWEST_PROGRAMS else 32
    num_stages = 3 if block_n == 64 and shape.outputs >= 32768 else 5
    return GemvConfig(block_m, block_n, 128, 2, num_stages, tensor_cores=True)


def floor_us(shapes: Sequence[GemvShape], element_size: int, read_gbps: float) -> float:
    """One read of every weight at a read rate measured in the same run: no step of a small batch takes less."""
    return sum(shape.read_bytes(element_size) for shape in shapes) / read_gbps / 1e3
