"""The registry of shapes that every run takes its own from, those of each benchmark's own models apart."""

from __future__ import annotations

import random
from dataclasses import replace

from .shapes import (
    HEADS,
    QWEN2_7B,
    AttentionShape,
    DecodeShape,
    Heads,
    MixShape,
    ModelShape,
    PoolShape,
    RaggedMix,
    SweptBatch,
    TrainShape,
)

_CPU_ATTENTION = {
    (1, 1, 1296),
    (1, 1, 5184),
    (1, 1, 10368),
    (1, 1, 41472),
    (4, 1, 5184),
    (1, 64, 1296),
    (1, 64, 5184),
    (1, 64, 10368),
}
_TABLE = [
    *[(1, 1, n) for n in (1296, 5184, 7776, 10368, 41472, 98304)],
    (4, 1, 5184),
    (16, 1, 10368),
    (1, 8, 10368),
    *[(1, 64, n) for n in (1296, 5184, 10368, 41472, 98304)],
    (8, 64, 10368),
    (1, 256, 10368),
    (1, 256, 98304),
    (1, 1024, 98304),
]
ATTENTION: list[AttentionShape] = [AttentionShape.even(*s, on_cpu=s in _CPU_ATTENTION) for s in _TABLE]
ATTENTION.append(AttentionShape((64, 16, 128, 1), (5184, 1296, 10368, 7776), on_cpu=True))
for _name, _heads in HEADS.items():
    if _heads != QWEN2_7B:
        _on_cpu = _name in ("Qwen2-0.5B", "Llama-3-8B")
        ATTENTION += [AttentionShape.even(1, n, 10368, _heads, on_cpu=_on_cpu and n == 1) for n in (1, 64)]


# Forward + backward: training and long chats, over the released models' lengths and longer videos.
ATTENTION_BACKWARD: list[AttentionShape] = [
    AttentionShape.even(1, 64, 10368, on_cpu=True),
    *[AttentionShape.even(*s) for s in ((1, 256, 10368), (4, 256, 10368), (8, 512, 5184), (1, 64, 98304))],
    AttentionShape.even(1, 256, 98304),
    AttentionShape.even(1, 1024, 41472, HEADS["Llama-3-8B"]),
]


# Where a split of slow tokens that assumes even lengths goes wrong. A label tells slow tokens, and text rows after "@".
def _random_mix(batch: int, text: int, longest: int, on_cpu: bool = False) -> RaggedMix:
    """Lengths from 1/100 of the longest to all of it, evenly drawn on a log scale; text rows too, up to ``text``."""
    draw = random.Random(batch * text)
    slow = [int(longest * 10 ** draw.uniform(-2, 0)) for _ in range(batch)]
    rows = [int(text ** draw.uniform(0, 1)) for _ in range(batch)]
    return RaggedMix.of(f"{batch} random up to {longest} @ up to {text}", rows, slow, on_cpu)


RAGGED: list[RaggedMix] = [
    RaggedMix.of("98304 + 31 x 0 @ 1", [1] * 32, [98304, *[0] * 31]),
    RaggedMix.of("98304 + 31 x 648 @ 1", [1] * 32, [98304, *[648] * 31]),
    RaggedMix.of("10368 in one of 16 slots @ 1", [1] * 16, [10368, *[0] * 15], on_cpu=True),
    RaggedMix.of("10368 of a cache of 32768 @ 1", [1, 0], [10368, 32768 - 10368], on_cpu=True),
    RaggedMix.of("41472 + 7 x 648 @ 1", [1] * 8, [41472, *[648] * 7], on_cpu=True),
    _random_mix(8, 1, 20736, on_cpu=True),
    _random_mix(16, 1, 41472),
    _random_mix(32, 1, 98304),
    RaggedMix.of("41472 + 7 x 648 @ 64", [64] * 8, [41472, *[648] * 7]),
    RaggedMix.of("98304 + 3 x 1296 @ 64", [64] * 4, [98304, *[1296] * 3]),
    _random_mix(8, 128, 41472),
    _random_mix(16, 256, 20736),
]


# Batches that users have: 8 to 32 sequences, 8 to 128 text rows over 2k to 20k slow tokens each; two of random lengths.
def _random_batch(batch: int) -> SweptBatch:
    draw = random.Random(batch)
    rows, slow = ([draw.randint(*most) for _ in range(batch)] for most in ((8, 128), (2048, 20736)))
    return SweptBatch(tuple(rows), tuple(slow))


BATCHES: list[SweptBatch] = [
    SweptBatch.even(batch, text, slow)
    for batch in (8, 16, 32)
    for text in (8, 32, 64, 128)
    for slow in (2048, 5184, 20736)
]
BATCHES += [SweptBatch.even(4, 128, 20736, HEADS["Llama-3-8B"]), SweptBatch.even(32, 1, 5184)]
BATCHES += [_random_batch(8), _random_batch(16)]

# Growing prefixes (text row i of n sees (i + 1) / n of its video), and one video in pieces of so many tokens.
RANGES: list[AttentionShape] = [
    AttentionShape.even(1, text, slow, on_cpu=(text, slow) == (64, 10368))
    for slow in (10368, 98304)
    for text in (64, 256, 1024)
]
PIECES: list[AttentionShape] = [
    AttentionShape.even(1, text, slow, on_cpu=slow == 10368) for slow in (10368, 98304) for text in (1, 64)
]

POOL: list[PoolShape] = [
    PoolShape((64,), (18, 18), on_cpu=True),
    PoolShape((128,), (18, 18)),
    PoolShape((1536,), (16, 16)),
    PoolShape((128,), (18, 18), sampling_stride=4, temporal_stride=1),
    PoolShape((128,), (18, 18), pool_stride=1, temporal_stride=4, spatial_stride=3),
    PoolShape((16, 1, 32), (18, 18), temporal_stride=4, min_fast_frames=8, on_cpu=True),
    PoolShape((64, 96, 128), (18, 18), temporal_stride=4, min_fast_frames=16),
]

MIX: list[MixShape] = [
    MixShape(1, 1, on_cpu=True),
    MixShape(64, 64, on_cpu=True),
    MixShape(64, 1360, on_cpu=True),
    MixShape(1024, 1024, on_cpu=True),
    MixShape(8192, 8192),
]

# One hybrid layer's slow path at decode and at prefill (64 question rows), and its key-value projection.
LAYER: list[AttentionShape] = [
    AttentionShape.even(1, 1, 10368, on_cpu=True),
    AttentionShape.even(1, 64, 10368),
    AttentionShape.even(1, 1, 98304),
]

MODEL_FRAMES = (16, 32, 64, 128, 256, 512, 1024, 1536)
CLOSER_FRAMES = (128, 1536)  # where decode is compiled too, half a minute a time, and a prefill's kernels are timed
MODEL_FRAMES_ON_CPU = (16, 64, 256, 512, 1536)
QWEN2_7B_MODEL = ModelShape(128, 3584, 18944, 28, QWEN2_7B, 152064, every=8)
QWEN2_1_5B_MODEL = ModelShape(128, 1536, 8960, 28, HEADS["Qwen2-1.5B"], 151936, every=8, text=256, slow_side=9)
TINY_MODEL = ModelShape(128, 256, 704, 4, Heads(4, 2, 64), 1024, every=2, text=16, slow_side=3, vision_channels=64)
TRAIN: list[TrainShape] = [TrainShape(QWEN2_1_5B_MODEL, 4)]
TRAIN_ON_CPU: list[TrainShape] = [TrainShape(replace(TINY_MODEL, frames=32), 2)]
DECODE: list[DecodeShape] = [DecodeShape(QWEN2_7B_MODEL, batch, 1360) for batch in (1, 2, 4, 8, 16, 32)]
DECODE_ON_CPU: list[DecodeShape] = [DecodeShape(TINY_MODEL, batch, 40) for batch in (1, 2)]
