"""A prefill's slow path in parts, from a run's rows: what was timed, what follows from it, what it adds in FLOP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .cells import by_shape
from .parts import ATTENTION, FUSED, KV, LAST, OP, POOL, PROJECTOR
from .runner import Row, format_us

GATE_AND_MIX, HOST = "gate and mix", "host and the rest"
PARTS = {KV: "#1f5fb4", ATTENTION: "#2a7f2a", GATE_AND_MIX: "#e08214", HOST: "#d62728"}
PARTS |= {LAST: "#76b7e0", POOL: "#8c8c8c", PROJECTOR: "#bbbbbb"}
ON_BOTH_SIDES = (PROJECTOR, POOL)
WORK = ("TFLOP", "added FLOP")
MEMORY = "over caches MiB"
MOST_OF_FLOOR, HELD_FROM = 1.15, 1536  # what the slow path's parts together are held to, and from how many frames on
BOTH_SIDES = "Both have the video, its projector and its fast tokens; FLOP are those of `torch.utils.flop_counter`."


class Point(NamedTuple):
    """A prefill of so many frames. Microseconds by ``PARTS``; percent that the slow path adds, None: not measured."""

    frames: int
    us: dict[str, float]
    base_us: float | None  # the base LLM's prefill
    wall_percent: float | None
    gpu_percent: float | None
    flop_percent: float | None


def _flop_percent(members: Sequence[Row]) -> float | None:
    flops = {row.kind: row.extra["model_flops"] for row in members if "model_flops" in row.extra}
    return 100 * (flops["ours"] / flops["base"] - 1) if {"ours", "base"} <= set(flops) else None


def work_cells(members: Sequence[Row]) -> list[str]:
    """The columns ``WORK`` of the rows of one shape."""
    ours = next((row.extra.get("model_flops") for row in members if row.kind == "ours"), None)
    percent = _flop_percent(members)
    return ["" if ours is None else f"{ours / 1e12:.4g}", "" if percent is None else f"{percent:+.2f}%"]


def mebibytes(row: Row | None) -> str:
    """Memory that a prefill takes over weights and what it leaves."""
    held = None if row is None else row.extra.get("transient_bytes")
    return "" if held is None else f"{held / 2**20:.0f}"


def _of(rows: list[Row], op: str, shape: str, dtype: str) -> dict[str, Row]:
    return {row.who: row for row in by_shape(rows, op).get((shape, dtype), []) if row.ok}


def split(rows: list[Row]) -> list[Point]:
    """The points of the first dtype that has parts, by frames.

    Gate and mix are what the one op takes beyond its attention alone; the host's is what the pair's wall time adds
    beyond the slow path's parts, which includes what these lose by not being alone.
    """
    points = []
    groups = by_shape(rows, OP)
    for shape, dtype in groups:
        of = _of(rows, OP, shape, dtype)
        if dtype != next(iter(groups))[1] or not {POOL, KV, ATTENTION, FUSED, PROJECTOR, LAST} <= set(of):
            continue
        us = {name: of[name].median_us for name in (PROJECTOR, POOL, KV, ATTENTION)}
        us[LAST] = of[LAST].median_us * of[LAST].extra["beyond_base"]
        us[GATE_AND_MIX] = max(0.0, of[FUSED].median_us - us[ATTENTION])
        prefill = _of(rows, "prefill", shape, dtype)
        wall, gpu = prefill.get("slow-fast"), _of(rows, "prefill-gpu", shape, dtype).get("slow-fast")
        added = wall.added if wall is not None else None
        if added:
            us[HOST] = max(0.0, added["median_us"] - us[LAST] - us[KV] - of[FUSED].median_us)
        points.append(
            Point(
                int(shape.split()[0]),
                us,
                next((row.median_us for row in prefill.values() if row.kind == "base"), None),
                added["percent"] if added else None,
                gpu.added["percent"] if gpu is not None and gpu.added else None,
                _flop_percent(list(prefill.values())),
            )
        )
    return sorted(points)


def table(rows: list[Row]) -> list[list[str]]:
    """A line for each part of each shape: microseconds, the floor, and how far above it.

    The slow path's line sums them up, says whether a long prefill is within ``MOST_OF_FLOOR``, and has the memory that
    the whole prefill takes over weights and what it leaves, where a GPU told it.
    """
    groups = by_shape(rows, OP)
    ours = {key: _of(rows, "prefill", *key).get("slow-fast") for key in groups}
    memory = [MEMORY] * any(mebibytes(row) for row in ours.values())
    held = f"<= {MOST_OF_FLOOR:.2f}x"
    cells = [["frames", "dtype", "part", "us", "floor us", "of the floor", held, *memory, "order"]]
    for (shape, dtype), members in groups.items():
        frames = shape.removesuffix(" frames")
        blank = ["", *[""] * len(memory)]
        for row in members:
            if not row.ok:
                cells.append([frames, dtype, row.who, row.status.split(":")[0], "", "", *blank, ""])
                continue
            line = [frames, dtype, row.who, format_us(row.median_us), format_us(row.floor_us)]
            cells.append([*line, f"{row.median_us / row.floor_us:.2f}x", *blank, row.variant])
        timed = {row.who: row for row in members if row.ok}
        whole = [timed[name] for name in (LAST, POOL, KV, FUSED) if name in timed]
        if len(whole) == 4:
            us, floor = (sum(getattr(row, name) for row in whole) for name in ("median_us", "floor_us"))
            line = [frames, dtype, "slow path", format_us(us), format_us(floor), f"{us / floor:.2f}x"]
            line.append(("yes" if us <= MOST_OF_FLOOR * floor else "no") if int(frames) >= HELD_FROM else "")
            cells.append([*line, *[mebibytes(ours[shape, dtype])] * len(memory), ""])
    return cells
