"""The Hopper backward's index logic, played on the host: programs made of the headers that the kernel is made of.

``backward_order.cpp``: CTAs add up dQ in one order, and none waits for ever, over random calls, plans and sights.
``backward_pieces.cpp``: what is known of sequences in pieces, over random pieces and ranges.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from host_play import build, needs_compiler, play


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Each program once."""
    built: dict[str, Path] = {}

    def program(source: str) -> Path:
        if source not in built:
            folder = tmp_path_factory.mktemp("played")
            (folder / "cuda_runtime.h").write_text("#pragma once\n")
            built[source] = build(source, folder)
        return built[source]

    return program


@needs_compiler
@pytest.mark.parametrize("seed", range(4))
def test_every_sum_gets_what_its_rows_see_once_and_in_one_order(programs, seed):
    play(programs("backward_order.cpp"), seed, 250)


@needs_compiler
@pytest.mark.parametrize("seed", range(4))
def test_each_row_meets_each_token_in_pieces_as_often_as_it_sees_it(programs, seed):
    play(programs("backward_pieces.cpp"), seed, 60)
