"""What a run leaves behind: the table in the terminal, the JSON file, PNG plots, and the README's markdown table.

``python -m bench report FILE.json`` prints the markdown, ``--brief`` a shorter one (the README's: the best peer only);
``--plot DIR`` beside it draws the plots again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

from .runner import Row, format_us, short

OP_TITLES = {
    "attention": "Attention over slow tokens (ours with gate and mix, peers attention alone)",
    "layer": "Slow path of one hybrid layer",
    "kv": "Keys and values of one hybrid layer",
    "pool": "Slow-fast pooling with the slow tokens' norm",
    "mix": "Gate and residual mix alone",
    "prefill": "Model prefill, one video",
    "decode": "Model decode, one token",
    "decode-compiled": "Model decode, one token, the step fused by torch.compile",
    "prefill-gpu": "Model prefill, one video: GPU time",
    "host": "Host time of a call",
    "demo": "Real video: fast backends against eager",
}
SUSTAINED_TITLE = "Sustained, without the rests that keep the clock up in the times above:"
TEXT_COLUMNS = ("shape", "dtype", "best peer", "video", "backend")
MODEL_OPS = ("prefill", "decode", "decode-compiled", "prefill-gpu")
METHODS = {
    "wall": "Wall time, from a call to its answer.",
    "kernels": "The time in which kernels and copies of a call keep the GPU busy, idle gaps left out (profiler).",
}
PAIRED = (
    "Slow-fast and base LLM were measured in pairs (A B A B): medians, and the median of the pairs' differences with "
    "its 20th and 80th percentile."
)
ALONE = "All tokens: alone, after the pairs."
ADDED = ["added ms", "p20 .. p80", "added", "pairs"]
NOT_PAIRED = (
    "Slow-fast and base LLM were not measured in pairs here, but minutes apart: what the slow path adds can't be told "
    "from these times. `python -m bench model` measures it."
)
BRIEF_OPS = ("attention", "layer", "pool", "mix")  # those with a choice of backends and peers


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


def best_of(rows: list[Row], kind: str, figure: str = "median_us") -> Row | None:
    timed = [row for row in rows if row.kind == kind and row.ok and getattr(row, figure)]
    return min(timed, key=lambda row: getattr(row, figure), default=None)


def _by_shape(rows: list[Row], op: str) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.op == op and row.shape != "all":
            groups.setdefault((row.shape, row.dtype), []).append(row)
    return groups


def _time_or_status(row: Row | None) -> str:
    if row is None:
        return ""
    return format_us(row.median_us) if row.ok else _status_word(row)


def _status_word(row: Row) -> str:
    return row.status.split(":")[0]


def table(rows: list[Row], op: str) -> list[list[str]]:
    """Header and cells of one op: microseconds for each competitor, our share of the ceiling, best peer over ours."""
    groups = _by_shape(rows, op)
    names = list(dict.fromkeys(row.who for members in groups.values() for row in members))
    compared = any(best_of(members, "peer") and best_of(members, "ours") for members in groups.values())
    floors = any(row.percent is not None for members in groups.values() for row in members)
    header = ["shape", "dtype", *(f"{name} us" for name in names)]
    header += ["floor us", "% of ceiling"] * floors + ["best peer / ours"] * compared
    cells = [header]
    for (shape, dtype), members in groups.items():
        of = {row.who: row for row in members}
        line = [shape, dtype]
        line += [_time_or_status(of.get(name)) for name in names]
        ours, peer = best_of(members, "ours"), best_of(members, "peer")
        if floors:
            line += (
                [format_us(ours.floor_us), f"{ours.percent:.0f}%"] if ours and ours.percent is not None else ["", ""]
            )
        if compared:
            line.append(f"{peer.median_us / ours.median_us:.2f}x" if ours and peer else "")
        cells.append(line)
    return cells


def _our_kernels(rows: list[Row], op: str) -> list[str]:
    """Names of our backends that have a time, the one that is chosen first."""
    ours = [row.who for row in rows if row.op == op and row.kind == "ours" and row.ok and row.who != "eager"]
    return list(dict.fromkeys(ours))


def brief_table(rows: list[Row], op: str) -> list[list[str]]:
    """Our kernels, the best peer of each shape by name, and both held against the one of ours that is chosen."""
    groups = _by_shape(rows, op)
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
    groups, names = _by_shape(rows, op), _our_kernels(rows, op)[:1]
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


def _cell(row: Row | None, figure: str = "median_us") -> str:
    """Milliseconds with four digits, or the word for why there are none."""
    if row is None or (row.ok and getattr(row, figure) is None):
        return ""
    return f"{getattr(row, figure) / 1e3:#.4g}".rstrip(".") if row.ok else _status_word(row)


def model_table(rows: list[Row], op: str) -> list[list[str]]:
    """Milliseconds against frames; what slow-fast adds to the base LLM only where it was measured in pairs."""
    groups = _by_shape(rows, op)
    kinds = {row.who: row.kind for members in groups.values() for row in members}
    pair, alone = ([who for who, kind in kinds.items() if (kind == "peer") == peer] for peer in (False, True))
    several = len({dtype for _, dtype in groups}) > 1
    counted = any("slow_tokens" in row.extra for members in groups.values() for row in members)
    paired = any(row.added for members in groups.values() for row in members)
    header = ["frames", *["dtype"] * several, *["slow tokens"] * counted, *(f"{who} ms" for who in pair)]
    cells = [[*header, *ADDED * paired, *(f"{who} ms" for who in alone), "floor ms"]]
    for (shape, dtype), members in groups.items():
        of = {row.who: row for row in members}
        ours = of.get("slow-fast")
        line = [shape.removesuffix(" frames"), *[dtype] * several]
        line += [str(members[0].extra.get("slow_tokens", ""))] * counted
        line += [_cell(of.get(who)) for who in pair]
        line += (_added(ours) if ours and ours.added else ["-"] * len(ADDED)) * paired
        line += [_cell(of.get(who)) for who in alone]
        cells.append([*line, _cell(ours, "floor_us") if ours and ours.ok else ""])
    return cells


def _added(row: Row) -> list[str]:
    ms, low, high = (f"{row.added[name] / 1e3:+.3f}" for name in ("median_us", "p20_us", "p80_us"))
    return [ms, f"{low} .. {high}", f"{row.added['percent']:+.1f}%", str(row.added["pairs"])]


def _how_measured(rows: list[Row], op: str) -> str | None:
    """What one has to know of a model's times to read them."""
    ours = [row for row in rows if row.op == op and row.kind == "ours" and row.ok]
    if not ours:
        return None
    if not any(row.added for row in ours):
        return NOT_PAIRED
    alone = any(row.op == op and row.kind == "peer" for row in rows)
    return " ".join([METHODS.get(ours[0].method, ""), PAIRED, ALONE * alone]).strip()


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
    ]


def _render(
    meta: dict, rows: list[Row], heading: str, draw: Callable[[list[list[str]]], str], bullet: str, brief: bool = False
) -> str:
    parts = ["\n".join(_headline(meta))]
    for op, title in OP_TITLES.items():
        if _by_shape(rows, op):
            if op in MODEL_OPS:
                cells = model_table(rows, op)
            elif brief and op in BRIEF_OPS:
                cells = brief_table(rows, op)
            else:
                cells = demo_table(rows) if op == "demo" else table(rows, op)
            said = f"{how}\n\n" if op in MODEL_OPS and (how := _how_measured(rows, op)) else ""
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


# ----------------------------------------------------------------------------------------------- plots


def plot(directory: Path, meta: dict, rows: list[Row]) -> list[Path]:
    """Draw what the rows allow; returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in (("attention", _plot_attention), ("pool_mix", _plot_share), ("model", _plot_model)):
        figure = draw(plt, rows)
        if figure is None:
            continue
        figure.suptitle(
            f"{meta['device']}   torch {meta['torch']}   {meta['commit']}   {meta['date']}", fontsize=8, color="0.4"
        )
        path = directory / f"{name}.png"
        figure.savefig(path, dpi=150, bbox_inches="tight")
        plt.close(figure)
        written.append(path)
    return written


_COLOURS = {"cuda": "#2a7f2a", "triton": "#1f5fb4", "cpu": "#c03a2b", "eager": "#8a8a8a", "slow-fast": "#2a7f2a"}
_COLOURS |= {"torch": "#e08214", "torch-compile": "#8073ac", "base LLM": "#1f77b4", "all tokens": "#ff7f0e"}
_COLOURS |= {"sdpa-flash": "#17becf", "sdpa-cudnn": "#ff7f0e", "sdpa-efficient": "#bcbd22", "sdpa-math": "#d62728"}
_COLOURS |= {"fa4": "#9467bd", "fa3": "#e377c2", "fa2": "#7f7f7f", "flex": "#8c564b"}


def _style(row: Row) -> dict:
    """Ours thick, peers thin and dashed; a colour for each name, so that panels agree."""
    if row.kind == "ours":
        return {"linewidth": 2.2, "marker": "o", "markersize": 4, "color": _COLOURS.get(row.who)}
    return {"linewidth": 1.1, "marker": ".", "linestyle": "--", "color": _COLOURS.get(row.who)}


def _value_ticks(low: float, high: float) -> list[float]:
    """Round numbers on a log axis from ``low`` to ``high``, enough of them to read a value off by."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    if high < 8 * low:  # too few powers of ten, and their multiples, fall in between
        locator = MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10])
    else:
        locator = LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,), numticks=100)
    return [float(tick) for tick in locator.tick_values(low, high) if low <= tick <= high]


def _finish_axis(axis, xlabel: str, ylabel: str, title: str) -> None:
    """Log-log with plain numbers, a tick at each measured x and round ones to read values off."""
    xs = sorted({float(x) for line in axis.get_lines() for x in line.get_xdata()})
    axis.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    axis.set_xticks(xs, [f"{x:g}" for x in xs], rotation=45, fontsize=7)
    ticks = _value_ticks(*axis.get_ylim())
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    axis.minorticks_off()
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.3, linewidth=0.5)


def _legend_below(figure, axes) -> None:
    """One legend for all panels, where it covers no curve."""
    lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(10, len(lines)), fontsize=7)


def _first_dtype(rows: list[Row], op: str) -> str | None:
    return next((row.dtype for row in rows if row.op == op and row.ok), None)


def _plot_attention(plt, rows: list[Row]):
    """Time against slow tokens, one panel for each number of text rows; the measured roofline below the curves."""
    dtype = _first_dtype(rows, "attention")
    points: dict[tuple[int, str], dict[str, list]] = {}
    for row in rows:
        match = re.fullmatch(r"1x(\d+)x(\d+)@(\d+/\d+/\d+)", row.shape)
        if row.op == "attention" and row.ok and row.dtype == dtype and match:
            panel = points.setdefault((int(match[1]), match[3]), {})
            panel.setdefault(row.who, []).append((int(match[2]), row))
    panels = sorted(key for key, who in points.items() if max(map(len, who.values())) > 1)
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.4), squeeze=False, layout="constrained")
    for axis, key in zip(axes[0], panels, strict=True):
        floors = {}
        for who, values in points[key].items():
            values.sort(key=lambda value: value[0])
            axis.plot([n for n, _ in values], [row.median_us for _, row in values], label=who, **_style(values[0][1]))
            floors |= {n: row.floor_us for n, row in values if row.kind == "ours"}
        if floors:
            axis.plot(
                *zip(*sorted(floors.items()), strict=True), color="black", linewidth=1.2, label="measured roofline"
            )
            axis.fill_between(*zip(*sorted(floors.items()), strict=True), color="0.9")
        title = f"{key[0]} text row{'s' * (key[0] > 1)}, {key[1]} heads, {dtype}"
        _finish_axis(axis, "slow tokens", "microseconds", title)
    _legend_below(figure, axes[0])
    return figure


def _plot_share(plt, rows: list[Row]):
    """Pooling and mix: share of the measured ceiling that each competitor reaches."""
    panels = [op for op in ("pool", "mix") if any(row.op == op and row.percent for row in rows)]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 4.5), squeeze=False, layout="constrained")
    for axis, op in zip(axes[0], panels, strict=True):
        groups = _by_shape(rows, op)
        names = sorted({row.who for row in rows if row.op == op and row.percent}, key=list(_COLOURS).index)
        height = 0.8 / len(names)
        for i, name in enumerate(names):
            shares = [next((r.percent or 0 for r in members if r.who == name), 0) for members in groups.values()]
            axis.barh(
                [y + i * height for y in range(len(groups))], shares, height, label=name, color=_COLOURS.get(name)
            )
        axis.set_yticks([y + 0.4 - height / 2 for y in range(len(groups))], [f"{s} {d}" for s, d in groups], fontsize=7)
        axis.invert_yaxis()
        axis.axvline(100, color="black", linewidth=1)
        axis.set(xlabel="% of the ceiling measured in this run")
        axis.set_title(op, fontsize=10)
        axis.legend(fontsize=7)
    return figure


def _plot_model(plt, rows: list[Row]):
    """Prefill and decode against frames: slow-fast, all tokens in self-attention, the base LLM without a slow path."""
    panels = [op for op in ("prefill", "decode") if any(row.op == op and row.ok for row in rows)]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.4), squeeze=False, layout="constrained")
    for axis, op in zip(axes[0], panels, strict=True):
        lines: dict[str, list] = {}
        for row in rows:
            if row.op in (op, f"{op}-compiled") and row.ok:
                name = row.who if row.op == op else f"{row.who}, compiled"
                lines.setdefault(name, []).append((int(row.shape.split()[0]), row))
        for who, values in lines.items():
            values.sort(key=lambda value: value[0])
            style = _style(values[0][1])
            if who.endswith("compiled"):
                style |= {"linestyle": ":", "marker": "s"}
            axis.plot([n for n, _ in values], [r.median_us / 1e3 for _, r in values], label=who, **style)
        floors = sorted(
            (int(r.shape.split()[0]), r.floor_us / 1e3)
            for r in rows
            if r.op == op and r.ok and r.kind == "ours" and r.floor_us
        )
        if floors:
            axis.plot(*zip(*floors, strict=True), color="black", linewidth=1.2, label="measured roofline (slow-fast)")
        _finish_axis(axis, "frames", "milliseconds", OP_TITLES[op])
    _legend_below(figure, axes[0])
    return figure
