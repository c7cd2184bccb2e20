"""Data-parallel training where one rank's batch is text alone: nothing hangs, and gradients are those of one process.

Two gloo processes (``parallel_worker.py``) run every wrapper once for the whole run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from model_cases import one_thread  # noqa: F401

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from parallel_worker import SHARDED_WRAPPERS, SHARDS_ON_CPU, TRAINABLE, WRAPPERS, build, gradients

shards = pytest.mark.skipif(not SHARDS_ON_CPU, reason="fully_shard is wrong on a CPU before torch 2.9")
WORKER = Path(__file__).with_name("parallel_worker.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each of the two processes saved."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers: the first one trains
    folder = shared / "parallel"
    files = [folder / f"rank{rank}.pt" for rank in range(2)]
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            train(folder)
    return [torch.load(file, weights_only=False) for file in files]


def train(folder: Path) -> None:
    paths = [str(WORKER.parents[1]), os.environ.get("PYTHONPATH", "")]  # this checkout's packages, as in this process
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}  # two CPU processes, whatever is here
    pair = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in pair:
            output, _ = process.communicate(timeout=180)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in pair:
            process.kill()


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("wrapper", [*WRAPPERS, *(pytest.param(name, marks=shards) for name in SHARDED_WRAPPERS)])
def test_gradients_are_those_of_one_process_on_the_joined_batch(ranks, wrapper, trainable):
    expected = gradients(build(trainable), lambda step: (0, 1))
    for saved in ranks:
        steps = saved[wrapper, trainable]
        assert not isinstance(steps, str), steps
        for grads, exact in zip(steps, expected, strict=True):
            assert grads.keys() == exact.keys()
            for name, grad in grads.items():
                assert grad is not None, name
                torch.testing.assert_close(grad, exact[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
