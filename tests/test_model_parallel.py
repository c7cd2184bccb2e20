"""Data-parallel training where one rank's batch is text alone: nothing hangs, and gradients are those of one process.

Two gloo processes (``parallel_worker.py``) run every wrapper once for the whole run.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from model_cases import one_thread  # noqa: F401

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from parallel_worker import SHARDED_WRAPPERS, SHARDS_ON_CPU, TRAINABLE, WRAPPERS, build, loss
from two_ranks import assert_gradients, gradients, saved_by, train

shards = pytest.mark.skipif(not SHARDS_ON_CPU, reason="fully_shard is wrong on a CPU before torch 2.9")
WORKER = Path(__file__).with_name("parallel_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of the two processes saved."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers: the first one trains
    folder = shared / "parallel"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            train(WORKER, folder)
    return saved_by(folder)


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("wrapper", [*WRAPPERS, *(pytest.param(name, marks=shards) for name in SHARDED_WRAPPERS)])
def test_gradients_are_those_of_one_process_on_the_joined_batch(ranks, wrapper, trainable):
    expected = gradients(build(trainable), loss, lambda step: (0, 1))
    for saved in ranks:
        assert_gradients(saved[wrapper, trainable], expected)
