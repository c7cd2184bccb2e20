"""A run's rows as PNG plots: time against size with the measured roofline below, and shares of the ceiling."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import parts_tables
from .cells import by_shape
from .report import OP_TITLES
from .runner import Row
from .verdicts import BASES, EMPTY, FULL, MOST_RATIO, beside


def plot(directory: Path, meta: dict, rows: list[Row]) -> list[Path]:
    """Draw what the rows allow; returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in _PLOTS.items():
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
_COLOURS |= {"auto": "#2a7f2a", "auto+triton": "#66c2a5", "official": "#d62728", "no slow path": "#1f77b4"}


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
    """One legend for all panels, where it covers nothing."""
    drawn = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=min(10, len(drawn)), fontsize=7)


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


def _bars(axis, rows: list[Row], op: str, value: Callable[[Row], float | None], xlabel: str, held_to: float | None):
    """A group of bars a shape, one for each row of ``op`` that has a value; a line at what they are held to."""
    groups = by_shape([row for row in rows if value(row) is not None], op)
    names = list(dict.fromkeys(row.who for members in groups.values() for row in members))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        found = [
            (y + i * height, value(row))
            for y, members in enumerate(groups.values())
            for row in members
            if row.who == name
        ]
        style = {"color": _COLOURS.get(name)}
        if name not in _COLOURS:  # a mode of the peer that it begins with
            style = {"color": _COLOURS.get(name.split()[0]), "hatch": "///", "alpha": 0.6}
        axis.barh(*zip(*found, strict=True), height, label=name, **style)
    axis.set_yticks([y + 0.4 - height / 2 for y in range(len(groups))], [f"{s} {d}" for s, d in groups], fontsize=7)
    axis.invert_yaxis()
    if held_to is not None:
        axis.axvline(held_to, color="black", linewidth=1)
    axis.set(xlabel=xlabel)


def _plot_share(plt, rows: list[Row], suffix: str = ""):
    """Pooling and mix: share of the measured ceiling that each competitor reaches."""

    def share(row: Row) -> float | None:
        return row.percent if row.ok else None

    panels = [op + suffix for op in ("pool", "mix") if any(row.op == op + suffix and share(row) for row in rows)]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 4.5), squeeze=False, layout="constrained")
    for axis, op in zip(axes[0], panels, strict=True):
        _bars(axis, rows, op, share, "% of the ceiling measured in this run", 100)
        axis.set_title(op, fontsize=10)
    _legend_below(figure, axes[0])
    return figure


def _plot_gradients(plt, rows: list[Row]):
    """Attention's steps and backward passes: times over that of the automatic choice, which is 1."""
    ours = {(row.op, row.shape, row.dtype): row.median_us for row in rows if row.who == "auto" and row.ok}

    def ratio(row: Row) -> float | None:
        of = ours.get((row.op, row.shape, row.dtype))
        return row.median_us / of if row.ok and of else None

    parts = ("attention-step", "attention-backward")
    panels = [op for op in parts if any(row.op == op and ratio(row) for row in rows)]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(7.5 * len(panels), 8), squeeze=False, layout="constrained")
    for axis, op in zip(axes[0], panels, strict=True):
        _bars(axis, rows, op, ratio, "time over ours (auto)", 1)
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.set_xlim(min(low, 0.5), high)
        ticks = _value_ticks(*axis.get_xlim())
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
        axis.minorticks_off()
        axis.set_title(OP_TITLES[op], fontsize=9)
    _legend_below(figure, axes[0])
    return figure


def _plot_train(plt, rows: list[Row]):
    """An optimizer step: wall time, and on a GPU the peak memory over weights, optimizer and batch."""

    def wall(row: Row) -> float | None:
        return row.median_us / 1e3 if row.ok else None

    def peak(row: Row) -> float | None:
        return row.extra["peak_bytes"] / 2**30 if row.ok and "peak_bytes" in row.extra else None

    values = {"milliseconds": wall, "peak GiB over weights, optimizer and batch": peak}
    panels = [each for each in values.items() if any(row.op == "train" and each[1](row) for row in rows)]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (xlabel, value) in zip(axes[0], panels, strict=True):
        _bars(axis, rows, "train", value, xlabel, None)
    axes[0][0].set_title(OP_TITLES["train"], fontsize=10)
    _legend_below(figure, axes[0])
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


def _plot_ranges(plt, rows: list[Row]):
    """Growing prefixes, one panel for each number of slow tokens: ours, what it is held to, and peers under masks."""
    dtype = _first_dtype(rows, "ranges")
    points: dict[tuple[int, str], dict[str, list[tuple[int, Row]]]] = {}
    for row in rows:
        match = re.fullmatch(r"1x(\d+)x(\d+)@(\d+/\d+/\d+)", row.shape)
        if row.op == "ranges" and row.ok and row.dtype == dtype and match:
            lines = points.setdefault((int(match[2]), match[3]), {})
            lines.setdefault(row.who, []).append((int(match[1]), row))
    if not points:
        return None
    figure, axes = plt.subplots(1, len(points), figsize=(5.2 * len(points), 4.4), squeeze=False, layout="constrained")
    for axis, key in zip(axes[0], sorted(points), strict=True):
        lines = {who: sorted(values, key=lambda value: value[0]) for who, values in points[key].items()}
        for who, values in lines.items():
            if values[0][1].kind != "base":
                axis.plot(
                    [n for n, _ in values], [row.median_us for _, row in values], label=who, **_style(values[0][1])
                )
        for who in [who for who, values in lines.items() if values[0][1].kind == "ours"]:
            for what, style in ((FULL, "-."), (EMPTY, ":")):
                if held := lines.get(beside(who, what)):
                    us = [row.median_us for _, row in held]
                    axis.plot([n for n, _ in held], us, style, label=beside(who, what), color=_COLOURS.get(who))
            targets = [(n, row.extra["target_us"]) for n, row in lines[who] if "target_us" in row.extra]
            if targets:
                label = f"{who} target"
                axis.plot(*zip(*targets, strict=True), label=label, color=_COLOURS.get(who), linewidth=0, marker="_")
        _finish_axis(axis, "text rows", "microseconds", f"growing prefixes of {key[0]} tokens, {key[1]}, {dtype}")
    _legend_below(figure, axes[0])
    return figure


def _plot_against_base(plt, rows: list[Row]):
    """Pieces over one range, and uneven batches over even ones: ratios of times, and what they may be."""
    panels = [op for op in BASES if any(row.op == op and "ratio" in row.extra for row in rows)]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(8 * len(panels), 5), squeeze=False, layout="constrained")
    for axis, op in zip(axes[0], panels, strict=True):
        _bars(axis, rows, op, lambda row: row.extra.get("ratio"), "time over that of the base", MOST_RATIO[op])
        axis.set_title(op, fontsize=10)
    _legend_below(figure, axes[0])
    return figure


def _plot_parts(plt, rows: list[Row]):
    """A prefill's slow path in its parts over frames, and what it adds in time beside what it adds in FLOP."""
    points = [point for point in parts_tables.split(rows) if point.base_us]
    if not points:
        return None
    figure, (parts, added) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    places, bottom = range(len(points)), [0.0] * len(points)
    for name, colour in parts_tables.PARTS.items():
        heights = [100 * point.us.get(name, 0.0) / point.base_us for point in points]
        style = {"hatch": "//", "alpha": 0.5} if name in parts_tables.ON_BOTH_SIDES else {}
        parts.bar(places, heights, 0.7, bottom=bottom, label=name, color=colour, **style)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    parts.set_title("parts of slow-fast's prefill; hatched: of the base LLM's too", fontsize=10)
    lines = {
        "wall time, in pairs": ("wall_percent", {"marker": "o", "color": "#2a7f2a"}),
        "GPU time, in pairs": ("gpu_percent", {"marker": "s", "color": "#1f5fb4"}),
        "FLOP, as the paper counts": ("flop_percent", {"marker": "^", "color": "#d62728"}),
    }
    for label, (figure_of, style) in lines.items():
        known = [(i, percent) for i, point in enumerate(points) if (percent := getattr(point, figure_of)) is not None]
        if known:
            added.plot(*zip(*known, strict=True), label=label, **style)
    added.set_title("what slow-fast adds to the base LLM's prefill", fontsize=10)
    for axis in (parts, added):
        axis.set(xlabel="frames", ylabel="% of the base LLM's prefill")
        axis.set_xticks(places, [str(point.frames) for point in points], fontsize=8)
        axis.grid(alpha=0.3, linewidth=0.5, axis="y")
    _legend_below(figure, [parts, added])
    return figure


_PLOTS = {
    "attention": _plot_attention,
    "pool_mix": _plot_share,
    "model": _plot_model,
    "parts": _plot_parts,
    "ranges": _plot_ranges,
    "pieces_ragged": _plot_against_base,
    "attention_backward": _plot_gradients,
    "pool_mix_backward": partial(_plot_share, suffix="-backward"),
    "train": _plot_train,
}
