"""Headers of kernels compiled for the host: a C++ program of this folder plays them over random cases."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler")


def build(source: str, folder: Path) -> Path:
    """``source`` of this folder, compiled in ``folder``, whose headers come before those of csrc."""
    program = folder / "played"
    command = [*COMPILER, "-std=c++17", "-O1", "-w", f"-I{folder}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(ROOT / "tests" / source), "-o", str(program)], check=True)
    return program


def play(program: Path, seed: int, cases: int) -> None:
    result = subprocess.run([program, str(seed), str(cases)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
