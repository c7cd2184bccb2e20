"""Runs one row after another: build, check the answer, time, record, print. No row is silent and none ends the run.

A row that fails is recorded with its reason. A crash (segmentation fault, lost CUDA context) ends only the worker
process: every row goes to a journal the moment it is done, the parent (``__main__``) starts a new worker on the same
journal, and that worker marks the row that was in progress as crashed and goes on after it.
"""

from __future__ import annotations

import gc
import json
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from . import ceilings as ceilings_module
from . import device as device_module
from .shapes import Ceilings, Cost
from .timing import Call, Timing, time_calls, time_host

DEVICE_LOST = 75  # exit code of a worker whose CUDA context is gone
TRIAL_SHARE = 5  # a variant's trial gets this part of the budget, on a GPU one burst
TOLERANCE = {"float32": 1e-4, "float16": 3e-3, "bfloat16": 1.5e-2}  # relative to the float32 reference


class DeviceLost(RuntimeError):
    """The CUDA context no longer answers; only a new process can go on."""


class Variant(NamedTuple):
    """One way to run a competitor. ``build`` makes the rotated calls (layouts are its own, untimed business) and a
    function that returns the relative error of the first call's answer."""

    label: str
    build: Callable[[], tuple[list[Call], Callable[[], float]]]


@dataclass
class Row:
    """One measured fact. Times in microseconds a call."""

    op: str
    shape: str
    dtype: str
    who: str
    kind: str  # "ours", "peer", "base" (what ours adds to), "host"
    status: str = "ok"  # or "absent: ...", "unsupported: ...", "failed: ...", "wrong: ...", "crashed"
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    sustained_us: float | None = None  # without the rests of the other figures
    samples: int = 0
    method: str = ""
    variant: str = ""
    error: float | None = None  # relative, against the reference
    tflops: float | None = None
    gbps: float | None = None
    floor_us: float | None = None
    percent: float | None = None  # of the ceiling measured in this run
    extra: dict = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.shape, self.dtype, self.who

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def is_broken(self) -> bool:
        """Neither measured nor refused for a stated limit; running out of memory is a limit."""
        return self.status.startswith(("wrong", "failed", "crashed")) and "out of memory" not in self.status


class Journal:
    """Append-only JSON lines: ``meta``, ``begin`` of a row, the ``row``. What a worker leaves to the next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta: dict | None = None
        self.rows: list[Row] = []
        self.crashed: list[dict] = []
        pending = None
        for line in path.read_text().splitlines() if path.exists() else ():
            record = json.loads(line)
            if "meta" in record:
                self.meta = record["meta"]
            elif "begin" in record:
                pending = record["begin"]
            else:
                self.rows.append(Row(**record["row"]))
                pending = None
        if pending is not None:
            self.crashed.append(pending)

    def write(self, **record) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def short(error: BaseException) -> str:
    """An exception in one line of a table."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
    text = lines[0].strip() if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {lines[0].strip()}"
    return text if len(text) <= 160 else text[:157] + "..."


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want|| in float32; infinity if anything is not finite or the shape is another."""
    if got.shape != want.shape:
        return float("inf")
    got, want = got.float(), want.float()
    error = float((got - want).norm() / want.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


class Runner:
    """State of one worker: device, ceilings, filters, journal."""

    def __init__(
        self,
        device: torch.device,
        dtypes: list[str],
        journal: Journal,
        peers: set[str] | None = None,
        shapes: Iterable[str] = (),
        quick: bool = False,
    ) -> None:
        self.device, self.dtypes, self.journal, self.quick = device, dtypes, journal, quick
        self.peers, self.shapes = peers, list(shapes)
        self.is_gpu = device.type == "cuda"
        self.budget_s = (0.03 if quick else 0.15) if self.is_gpu else (0.05 if quick else 0.25)
        self.started = time.monotonic()
        self._done = {row.key for row in journal.rows}
        if journal.meta is None:
            journal.meta = device_module.describe(device)
            journal.meta["ceilings"] = asdict(ceilings_module.measure(device, dtypes, quick))
            journal.write(meta=journal.meta)
            load, cores = journal.meta["load_average"], journal.meta["cores"]
            if load > 0.5 * cores:
                print(f"the machine is busy (load average {load} on {cores} cores): expect noisy times", flush=True)
        self.ceilings = Ceilings(**journal.meta["ceilings"])
        for pending in journal.crashed:
            self.record(Row(**pending, status="crashed: the process died in this row"))

    # -- rows

    def wants_peer(self, name: str) -> bool:
        return self.peers is None or name in self.peers

    def is_done(self, *key: str) -> bool:
        return key in self._done

    def record(self, row: Row) -> None:
        self._done.add(row.key)
        self.journal.rows.append(row)
        self.journal.write(row=asdict(row))
        print(format_row(row), flush=True)

    def absent(self, op: str, who: str, reason: str, kind: str = "peer") -> None:
        """One row that says why a peer or backend takes no part in an op."""
        if not self.is_done(op, "all", "-", who):
            self.record(Row(op, "all", "-", who, kind, status=f"absent: {reason}"))

    def measure(
        self,
        op: str,
        shape: str,
        dtype: str,
        who: str,
        variants: Iterable[Variant],
        *,
        cost: Cost,
        kind: str = "peer",
        capturable: bool = True,
        sustained: bool = False,
        timer: Callable[[list[Call]], Timing] | None = None,
        tolerance: float | None = None,
    ) -> Row | None:
        """Check each variant, record the fastest right one. None if an earlier worker did this row.

        Of several variants each gets a short trial, and the winner is then measured as a single one is: a row's
        protocol doesn't depend on how many variants it has. ``sustained`` adds the figure without rests. ``timer``
        replaces ``time_calls`` where a call can't be repeated at will; it times each variant once.
        """
        if self.is_done(op, shape, dtype, who):
            return None
        row = Row(op, shape, dtype, who, kind)
        self.journal.write(begin={"op": op, "shape": shape, "dtype": dtype, "who": who, "kind": kind})
        tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
        problems: list[str] = []
        try:
            variants = list(variants)
        except Exception as problem:
            variants, problems = [], [f"failed: {short(problem)}"]
        timed = partial(time_calls, device=self.device, capturable=capturable)
        whole = timer or partial(timed, budget_s=self.budget_s, sustained=sustained and not self.quick)
        on_trial = timer is None and len(variants) > 1
        first = partial(timed, budget_s=self.budget_s / TRIAL_SHARE) if on_trial else whole

        def attempt(variant: Variant, timer: Callable[[list[Call]], Timing]) -> tuple[Timing, float, Variant] | None:
            found = self._try(variant, timer, tolerance)
            if not isinstance(found, str):
                return (*found, variant)
            problems.append(f"{found} ({variant.label})" if len(variants) > 1 else found)
            try:
                self.recover()
            except DeviceLost:
                row.status = f"crashed: the CUDA context was lost ({variant.label or who})"
                self.record(row)
                raise
            return None

        right = [found for variant in variants if (found := attempt(variant, first))]
        best = min(right, key=lambda found: found[0].median_us, default=None)
        if best and on_trial:
            best = attempt(best[2], whole)
        if best is None:
            # where some were right, the last problem is the winner's, which passed its trial and then failed
            row.status = problems[-1 if right else 0] if problems else "unsupported: no variant takes this shape"
        else:
            self._fill(row, best[0], cost)
            row.error, row.variant = best[1], best[2].label
            if problems:
                row.extra["rejected_variants"] = problems
        self.record(row)
        return row

    def _try(
        self, variant: Variant, timer: Callable[[list[Call]], Timing], tolerance: float
    ) -> tuple[Timing, float] | str:
        """(timing, error), or the status that says why not."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                calls, check = variant.build()
                error = check()
                if not error <= tolerance:
                    return f"wrong: relative error {error:.2g}, want <= {tolerance:.2g}"
                return timer(calls), error
            except NotImplementedError as problem:
                return f"unsupported: {short(problem)}"
            except Exception as problem:
                reason = short(problem)
                if "No available kernel" in reason and caught:
                    reason = f"no kernel: {str(caught[-1].message).splitlines()[0][:140]}"
                return f"failed: {reason}"
            finally:
                calls = check = None

    def recover(self) -> None:
        """Free what a failed variant held, and see whether the device still answers."""
        gc.collect()
        if not self.is_gpu:
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(short(error)) from error

    def _fill(self, row: Row, timing: Timing, cost: Cost | None) -> None:
        row.median_us, row.p20_us, row.p80_us = (round(x, 3) for x in (timing.median_us, timing.p20_us, timing.p80_us))
        row.samples, row.method = timing.samples, timing.method
        row.sustained_us = timing.sustained_us and round(timing.sustained_us, 3)
        if cost is None:
            return
        row.tflops = round(cost.flops / timing.median_us / 1e6, 4)
        row.gbps = round(cost.bytes / timing.median_us / 1e3, 2)
        if row.dtype in self.ceilings.gemm_tflops:
            floor = cost.floor_us(self.ceilings, row.dtype)
            row.floor_us = round(floor, 3)
            row.percent = round(100 * floor / timing.median_us, 1)

    def host(self, op: str, shape: str, dtype: str, who: str, call: Call) -> None:
        """Host time of a call on a tiny shape; no ceiling applies."""
        if self.is_done(op, shape, dtype, who):
            return
        row = Row(op, shape, dtype, who, "host")
        self.journal.write(begin={"op": op, "shape": shape, "dtype": dtype, "who": who, "kind": "host"})
        try:
            self._fill(row, time_host(call, self.device), None)
        except Exception as problem:
            kind = "unsupported" if isinstance(problem, NotImplementedError) else "failed"
            row.status = f"{kind}: {short(problem)}"
        self.record(row)


def format_us(us: float | None) -> str:
    if us is None:
        return "-"
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def format_row(row: Row) -> str:
    name = f"{row.op:<10} {row.shape:<32} {row.dtype:<9} {row.who:<15}"
    if not row.ok:
        return f"{name} {row.status}"
    text = f"{name} {format_us(row.median_us):>9} us  [{format_us(row.p20_us)} .. {format_us(row.p80_us)}]"
    if row.percent is not None:
        text += f"  {row.tflops:8.3f} TFLOP/s {row.gbps:8.1f} GB/s  {row.percent:5.1f}% of ceiling"
    if row.sustained_us is not None:
        text += f"  {format_us(row.sustained_us)} us sustained"
    notes = [note for note in (row.variant, "not a graph" if row.method == "events" else "") if note]
    return "  ".join([text, *notes])
