"""The Hopper backward where rows see ranges: CTAs add up dQ in one order, and none waits for ever (on the host).

``backward_order.cpp`` plays the header that the kernel is made of over random calls, plans and sights.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = shlex.split(os.environ.get("CXX", "c++"))


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("backward_order")
    (folder / "cuda_runtime.h").write_text("#pragma once\n")
    program = folder / "played"
    command = [*COMPILER, "-std=c++17", "-O1", "-w", f"-I{folder}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(ROOT / "tests" / "backward_order.cpp"), "-o", str(program)], check=True)
    return program


@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler")
@pytest.mark.parametrize("seed", range(4))
def test_every_sum_gets_each_block_that_its_rows_see_once_and_in_one_order(played, seed):
    result = subprocess.run([played, str(seed), "250"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
