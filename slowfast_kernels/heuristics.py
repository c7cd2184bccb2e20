"""Every choice that depends on shapes, in one place: backends, tiles, splits. Pure Python, printable, tested on a CPU.

A choice is a function of shapes, dtype and GPU alone, never of data on the device, so nothing here syncs and a CUDA
graph captured for a shape stays right for new data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, inf
from typing import NamedTuple

import torch

from .dtypes import HALF_DTYPES, KERNEL_DTYPES

# ---------------------------------------------------------------------------------------------- backends

BACKENDS = ("cuda", "triton", "cpu", "eager")


class OpCall(NamedTuple):
    """What a backend needs to know of a call to say whether it supports it."""

    op: str
    device_type: str
    dtype: torch.dtype
    capability: tuple[int, int] | None = None
    head_dim: int = 0
    num_text: int = 0  # of the mix
    aligned: bool = True  # 16-byte rows and base addresses
    apart: bool = False  # K and V are two tensors
    selects: bool = False  # rows see ranges, or sequences are in pieces
    positive_scale: bool = True
    has_sm90_kernels: bool = True  # the extension was built for sm_90a
    backward: bool = False  # its gradients
    rows_outweigh: bool = False  # of them: CUDA's workspace would be large beside the results (``rows_outweigh``)


class BackendChoice(NamedTuple):
    backend: str
    rejected: dict[str, str]  # the faster backends that were passed over, and why


_BACKWARD_KERNELS: dict[str, tuple[str, ...]] = {  # ops that have one
    "cuda": ("text_cross_attention", "slowfast_pool", "gated_residual_mix"),
    "triton": ("text_cross_attention", "slowfast_pool", "gated_residual_mix"),
    "cpu": ("text_cross_attention", "slowfast_pool", "gated_residual_mix"),
}


def unsupported_reason(backend: str, call: OpCall) -> str | None:
    """The limit of ``backend`` that ``call`` exceeds, with the way out; None if it supports the call."""
    if backend == "eager":
        return None
    if call.dtype not in KERNEL_DTYPES:
        return f"dtype {call.dtype} (float32, bfloat16, float16 only); use backend='eager'"
    if backend == "cpu" and call.device_type != "cpu":
        return f"tensors on {call.device_type}; use backend='triton' or 'cuda'"
    if backend == "cuda" and call.device_type != "cuda":
        return f"tensors on {call.device_type}; use backend='cpu'"
    if call.backward and call.op not in _BACKWARD_KERNELS[backend]:
        return "its gradients have no kernel there; use backend='eager'"
    attends = call.op in ("text_cross_attention", "slowfast_cross_attention")
    if backend == "triton" and attends and call.device_type == "cpu" and call.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 matrices wrongly; use backend='eager', float32 or float16"
    if backend == "triton" and attends and call.head_dim > 256:
        return f"head dimension {call.head_dim} (<= 256 only); use backend='eager'"
    if backend == "cuda" and attends:
        return _hopper_limit(call)
    return None


def _hopper_limit(call: OpCall) -> str | None:
    """What keeps an attention call from the Hopper kernel (TMA and wgmma, sm_90a)."""
    limit = None
    if call.capability != (9, 0):
        limit = f"the CUDA attention is for compute capability 9.0 (Hopper), this GPU has {call.capability}"
    elif not call.has_sm90_kernels:
        limit = "the extension was built without sm_90a (reinstall with SLOWFAST_CUDA_ARCHS='80;90a')"
    elif call.dtype not in HALF_DTYPES:
        limit = f"the CUDA attention takes bfloat16 and float16, not {call.dtype}"
    elif call.head_dim not in HOPPER_HEAD_DIMS:
        limit = (
            f"the CUDA attention takes head dimensions {' and '.join(map(str, HOPPER_HEAD_DIMS))}, not {call.head_dim}"
        )
    elif not call.aligned:
        limit = "the CUDA attention takes tensors whose rows and base addresses are multiples of 16 bytes"
    elif not call.positive_scale:
        limit = "the CUDA attention takes a positive softmax_scale"
    elif call.backward and call.selects:
        limit = "the CUDA attention's gradients are of rows that see all of one run of tokens"
    return limit and f"{limit}; use backend='triton'"


MIX_ROWS_FOR_TRITON = 4096  # 8192 rows of 3584 on an H100: 59.9 us, CUDA 66.5; 1024 rows: 8.06, CUDA 8.11


def _slower_reason(backend: str, call: OpCall) -> str | None:
    """Why a backend that supports a call is passed over for the next one, by measured crossover or for its memory."""
    is_mix = call.op == "gated_residual_mix" and not call.backward  # there: 8192 rows 110.5 us, Triton 112.5
    if backend == "cuda" and is_mix and call.num_text >= MIX_ROWS_FOR_TRITON:
        return f"Triton's mix is faster from {MIX_ROWS_FOR_TRITON} rows on"
    if backend == "cuda" and call.op == "text_cross_attention" and call.backward and call.rows_outweigh:
        return "Triton's gradients take less memory where there are many text rows for few slow tokens"
    return None


def choose_backend(call: OpCall, unavailable: dict[str, str | None]) -> BackendChoice:
    """The fastest backend that is here and supports the call, in the order cuda, triton, cpu, eager.

    Args:
        call: shapes and types.
        unavailable: for each backend, why this machine cannot run it, or None (``_extension.unavailable_reason``).
    """
    rejected: dict[str, str] = {}
    for backend in BACKENDS:
        reason = unavailable[backend] or unsupported_reason(backend, call)
        if reason is None and unavailable["triton"] is None:
            reason = _slower_reason(backend, call)
        if reason is None and backend == "triton" and call.device_type == "cpu":
            reason = "the interpreter is for testing; ask for it by name"
        if reason is None:
            return BackendChoice(backend, rejected)
        rejected[backend] = reason
    raise AssertionError("eager supports every call")


# ------------------------------------------------------------------------------- triton: attention, pool, mix


@dataclass(frozen=True)
class AttentionConfig:
    """Tiles of the Triton attention kernel. A packed row is a text row and one of the query heads of a KV head."""

    block_m: int
    block_n: int
    num_splits: int
    num_warps: int
    num_stages: int

    @property
    def peel_tail(self) -> bool:
        """Masks stay out of the loop where tensor cores are the limit; where loads are, they cost nothing."""
        return self.block_m >= 64

    def num_tiles(self, num_text: int, batch: int, heads_per_kv: int) -> int:
        """Row tiles over all sequences: a bound from shapes alone, exact for one sequence."""
        if batch == 1:
            return -(-num_text * heads_per_kv // self.block_m)
        filled = num_text * heads_per_kv // self.block_m + min(batch, num_text)  # and one partial tile a sequence
        return min(filled, num_text * -(-heads_per_kv // self.block_m))


@dataclass(frozen=True)
class AttentionBackwardConfig(AttentionConfig):
    """Of the Triton attention's backward: a program owns ``block_m`` packed rows, and one of ``num_splits`` parts of
    the slow tokens, or ``block_n`` slow tokens, and walks the others ``step`` at a time."""

    step: int = 64


@dataclass(frozen=True)
class CombineConfig:
    """A program adds up the splits of ``block_h`` heads of one text row, ``block_s`` splits at a time."""

    block_s: int
    block_h: int
    num_warps: int
    dependent: bool  # programmatic dependent launch behind the attention kernel


@dataclass(frozen=True)
class RowConfig:
    """A program holds a row of ``block_c`` channels."""

    block_c: int
    num_warps: int


@dataclass(frozen=True)
class RowSumConfig(RowConfig):
    """And takes rows one after the other, ``num_stages - 1`` of them under way, of which it keeps a sum."""

    num_programs: int
    num_stages: int


# (bytes an element, head dimension padded to a power of 2) -> (rows a sequence up to, (block_m, block_n, num_warps,
# num_stages)); the last entry serves everything longer. bench/tune_triton.py measures the alternatives.
_ATTENTION_TILES: dict[tuple[int, int], tuple[tuple[float, tuple[int, int, int, int]], ...]] = {
    (2, 64): ((1024, (64, 64, 4, 3)), (inf, (128, 64, 8, 3))),
    (2, 128): ((1024, (64, 64, 4, 3)), (inf, (128, 64, 8, 3))),
    (2, 256): ((16, (16, 32, 4, 3)), (64, (32, 32, 8, 3)), (inf, (128, 64, 8, 2))),
    (4, 64): ((inf, (16, 32, 4, 3)),),
    (4, 128): ((inf, (16, 32, 4, 3)),),
    (4, 256): ((inf, (16, 16, 4, 3)),),
}

_MAX_SPLITS = 128
_SPLIT_PENALTY = 0.04  # of the whole, for the partials of one more split


def _fewest_waves(programs: int, slots: int, most: int) -> int:
    """Splits of each of ``programs``, up to ``most``, that fill waves of ``slots`` best."""

    def share(splits: int) -> float:
        return -(-programs * splits // slots) / splits * (1 + _SPLIT_PENALTY * splits)

    return min(range(1, most + 1), key=share)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def padded_head_dim(head_dim: int) -> int:
    """``tl.dot`` wants a power of 2, 16 at least."""
    return max(16, next_power_of_2(head_dim))


def _shared_bytes(tile: tuple[int, int, int, int], block_d: int, dtype_bytes: int) -> int:
    block_m, block_n, _, num_stages = tile
    buffers = num_stages if block_m >= 64 else num_stages - 1  # wgmma reads K and V while the next ones arrive
    return (buffers * 2 * block_n + block_m) * block_d * dtype_bytes + block_m * block_n * dtype_bytes


def _attention_tile(rows: int, block_d: int, dtype_bytes: int, shared_bytes: int) -> tuple[int, int, int, int]:
    """The table's tile for a sequence of ``rows`` packed rows, made smaller until it fits the shared memory."""
    classes = _ATTENTION_TILES[dtype_bytes, max(64, block_d)]
    tile = next(tile for up_to, tile in classes if rows <= up_to)
    while _shared_bytes(tile, block_d, dtype_bytes) > shared_bytes:
        block_m, block_n, num_warps, num_stages = tile
        if num_stages > 2:
            tile = (block_m, block_n, num_warps, num_stages - 1)
        elif block_d > 128 and block_m > 32:  # below Hopper registers are short too: q is kept in them
            tile = (32, block_n, num_warps, num_stages)
        elif block_n > 16:
            tile = (block_m, block_n // 2, num_warps, num_stages)
        else:
            tile = (block_m // 2, block_n, 4, num_stages)
    return tile


@lru_cache(maxsize=4096)
def triton_attention_config(
    num_text: int,
    num_slow: int,
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype_bytes: int,
    num_sms: int,
    num_splits: int = 0,
    shared_bytes: int = 227 * 1024,
) -> AttentionConfig:
    """Tiles and splits of the Triton attention kernel for a batch of ``num_text`` rows over ``num_slow`` tokens.

    Lengths of single sequences are on the device, so an even batch is assumed. ``num_splits`` 0 chooses what fills the
    GPU's waves best; a fixed number fixes the tile too, so that a sequence's bits do not depend on its batch.
    """
    heads_per_kv, block_d = num_q_heads // num_kv_heads, padded_head_dim(head_dim)
    rows = -(-num_text // batch) * heads_per_kv
    tile = _attention_tile(64 if num_splits else rows, block_d, dtype_bytes, shared_bytes)
    block_m, block_n, num_warps, num_stages = tile
    if num_splits == 0:
        programs = batch * -(-rows // block_m) * num_kv_heads
        num_blocks = max(1, -(-num_slow // (batch * block_n)))
        # One program of 4 warps an SM streams at the memory's rate; where products rule, a second one fills its gaps.
        slots = num_sms * (2 if rows > 16 and num_warps == 4 else 1)
        num_splits = _fewest_waves(programs, slots, min(num_blocks, _MAX_SPLITS))
    return AttentionConfig(block_m, block_n, num_splits, num_warps, num_stages)


# Of the backward, by bytes an element and padded head dimension: (block_m and block_n, num_warps, num_stages, step) of
# GPUs with Hopper's shared memory, and of others.
_HOPPER_SHARED_BYTES = 200 * 1024
_BACKWARD_TILES: dict[tuple[int, int], tuple[tuple[int, int, int, int], tuple[int, int, int, int]]] = {
    (2, 64): ((64, 4, 2, 64), (128, 8, 2, 64)),
    (2, 128): ((64, 4, 2, 64), (128, 8, 2, 32)),
    (2, 256): ((64, 8, 2, 32), (64, 8, 2, 16)),
    (4, 64): ((64, 8, 2, 16), (64, 8, 2, 16)),
    (4, 128): ((64, 8, 2, 16), (64, 8, 2, 16)),
    (4, 256): ((16, 4, 1, 16), (16, 4, 1, 16)),
}


@lru_cache(maxsize=4096)
def triton_attention_backward_config(
    num_text: int,
    num_slow: int,
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype_bytes: int,
    num_sms: int,
    shared_bytes: int = 227 * 1024,
    owns_tokens: bool = True,
) -> AttentionBackwardConfig:
    """Tiles and splits of the gradients of such a call; an even batch is assumed.

    ``owns_tokens``: dK or dV are wanted too. Their programs begin behind those of dQ, and fill what these leave idle:
    as few splits are enough as keep a program of dQ from outlasting all the rest.
    """
    heads_per_kv, block_d = num_q_heads // num_kv_heads, padded_head_dim(head_dim)
    rows = -(-num_text // batch) * heads_per_kv
    tiles = _BACKWARD_TILES[dtype_bytes, max(64, block_d)]
    block_n, num_warps, num_stages, step = tiles[0 if shared_bytes >= _HOPPER_SHARED_BYTES else 1]
    block_m = min(block_n, max(16, next_power_of_2(rows)))
    steps = max(1, -(-num_slow // (batch * step)))
    programs = batch * -(-rows // block_m) * num_kv_heads
    slots = num_sms * (2 if num_warps == 4 else 1)
    if owns_tokens:
        longest = 3 * block_m * steps  # products of a dQ program that has all slow tokens, over step and head dimension
        all_products = longest * programs + 4 * rows * steps * batch * num_kv_heads
        num_splits = max(1, ceil(longest * slots / all_products - 0.1))
    else:
        num_splits = _fewest_waves(programs, slots, max(1, slots // programs))
    return AttentionBackwardConfig(block_m, block_n, min(num_splits, steps), num_warps, num_stages, step)


@lru_cache(maxsize=4096)
def triton_combine_config(
    num_text: int, num_q_heads: int, head_dim: int, num_splits: int, num_sms: int, dependent: bool
) -> CombineConfig:
    """More heads a program save repeated gates; fewer fill the GPU where text rows are few."""
    block_s, block_d = min(next_power_of_2(num_splits), 64), padded_head_dim(head_dim)
    block_h = 1
    while block_h < 4 and num_text * -(-num_q_heads // (2 * block_h)) >= 2 * num_sms:
        block_h *= 2
    block_s = min(block_s, max(1, 16384 // (block_h * block_d)))
    return CombineConfig(block_s, block_h, 4 if block_s * block_h * block_d <= 8192 else 8, dependent)


def triton_pieces_config(num_pieces: int) -> tuple[int, int]:
    """(pieces that a tile counts at a time, pieces whose blocks it walks in one loop: those that a warp holds)."""
    return 64 if num_pieces <= 64 else 1024, 32


def triton_row_config(channels: int) -> RowConfig:
    """For the pool and the mix: a program holds whole rows, because a norm or a gate needs them."""
    block_c = next_power_of_2(channels)
    return RowConfig(block_c, min(16, max(1, block_c // 512)))


def triton_mix_backward_config(
    num_text: int, channels: int, dtype_bytes: int, num_sms: int, shared_bytes: int = 227 * 1024
) -> RowSumConfig:
    """Every program leaves a row of sums, so there are no more of them than keep the memory busy.

    On an H100, 8192 rows of 3584: a program an SM with 4 stages 117 us, two with 2 stages 113; 1024: 19.5 and 22.0.
    """
    row = triton_row_config(channels)
    programs_an_sm, num_stages = (1, 4) if num_text < 16 * num_sms else (2, 2)
    row_bytes = 3 * row.block_c * dtype_bytes  # of gradient, state and context
    while num_stages > 1 and programs_an_sm * (num_stages - 1) * row_bytes + 1024 > shared_bytes:
        num_stages -= 1
    num_programs = max(1, min(num_text, programs_an_sm * num_sms))
    return RowSumConfig(row.block_c, row.num_warps, num_programs, num_stages)


# ---------------------------------------------------------------------------------------------- cuda: mix

_MIX_ROWS_A_BLOCK = 2048  # kMaxTasks of csrc/cuda/common/mix_rows.cuh


def cuda_mix_backward_blocks(num_rows: int, num_sms: int) -> int:
    """CTAs of the mix's backward over so many rows. Each leaves a row of sums, which few rows must make good.

    On an H100 with one and two an SM: 256 rows of 3584 9.8 and 10.5 us, 1024 19.4 and 18.2, 2048 34.8 and 33.6, 4096
    59.4 and 61.1, 8192 110.5 and 112.0.
    """
    blocks = 2 * num_sms if 4 * num_sms <= num_rows < 24 * num_sms else num_sms
    return max(1, min(num_rows, blocks), -(-num_rows // _MIX_ROWS_A_BLOCK))


# ------------------------------------------------------------------------------------- cuda: Hopper attention


@dataclass(frozen=True)
class HopperConfig:
    """How one launch of the Hopper attention is cut into CTAs (``SplitPlan`` in csrc/cuda/cross_attention/launch.h)."""

    consumers: int  # warpgroups of 64 packed rows
    cluster_size: int  # CTAs that add up through distributed shared memory, a group: one of HOPPER_CLUSTER_SIZES
    num_groups: int  # groups a unit, which add up through global memory
    max_tiles: int  # row tiles of one KV head over all sequences: a bound from shapes alone
    whole_units: int = 0  # the first (tile, KV head) units, which a CTA each takes without a split
    long_blocks: int = 0  # KV blocks of every group but the last, which gets the rest; 0: equal groups
    kv_evict_first: bool = False
    dealt_ctas: int = 0  # CTAs to which the device deals out blocks, where rows see ranges (deal.cuh); 0: equal groups
    # Where the device sees uneven lengths, it cuts units otherwise (shares.cuh), for so many groups at once; 0: never.
    share_slots: int = 0
    even_units: int = 0  # what the rest of the plan is for: units that have something to do,
    even_blocks: int = 0  # and KV blocks of each; 0: any number

    @property
    def block_n(self) -> int:
        """Slow tokens of a KV block."""
        return _HOPPER_BLOCK_N[self.consumers]

    def grid(self, num_kv_heads: int) -> tuple[int, int, int]:
        """CTAs of the launch; those of whole units have nothing to do in groups but the first."""
        if self.dealt_ctas:
            return self.dealt_ctas, 1, 1
        heads, groups = num_kv_heads, self.num_groups
        room = self.max_tiles * num_kv_heads + self.share_slots // 2  # see SplitPlan
        if groups == 1:  # in either case what is added comes last
            heads = max(heads, -(-room // self.max_tiles))
        else:
            groups = max(groups, -(-room // (self.max_tiles * num_kv_heads)))
        return self.cluster_size * self.max_tiles, heads, groups

    @property
    def leaves_parts(self) -> bool:
        """Groups may add up through global memory."""
        return self.num_groups > 1 or self.share_slots > 0

    def workspace(self, num_kv_heads: int, head_dim: int) -> tuple[int, int, int, int]:
        """Floats of partial outputs, statistics and gates, and counters, if it ``leaves_parts``."""
        units, rows = self.max_tiles * num_kv_heads - self.whole_units, 64 * self.consumers
        if self.dealt_ctas > 0:
            parts = self.dealt_ctas * rows
            return parts * head_dim, parts * 2, units * rows * 3, self.dealt_ctas * self.consumers
        shared = 2 * self.share_slots
        parts = max(units * self.num_groups if self.num_groups > 1 else 0, shared)
        counters = max(units, shared) * self.cluster_size if self.cluster_size > 1 else parts * self.consumers
        return parts * rows * head_dim, parts * rows * 2, max(units, shared) * self.cluster_size * rows * 3, counters


# Numbers in brackets are sections of bench/NOTES.md.
_HOPPER_SMS = 132
_HOPPER_BLOCK_N = {1: 32, 2: 128}  # by consumers, as in csrc/cuda/cross_attention/traits.h
# Clusters of a size that an H100 holds at once: fewer than 132 / size where a GPC is not a multiple of the size (1).
_HOPPER_CLUSTERS = {2: 66, 4: 30, 8: 15}
HOPPER_CLUSTER_SIZES = (1, *_HOPPER_CLUSTERS)
_HOPPER_L2_BYTES = 50 * 2**20
# Decode, whose CTAs share an SM in pairs. So many saturate the memory (5), a few more where a video is long, for then
# what they add to the reduction does not count: 98304 tokens are 3072 blocks, the published models' at most 324.
_HOPPER_SATURATING_CTAS, _HOPPER_SATURATING_CTAS_LONG = 80, 96
_HOPPER_LONG_DECODE_BLOCKS = 1024
# Units of two videos: clusters of 8 without groups, 2x1x10368 21.3 -> 19.8 us, 2x1x5184 13.9 -> 12.6 (24).
_HOPPER_TWO_VIDEOS = range(5, 9)
# Microseconds of a 128-row CTA: start and end; a KV block; what a cluster's reduction adds; a level of the tree in
# which groups add up, or, for clusters, the last group's reading of all partial rows.
_HOPPER_CTA_US = 6.5
_HOPPER_BLOCK_US = {64: 0.91, 128: 1.49}
HOPPER_HEAD_DIMS = tuple(_HOPPER_BLOCK_US)  # sm90_d*.cu
_HOPPER_CLUSTER_US, _HOPPER_CLUSTER_GROUP_US, _HOPPER_PARTIAL_BYTES_A_US = 4.0, 8.0, 60e3
_HOPPER_LEVEL_US = 3.0
_HOPPER_MAX_GROUPS = 32
_HOPPER_DEALT_BATCH, _HOPPER_DEALT_TILES = 64, 512
# Uneven batches: every CTA looks at all lengths, 32 at a time. CTAs of decode, which do not all end together: more than
# saturate the memory.
_HOPPER_SHARED_BATCH = 256
_HOPPER_SHARED_DECODE_CTAS = 160


@lru_cache(maxsize=4096)
def hopper_attention_config(
    num_text: int,
    num_slow: int,
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_splits: int = 0,
    selects: bool = False,
    num_sms: int = _HOPPER_SMS,
) -> HopperConfig:
    """Tile and splits of a call. A fixed ``num_splits`` fixes every choice that a row's bits depend on.

    ``selects``: rows see ranges, or several sequences are in pieces, so that tiles differ in ways that only the device
    knows.
    """
    heads_per_kv = num_q_heads // num_kv_heads
    rows = -(-num_text // batch) * heads_per_kv  # packed rows of a KV head, a sequence
    consumers = 2 if num_splits or rows > 64 else 1
    block_m, block_n = 64 * consumers, _HOPPER_BLOCK_N[consumers]
    max_tiles = (num_text * heads_per_kv + batch * (block_m - 1)) // block_m
    evict_first = rows <= block_m and num_slow * num_kv_heads * head_dim * 4 > _HOPPER_L2_BYTES

    if num_splits:
        cluster_size = max(size for size in HOPPER_CLUSTER_SIZES if num_splits % size == 0)
        return HopperConfig(consumers, cluster_size, num_splits // cluster_size, max_tiles, kv_evict_first=evict_first)

    units = min(max_tiles, batch * -(-rows // block_m)) * num_kv_heads
    blocks = max(1, -(-(num_slow // batch) // block_n))
    clusters = _hopper_clusters(num_sms)
    if consumers == 1:
        cluster_size, groups = _hopper_decode_splits(units, blocks, num_sms)
        config = HopperConfig(consumers, cluster_size, groups, max_tiles, kv_evict_first=evict_first)
        if units in _HOPPER_TWO_VIDEOS and not selects:
            return config  # a look at the lengths costs them 7%: 2x1x5184 11.9 -> 12.9 us (30)
        ctas = min(_HOPPER_SHARED_DECODE_CTAS, _HOPPER_SATURATING_CTAS_LONG + units * cluster_size // 2)
        return _sharing(config, batch, -(-ctas * num_sms // _HOPPER_SMS // cluster_size), units, blocks)

    idle = batch * (num_kv_heads // 2) if 0 < rows % block_m <= 64 else 0  # two half tiles share a CTA
    plans = [
        *_direct_plans(units, idle, blocks, _HOPPER_BLOCK_US[head_dim], num_sms),
        *_cluster_plans(units - idle, blocks, head_dim, clusters),
    ]
    # A deal looks at every sequence and tile, which takes its time, and makes short groups by itself.
    deals = selects and batch <= _HOPPER_DEALT_BATCH and max_tiles <= _HOPPER_DEALT_TILES
    if selects and not deals:
        plans = [plan for plan in plans if not plan[1].get("long_blocks")]
    _, choice = min(plans, key=lambda plan: plan[0])
    if deals and choice["cluster_size"] == 1:  # clusters add up faster than a deal makes good
        choice = {"cluster_size": 1, "num_groups": 2, "dealt_ctas": max_tiles * num_kv_heads + num_sms}
    config = HopperConfig(consumers, max_tiles=max_tiles, kv_evict_first=evict_first, **choice)
    if selects:
        return config
    slots = ({1: num_sms} | clusters)[config.cluster_size]
    return _sharing(config, batch, slots, units - idle, blocks)


def _hopper_clusters(num_sms: int) -> dict[int, int]:
    """Clusters of each size that so many SMs hold at once, if they lie in GPCs as an H100's do."""
    return {size: count * num_sms // _HOPPER_SMS for size, count in _HOPPER_CLUSTERS.items()}


def _sharing(config: HopperConfig, batch: int, slots: int, units: int, blocks: int) -> HopperConfig:
    """The same plan for even lengths, and ``slots`` groups that run at once among which the device shares others."""
    config = replace(config, even_blocks=blocks if config.long_blocks else 0)
    if not 1 < batch <= _HOPPER_SHARED_BATCH:
        return config
    return replace(config, share_slots=slots, even_units=units)


def _direct_plans(units: int, idle: int, blocks: int, block_us: float, num_sms: int) -> Iterator[tuple[float, dict]]:
    """(microseconds, fields of HopperConfig) of the ways without clusters; ``idle`` of the units have nothing to do.

    Units as they come or in equal groups, wave after wave. Or first full waves of whole units, and then the rest in
    groups of which one is short: the long ones fill most of the SMs for one wave, and on the others the short ones run
    one after another. CTAs that share K and V thus walk it abreast, and read it from L2.
    """

    def wave(length: int) -> float:
        return length * block_us + _HOPPER_CTA_US

    def levels(groups: int) -> float:
        return (groups - 1).bit_length() * _HOPPER_LEVEL_US

    for groups in range(1, min(_HOPPER_MAX_GROUPS, blocks) + 1):
        waves = -(-(units - idle) * groups // num_sms)
        yield waves * wave(-(-blocks // groups)) + levels(groups), {"cluster_size": 1, "num_groups": groups}
    for whole in range(0, 1 if idle else units, num_sms):
        rest = units - idle - whole
        before = whole // num_sms * wave(blocks)
        for long_groups in range(1, min(_HOPPER_MAX_GROUPS, (num_sms - 1) // rest + 1)):
            rounds = -(-rest // (num_sms - rest * long_groups))
            for length in range(-(-blocks // (long_groups + 1)), -(-blocks // long_groups)):
                last = max(wave(length), rounds * wave(blocks - long_groups * length))
                yield (
                    before + last + levels(long_groups + 1),
                    {"cluster_size": 1, "num_groups": long_groups + 1, "whole_units": whole, "long_blocks": length},
                )


def _cluster_plans(units: int, blocks: int, head_dim: int, clusters: dict[int, int]) -> Iterator[tuple[float, dict]]:
    """The same of the ways with clusters."""
    for cluster_size, slots in clusters.items():
        for groups in range(1, min(_HOPPER_MAX_GROUPS, blocks // cluster_size) + 1):
            overhead = _HOPPER_CLUSTER_US
            if groups > 1:
                overhead += _HOPPER_CLUSTER_GROUP_US
                overhead += groups * 128 * head_dim * 4 / cluster_size / _HOPPER_PARTIAL_BYTES_A_US
            us = -(-blocks // (cluster_size * groups)) * _HOPPER_BLOCK_US[head_dim]
            waves = -(-units * groups // slots)
            yield waves * (_HOPPER_CTA_US + us) + overhead, {"cluster_size": cluster_size, "num_groups": groups}


def _hopper_decode_splits(units: int, blocks: int, num_sms: int) -> tuple[int, int]:
    """(cluster size, groups). Decode is bytes: CTAs that saturate the memory are enough, more only add partials.

    Clusters add up faster than groups, so that somewhat fewer CTAs without groups are better for two short videos, and
    clusters of 2 for batches that fill the GPU, with two groups instead of four: 16x1x10368 119.3 -> 117.9 us (24).
    """
    is_long = blocks >= _HOPPER_LONG_DECODE_BLOCKS
    if units in _HOPPER_TWO_VIDEOS and blocks >= 8 and not is_long:
        return 8, 1
    if units <= _hopper_clusters(num_sms)[4] and blocks >= 4:
        ctas = _HOPPER_SATURATING_CTAS_LONG if is_long else _HOPPER_SATURATING_CTAS
        ctas = ctas * num_sms // _HOPPER_SMS
        return 4, max(1, min(blocks // 4, ctas // (4 * units)))
    most = 2 * num_sms
    cluster_size = 2 if 2 * units <= most and blocks >= 2 else 1
    return cluster_size, max(1, min(blocks, most // units) // cluster_size)


@dataclass(frozen=True)
class HopperBackwardConfig:
    """How the gradients of one Hopper call are cut (``BackwardPlan`` in csrc/cuda/cross_attention/backward.h)."""

    num_ctas: int
    max_tiles: int
    max_sums: int
    max_groups: int
    spread: int
    splits_last_round: bool

    def workspace(self, num_kv_heads: int, head_dim: int) -> tuple[int, int, int, int, int]:
        """Bytes of row tiles, of sums of dQ, of parts of dK and dV, and of the counters of either."""
        tile = 64 * head_dim
        pairs = self.num_ctas // 2
        return (
            num_kv_heads * self.max_tiles * (2 * tile * 2 + 2 * 64 * 4),
            num_kv_heads * self.max_sums * tile * 4,
            pairs * 4 * tile * 4 if self.splits_last_round else 0,
            -(-num_kv_heads * self.max_sums // 4) * 16,
            -(-pairs // 4) * 4 * 16,
        )


_HOPPER_BACKWARD_GROUPS = 12
_HOPPER_BACKWARD_MEMORY = (0.15, 64 * 2**20)  # of all results and gradients, and beside that


def rows_outweigh(query_bytes: int, slow_bytes: int) -> bool:
    """Whether the workspace of the Hopper backward is more than is allowed beside context, dQ, dK and dV.

    It holds q and the gradient of the context once more, dQ in float32, further sums of it, and the parts of two
    CTAs' blocks. ``query_bytes``: of the text rows of q; ``slow_bytes``: of K and V.
    """
    share, allowed = _HOPPER_BACKWARD_MEMORY
    workspace = 4 * query_bytes + _HOPPER_BACKWARD_SPARE_BYTES + _HOPPER_SMS // 2 * 4 * 64 * 128 * 4
    return workspace > share * (2 * query_bytes + slow_bytes) + allowed


# Row tiles between the starts of CTAs that add to the same sums: with one they wait for one another, 1x64x98304 612 us
# instead of 496; with three there are more sums to write and read.
_HOPPER_BACKWARD_SPREAD = 2
_HOPPER_BACKWARD_SPARE_BYTES = 16 * 2**20  # of sums beyond one of each row


@lru_cache(maxsize=4096)
def hopper_attention_backward_config(
    num_text: int,
    num_slow: int,
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_sms: int = _HOPPER_SMS,
) -> HopperBackwardConfig:
    rows = num_text * (num_q_heads // num_kv_heads)
    max_tiles = (rows + 63 * batch) // 64
    num_ctas = min(num_sms, (num_slow // 128 + batch) * num_kv_heads)
    at_once = -(-num_ctas // num_kv_heads)  # blocks of a KV head that are worked on together
    spare = min(
        (_HOPPER_BACKWARD_GROUPS - 1) * max_tiles,
        _HOPPER_BACKWARD_SPREAD * batch * at_once,
        _HOPPER_BACKWARD_SPARE_BYTES // (num_kv_heads * 64 * head_dim * 4),
    )
    return HopperBackwardConfig(
        num_ctas,
        max_tiles,
        max_tiles + spare,
        _HOPPER_BACKWARD_GROUPS,
        _HOPPER_BACKWARD_SPREAD,
        splits_last_round=rows >= 4 * 64 * batch,  # with fewer rows the sum of two parts takes longer than it saves
    )
