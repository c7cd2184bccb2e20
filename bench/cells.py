"""What every table takes from rows: groups of them, the best of a group, and cells."""

from __future__ import annotations

from .runner import Row, format_us


def best_of(rows: list[Row], kind: str, figure: str = "median_us") -> Row | None:
    timed = [row for row in rows if row.kind == kind and row.ok and getattr(row, figure)]
    return min(timed, key=lambda row: getattr(row, figure), default=None)


def by_shape(rows: list[Row], op: str) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.op == op and row.shape != "all":
            groups.setdefault((row.shape, row.dtype), []).append(row)
    return groups


def time_or_status(row: Row | None) -> str:
    if row is None:
        return ""
    return format_us(row.median_us) if row.ok else status_word(row)


def status_word(row: Row) -> str:
    return row.status.split(":")[0]


def milliseconds(row: Row | None, figure: str = "median_us") -> str:
    """Milliseconds with four digits, or the word for why there are none."""
    if row is None or (row.ok and getattr(row, figure) is None):
        return ""
    return f"{getattr(row, figure) / 1e3:#.4g}".rstrip(".") if row.ok else status_word(row)


ADDED = ("added ms", "p20 .. p80", "added", "pairs")  # the columns of ``added_cells``


def added_cells(row: Row) -> list[str]:
    ms, low, high = (f"{row.added[name] / 1e3:+.3f}" for name in ("median_us", "p20_us", "p80_us"))
    return [ms, f"{low} .. {high}", f"{row.added['percent']:+.1f}%", str(row.added["pairs"])]
