"""One of two data-parallel training processes (gloo, CPU); ``test_model_parallel.py`` starts both.

Each wrapper trains two steps. A step's two samples go to the two ranks; one has a video and one is text alone, and the
ranks swap them in the second step. Each rank saves the gradients of every run, or what went wrong.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from model_cases import VIDEO, features, padded, tiny_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.torch_version import TorchVersion

SAMPLES = ([1, VIDEO, 2, 3, 4], [5, 6, 7, 8])  # as many targets in both: the ranks' mean losses weigh the same
SLOW_PATH = ("cross_attn", "mm_projector")
TRAINABLE = {"everything": ("",), "slow_path": SLOW_PATH, "projector": ("mm_projector",), "warm_up": ("warm_up_gate",)}


def batch(step: int, samples: tuple[int, ...]) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Arguments of ``forward`` for some of a step's samples."""
    ids, mask = padded([SAMPLES[i] for i in samples])
    videos = features((4 + step, 4)) if 0 in samples else []
    return ids, videos, mask, ids.masked_fill((ids == VIDEO) | (mask == 0), -100)


def build(trainable: str) -> nn.Module:
    model = tiny_model("cpu").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINABLE[trainable]))
    return model


def gradients(model: nn.Module, samples_of: Callable[[int], tuple[int, ...]]) -> list[dict[str, Tensor]]:
    """Gradients of two steps, without an update between them."""
    steps = []
    for step in range(2):
        model.zero_grad()
        model(*batch(step, samples_of(step))).loss.backward()
        grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}
        steps.append({name: whole(grad) for name, grad in grads.items()})
    return steps


def whole(grad: Tensor | None) -> Tensor | None:
    if grad is None:
        return None
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()  # a shard of it, or all of it


def ddp(model: nn.Module, **options) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, **options)


def sharded(model: nn.Module) -> nn.Module:
    """Every part is gathered on its own, so that one which a rank leaves out would keep the other waiting."""
    for layer in model.model.layers:
        fully_shard(layer)
    for part in (model.model.mm_projector, model.model.embed_tokens, model.lm_head):
        fully_shard(part)
    return fully_shard(model)


def recomputing(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable()
    return model


WRAPPERS = {
    "ddp": ddp,
    "ddp_static_graph": lambda model: ddp(model, static_graph=True),
    "ddp_checkpointing": lambda model: ddp(recomputing(model)),
}
SHARDED_WRAPPERS = {
    "fully_shard": sharded,
    "fully_shard_checkpointing": lambda model: sharded(recomputing(model)),
}
# before, a single Linear on a CPU fails, or gets the gradient of one rank
SHARDS_ON_CPU = TorchVersion(torch.__version__) >= (2, 9)


def main(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{directory}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    results = {}
    for wrapper, wrap in (WRAPPERS | (SHARDED_WRAPPERS if SHARDS_ON_CPU else {})).items():
        for trainable in TRAINABLE:
            try:
                model = wrap(build(trainable))
                results[wrapper, trainable] = gradients(model, lambda step: ((rank + step) % 2,))
            except Exception:
                results[wrapper, trainable] = traceback.format_exc()
    torch.save(results, f"{directory}/rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
