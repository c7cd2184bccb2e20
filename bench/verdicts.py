"""What calls with ranges, with pieces and over uneven batches are held to: calls of ours, timed in turns with them.

A backend's row has others beside it, named after it, of kind "base". From them follow, for each backend:
ranges: t <= 1.10 x [t(all empty) + share x (t(full) - t(all empty))], ``share`` being the part of its (tile, block)
pairs in which some row sees a token, and twice the speed of the best peer under a mask; pieces: within 5% of one range
of as many blocks; ragged: within 15% of an even batch of as much work.
"""

from __future__ import annotations

from collections.abc import Iterator

from .runner import Row, format_us

RANGES_FACTOR, PEER_FACTOR = 1.10, 2.0
MOST_RATIO = {"pieces": 1.05, "ragged": 1.15}
OPS = ("ranges", *MOST_RATIO)


FULL, EMPTY, ONE_RANGE, EVEN = "full", "empty", "one-range", "even"
BASES = {"pieces": ONE_RANGE, "ragged": EVEN}


def beside(backend: str, what: str) -> str:
    """The name of a row that the backend's own is held to."""
    return f"{backend}-{what}"


def _groups(rows: list[Row], op: str) -> Iterator[tuple[dict[str, Row], list[Row]]]:
    """Of each shape and dtype: rows by who, and those of our backends."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row.op == op and row.shape != "all":
            groups.setdefault((row.shape, row.dtype), {})[row.who] = row
    for of in groups.values():
        yield of, [row for row in of.values() if row.kind == "ours"]


def range_verdict(of: dict[str, Row], backend: str) -> dict[str, float | str | bool]:
    """What a backend's row of growing prefixes is held to; empty where a time that it takes is not there."""
    ours, full, empty = (of.get(who) for who in (backend, beside(backend, FULL), beside(backend, EMPTY)))
    verdict: dict[str, float | str | bool] = {}
    if ours is None or not ours.ok:
        return verdict
    if full and empty and full.ok and empty.ok and "share" in ours.extra:
        target = RANGES_FACTOR * (empty.median_us + ours.extra["share"] * (full.median_us - empty.median_us))
        verdict |= {"target_us": round(target, 3), "meets_target": ours.median_us <= target}
    peers = [row for row in of.values() if row.kind == "peer" and row.ok]
    if peers:
        best = min(peers, key=lambda row: row.median_us)
        lead = best.median_us / ours.median_us
        verdict |= {"best_peer": best.who, "lead": round(lead, 3), "meets_lead": lead >= PEER_FACTOR}
    return verdict


def ratio(of: dict[str, Row], row: Row) -> float | None:
    """Time of a backend's row of pieces or of an uneven batch over that of the row beside it."""
    base = of.get(beside(row.who, BASES[row.op]))
    return row.median_us / base.median_us if row.ok and base and base.ok else None


def complete(rows: list[Row]) -> None:
    """Write the verdicts into the ``extra`` of our rows."""
    for of, ours in _groups(rows, "ranges"):
        for row in ours:
            row.extra |= range_verdict(of, row.who)
    for op, most in MOST_RATIO.items():
        for of, ours in _groups(rows, op):
            for row in ours:
                if (found := ratio(of, row)) is not None:
                    row.extra |= {"ratio": round(found, 4), "meets_target": found <= most}


# ---------------------------------------------------------------------------------------------- tables


def _us(row: Row | None) -> str:
    if row is None:
        return ""
    return format_us(row.median_us) if row.ok else row.status.split(":")[0]


def _mark(holds: bool) -> str:
    return "yes" if holds else "no"


def table(rows: list[Row], op: str) -> list[list[str]]:
    """Header and cells, one line a backend."""
    if op == "ranges":
        return _ranges_table(rows)
    base, most = BASES[op], MOST_RATIO[op]
    cells = [["shape", "dtype", "backend", "us", f"{base} us", "ratio", f"<= {most:.2f}"]]
    for of, ours in _groups(rows, op):
        for row in ours:
            line = [row.shape, row.dtype, row.who, _us(row), _us(of.get(beside(row.who, base)))]
            found = ratio(of, row)
            line += ["", ""] if found is None else [f"{found:.3f}", _mark(found <= most)]
            cells.append(line)
    return cells


def _ranges_table(rows: list[Row]) -> list[list[str]]:
    header = ["shape", "dtype", "backend", "us", "full us", "empty us", "share", "target us", "met"]
    cells = [[*header, "best peer", "peer us", "peer / ours"]]
    for of, ours in _groups(rows, "ranges"):
        for row in ours:
            found = range_verdict(of, row.who)
            share = f"{row.extra['share']:.3f}" if "share" in row.extra else ""
            line = [row.shape, row.dtype, row.who, _us(row), _us(of.get(beside(row.who, FULL)))]
            line += [_us(of.get(beside(row.who, EMPTY))), share]
            target = "target_us" in found
            line += [format_us(found["target_us"]), _mark(found["meets_target"])] if target else ["", ""]
            peer = of.get(found.get("best_peer", ""))
            line += [peer.who, _us(peer), f"{found['lead']:.2f}x"] if peer else ["", "", ""]
            cells.append(line)
    return cells
