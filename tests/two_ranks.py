"""Two data-parallel training processes (gloo, CPU) that save the gradients of two steps under every wrapper.

A step's two samples go to the two ranks; one has a video and one is text alone, and the ranks swap them in the second
step. ``parallel_worker.py`` and ``hf/parallel_worker.py`` say which model is trained on what.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
Loss = Callable[[nn.Module, int, tuple[int, ...]], Tensor]  # of a model, of some samples of a step


def train_only(model: nn.Module, parts: Iterable[str]) -> nn.Module:
    """Parameters whose names have one of ``parts`` in them train; returns ``model``."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
    return model


def gradients(model: nn.Module, loss: Loss, samples_of: Callable[[int], tuple[int, ...]]) -> list[dict[str, Tensor]]:
    """Of two steps, without an update between them."""
    steps = []
    for step in range(2):
        model.zero_grad()
        loss(model, step, samples_of(step)).backward()
        grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}
        steps.append({name: whole(grad) for name, grad in grads.items()})
    return steps


def whole(grad: Tensor | None) -> Tensor | None:
    if grad is None:
        return None
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()  # a shard of it, or all of it


def ddp(model: nn.Module, **options) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, **options)


def sharded(model: nn.Module, parts: Iterable[nn.Module]) -> nn.Module:
    """Every part is gathered on its own, so that one which a rank leaves out would keep the other waiting."""
    from torch.distributed.fsdp import fully_shard

    for part in parts:
        fully_shard(part)
    return fully_shard(model)


def recomputing(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable()
    return model


def main(
    wrappers: Mapping[str, Callable[[nn.Module], nn.Module]],
    trainable: Iterable[str],
    build: Callable[[str], nn.Module],
    loss: Loss,
) -> None:
    """A rank: its number and the folder are the command line's arguments. It saves gradients, or what went wrong."""
    rank, directory = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{directory}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    results = {}
    for wrapper, wrap in wrappers.items():
        for which in trainable:
            try:
                model = wrap(build(which))
                results[wrapper, which] = gradients(model, loss, lambda step: ((rank + step) % 2,))
            except Exception:
                results[wrapper, which] = traceback.format_exc()
    torch.save(results, f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


def train(worker: Path, folder: Path) -> None:
    """Runs both ranks of a worker to their end."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]  # this checkout's packages, as in this process
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}  # two CPU processes, whatever is here
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, str(worker)]
    pair = [subprocess.Popen([*command, str(rank), str(folder)], env=environment, **streams) for rank in range(2)]
    try:
        for process in pair:
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in pair:
            process.kill()


def saved_by(folder: Path) -> list[dict]:
    """What each of the two ranks saved."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def assert_gradients(steps: list[dict[str, Tensor]] | str, expected: list[dict[str, Tensor]]) -> None:
    assert not isinstance(steps, str), steps
    for grads, exact in zip(steps, expected, strict=True):
        assert grads.keys() == exact.keys()
        for name, grad in grads.items():
            assert grad is not None, name
            torch.testing.assert_close(grad, exact[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
