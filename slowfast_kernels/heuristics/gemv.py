"""How a decode step's linear layers are cut: tiles, the batch up to which they pay, and the floor they are held to.

Tiles of a 7B's launches at 1 and 2 rows, and the batch, are measured on an H100 (``bench/tune_gemv.py``); tiles of 8
rows and more are a rule that no run has confirmed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from .triton import next_power_of_2

MOST_ROWS = 32  # that a kernel takes: a program holds all of them beside each weight
# Four rows take longer than cuBLAS's tensor cores (gate and up 130 us, cuBLAS 98), as a weight costs a multiplication a
# row here; two take as long, with the norm, the bias, SiLU and the residual inside (100 and 98 us).
ROWS_THAT_PAY = 2


@dataclass(frozen=True)
class GemvConfig:
    """Tiles of one launch: a program takes ``block_n`` rows of the weights (of pairs, both count) over their length."""

    block_m: int  # rows of the activations, padded: all of them
    block_n: int
    block_k: int  # channels at a time
    num_warps: int
    num_stages: int


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
# Of other shapes: what is within 4% of the best of those on average, or, from 8 rows on, predicted. A program's float32
# sums stay in registers (none is spilled, the suite compiles them) in a layout that weights are loaded in, 8 or 16
# bytes a thread.
_BY_ROWS = {
    1: (4, 256, 4),
    2: (4, 512, 2),
    4: (4, 256, 4),
    8: (8, 256, 4),
    16: (4, 256, 4),
    32: (2, 128, 4),
}


@lru_cache(maxsize=4096)
def gemv_config(shape: GemvShape, batch: int) -> GemvConfig:
    """For ``batch`` rows of activations.

    Raises:
        ValueError: not 1 to ``MOST_ROWS`` of them.
    """
    if not 1 <= batch <= MOST_ROWS:
        raise ValueError(f"batch: got {batch}, want 1 to {MOST_ROWS} (torch.nn.functional.linear takes more)")
    block_m = next_power_of_2(batch)
    block_n, block_k, num_warps = _MEASURED.get(block_m, {}).get(shape, _BY_ROWS[block_m])
    block_k = min(block_k, max(32, next_power_of_2(shape.inputs)))
    return GemvConfig(block_m, block_n, block_k, num_warps, num_stages=4)


def floor_us(shapes: Sequence[GemvShape], element_size: int, read_gbps: float) -> float:
    """One read of every weight at a read rate measured in the same run: no step of a small batch takes less."""
    return sum(shape.read_bytes(element_size) for shape in shapes) / read_gbps / 1e3
