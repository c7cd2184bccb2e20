"""Kinds of shapes (``registry`` has the shapes), and one FLOP / byte formula an op, for benchmarks, reports and tests.

Shapes are those that users have: the released models' heads, 64 to 1536 frames, one decoded row to long chats.
A formula counts the least work there is: each input byte read once, each output byte written once. Divided by the
ceilings that the same run measured it gives the floor of a row: max(FLOPs / GEMM rate, bytes / bandwidth).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from slowfast_kernels import flops
from slowfast_kernels.pool_plan import PoolPlan, make_pool_plan

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
    def num_pairs(self) -> int:
        """Of a text row and a slow token that it attends."""
        return sum(text * slow for text, slow in zip(self.text, self.slow, strict=True))

    @property
    def name(self) -> str:
        def lengths(values: tuple[int, ...]) -> str:
            return str(values[0]) if len(set(values)) == 1 else f"{min(values)}..{max(values)}"

        return f"{self.batch}x{lengths(self.text)}x{lengths(self.slow)}@{self.heads}"

    def kv_bytes(self, dtype: str) -> int:
        return self.num_slow * self.heads.num_kv * 2 * self.heads.dim * BYTES[dtype]


@dataclass(frozen=True)
class SweptBatch(AttentionShape):
    """One of a sweep of batches."""

    @property
    def name(self) -> str:
        return f"batches {super().name}"


@dataclass(frozen=True)
class RaggedMix:
    """A batch of uneven sequences, and the even batch with as much work that it is held to."""

    label: str
    mix: AttentionShape
    even: AttentionShape
    on_cpu: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, label: str, text: Sequence[int], slow: Sequence[int], on_cpu: bool = False) -> RaggedMix:
        """The even batch has as many sequences with text rows, the same rows and pairs of (row, token), rounded up."""
        mix = AttentionShape(tuple(text), tuple(slow))
        batch = len(text) - text.count(0)
        rows = -(-mix.num_text // batch)
        return cls(label, mix, AttentionShape.even(batch, rows, -(-mix.num_pairs // (batch * rows))), on_cpu)

    @property
    def name(self) -> str:
        return f"ragged {self.label}"


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


def language_model_keys(shape) -> dict[str, int]:
    """Sizes of a shape's language model, by the keys of transformers and of a released config.json."""
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads.num_q,
        "num_key_value_heads": shape.heads.num_kv,
    }


def pooling_keys(shape: ModelShape) -> dict[str, int]:
    """How a shape's video is pooled, by the keys of a released config.json."""
    return {
        "mm_video_pooling_stride": 2,
        # more frames to a window than any video has: the pooling then averages to min_fast_frames frames
        "fast_token_temporal_stride": 1 << 20,
        "min_fast_frames": shape.fast_frames,
    }


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
    vision_channels: int = 3072  # of the released towers; two linear layers bring them to ``hidden``

    @property
    def name(self) -> str:
        return f"{self.frames} frames"

    @property
    def vision_size(self) -> tuple[int, int, int]:
        """Of the video's features, before the projector and the pooling by 2."""
        return self.frames, (2 * self.slow_side) ** 2, self.vision_channels

    @property
    def num_slow(self) -> int:
        return self.frames * self.slow_side**2

    @property
    def num_fast(self) -> int:
        return min(self.frames, self.fast_frames) * self.slow_side**2

    @property
    def num_hybrid(self) -> int:
        return -(-self.layers // self.every)


@dataclass(frozen=True)
class DecodeShape:
    """A decoded token of each of ``batch`` prompts of text, with ``cached`` tokens before it."""

    model: ModelShape
    batch: int
    cached: int

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.cached}"


@dataclass(frozen=True)
class TrainShape:
    """Optimizer steps over ``batch`` samples, each a video and the model's text rows."""

    model: ModelShape
    batch: int

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.model.text}x{self.model.frames}f"

    @property
    def rows(self) -> int:
        return self.model.text + self.model.num_fast


# ---------------------------------------------------------------------------------------------- formulas


def attention_cost(shape: AttentionShape, dtype: str, fused: bool) -> Cost:
    """Attention over the slow tokens; ``fused`` adds gate and mix, which write the state and not the context."""
    attended = sum(s for t, s in zip(shape.text, shape.slow, strict=True) if t)
    size, heads = BYTES[dtype], shape.heads
    rows = shape.num_text * heads.channels * size
    products = float(flops.attention(shape.num_pairs, heads.num_q, heads.dim))
    cost = Cost(products, attended * heads.num_kv * 2 * heads.dim * size + rows, rows)
    if fused:
        mixed = float(flops.mix(shape.num_text, heads.channels, weighted=True))
        cost += Cost(mixed, rows + heads.channels * size, 0)
    return cost


def attention_backward_cost(shape: AttentionShape, dtype: str) -> Cost:
    """Gradients of Q, K and V from those, the context, its gradient and the log-sum-exp of each row and head."""
    size, heads = BYTES[dtype], shape.heads
    rows, kv = shape.num_text * heads.channels * size, shape.kv_bytes(dtype)
    products = float(flops.attention_backward(shape.num_pairs, heads.num_q, heads.dim))
    return Cost(products, kv + 3 * rows + shape.num_text * heads.num_q * 4, kv + rows)


def _used_features(shape: PoolShape) -> int:
    """Numbers that tokens are made of: floor pooling drops the rest."""
    tokens = sum(v.num_frames * v.slow_grid[0] * v.slow_grid[1] * v.pool_stride**2 for v in shape.plan.videos)
    return tokens * shape.channels


def pool_cost(shape: PoolShape, dtype: str, normed: bool = True) -> Cost:
    """One read of the vision features that are used, one write of the slow and of the fast tokens."""
    size, plan = BYTES[dtype], shape.plan
    sums = float(flops.pool(plan, shape.channels, normed))
    return Cost(sums, _used_features(shape) * size, (plan.num_slow + plan.num_fast) * shape.channels * size)


def pool_backward_cost(shape: PoolShape, dtype: str, normed: bool) -> Cost:
    """Gradients of slow and fast tokens read, that of all features written; through a norm the features are read."""
    size, plan = BYTES[dtype], shape.plan
    read = (plan.num_slow + plan.num_fast) * shape.channels + normed * _used_features(shape)
    written = sum(shape.frames) * shape.grid[0] * shape.grid[1] * shape.channels
    return Cost(float(flops.pool_backward(plan, shape.channels, normed)), read * size, written * size)


def mix_cost(shape: MixShape, dtype: str) -> Cost:
    """state read and written, context and gate weight read."""
    size = BYTES[dtype]
    read = (shape.rows + shape.num_text + 1) * shape.channels * size
    mixed = float(flops.mix(shape.num_text, shape.channels, weighted=True))
    return Cost(mixed, read, shape.rows * shape.channels * size)


def mix_backward_cost(shape: MixShape, dtype: str) -> Cost:
    """The gradient read and that of the state written, on all rows; on text rows state and context read, and the
    context's gradient written; the gate's weight and its gradient.
    """
    size = BYTES[dtype]
    work = float(flops.mix_backward(shape.num_text, shape.channels, weighted=True))
    read = (shape.rows + 2 * shape.num_text + 1) * shape.channels * size
    return Cost(work, read, (shape.rows + shape.num_text + 1) * shape.channels * size)


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


def vision_cost(shape: ModelShape, dtype: str, tokens: int) -> Cost:
    """A video's features through a projector of two linear layers, to ``tokens`` that the rest of the model reads.

    The first layer is one of all features. The last commutes with the averages that make slow and fast tokens, so that
    it need be one of these alone.
    """
    frames, area, channels = shape.vision_size
    features, size = frames * area, BYTES[dtype]
    work = 2.0 * shape.hidden * (features * channels + tokens * shape.hidden)
    read = (features * channels + shape.hidden * (channels + shape.hidden)) * size
    return Cost(work, read, tokens * shape.hidden * size)


def layer_costs(shape: ModelShape, dtype: str, tokens: int) -> tuple[Cost, Cost]:
    """Of ``vision_cost`` each linear layer, where the first hands over what the last needs of it."""
    frames, area, channels = shape.vision_size
    features, size, width = frames * area, BYTES[dtype], shape.hidden
    first = Cost(2.0 * features * channels * width, (features + width) * channels * size, tokens * width * size)
    return first, Cost(2.0 * tokens * width * width, (tokens + width) * width * size, tokens * width * size)


def decode_cost(shape: DecodeShape, dtype: str) -> Cost:
    """One step: the weights once, the cache and the products once a prompt."""
    weights = model_cost(shape.model, dtype, 0, 0, decode=True).read
    one = model_cost(shape.model, dtype, shape.cached, 0, decode=True)
    read = weights + shape.batch * (one.read - weights)
    return Cost(shape.batch * one.flops, read, shape.batch * one.written)


def slow_read_bytes(shape: ModelShape, dtype: str) -> int:
    """Keys and values of the slow tokens in all hybrid layers, which each step reads."""
    return shape.num_slow * shape.num_hybrid * 2 * shape.heads.num_kv * shape.heads.dim * BYTES[dtype]


def train_cost(shape: TrainShape, dtype: str, slow_path: bool = True) -> Cost:
    """Products of one optimizer step and the bytes of its weights: read in both passes, their gradients written.

    A linear layer's backward pass is twice its forward pass (but for the first of the projector, whose input is given),
    attention's 2.5 times. ``slow_path``: with the hybrid layers' keys and values, and attention of the slow tokens.
    """
    model, heads = shape.model, shape.model.heads
    width, channels = heads.num_kv * heads.dim, model.hidden
    layer_weights = channels * (2 * heads.channels + 2 * width + 3 * model.intermediate)
    weights = model.layers * layer_weights + channels * model.vocab
    pairs = shape.rows * (shape.rows + 1) // 2 * model.layers
    frames, area, vision_channels = model.vision_size
    # The last linear layer of the projector is one of the slow tokens: frames are pooled before it.
    vision = frames * area * 4.0 * vision_channels + model.num_slow * 6.0 * channels
    linear = 6.0 * shape.rows * weights + channels * vision
    if slow_path:
        weights += model.num_hybrid * 2 * width * channels
        pairs += model.text * model.num_slow * model.num_hybrid
        linear += 6.0 * model.num_slow * channels * 2 * width * model.num_hybrid
    attended = flops.attention(pairs, heads.num_q, heads.dim) + flops.attention_backward(pairs, heads.num_q, heads.dim)
    size = BYTES[dtype] * (weights + channels * (vision_channels + channels))
    return Cost(shape.batch * (linear + attended), 2.0 * size, 1.0 * size)
