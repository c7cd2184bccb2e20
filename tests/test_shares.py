"""How the Hopper kernel shares out an uneven batch: every group of every unit has one CTA (on the host).

``shares.cpp`` plays the header that the kernel is made of over random batches and plans.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from host_play import ROOT, build, needs_compiler, play


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> Path:
    """The header is copied to where nothing is found of what it includes but an empty file."""
    folder = tmp_path_factory.mktemp("shares")
    shutil.copy(ROOT / "csrc" / "cuda" / "cross_attention" / "shares.cuh", folder)
    (folder / "slow_tokens.cuh").write_text("#pragma once\n")
    return build("shares.cpp", folder)


@pytest.mark.skipif(sys.platform != "linux", reason="fibers by ucontext.h")
@needs_compiler
@pytest.mark.parametrize("seed", range(4))
def test_every_group_of_an_uneven_batch_has_one_cta(played, seed):
    play(played, seed, 20)
