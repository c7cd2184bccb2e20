"""What a run leaves behind: the table in the terminal, the JSON file, and the README's markdown table.

``python -m bench report FILE.json`` prints the markdown, ``--brief`` a shorter one (the README's: the best peer only);
``--plot DIR`` beside it draws the plots (``plots``) again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

from . import backward_tables, parts_tables, verdicts
from .cells import ADDED, added_cells, best_of, by_shape, milliseconds, time_or_status
from .runner import Row, format_us, short

OP_TITLES = {
    "attention": "Attention over slow tokens (ours with gate and mix, peers attention alone)",
    "batches": "A sweep of batches (ours with gate and mix, peers attention alone)",
    "layer": "Slow path of one hybrid layer",
    "kv": "Keys and values of one hybrid layer",
    "ranges": "Growing prefixes: text row i of n sees i / n of the slow tokens (attention alone)",
    "pieces": "Slow tokens in pieces against one range of as many blocks (attention alone)",
    "ragged": "Uneven batches against even ones of as much work (with gate and mix)",
    "pool": "Slow-fast pooling with the slow tokens' norm",
    "mix": "Gate and residual mix alone",
    "attention-step": "Attention, forward + backward (attention alone; peers are given K and V apart)",
    "attention-backward": "Attention, the backward pass alone",
    "pool-step": "Slow-fast pooling, forward + backward",
    "pool-backward": "Slow-fast pooling, the backward pass alone",
    "mix-step": "Gate and residual mix, forward + backward",
    "mix-backward": "Gate and residual mix, the backward pass alone",
    "train": "One optimizer step (batch x text rows x frames): wall time",
    "train-gpu": "One optimizer step: GPU time",
    "prefill": "Model prefill, one video",
    "decode": "Model decode, one token",
    "decode-compiled": "Model decode, one token, the step fused by torch.compile",
    "decode-step": "A decoded token of the base model (batch x tokens in the cache), greedy sampling included",
    "decode-slow": "Model decode, one token: what the slow path adds",
    "prefill-gpu": "Model prefill, one video: GPU time",
    "parts": "Where the time of a prefill's slow path goes: each part on the device, alone",
    "released": "A released model, from a file to its answer",
    "hf-prefill": "transformers, Qwen2 with slow-fast layers: prefill, one video",
    "hf-decode": "transformers, Qwen2 with slow-fast layers: decode, one token, static cache",
    "hf-prefill-gpu": "transformers, Qwen2 with slow-fast layers: prefill, GPU time",
    "hf-decode-gpu": "transformers, Qwen2 with slow-fast layers: decode, GPU time",
    "mllama-prefill": "transformers, Llama-3.2-Vision (text rows x images): prefill",
    "mllama-decode": "transformers, Llama-3.2-Vision (text rows x images): decode, one token, static cache",
    "mllama-prefill-gpu": "transformers, Llama-3.2-Vision (text rows x images): prefill, GPU time",
    "mllama-decode-gpu": "transformers, Llama-3.2-Vision (text rows x images): decode, GPU time",
    "host": "Host time of a call",
    "demo": "Real video: fast backends against eager",
}
SUSTAINED_TITLE = "Sustained, without the rests that keep the clock up in the times above:"
TEXT_COLUMNS = (
    "shape",
    "dtype",
    "best peer",
    "video",
    "backend",
    "met",
    "order",
    "stage",
    "step",
    *backward_tables.TEXT_COLUMNS,
)
MODEL_OPS = ("prefill", "decode", "decode-compiled", "decode-slow", "prefill-gpu")
_POINTS = ("prefill", "decode", "prefill-gpu", "decode-gpu")
PLUGIN_OPS = tuple(f"{models}-{op}" for models in ("hf", "mllama") for op in _POINTS)
COUNTED = {"slow_tokens": "slow tokens", "vision_tokens": "vision tokens"}  # in a row's ``extra``
METHODS = {
    "wall": "Wall time, from a call to its answer.",
    "kernels": "The time in which kernels and copies of a call keep the GPU busy, idle gaps left out (profiler).",
}
PAIRED = (
    "Slow-fast and base LLM were measured in pairs (A B A B): medians, and the median of the pairs' differences with "
    "its 20th and 80th percentile."
)
ALONE = "All tokens: alone, after the pairs."
NOT_PAIRED = (
    "Slow-fast and base LLM were not measured in pairs here, but minutes apart: what the slow path adds can't be told "
    "from these times. `python -m bench model` measures it."
)
BRIEF_OPS = ("attention", "batches", "layer", "pool", "mix")  # those with a choice of backends and peers


def save_json(path: Path, meta: dict, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"meta": meta, "rows": [asdict(row) for row in rows]}, indent=1)
    path.write_text(text + "\n")


def load_json(path: Path) -> tuple[dict, list[Row]]:
    """Of this version or an older one, whose rows lack some fields and whose decode steps were compiled here and there.

    Raises:
        ValueError: no result file, or one of a newer version.
    """
    try:
        data = json.loads(path.read_text())
        meta, rows = data["meta"], data["rows"]
        known = {field.name for field in fields(Row)}
        unknown = sorted({name for row in rows for name in row} - known)
        if unknown:
            raise ValueError(f"rows with {', '.join(unknown)}, which a newer version wrote")
        rows = [Row(**row) for row in rows]
        for row in rows:
            if row.op == "decode" and "torch.compile" in row.variant:
                row.op = "decode-compiled"
        _headline(meta)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise ValueError(f"{path}: got no JSON ({problem}), want a result file of python -m bench") from problem
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise ValueError(f"{path}: got {short(problem)}, want a result file of python -m bench") from problem
    return meta, rows


# ---------------------------------------------------------------------------------------------- tables


def table(rows: list[Row], op: str) -> list[list[str]]:
    """Header and cells of one op: microseconds for each competitor, our share of the ceiling, best peer over ours."""
    groups = by_shape(rows, op)
    names = list(dict.fromkeys(row.who for members in groups.values() for row in members))
    compared = any(best_of(members, "peer") and best_of(members, "ours") for members in groups.values())
    floors = any(row.percent is not None for members in groups.values() for row in members)
    timed = [row for members in groups.values() for row in members]
    added_to = {row.added["to"] for row in timed if row.added}  # these have no peers of their own
    bases = list(dict.fromkeys(row.who for row in timed if row.kind == "base" and row.who not in added_to))
    header = ["shape", "dtype", *(f"{name} us" for name in names)]
    header += ["floor us", "% of ceiling"] * floors + ["best peer / ours"] * compared
    header += [f"best peer / {name}" for name in bases] * compared
    cells = [header]
    for (shape, dtype), members in groups.items():
        of = {row.who: row for row in members}
        line = [shape, dtype]
        line += [time_or_status(of.get(name)) for name in names]
        ours, peer = best_of(members, "ours"), best_of(members, "peer")
        if floors:
            line += (
                [format_us(ours.floor_us), f"{ours.percent:.0f}%"] if ours and ours.percent is not None else ["", ""]
            )
        if compared:
            for held in (ours, *(of.get(name) for name in bases)):
                line.append(f"{peer.median_us / held.median_us:.2f}x" if peer and held and held.ok else "")
        cells.append(line)
    return cells


def _our_kernels(rows: list[Row], op: str) -> list[str]:
    """Names of our backends that have a time, the one that is chosen first."""
    ours = [row.who for row in rows if row.op == op and row.kind == "ours" and row.ok and row.who != "eager"]
    return list(dict.fromkeys(ours))


def brief_table(rows: list[Row], op: str) -> list[list[str]]:
    """Our kernels, the best peer of each shape by name, and both held against the one of ours that is chosen."""
    groups = by_shape(rows, op)
    names = _our_kernels(rows, op)
    several = len({dtype for _, dtype in groups}) > 1
    cells = [["shape", "dtype"] if several else ["shape"]]
    cells[0] += [*(f"{name} us" for name in names), "best peer", "peer us", "floor us", f"best peer / {names[0]}"]
    for (shape, dtype), members in groups.items():
        of, peer = {row.who: row for row in members if row.ok}, best_of(members, "peer")
        line = [shape, dtype] if several else [shape]
        line += [format_us(of[name].median_us) if name in of else "" for name in names]
        line += [peer.who, format_us(peer.median_us)] if peer else ["", ""]
        chosen = of.get(names[0])
        line.append(format_us(chosen.floor_us) if chosen and chosen.floor_us else "")
        line.append(f"{peer.median_us / chosen.median_us:.2f}x" if peer and chosen else "")
        cells.append(line)
    return cells


THROTTLED = 1.03  # a time without rest that is longer by more than this is worth a line


def sustained_table(rows: list[Row], op: str) -> list[list[str]] | None:
    """The chosen kernel of ours against the best peer, both without rest, for the shapes where the rest matters.

    None if there is none: no figures, or none that differs from the time of short bursts.
    """
    groups, names = by_shape(rows, op), _our_kernels(rows, op)[:1]
    several = len({dtype for _, dtype in groups}) > 1
    cells = []
    for (shape, dtype), members in groups.items():
        chosen = best_of([row for row in members if row.who in names], "ours", "sustained_us")
        peer = best_of(members, "peer", "sustained_us")
        if chosen and peer and any(row.sustained_us > THROTTLED * row.median_us for row in (chosen, peer)):
            us, peer_us = chosen.sustained_us, peer.sustained_us
            line = [shape, dtype] if several else [shape]
            cells.append([*line, format_us(us), peer.who, format_us(peer_us), f"{peer_us / us:.2f}x"])
    if not cells:
        return None
    header = ["shape", "dtype"] if several else ["shape"]
    return [[*header, f"{names[0]} us", "best peer", "peer us", f"best peer / {names[0]}"], *cells]


def model_table(rows: list[Row], op: str) -> list[list[str]]:
    """Milliseconds against frames; what slow-fast adds to the base LLM only where it was measured in pairs."""
    groups = by_shape(rows, op)
    kinds = {row.who: row.kind for members in groups.values() for row in members}
    pair, alone = ([who for who, kind in kinds.items() if (kind == "peer") == peer] for peer in (False, True))
    several = len({dtype for _, dtype in groups}) > 1
    counted = any("slow_tokens" in row.extra for members in groups.values() for row in members)
    paired = any(row.added for members in groups.values() for row in members)
    work = parts_tables.WORK * any("model_flops" in row.extra for members in groups.values() for row in members)
    memory = [parts_tables.MEMORY] * any(
        "transient_bytes" in row.extra for members in groups.values() for row in members
    )
    read = paired and any("slow_read_us" in row.extra for members in groups.values() for row in members)
    header = ["frames", *["dtype"] * several, *["slow tokens"] * counted, *(f"{who} ms" for who in pair)]
    cells = [[*header, *ADDED * paired, *[OF_READ] * read, *work, *memory, *(f"{who} ms" for who in alone), "floor ms"]]
    for (shape, dtype), members in groups.items():
        of = {row.who: row for row in members}
        ours = of.get("slow-fast")
        line = [shape.removesuffix(" frames"), *[dtype] * several]
        line += [str(members[0].extra.get("slow_tokens", ""))] * counted
        line += [milliseconds(of.get(who)) for who in pair]
        line += (added_cells(ours) if ours and ours.added else ["-"] * len(ADDED)) * paired
        line += [_of_read(ours)] * read
        line += parts_tables.work_cells(members) if work else []
        line += [parts_tables.mebibytes(ours)] if memory else []
        line += [milliseconds(of.get(who)) for who in alone]
        cells.append([*line, milliseconds(ours, "floor_us") if ours and ours.ok else ""])
    return cells


def plugin_table(rows: list[Row], op: str) -> list[list[str]]:
    """A line a contender: milliseconds, and what it adds to the base's turn by turn (less than 0: what it saves)."""
    groups = by_shape(rows, op)
    counts = sorted({name for members in groups.values() for row in members for name in row.extra} & set(COUNTED))
    is_step = any("how" in row.extra for members in groups.values() for row in members)
    cells = [
        ["shape", "dtype", *(COUNTED[name] for name in counts), "who", "ms", *ADDED, "floor ms", *["step"] * is_step]
    ]
    for (shape, dtype), members in groups.items():
        for row in members:
            line = [shape, dtype, *(str(row.extra.get(name, "")) for name in counts), row.who, milliseconds(row)]
            line += added_cells(row) if row.added else [""] * len(ADDED)
            cells.append(
                [*line, milliseconds(row, "floor_us") if row.ok else "", *[row.extra.get("how", "")] * is_step]
            )
    return cells


def _of_the_plugin(rows: list[Row], op: str) -> str:
    """What one has to know to read a ``plugin_table``."""
    timed = [row for row in rows if row.op == op and row.ok]
    base = next((row.added["to"] for row in timed if row.added), None)
    said = [METHODS.get(timed[0].method, "") if timed else "", f"All took turns; added: to {base}." if base else ""]
    return " ".join(filter(None, said))


OF_READ = "added / slow cache's read"


def _of_read(row: Row | None) -> str:
    """What the slow path adds to a decode step, in times of one read of its keys and values."""
    if row is None or not row.added or "slow_read_us" not in row.extra:
        return "-"
    return f"{row.added['median_us'] / row.extra['slow_read_us']:.2f}x"


def _how_measured(rows: list[Row], op: str) -> str | None:
    """What one has to know of a model's times to read them."""
    ours = [row for row in rows if row.op == op and row.kind == "ours" and row.ok]
    if not ours:
        return None
    if not any(row.added for row in ours):
        return NOT_PAIRED
    alone = any(row.op == op and row.kind == "peer" for row in rows)
    both = parts_tables.BOTH_SIDES * any("model_flops" in row.extra for row in ours)
    return " ".join(filter(None, [METHODS.get(ours[0].method, ""), PAIRED, both, ALONE * alone]))


NOTES_OF = dict.fromkeys(MODEL_OPS, _how_measured) | dict.fromkeys(PLUGIN_OPS, _of_the_plugin)


def demo_table(rows: list[Row]) -> list[list[str]]:
    """What the real video showed: each backend against eager."""
    compared = ["largest difference of logits", "equal greedy ids", "largest gap of an id"]
    cells = [["video", "dtype", "backend", *compared, "us a token"]]
    for row in rows:
        if row.op == "demo" and "ids" in row.extra:
            ids = f"{row.extra['equal_ids']} of {row.extra['ids']}"
            difference = f"{row.extra['max_difference']:.2g}"
            gap = f"{row.extra['largest_gap']:.2g}" if "largest_gap" in row.extra else "-"
            cells.append([row.shape, row.dtype, row.who, difference, ids, gap, format_us(row.median_us)])
    return cells


def stages_table(rows: list[Row]) -> list[list[str]]:
    """A line a stage of a released model: its time, and the memory that it adds to what lay there before it."""
    mine = [row for row in rows if row.op == "released" and row.shape != "all"]
    measured = any("peak_bytes" in row.extra for row in mine)
    cells = [["shape", "dtype", "stage", "ms", "p20 .. p80", *["held GiB", "peak GiB"] * measured]]
    for row in mine:
        spread = f"{milliseconds(row, 'p20_us')} .. {milliseconds(row, 'p80_us')}" if row.ok else ""
        memory = [
            f"{row.extra[name] / 2**30:.2f}" if name in row.extra else "" for name in ("held_bytes", "peak_bytes")
        ]
        cells.append([row.shape, row.dtype, row.who, milliseconds(row), spread, *memory * measured])
    return cells


def _plain(cells: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(x.ljust(w) if i < 2 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )


def _markdown(cells: list[list[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    rule = "|" + "|".join("---" if name in TEXT_COLUMNS else "---:" for name in cells[0]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _not_measured(rows: list[Row]) -> list[str]:
    """One line for each reason that something has no number."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if not row.ok:
            where = row.op if row.shape == "all" else f"{row.op} {row.shape}"
            reasons.setdefault((row.who, row.status), []).append(where)
    lines = []
    for (who, status), places in reasons.items():
        places = list(dict.fromkeys(places))
        where = ", ".join(places) if len(places) <= 4 else f"{', '.join(places[:3])} and {len(places) - 3} more"
        lines.append(f"{who} {status} ({where})")
    return lines


def _headline(meta: dict) -> list[str]:
    ceilings = meta["ceilings"]
    versions = ", ".join(f"{name} {meta[name]}" for name in ("torch", "triton", "cuda", "driver", "commit"))
    gemm = ", ".join(f"GEMM {dtype} {value:.4g} TFLOP/s" for dtype, value in ceilings["gemm_tflops"].items())
    bandwidth = f"read {ceilings['read_gbps']:.0f} GB/s, copy {ceilings['copy_gbps']:.0f} GB/s"
    return [
        f"{meta['device']}, {versions}, {meta['date']}",
        f"Ceilings measured in this run: {bandwidth}, {gemm}",
        *([f"`{meta['command']}`"] if "command" in meta else []),
        *(["Stopped before its end: rows are missing."] if "stopped" in meta else []),
    ]


def _render(
    meta: dict, rows: list[Row], heading: str, draw: Callable[[list[list[str]]], str], bullet: str, brief: bool = False
) -> str:
    parts = ["\n".join(_headline(meta))]
    for op, title in OP_TITLES.items():
        if by_shape(rows, op):
            if op in MODEL_OPS:
                cells = model_table(rows, op)
            elif op == "parts":
                cells = parts_tables.table(rows)
            elif op in PLUGIN_OPS:
                cells = plugin_table(rows, op)
            elif op in verdicts.OPS:
                cells = verdicts.table(rows, op)
            elif op in backward_tables.TABLES:
                cells = backward_tables.TABLES[op](rows, op, brief)
            elif brief and op in BRIEF_OPS:
                cells = brief_table(rows, op)
            else:
                own = {"demo": demo_table, "released": stages_table}.get(op)
                cells = own(rows) if own else table(rows, op)
            how = NOTES_OF.get(op, backward_tables.note)(rows, op)
            said = f"{how}\n\n" if how else ""
            parts.append(f"{heading}{title}\n\n{said}{draw(cells)}")
            sustained = sustained_table(rows, op)
            if sustained:
                parts.append(f"{SUSTAINED_TITLE}\n\n{draw(sustained)}")
    missing = _not_measured(rows)
    if missing:
        parts.append(f"{heading}Not measured\n\n" + "\n".join(bullet + line for line in missing))
    return "\n\n".join(parts)


def terminal(meta: dict, rows: list[Row]) -> str:
    return _render(meta, rows, "== ", _plain, "  ")


def markdown(meta: dict, rows: list[Row], brief: bool = False) -> str:
    return _render(meta, rows, "### ", _markdown, "- ", brief)
