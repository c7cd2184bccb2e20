"""The Hopper backward: CTAs add up dQ in one order, and none waits for ever (on the host).

``backward_order.cpp`` plays the headers that the kernel is made of over random calls, plans and sights.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from host_play import build, needs_compiler, play


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("backward_order")
    (folder / "cuda_runtime.h").write_text("#pragma once\n")
    return build("backward_order.cpp", folder)


@needs_compiler
@pytest.mark.parametrize("seed", range(4))
def test_every_sum_gets_each_block_that_its_rows_see_once_and_in_one_order(played, seed):
    play(played, seed, 250)
