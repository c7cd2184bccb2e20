"""The one registry of shapes, and one FLOP / byte formula an op, shared by benchmarks, reports and tests.

Shapes are those that users have: the released models' heads, 64 to 1536 frames, one decoded row to long chats.
A formula counts the least work there is: each input byte read once, each output byte written once. Divided by the
ceilings that the same run measured it gives the floor of a row: max(FLOPs / GEMM rate, bytes / bandwidth).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from slowfast_kernels import flops
from slowfast_kernels.pool_plan import PoolPlan, make_pool_plan

MOST = 2**20  # of anything that is counted in a shape; row and token counts are int32
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


# ------------------------------------------------------------------------------------------------ costs


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached in this run: GB/s reading, GB/s copying (read + written), TFLOP/s of a GEMM."""

    read_gbps: float
    copy_gbps: float
    gemm_tflops: dict[str, float]  # by dtype


@dataclass(frozen=True)
class Cost:
    """The least work of one call."""

    flops: float
    read: float  # bytes
    written: float

    @property
    def bytes(self) -> float:
        return self.read + self.written

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.read + other.read, self.written + other.written)

    def floor_us(self, ceilings: Ceilings, dtype: str) -> float:
        """Microseconds below which no version runs, by the ceilings measured in the same run.

        A call that writes under a tenth of what it reads is held to the read ceiling, any other to the copy ceiling.
        Inputs come cold, but a small output may stay in the cache: a call that mostly writes can pass 100%.
        """
        gbps = ceilings.read_gbps if self.written * 10 < self.read else ceilings.copy_gbps
        return max(self.flops / ceilings.gemm_tflops[dtype] / 1e6, self.bytes / gbps / 1e3)


# ------------------------------------------------------------------------------------------------ shapes


@dataclass(frozen=True)
class Heads:
    num_q: int
    num_kv: int
    dim: int

    def __str__(self) -> str:
        return f"{self.num_q}/{self.num_kv}/{self.dim}"

    @property
    def channels(self) -> int:
        return self.num_q * self.dim


QWEN2_7B = Heads(28, 4, 128)
HEADS = {
    "Qwen2-7B": QWEN2_7B,
    "Qwen2-0.5B": Heads(14, 2, 64),
    "Qwen2-1.5B": Heads(12, 2, 128),
    "Qwen2-3B": Heads(16, 2, 128),
    "Llama-3-8B": Heads(32, 8, 128),
    "Llama-3-70B": Heads(64, 8, 128),
}


@dataclass(frozen=True)
class AttentionShape:
    """Text rows and slow tokens of each sequence. Every row of q and state is a text row, as at decode."""

    text: tuple[int, ...]
    slow: tuple[int, ...]
    heads: Heads = QWEN2_7B
    on_cpu: bool = field(default=False, compare=False)  # small enough for a CPU run

    @classmethod
    def even(cls, batch: int, text: int, slow: int, heads: Heads = QWEN2_7B, on_cpu: bool = False) -> AttentionShape:
        return cls((text,) * batch, (slow,) * batch, heads, on_cpu)

    @property
    def batch(self) -> int:
        return len(self.text)

    @property
    def is_even(self) -> bool:
        return len(set(self.text)) == len(set(self.slow)) == 1

    @property
    def num_text(self) -> int:
        return sum(self.text)

    @property
    def num_slow(self) -> int:
        return sum(self.slow)

    @property
    def name(self) -> str:
        def lengths(values: tuple[int, ...]) -> str:
            return str(values[0]) if len(set(values)) == 1 else f"{min(values)}..{max(values)}"

        return f"{self.batch}x{lengths(self.text)}x{lengths(self.slow)}@{self.heads}"

    def kv_bytes(self, dtype: str) -> int:
        return self.num_slow * self.heads.num_kv * 2 * self.heads.dim * BYTES[dtype]


@dataclass(frozen=True)
class PoolShape:
    """Videos of ``frames`` frames of ``grid`` tokens; strides as in ``slowfast_pool``."""

    frames: tuple[int, ...]
    grid: tuple[int, int]
    channels: int = 3584
    pool_stride: int = 2
    sampling_stride: int = 1
    temporal_stride: int = 4
    spatial_stride: int = 1
    min_fast_frames: int = 1
    on_cpu: bool = field(default=False, compare=False)

    @property
    def plan(self) -> PoolPlan:
        strides = (self.pool_stride, self.sampling_stride, self.temporal_stride, self.spatial_stride)
        return make_pool_plan(self.frames, self.grid, *strides, self.min_fast_frames)

    @property
    def name(self) -> str:
        frames = "+".join(map(str, self.frames))
        strides = {"s": self.sampling_stride, "t": self.temporal_stride, "x": self.spatial_stride}
        fast = "".join(f"/{letter}{stride}" for letter, stride in strides.items() if stride > 1)
        return f"{frames}x{self.grid[0]}x{self.grid[1]}/p{self.pool_stride}{fast}@{self.channels}"


@dataclass(frozen=True)
class MixShape:
    """``num_text`` text rows among ``rows`` rows."""

    num_text: int
    rows: int
    channels: int = 3584
    on_cpu: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        return f"{self.num_text}of{self.rows}@{self.channels}"


@dataclass(frozen=True)
class ModelShape:
    """A model with one video of ``frames`` frames in its prompt.

    Slow tokens are ``slow_side``^2 a frame, fast tokens the same of ``fast_frames`` frames, as in the released models.
    """

    frames: int
    hidden: int
    intermediate: int
    layers: int
    heads: Heads
    vocab: int
    every: int  # a hybrid layer every so many
    text: int = 64
    slow_side: int = 8
    fast_frames: int = 16

    @property
    def name(self) -> str:
        return f"{self.frames} frames"

    @property
    def num_slow(self) -> int:
        return self.frames * self.slow_side**2

    @property
    def num_fast(self) -> int:
        return min(self.frames, self.fast_frames) * self.slow_side**2

    @property
    def num_hybrid(self) -> int:
        return -(-self.layers // self.every)


# ---------------------------------------------------------------------------------------------- formulas


def attention_cost(shape: AttentionShape, dtype: str, fused: bool) -> Cost:
    """Attention over the slow tokens; ``fused`` adds gate and mix, which write the state and not the context."""
    pairs = sum(t * s for t, s in zip(shape.text, shape.slow, strict=True))
    attended = sum(s for t, s in zip(shape.text, shape.slow, strict=True) if t)
    size, heads = BYTES[dtype], shape.heads
    rows = shape.num_text * heads.channels * size
    products = float(flops.attention(pairs, heads.num_q, heads.dim))
    cost = Cost(products, attended * heads.num_kv * 2 * heads.dim * size + rows, rows)
    if fused:
        mixed = float(flops.mix(shape.num_text, heads.channels, weighted=True))
        cost += Cost(mixed, rows + heads.channels * size, 0)
    return cost


def pool_cost(shape: PoolShape, dtype: str) -> Cost:
    """One read of the vision features that are used, one write of the slow and of the fast tokens; with the norm."""
    size, plan = BYTES[dtype], shape.plan
    used = sum(v.num_frames * v.slow_grid[0] * v.slow_grid[1] * v.pool_stride**2 for v in plan.videos)
    sums = float(flops.pool(plan, shape.channels, normed=True))
    return Cost(sums, used * shape.channels * size, (plan.num_slow + plan.num_fast) * shape.channels * size)


def mix_cost(shape: MixShape, dtype: str) -> Cost:
    """state read and written, context and gate weight read."""
    size = BYTES[dtype]
    read = (shape.rows + shape.num_text + 1) * shape.channels * size
    mixed = float(flops.mix(shape.num_text, shape.channels, weighted=True))
    return Cost(mixed, read, shape.rows * shape.channels * size)


def projection_cost(tokens: int, channels: int, heads: Heads, dtype: str) -> Cost:
    """Keys and values of ``tokens`` slow tokens for one hybrid layer: one GEMM."""
    size, width = BYTES[dtype], 2 * heads.num_kv * heads.dim
    return Cost(2.0 * tokens * channels * width, (tokens + width) * channels * size, tokens * width * size)


def model_cost(shape: ModelShape, dtype: str, rows: int, slow: int, decode: bool) -> Cost:
    """Prefill of ``rows`` rows, or one decoded token after them; ``slow`` tokens attended in the hybrid layers.

    Weights are read once (embeddings are not, but for the rows used). Prefill computes the logits of one row.
    """
    size, heads, layers = BYTES[dtype], shape.heads, shape.layers
    width = heads.num_kv * heads.dim
    layer_weights = shape.hidden * (2 * heads.channels + 2 * width + 3 * shape.intermediate)
    weights = layers * layer_weights + shape.hidden * shape.vocab
    new = 1 if decode else rows
    pairs = rows if decode else rows * (rows + 1) // 2
    attended = flops.attention(pairs, heads.num_q, heads.dim) * layers
    text = 1 if decode else shape.text
    attended += flops.attention(text * slow, heads.num_q, heads.dim) * shape.num_hybrid
    work = 2.0 * (new * layers * layer_weights + shape.hidden * shape.vocab) + attended
    read = weights * size + slow * shape.hidden * size * (not decode)
    written = new * 2 * width * size * layers
    if decode:
        read += (rows * layers + slow * shape.num_hybrid) * 2 * width * size
    else:
        work += 4.0 * slow * shape.hidden * width * shape.num_hybrid
        written += slow * 2 * width * size * shape.num_hybrid
    return Cost(work, read, written)


# ---------------------------------------------------------------------------------------------- registry

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
TINY_MODEL = ModelShape(128, 256, 704, 4, Heads(4, 2, 64), 1024, every=2, text=16, slow_side=3)


# --------------------------------------------------------------------------------------------- selection


def _check(text: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if not 1 <= value <= MOST:
            raise ValueError(f"{text!r} with {value} {name.replace('_', ' ')}, want 1 to {MOST}")


def parse_attention(text: str) -> AttentionShape | None:
    """``BATCHxTEXTxSLOW`` or ``BATCHxTEXTxSLOW@HQ/HKV/D``.

    This parser and those below give None for a text of another form, and raise ValueError for a size that can't be.
    """
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:@(\d+)/(\d+)/(\d+))?", text)
    if match is None:
        return None
    batch, rows, slow = (int(match[i]) for i in (1, 2, 3))
    heads = Heads(*(int(match[i]) for i in (4, 5, 6))) if match[4] else QWEN2_7B
    _check(text, sequences=batch, text_rows=rows, slow_tokens=slow)
    _check(text, query_heads=heads.num_q, KV_heads=heads.num_kv, channels_of_a_head=heads.dim)
    if heads.num_q % heads.num_kv:
        raise ValueError(f"{text!r} with {heads.num_q} query heads, want a multiple of its {heads.num_kv} KV heads")
    return AttentionShape.even(batch, rows, slow, heads, on_cpu=True)


def parse_pool(text: str) -> PoolShape | None:
    """``FRAMESxHxW``, ``FRAMESxHxW/pPOOL`` or ``FRAMESxHxW/pPOOL/tTEMPORAL``."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:/p(\d+))?(?:/t(\d+))?", text)
    if match is None:
        return None
    frames, grid, pool, temporal = int(match[1]), (int(match[2]), int(match[3])), int(match[4] or 2), int(match[5] or 4)
    _check(text, frames=frames, rows=grid[0], columns=grid[1], pool_stride=pool, temporal_stride=temporal)
    shape = PoolShape((frames,), grid, pool_stride=pool, temporal_stride=temporal, on_cpu=True)
    try:
        shape.plan  # noqa: B018 (it knows which grids and strides go together)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from error
    return shape


def parse_mix(text: str) -> MixShape | None:
    """``TEXTofROWS`` or ``TEXTofROWS@CHANNELS``."""
    match = re.fullmatch(r"(\d+)of(\d+)(?:@(\d+))?", text)
    if match is None:
        return None
    text_rows, rows, channels = int(match[1]), int(match[2]), int(match[3] or 3584)
    _check(text, text_rows=text_rows, rows=rows, channels=channels)
    if text_rows > rows:
        raise ValueError(f"{text!r} with {text_rows} text rows, want at most its {rows} rows")
    return MixShape(text_rows, rows, channels, on_cpu=True)


def parse_frames(text: str) -> int | None:
    """``FRAMES`` or ``FRAMES frames`` of the model."""
    match = re.fullmatch(r"(-?\d+)( frames)?", text)
    if match is None:
        return None
    _check(text, frames=int(match[1]))
    return int(match[1])


def _parsed(parse: Callable, text: str):
    """None for what is no shape here: ``check_shapes`` has seen that it is one of another op."""
    try:
        return parse(text)
    except ValueError:
        return None


def model_shapes(wanted: Iterable[str], on_cpu: bool) -> list[ModelShape]:
    """The model at each number of frames; ``wanted`` names other numbers (texts that are no numbers are not ours)."""
    base, frames = (TINY_MODEL, MODEL_FRAMES_ON_CPU) if on_cpu else (QWEN2_7B_MODEL, MODEL_FRAMES)
    wanted = list(wanted)
    if wanted:
        frames = sorted({count for text in wanted if (count := _parsed(parse_frames, text)) is not None})
    return [replace(base, frames=count) for count in frames]


def select(registry: Sequence, wanted: Iterable[str], parse: Callable, on_cpu: bool) -> list:
    """Shapes of a registry for one run.

    Args:
        registry: shapes with ``name`` and ``on_cpu``.
        wanted: patterns of names (``1x64x*``), parts of names (``28/4/128``), or explicit shapes; empty: all.
        parse: explicit text -> shape, or None where the text is not one.
        on_cpu: without ``wanted``, keep only the shapes that a CPU finishes.
    """
    wanted = list(wanted)
    if not wanted:
        return [shape for shape in registry if shape.on_cpu or not on_cpu]
    chosen = []
    for text in wanted:
        exact = _parsed(parse, text)
        found = [exact] if exact else [s for s in registry if fnmatchcase(s.name, text) or text in s.name]
        chosen += [shape for shape in found if shape not in chosen]
    return chosen


OPS = {
    "attention": (ATTENTION, parse_attention),
    "pool": (POOL, parse_pool),
    "mix": (MIX, parse_mix),
    "model": ((), parse_frames),
}


def check_shapes(wanted: Iterable[str], ops: Iterable[str]) -> None:
    """See that each text names a shape of one of ``ops``.

    Raises:
        ValueError: naming the first that doesn't.
    """
    for text in wanted:
        problem, found = "", False
        for op in ops:
            try:
                registry, parse = OPS[op]
                found |= parse(text) is not None or bool(select(registry, [text], parse, on_cpu=False))
            except ValueError as error:
                problem = str(error)
        if not found:
            raise ValueError(problem or f"{text!r}, want a pattern or a part of a shape's name, or an explicit shape")
