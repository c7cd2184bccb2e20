"""Tables of gradients and of training: a line a competitor, or (brief) a line a shape with the best peers by name."""

from __future__ import annotations

from collections.abc import Sequence

from .cells import ADDED, added_cells, best_of, by_shape, milliseconds, time_or_status
from .runner import Row, format_us

TEXT_COLUMNS = ("who", "how", "step", "deterministic peer", "unpacked peer", "same bits", "ours: same bits")
# What a call may add to its inputs on a GPU: a little more than its results, and something for small ones.
MEMORY_FACTOR, MEMORY_BYTES = 1.15, 64 << 20


PEAK = f"Memory is over the inputs; allowed are {MEMORY_FACTOR} x results + {MEMORY_BYTES >> 20} MiB."
TURNS = "All took turns; `added` is the median of the turns' differences to a step without a slow path."
SAVED = "A layer saves what the layers before it do not hold already; figures are of the hybrid layers in their order."
HELD = "Held are weights, optimizer and batch."
TIMES = {"train": "Wall time.", "train-gpu": "The time in which kernels and copies keep the GPU busy (profiler)."}


def note(rows: Sequence[Row], op: str) -> str:
    """What one has to know to read the table of ``op``."""
    seen = {name for row in rows if row.op == op for name in row.extra}
    if op not in TIMES:
        return PEAK * ("peak_bytes" in seen)
    said = [TIMES[op], TURNS, HELD * ("held_bytes" in seen), SAVED * ("saved_bytes" in seen)]
    return " ".join(filter(None, said))


def allowed_bytes(row: Row) -> float | None:
    results = row.extra.get("result_bytes")
    return None if results is None else MEMORY_FACTOR * results + MEMORY_BYTES


def _mib(count: float | None) -> str:
    return "" if count is None else f"{count / 2**20:.0f}"


def _yes(holds: bool | None) -> str:
    return "" if holds is None else "yes" if holds else "no"


def gradients_table(rows: Sequence[Row], op: str, brief: bool) -> list[list[str]]:
    """Header and cells of a step or of a backward pass."""
    return _brief(rows, op) if brief else _full(rows, op)


def _full(rows: Sequence[Row], op: str) -> list[list[str]]:
    mine = [row for row in rows if row.op == op]
    has_peak = any("peak_bytes" in row.extra for row in mine)
    memory = ["peak MiB", "results MiB"] * has_peak
    cells = [["shape", "dtype", "who", "how", "us", "floor us", "% of ceiling", *memory, "error", "same bits"]]
    for (shape, dtype), members in by_shape(list(rows), op).items():
        for row in members:
            share = "" if row.percent is None else f"{row.percent:.0f}%"
            line = [shape, dtype, row.who, row.variant, time_or_status(row), format_us(row.floor_us), share]
            line += [_mib(row.extra.get(name)) for name in ("peak_bytes", "result_bytes")] * has_peak
            line += ["" if row.error is None else f"{row.error:.1e}", _yes(row.extra.get("same_bits"))]
            cells.append(line)
    return cells


def _brief(rows: Sequence[Row], op: str) -> list[list[str]]:
    """Ours by name and the best peers, held against the automatic choice."""
    groups = by_shape(list(rows), op)
    every = [row for members in groups.values() for row in members]
    names = list(dict.fromkeys(row.who for row in every if row.kind == "ours"))
    several = len({dtype for _, dtype in groups}) > 1
    has_modes = any(row.extra.get("deterministic") for row in every)
    has_packed = any(row.extra.get("packed") for row in every)
    has_peak = any("peak_bytes" in row.extra for row in every)
    header = ["shape", *["dtype"] * several, *(f"{name} us" for name in names), "best peer", "peer us"]
    header += ["unpacked peer", "unpacked us"] * has_packed + ["deterministic peer", "its us"] * has_modes
    header += ["floor us", "% of ceiling", "best peer / auto"]
    header += ["auto MiB", "allowed MiB", "peer MiB"] * has_peak + ["ours: same bits"]
    cells = [header]
    for (shape, dtype), members in groups.items():
        of = {row.who: row for row in members}
        auto, peer = of.get("auto"), best_of(members, "peer")
        auto = auto if auto and auto.ok else None
        mode = best_of([row for row in members if row.extra.get("deterministic")], "peer")
        line = [shape, *[dtype] * several, *(time_or_status(of.get(name)) for name in names), *_named(peer)]
        line += _named(best_of([row for row in members if not row.extra.get("packed")], "peer")) * has_packed
        line += _named(mode) * has_modes
        line += [format_us(auto.floor_us) if auto else "", f"{auto.percent:.0f}%" if auto and auto.percent else ""]
        line.append(f"{peer.median_us / auto.median_us:.2f}x" if auto and peer else "")
        if has_peak:
            line += [_mib(auto.extra.get("peak_bytes")), _mib(allowed_bytes(auto))] if auto else ["", ""]
            line.append(_mib(peer.extra.get("peak_bytes")) if peer else "")
        told = [row.extra["same_bits"] for row in members if row.kind == "ours" and "same_bits" in row.extra]
        cells.append([*line, _yes(all(told) if told else None)])
    return cells


def _named(row: Row | None) -> list[str]:
    return [row.who, format_us(row.median_us)] if row else ["", ""]


def train_table(rows: Sequence[Row], op: str, brief: bool) -> list[list[str]]:
    """Milliseconds of a step, what it adds to one without a slow path in pairs, and what memory it takes."""
    groups = by_shape(list(rows), op)
    every = [row for members in groups.values() for row in members]
    has_peak = any("peak_bytes" in row.extra for row in every)
    has_saved = any("saved_bytes" in row.extra for row in every)
    memory = ["held GiB", "peak GiB over it"] * has_peak + ["hybrid layers save MiB"] * has_saved
    cells = [["step", "dtype", "who", "ms", "floor ms", *ADDED, *memory]]
    for (shape, dtype), members in groups.items():
        for row in members:
            floor = milliseconds(row, "floor_us") if row.ok else ""
            line = [shape, dtype, row.who, milliseconds(row), floor]
            line += added_cells(row) if row.added else [""] * len(ADDED)
            sizes = (row.extra.get(name) for name in ("held_bytes", "peak_bytes"))
            line += ["" if size is None else f"{size / 2**30:.1f}" for size in sizes] * has_peak
            line += [" / ".join(map(_mib, row.extra.get("saved_bytes", ())))] * has_saved
            cells.append(line)
    return cells


TABLES = {f"{op}-{part}": gradients_table for op in ("attention", "pool", "mix") for part in ("step", "backward")}
TABLES |= {"train": train_table, "train-gpu": train_table}
