"""One of two data-parallel training processes (gloo, CPU); ``test_train.py`` starts both.

A step's two samples go to the two ranks; one has a video and one is text alone, and the ranks swap them in the second
step. Each rank saves the gradients of every run, or what went wrong.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torchvision_beside_cpu_torch  # noqa: F401  (before transformers)
from families import VIDEO, batch, slow_fast_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

TEXT = ([5, 6, 7], [8, 9, 10, 11])
TRAINABLE = {"everything": ("",), "slow_path": ("cross_attn", "mm_projector")}


def build(trainable: str) -> nn.Module:
    torch.manual_seed(0)
    model = slow_fast_model().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINABLE[trainable]))
    return model


def inputs(model: nn.Module, step: int, samples: tuple[int, ...]) -> dict:
    """Of some of a step's samples, with as many targets in both, so that the ranks' mean losses weigh the same."""
    config = getattr(model, "module", model).config
    features = torch.randn(4 + 4 * step, 16, 12, generator=torch.Generator().manual_seed(step))
    count = config.num_fast_tokens(*features.shape[:2])
    rows = [[3, *[VIDEO] * count, *TEXT[0]], [4, *TEXT[1]]]
    given = batch([rows[i] for i in samples], "right")
    ids, mask = given["input_ids"], given["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    for row, i in zip(labels, samples, strict=True):
        row[row != -100] = torch.where(row[row != -100] == VIDEO, -100, row[row != -100])
        if i == 1:
            row[1] = -100  # four words, of which three are targets
    return given | {"labels": labels, "video_features": [features] if 0 in samples else None}


def gradients(model: nn.Module, samples_of: Callable[[int], tuple[int, ...]]) -> list[dict[str, Tensor]]:
    """Of two steps, without an update between them."""
    steps = []
    for step in range(2):
        model.zero_grad()
        model(**inputs(model, step, samples_of(step))).loss.backward()
        grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad}
        steps.append({name: whole(grad) for name, grad in grads.items()})
    return steps


def whole(grad: Tensor | None) -> Tensor | None:
    if grad is None:
        return None
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    """Every part is gathered on its own, so that one which a rank leaves out would keep the other waiting."""
    for layer in model.get_decoder().layers:
        fully_shard(layer)
    for part in (model.mm_projector, model.get_input_embeddings(), model.get_output_embeddings()):
        fully_shard(part)
    return fully_shard(model)


def recomputing(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable()
    return model


WRAPPERS = {
    "ddp": ddp,
    "ddp, recomputing": lambda model: ddp(recomputing(model)),
    "fully_shard": sharded,
    "fully_shard, recomputing": lambda model: sharded(recomputing(model)),
}


def main(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{directory}/rendezvous", rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    results = {}
    for wrapper, wrap in WRAPPERS.items():
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
