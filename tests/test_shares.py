"""How the Hopper kernel shares out an uneven batch: every group of every unit has one CTA (on the host).

``shares.cpp`` plays the header that the kernel is made of over random batches and plans.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = shlex.split(os.environ.get("CXX", "c++"))


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> Path:
    """The header is copied to where nothing is found of what it includes but an empty file."""
    folder = tmp_path_factory.mktemp("shares")
    shutil.copy(ROOT / "csrc" / "cuda" / "cross_attention" / "shares.cuh", folder)
    (folder / "slow_tokens.cuh").write_text("#pragma once\n")
    program = folder / "played"
    command = [*COMPILER, "-std=c++17", "-O1", "-w", f"-I{folder}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(ROOT / "tests" / "shares.cpp"), "-o", str(program)], check=True)
    return program


@pytest.mark.skipif(sys.platform != "linux", reason="fibers by ucontext.h")
@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler")
@pytest.mark.parametrize("seed", range(4))
def test_every_group_of_an_uneven_batch_has_one_cta(played, seed):
    result = subprocess.run([played, str(seed), "20"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
