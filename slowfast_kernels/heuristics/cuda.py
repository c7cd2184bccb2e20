"""How the CUDA kernels are cut into CTAs: the Hopper attention, whose constants bench/tune_cuda.py measures, its
gradients, and those of the mix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache


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
    gates_first: bool = False  # a launch before forms all gates that have a weight, not each unit those of its rows
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
        gates = 0 if self.gates_first else rows * 3  # of a CTA's rows; those that come first are not among the parts
        if self.dealt_ctas > 0:
            parts = self.dealt_ctas * rows
            return parts * head_dim, parts * 2, units * gates, self.dealt_ctas * self.consumers
        shared = 2 * self.share_slots
        parts = max(units * self.num_groups if self.num_groups > 1 else 0, shared)
        counters = max(units, shared) * self.cluster_size if self.cluster_size > 1 else parts * self.consumers
        return parts * rows * head_dim, parts * rows * 2, max(units, shared) * self.cluster_size * gates, counters


# Numbers in brackets are sections of bench/NOTES.md.
HOPPER_SMS = 132
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
# One short video, plain and in a piece: clusters of 8 without groups 3.3 and 5.7 us over 324 tokens instead of 4.6 and
# 6.8, 4.9 and 7.4 over 1360 instead of 5.5 and 7.7; over 2048 plain alone is faster (24).
_HOPPER_SHORT_DECODE_BLOCKS = 48
# Batches of more packed rows a sequence than these: 8x8x2048 28.9 us in clusters of 2 by 4 groups, 20.1 in clusters
# of 4; 8x8x20736 128.3 and, in 3 groups, 120.5; 16x8x2048 38.8 by 2 and 2, 31.6 in whole units; 16x8x5184 72.6 and, in
# 4 groups, 66.8. One row, short: 8x1x2048 17.8 by 2 and 4, 16.4 in clusters of 2 alone (33).
_HOPPER_FEW_ROWS = 16
_HOPPER_SHORT_BATCH_BLOCKS, _HOPPER_LONG_BATCH_BLOCKS = 96, 256
# Microseconds of a 128-row CTA: start and end; a KV block; what a cluster's reduction adds; a level of the tree in
# which groups add up, or, for clusters, the last group's reading of all partial rows.
_HOPPER_CTA_US = 6.5
_HOPPER_BLOCK_US = {64: 0.91, 128: 1.49}
HOPPER_HEAD_DIMS = tuple(_HOPPER_BLOCK_US)  # sm90_d*.cu
_HOPPER_CLUSTER_US, _HOPPER_CLUSTER_GROUP_US, _HOPPER_PARTIAL_BYTES_A_US = 4.0, 8.0, 60e3
_HOPPER_LEVEL_US = 3.0
_HOPPER_MAX_GROUPS = 32
_HOPPER_DEALT_BATCH, _HOPPER_DEALT_TILES = 64, 512
# Gates, counted once a KV head, from which on a launch before forms them: 32x64x2048 151.3 -> 132.0 us, 8x128x2048 69.6
# -> 67.0, 4x128x20736 at 32 / 8 heads 251.6 -> 241.5; 8x64x2048 would take 38.6 instead of 35.0. Groups share them out,
# and hide twice as many: 16x128x5184 265.6 -> 251.4, 8x128x5184 130.5 -> 134.0 (32).
_HOPPER_GATES_FIRST = 4096
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
    num_sms: int = HOPPER_SMS,
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

    live = min(batch, num_text)  # sequences that can have rows
    units = min(max_tiles, live * -(-rows // block_m)) * num_kv_heads
    blocks = max(1, -(-(num_slow // batch) // block_n))
    clusters = _hopper_clusters(num_sms)
    if consumers == 1:
        cluster_size, groups = _hopper_decode_splits(units, blocks, rows, num_sms)
        config = HopperConfig(consumers, cluster_size, groups, max_tiles, kv_evict_first=evict_first)
        if units in _HOPPER_TWO_VIDEOS and not selects:
            return config  # a look at the lengths costs them 7%: 2x1x5184 11.9 -> 12.9 us (30)
        ctas = min(_HOPPER_SHARED_DECODE_CTAS, _HOPPER_SATURATING_CTAS_LONG + units * cluster_size // 2)
        return _sharing(config, batch, -(-ctas * num_sms // HOPPER_SMS // cluster_size), units, blocks)

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
    formed = num_text * num_kv_heads  # gates that units form: each KV head's those of all rows
    gates_first = formed >= _HOPPER_GATES_FIRST * (1 if choice["num_groups"] == 1 else 2)
    config = HopperConfig(consumers, max_tiles=max_tiles, kv_evict_first=evict_first, gates_first=gates_first, **choice)
    if selects:
        return config
    slots = ({1: num_sms} | clusters)[config.cluster_size]
    return _sharing(config, batch, slots, units - idle, blocks)


def _hopper_clusters(num_sms: int) -> dict[int, int]:
    """Clusters of each size that so many SMs hold at once, if they lie in GPCs as an H100's do."""
    return {size: count * num_sms // HOPPER_SMS for size, count in _HOPPER_CLUSTERS.items()}


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


def _hopper_decode_splits(units: int, blocks: int, rows: int, num_sms: int) -> tuple[int, int]:
    """(cluster size, groups). Decode is bytes: CTAs that saturate the memory are enough, more only add partials.

    Clusters add up faster than groups, so that somewhat fewer CTAs without groups are better for two short videos, and
    clusters of 2 for batches that fill the GPU, with two groups instead of four: 16x1x10368 119.3 -> 117.9 us (24).
    Of more than a few rows partials are large, and in batches of them clusters do not have groups beside
    (``_HOPPER_FEW_ROWS``); nor have short videos.
    """
    is_long = blocks >= _HOPPER_LONG_DECODE_BLOCKS
    most = _HOPPER_LONG_DECODE_BLOCKS - 1 if units in _HOPPER_TWO_VIDEOS else _HOPPER_SHORT_DECODE_BLOCKS
    if units <= _HOPPER_TWO_VIDEOS[-1] and 8 <= blocks <= most:
        return 8, 1
    clusters = _hopper_clusters(num_sms)[4]
    if units <= clusters and blocks >= 4:
        ctas = _HOPPER_SATURATING_CTAS_LONG if is_long else _HOPPER_SATURATING_CTAS
        ctas = ctas * num_sms // HOPPER_SMS
        return 4, max(1, min(blocks // 4, ctas // (4 * units)))
    most = 2 * num_sms
    is_short = blocks <= _HOPPER_SHORT_BATCH_BLOCKS
    if rows > _HOPPER_FEW_ROWS and blocks >= 4:
        if units > 2 * clusters:
            return 1, 1 if is_short else max(1, most // units)
        if blocks <= _HOPPER_LONG_BATCH_BLOCKS:
            return 4, 1
        ctas = _HOPPER_SATURATING_CTAS_LONG * num_sms // HOPPER_SMS
        return 1, -(-ctas // units)
    cluster_size = 2 if 2 * units <= most and blocks >= 2 else 1
    return cluster_size, 1 if is_short else max(1, min(blocks, most // units) // cluster_size)


# -------------------------------------------------------------------------------------------------------- its gradients


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

    def most_groups(self, num_kv_heads: int, tiles: int, blocks: int) -> int:
        """Of a sequence of so many row tiles and blocks (of a KV head), where sums do not run out: as the device has it
        of whole videos (backward_schedule.cuh)."""
        at_once = -(-self.num_ctas // num_kv_heads)
        size = max(-(-tiles // self.spread), -(-at_once // self.max_groups))
        return -(-min(at_once, blocks) // size)

    @property
    def tile_words(self) -> int:
        """Words of 32 bits that have one for each row tile."""
        return -(-self.max_tiles // 32)

    def pieces(self, num_pieces: int, num_slow: int, batch: int) -> tuple[int, int, int, int]:
        """Bytes of what is known of pieces, of blocks' uses, of row tiles' sequences, and of two sums."""
        max_blocks = num_slow // 128 + batch
        return num_pieces * 16, max_blocks * 32, -(-self.max_tiles // 4) * 16, 16

    def sights(self, num_slow: int, batch: int) -> tuple[int, int, int, int]:
        """Bytes of what rows see: of packed rows, of tokens by blocks, and twice of row tiles by blocks."""
        max_blocks = num_slow // 128 + batch
        bits = max_blocks * self.tile_words * 4
        return self.max_tiles * 64 * 8, max_blocks * 16, bits, bits


_HOPPER_BACKWARD_GROUPS = 12
_HOPPER_BACKWARD_MEMORY = (0.15, 64 * 2**20)  # of dQ, dK and dV, and beside that
_HOPPER_BACKWARD_LEAST_SPARE = 16 * 2**20  # bytes of sums beyond one of each row


def hopper_backward_room(query_bytes: int, slow_bytes: int) -> int:
    """Bytes that the Hopper backward may take beside dQ, dK and dV.

    ``query_bytes``: of the text rows of q; ``slow_bytes``: of K and V.
    """
    share, beside = _HOPPER_BACKWARD_MEMORY
    return int(share * (query_bytes + slow_bytes) + beside)


def hopper_backward_kv_heads(query_bytes: int, slow_bytes: int, num_kv_heads: int) -> int:
    """KV heads of a launch of the Hopper backward, so that its workspace has room (``hopper_backward_room``): all of
    them, or those that each of a few launches has; 0: even one is too many.

    The workspace holds q and the gradient of the context once more, dQ in float32, further sums of it, and the parts of
    two CTAs' blocks.
    """
    room = hopper_backward_room(query_bytes, slow_bytes)
    room -= _HOPPER_BACKWARD_LEAST_SPARE + HOPPER_SMS // 2 * 4 * 64 * 128 * 4
    fitting = min(num_kv_heads, int(room * num_kv_heads / max(1, 4 * query_bytes)))
    if fitting == 0:
        return 0
    launches = -(-num_kv_heads // fitting)
    return -(-num_kv_heads // launches)


# Row tiles between the starts of CTAs that add to the same sums: with one they wait for one another, 1x64x98304 612 us
# instead of 496; with three there are more sums to write and read.
_HOPPER_BACKWARD_SPREAD = 2


@lru_cache(maxsize=4096)
def hopper_attention_backward_config(
    num_text: int,
    num_slow: int,
    batch: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_sms: int = HOPPER_SMS,
    room: int = _HOPPER_BACKWARD_MEMORY[1],
    in_pieces: bool = False,
) -> HopperBackwardConfig:
    """How a call is cut.

    ``room``: bytes that the workspace may take, but for counters and what is known of ranges and pieces; further sums
    have what is left of it. ``in_pieces``: the device takes all sequences for one, whose groups have sums of all tiles.
    """
    rows = num_text * (num_q_heads // num_kv_heads)
    max_tiles = (rows + 63 * batch) // 64
    max_blocks = num_slow // 128 + batch  # of a KV head
    num_ctas = min(num_sms, max_blocks * num_kv_heads)
    at_once = -(-num_ctas // num_kv_heads)  # blocks of a KV head that are worked on together
    config = HopperBackwardConfig(
        num_ctas,
        max_tiles,
        max_tiles,
        _HOPPER_BACKWARD_GROUPS,
        _HOPPER_BACKWARD_SPREAD,
        splits_last_round=rows >= 4 * 64 * batch,  # with fewer rows the sum of two parts takes longer than it saves
    )
    wanted = min(
        (_HOPPER_BACKWARD_GROUPS - 1) * max_tiles,
        _HOPPER_BACKWARD_SPREAD * (batch * at_once if in_pieces else min(batch * at_once, max_blocks)),
    )
    fitting = (room - sum(config.workspace(num_kv_heads, head_dim))) // (num_kv_heads * 64 * head_dim * 4)
    return replace(config, max_sums=max_tiles + max(0, min(wanted, fitting)))


# Where the Hopper backward is slower than Triton's, on an H100 (bf16; CUDA's us, Triton's; as if lengths were even).
# Blocks of all KV heads: 1x64x2048 26.6, 22.2; 1x64x3240 (104 of them) 30.3, 33.5; with two row tiles 15.9, 18.0.
_BACKWARD_FEW_BLOCKS = 72
# Over pieces: four and eight slabs of 648 tokens (84 and 164 blocks in memory) 52.5, 27.5 and 97.0, 52.6; eight
# questions of 64 rows about a video of 2048 (64) 202, 172, of 5184 (164) 310, 363, of 10368 (324) 473, 601; of 256 rows
# about one of 5184 1589, 1178. Eight slabs of 648 and eight questions about 5184 are one call to the host.
_BACKWARD_FEW_BLOCKS_OF_PIECES = 200
# Blocks of a video: 8x64x648 63.8, 54.5; 32x64x648 325, 196; 4x64x648 33.9, 34.3.
_BACKWARD_SHORT_VIDEO = 8
# In larger batches: 16x64x2048 238, 230; 32x256x2048 1693, 1484; with one row tile 8x8x2048 55.3, 48.0.
_BACKWARD_SHORT_VIDEO_OF_MANY = 16
# Of the sums that groups want, the share that there must be room for: 16x64x5184 (0.44) 549, 522; 32x64x5184
# (0.19) 1542, 1022; 16x64x10368 (0.66) 851, 1014. Many row tiles keep CTAs apart: 8x256x10368 (0.43) 1384, 1714.
_BACKWARD_ROOM_FOR_GROUPS = 0.5
_BACKWARD_MANY_TILES = 28


@lru_cache(maxsize=4096)
def hopper_backward_drawback(
    num_text: int, num_slow: int, batch: int, num_q_heads: int, num_kv_heads: int, head_dim: int, in_pieces: bool
) -> str | None:
    """Why Triton's gradients are better than the Hopper backward's; None if they are not.

    ``in_pieces``: sequences may share slow tokens, so nothing is known of their lengths.
    """
    if num_text == 0 or num_slow == 0 or batch == 0:
        return None
    query_bytes, slow_bytes = 2 * num_text * num_q_heads * head_dim, 4 * num_slow * num_kv_heads * head_dim
    heads = hopper_backward_kv_heads(query_bytes, slow_bytes, num_kv_heads)
    if heads == 0:
        return "Triton's gradients take less memory where there are many text rows for few slow tokens"
    heads_per_kv = num_q_heads // num_kv_heads
    tiles, blocks = -(-num_text * heads_per_kv // (64 * batch)), -(-num_slow // (128 * batch))
    if in_pieces:
        if -(-num_slow // 128) * num_kv_heads < _BACKWARD_FEW_BLOCKS_OF_PIECES:
            return "Triton's gradients are faster of few slow tokens in pieces"
    else:
        if batch * blocks * num_kv_heads < _BACKWARD_FEW_BLOCKS and tiles > 2:
            return "Triton's gradients are faster of few slow tokens"
        is_many = batch >= 16 or (batch >= 8 and tiles <= 4)
        if blocks <= (_BACKWARD_SHORT_VIDEO_OF_MANY if is_many else _BACKWARD_SHORT_VIDEO):
            return "Triton's gradients are faster of short videos"
    if tiles < _BACKWARD_MANY_TILES:
        room = hopper_backward_room(query_bytes, slow_bytes)
        config = hopper_attention_backward_config(
            num_text, num_slow, batch, heads * heads_per_kv, heads, head_dim, HOPPER_SMS, room, in_pieces
        )
        wanted = batch * tiles * (config.most_groups(heads, tiles, blocks) - 1)
        if config.max_sums - config.max_tiles < _BACKWARD_ROOM_FOR_GROUPS * wanted:
            return "Triton's gradients are faster of large batches with few text rows"
    return None


# --------------------------------------------------------------------------------------------- the gradients of the mix

_MIX_ROWS_A_BLOCK = 2048  # kMaxTasks of csrc/cuda/common/mix_rows.cuh


def cuda_mix_backward_blocks(num_rows: int, num_sms: int) -> int:
    """CTAs of the mix's backward over so many rows. Each leaves a row of sums, which few rows must make good.

    On an H100 with one and two an SM: 256 rows of 3584 9.8 and 10.5 us, 1024 19.4 and 18.2, 2048 34.8 and 33.6, 4096
    59.4 and 61.1, 8192 110.5 and 112.0.
    """
    blocks = 2 * num_sms if 4 * num_sms <= num_rows < 24 * num_sms else num_sms
    return max(1, min(num_rows, blocks), -(-num_rows // _MIX_ROWS_A_BLOCK))
