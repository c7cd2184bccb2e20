"""Which shapes a run takes: those of the registries that ``--shapes`` names by pattern, and explicit ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

from .mllama_shapes import MLLAMA, MLLAMA_ON_CPU, MllamaShape
from .registry import (
    ATTENTION,
    ATTENTION_BACKWARD,
    BATCHES,
    DECODE,
    DECODE_ON_CPU,
    MIX,
    MODEL_FRAMES,
    MODEL_FRAMES_ON_CPU,
    PIECES,
    POOL,
    QWEN2_7B_MODEL,
    RAGGED,
    RANGES,
    TINY_MODEL,
    TRAIN,
    TRAIN_ON_CPU,
)
from .released_shapes import RELEASED, RELEASED_ON_CPU, ReleasedShape
from .shapes import (
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

MOST = 2**20  # of anything that is counted in a shape; row and token counts are int32


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
    """``FRAMESxHxW``, with ``/pPOOL``, ``/tTEMPORAL`` and ``@CHANNELS`` behind it as wanted, in this order."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)(?:/p(\d+))?(?:/t(\d+))?(?:@(\d+))?", text)
    if match is None:
        return None
    frames, grid, pool, temporal = int(match[1]), (int(match[2]), int(match[3])), int(match[4] or 2), int(match[5] or 4)
    channels = int(match[6] or PoolShape.channels)
    _check(text, frames=frames, rows=grid[0], columns=grid[1], pool_stride=pool, temporal_stride=temporal)
    _check(text, channels=channels)
    shape = PoolShape((frames,), grid, channels, pool, temporal_stride=temporal, on_cpu=True)
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


def parse_decode(text: str, base: DecodeShape = DECODE[0]) -> DecodeShape | None:
    """``BATCHxCACHED``, of the model of ``base``."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        return None
    batch, cached = int(match[1]), int(match[2])
    _check(text, prompts=batch, cached_tokens=cached)
    return replace(base, batch=batch, cached=cached)


def decode_shapes(wanted: Iterable[str], on_cpu: bool) -> list[DecodeShape]:
    """On a CPU of a tiny model."""
    registry, wanted = DECODE_ON_CPU if on_cpu else DECODE, list(wanted)
    return select(registry, wanted, partial(parse_decode, base=registry[0]), False) if wanted else list(registry)


def parse_train(text: str, base: TrainShape = TRAIN[0]) -> TrainShape | None:
    """``BATCHxTEXTxFRAMESf``, of the model of ``base``."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)f", text)
    if match is None:
        return None
    batch, rows, frames = (int(match[i]) for i in (1, 2, 3))
    _check(text, samples=batch, text_rows=rows, frames=frames)
    return replace(base, batch=batch, model=replace(base.model, text=rows, frames=frames))


def parse_mllama(text: str, base: MllamaShape = MLLAMA[0]) -> MllamaShape | None:
    """``TEXTxIMAGESi``, of the model of ``base``."""
    match = re.fullmatch(r"(\d+)x(\d+)i", text)
    if match is None:
        return None
    rows, images = int(match[1]), int(match[2])
    _check(text, text_rows=rows, images=images)
    return replace(base, text=rows, images=images)


def mllama_shapes(wanted: Iterable[str], on_cpu: bool) -> list[MllamaShape]:
    """On a CPU of a tiny model."""
    registry, wanted = MLLAMA_ON_CPU if on_cpu else MLLAMA, list(wanted)
    return select(registry, wanted, partial(parse_mllama, base=registry[0]), False) if wanted else list(registry)


def train_shapes(wanted: Iterable[str], on_cpu: bool) -> list[TrainShape]:
    """On a CPU of a tiny model."""
    registry, wanted = TRAIN_ON_CPU if on_cpu else TRAIN, list(wanted)
    return select(registry, wanted, partial(parse_train, base=registry[0]), False) if wanted else list(registry)


def parse_released(text: str, base: ReleasedShape = RELEASED[0]) -> ReleasedShape | None:
    """``FRAMES-sSAMPLINGtTEMPORAL``, as in the released models' names, of the model of ``base``."""
    match = re.fullmatch(r"(\d+)-s(\d+)t(\d+)", text)
    if match is None:
        return None
    frames, sampling, temporal = (int(match[i]) for i in (1, 2, 3))
    _check(text, frames=frames, sampling_stride=sampling, temporal_stride=temporal)
    return replace(base, frames=frames, sampling=sampling, temporal=temporal)


def released_shapes(wanted: Iterable[str], on_cpu: bool) -> list[ReleasedShape]:
    """On a CPU of a tiny model."""
    registry, wanted = RELEASED_ON_CPU if on_cpu else RELEASED, list(wanted)
    return select(registry, wanted, partial(parse_released, base=registry[0]), False) if wanted else list(registry)


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


def ragged_mixes(wanted: Iterable[str], on_cpu: bool) -> list[RaggedMix]:
    """Those that ``wanted`` names ("ragged", a pattern or a part of a name that begins so): no run has them unasked."""
    wanted = list(wanted)
    found = _named("ragged", RAGGED, wanted)
    return [mix for mix in found if mix.on_cpu or not on_cpu or "ragged" not in wanted]


def swept_batches(wanted: Iterable[str]) -> list[SweptBatch]:
    """Those that ``wanted`` names ("batches", or as ``ragged_mixes`` takes it): no run has them unasked."""
    return _named("batches", BATCHES, wanted)


def _named(first: str, registry: Sequence, wanted: Iterable[str]) -> list:
    """What those of ``wanted`` that begin so name."""
    wanted = [text for text in wanted if text.startswith(first)]
    return select(registry, wanted, lambda text: None, on_cpu=False) if wanted else []


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
    "attention": ([*ATTENTION, *BATCHES, *RAGGED], parse_attention),
    "ranges": ([*RANGES, *PIECES], parse_attention),
    "pool": (POOL, parse_pool),
    "mix": (MIX, parse_mix),
    "model": ((), parse_frames),
    "decode": (DECODE, parse_decode),
    "train": (TRAIN, parse_train),
    "released": (RELEASED, parse_released),
    "hf": ((), parse_frames),
    "mllama": (MLLAMA, parse_mllama),
}
BACKWARD_OPS = {
    "attention": (ATTENTION_BACKWARD, parse_attention),
    "pool": OPS["pool"],
    "mix": OPS["mix"],
}


def check_shapes(wanted: Iterable[str], ops: Iterable[str], backward: bool = False) -> None:
    """See that each text names a shape of one of ``ops``; ``backward``: of their gradients.

    Raises:
        ValueError: naming the first that doesn't.
    """
    for text in wanted:
        problem, found = "", False
        for op in ops:
            try:
                registry, parse = (BACKWARD_OPS if backward else OPS)[op]
                found |= parse(text) is not None or bool(select(registry, [text], parse, on_cpu=False))
            except ValueError as error:
                problem = str(error)
        if not found:
            raise ValueError(problem or f"{text!r}, want a pattern or a part of a shape's name, or an explicit shape")
