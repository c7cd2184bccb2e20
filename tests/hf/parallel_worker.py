"""What each of two data-parallel processes (``tests/two_ranks.py``) trains; ``test_train.py`` starts them."""

from __future__ import annotations

import shared_with_tests  # noqa: F401
import torch
import torchvision_beside_cpu_torch  # noqa: F401  (before transformers)
import two_ranks
from families import VIDEO, batch, slow_fast_model
from torch import Tensor, nn
from two_ranks import ddp, recomputing

TEXT = ([5, 6, 7], [8, 9, 10, 11])
TRAINABLE = {"everything": ("",), "slow_path": ("cross_attn", "mm_projector")}


def build(trainable: str) -> nn.Module:
    torch.manual_seed(0)
    return two_ranks.train_only(slow_fast_model().train(), TRAINABLE[trainable])


def loss(model: nn.Module, step: int, samples: tuple[int, ...]) -> Tensor:
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
    return model(**given, labels=labels, video_features=[features] if 0 in samples else None).loss


def sharded(model: nn.Module) -> nn.Module:
    parts = (model.mm_projector, model.get_input_embeddings(), model.get_output_embeddings())
    return two_ranks.sharded(model, [*model.get_decoder().layers, *parts])


WRAPPERS = {
    "ddp": ddp,
    "ddp, recomputing": lambda model: ddp(recomputing(model)),
    "fully_shard": sharded,
    "fully_shard, recomputing": lambda model: sharded(recomputing(model)),
}

if __name__ == "__main__":
    two_ranks.main(WRAPPERS, TRAINABLE, build, loss)
