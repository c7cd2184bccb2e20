"""What the benchmark's tests share: a journal of a machine with ceilings, and a runner on it that measures briefly."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # bench is not installed; installed packages keep winning

from bench import device
from bench.runner import Journal, Runner

CPU = torch.device("cpu")


def new_journal(directory: Path) -> Journal:
    journal = Journal(directory / "journal.jsonl")
    journal.meta = {
        **device.describe(CPU),
        "ceilings": {"read_gbps": 10.0, "copy_gbps": 8.0, "gemm_tflops": {"float32": 0.1}},
        "cache_bytes": 1e5,
    }
    journal.write(meta=journal.meta)
    return journal


def quick_runner(journal: Journal) -> Runner:
    run = Runner(CPU, ["float32"], journal, quick=True)
    run.budget_s = 0.002
    return run
