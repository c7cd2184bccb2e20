"""Runs one comparison after another: build, check the answers, time, record, print. No row is silent or ends the run.

The contenders of a comparison are made ready one by one and then timed in turns (``timing``), so that none has a cooler
machine than another. A row that fails is recorded with its reason. A crash (segmentation fault, lost CUDA context) ends
only the worker process: every row goes to a journal the moment it is done, the parent (``__main__``) starts a new
worker on the same journal, and that worker marks the row that was in progress as crashed and goes on after it.
"""

from __future__ import annotations

import gc
import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import torch

from . import ceilings as ceilings_module
from . import device as device_module
from .shapes import Ceilings, Cost
from .timing import (
    Call,
    Lane,
    Timing,
    difference,
    make_lane,
    no_collection,
    summarize,
    time_calls,
    time_host,
    with_sustained,
)

T = TypeVar("T")

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


class Contender(NamedTuple):
    """One competitor of a comparison, with every way to run it that is worth a try."""

    who: str
    variants: Iterable[Variant]
    cost: Cost
    kind: str = "peer"
    capturable: bool = True  # a call that waits for the host is not
    tolerance: float | None = None  # of the answer's error, in the place of the dtype's
    facts: Mapping[str, float] = MappingProxyType({})  # go to the row's ``extra``


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
    added: dict | None = None  # {"to": who, **timing.Difference}: what it takes longer than the base, turn by turn
    extra: dict = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.op, self.shape, self.dtype, self.who

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def varies(self) -> bool:
        """Calls alike gave other bits."""
        return self.extra.get("same_bits") is False

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
    """||got - want|| / ||want|| in float32 or wider; infinity if anything is not finite or the shape is another."""
    if got.shape != want.shape:
        return float("inf")
    wide = torch.promote_types(want.dtype, torch.float32)
    got, want = got.to(wide), want.to(wide)
    error = float((got - want).norm() / want.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


@dataclass
class _Racer:
    """A contender on its way through a comparison."""

    contender: Contender
    row: Row
    variants: list[Variant] = field(default_factory=list)
    chosen: Variant | None = None
    lane: Lane | None = None
    error: float | None = None  # of the answer of the variant tried last, in the end the chosen one
    seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def _status_of(error: Exception, caught: list[warnings.WarningMessage]) -> str:
    """A row's status; ``caught`` are the warnings in which SDPA tells why a backend of its refuses."""
    reason = short(error)
    if isinstance(error, NotImplementedError):
        return f"unsupported: {reason}"
    if "No available kernel" in reason and caught:
        reason = f"no kernel: {str(caught[-1].message).splitlines()[0][:140]}"
    return f"failed: {reason}"


def _compare_to_base(racers: list[_Racer], base: str | None) -> None:
    """Give each row what it adds to the base's, turn by turn; none where either has no time."""
    of = {racer.row.who: racer for racer in racers if racer.row.ok}
    for racer in of.values():
        if base in of and racer.row.who != base:
            added = difference(racer.seconds, of[base].seconds)
            racer.row.added = {"to": base} | {name: round(value, 3) for name, value in asdict(added).items()}


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
        quick_s, full_s = (0.03, 0.15) if self.is_gpu else (0.05, 0.25)
        self.budget_s = quick_s if quick else full_s
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

    def present(self, op: str, peers: Iterable[T]) -> list[T]:
        """Of ``peers`` those that are wanted and run here; a row says why one that is wanted does not."""
        found = []
        for peer in peers:
            if not self.wants_peer(peer.name):
                continue
            reason = peer.absent(self.device)
            if reason is None:
                found.append(peer)
            else:
                self.absent(op, peer.name, reason)
        return found

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

    def compare(
        self,
        op: str,
        shape: str,
        dtype: str,
        contenders: Iterable[Contender],
        *,
        base: str | None = None,
        sustained: bool = False,
        lane: Callable[..., Lane] | None = None,
        observe: Callable[[Call], dict] | None = None,
    ) -> list[Row]:
        """Time the fastest right variant of each contender, all in turns; the rows of those that had none before.

        Of several variants each gets a short trial, and the winner is then measured as a single one is: a row's
        protocol doesn't depend on how many variants it has.

        Args:
            base: the contender to which the others add something: their rows tell how much, by turns.
            sustained: adds the figure without rests.
            lane: what makes a variant's calls a lane, in the place of ``make_lane``.
            observe: what it finds of the chosen variant's call, before that is timed, goes to the row's ``extra``.
        """
        racers = [
            _Racer(contender, Row(op, shape, dtype, contender.who, contender.kind, extra=dict(contender.facts)))
            for contender in contenders
            if not self.is_done(op, shape, dtype, contender.who)
        ]
        if len(racers) > 1:
            print(f"{op} {shape} {dtype}: {', '.join(racer.row.who for racer in racers)} in turns", flush=True)
        try:
            for racer in racers:
                self._make_ready(racer, lane, observe)
            with no_collection():
                self._take_turns(racers, paired=base is not None)
            for racer in racers:
                self._finish(racer, sustained and not self.quick)
            _compare_to_base(racers, base)
        except DeviceLost:
            self.record(next(racer.row for racer in racers if racer.row.status.startswith("crashed")))
            raise
        for racer in racers:
            self.record(racer.row)
        return [racer.row for racer in racers]

    def _begin(self, row: Row) -> None:
        """Should the process die now, it was in this row."""
        fields = ("op", "shape", "dtype", "who", "kind")
        self.journal.write(begin={name: getattr(row, name) for name in fields})

    def _make_ready(
        self, racer: _Racer, lane: Callable[..., Lane] | None, observe: Callable[[Call], dict] | None
    ) -> None:
        """Choose the variant and give the racer its lane; a row that can't have one has a status that says why."""
        self._begin(racer.row)
        capturable = racer.contender.capturable
        make = lane or partial(make_lane, device=self.device, budget_s=self.budget_s, capturable=capturable)
        trial = partial(time_calls, device=self.device, budget_s=self.budget_s / TRIAL_SHARE, capturable=capturable)
        try:
            racer.variants = list(racer.contender.variants)
        except Exception as problem:
            racer.problems.append(f"failed: {short(problem)}")
        if len(racer.variants) == 1:
            racer.chosen = racer.variants[0]
        else:
            tried = [(found, variant) for variant in racer.variants if (found := self._try(racer, variant, trial))]
            racer.chosen = min(tried, key=lambda each: each[0].median_us)[1] if tried else None

        def observed(calls: list[Call]) -> Lane:
            if observe:
                racer.row.extra |= observe(calls[0])
            return make(calls)

        racer.lane = self._try(racer, racer.chosen, observed) if racer.chosen else None
        if racer.lane is None:
            # a winner's problem is the last one: it passed its trial and then failed
            problems = racer.problems or ["unsupported: no variant takes this shape"]
            racer.row.status = problems[-1 if racer.chosen else 0]

    def _try(self, racer: _Racer, variant: Variant, use: Callable[[list[Call]], T]) -> T | None:
        """What ``use`` makes of a variant's calls once their answer is right; None with a problem noted if it can't."""
        tolerance = racer.contender.tolerance or TOLERANCE[racer.row.dtype]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                calls, check = variant.build()
                racer.error = check()
                if racer.error <= tolerance:
                    return use(calls)
                problem = f"wrong: relative error {racer.error:.2g}, want <= {tolerance:.2g}"
            except Exception as error:
                problem = _status_of(error, caught)
            finally:
                calls = check = None
        racer.problems.append(f"{problem} ({variant.label})" if len(racer.variants) > 1 else problem)
        self._recover_in(racer, variant)
        return None

    def _recover_in(self, racer: _Racer, variant: Variant) -> None:
        try:
            self.recover()
        except DeviceLost:
            racer.row.status = f"crashed: the CUDA context was lost ({variant.label or racer.row.who})"
            raise

    def _take_turns(self, racers: list[_Racer], paired: bool) -> None:
        """A B A B: each turn goes to every racer, in order. ``paired``: as many turns as the one that has fewest."""
        ready = [racer for racer in racers if racer.lane]
        turns = (min if paired else max)((racer.lane.turns for racer in ready), default=0)
        for turn in range(turns):
            for racer in ready:
                if racer.lane and turn < racer.lane.turns:
                    self._run(racer, lambda racer=racer: racer.seconds.extend(racer.lane.turn()))

    def _finish(self, racer: _Racer, sustained: bool) -> None:
        if racer.lane is None:
            return
        timing = summarize(racer.seconds, racer.lane.method)
        if sustained:
            timing = self._run(racer, lambda: with_sustained(timing, racer.lane))
        if timing is None:
            return
        row = racer.row
        self._fill(row, timing, racer.contender.cost)
        row.error, row.variant = racer.error, racer.chosen.label
        if racer.problems:
            row.extra["rejected_variants"] = racer.problems

    def _run(self, racer: _Racer, work: Callable[[], T]) -> T | None:
        """A racer's turn; an error takes it out of the race and leaves the others in."""
        self._begin(racer.row)
        try:
            return work()
        except Exception as error:
            racer.row.status, racer.lane = _status_of(error, []), None
            self._recover_in(racer, racer.chosen)
            return None

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
        self._begin(row)
        try:
            self._fill(row, time_host(call, self.device), None)
        except Exception as problem:
            kind = "unsupported" if isinstance(problem, NotImplementedError) else "failed"
            row.status = f"{kind}: {short(problem)}"
        self.record(row)


def format_us(us: float | None) -> str:
    if us is None:
        return "-"
    if us < 10:
        return f"{us:.2f}"
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def format_row(row: Row) -> str:
    name = f"{row.op:<10} {row.shape:<32} {row.dtype:<9} {row.who:<15}"
    if not row.ok:
        return f"{name} {row.status}"
    text = f"{name} {format_us(row.median_us):>9} us  [{format_us(row.p20_us)} .. {format_us(row.p80_us)}]"
    if row.percent is not None:
        text += f"  {row.tflops:8.3f} TFLOP/s {row.gbps:8.1f} GB/s  {row.percent:5.1f}% of ceiling"
    if row.sustained_us is not None:
        text += f"  {format_us(row.sustained_us)} us sustained"
    if row.added is not None:
        text += f"  {row.added['median_us']:+.1f} us ({row.added['percent']:+.2f}%) to {row.added['to']}"
    notes = [note for note in (row.variant, "not a graph" if row.method == "events" else "") if note]
    return "  ".join([text, *notes])
