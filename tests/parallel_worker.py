"""What each of two data-parallel processes (``two_ranks.py``) trains; ``test_model_parallel.py`` starts them."""

from __future__ import annotations

import torch
import two_ranks
from model_cases import VIDEO, features, padded, tiny_model
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from two_ranks import ddp, recomputing

SAMPLES = ([1, VIDEO, 2, 3, 4], [5, 6, 7, 8])  # as many targets in both: the ranks' mean losses weigh the same
SLOW_PATH = ("cross_attn", "mm_projector")
TRAINABLE = {"everything": ("",), "slow_path": SLOW_PATH, "projector": ("mm_projector",), "warm_up": ("warm_up_gate",)}


def loss(model: nn.Module, step: int, samples: tuple[int, ...]) -> Tensor:
    """Of some of a step's samples."""
    ids, mask = padded([SAMPLES[i] for i in samples])
    videos = features((4 + step, 4)) if 0 in samples else []
    return model(ids, videos, mask, ids.masked_fill((ids == VIDEO) | (mask == 0), -100)).loss


def build(trainable: str) -> nn.Module:
    return two_ranks.train_only(tiny_model("cpu").train(), TRAINABLE[trainable])


def sharded(model: nn.Module) -> nn.Module:
    inner = model.model
    return two_ranks.sharded(model, [*inner.layers, inner.mm_projector, inner.embed_tokens, model.lm_head])


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

if __name__ == "__main__":
    two_ranks.main(WRAPPERS | (SHARDED_WRAPPERS if SHARDS_ON_CPU else {}), TRAINABLE, build, loss)
