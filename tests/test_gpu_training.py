"""On a GPU: 200 steps of training through the kernels follow the loss of the eager formulas within its seeds' noise."""

from __future__ import annotations

import pytest
import torch
from targets import HAS_GPU
from torch import Tensor

from slowfast_model import IMAGE_TOKEN_INDEX, SlowFastConfig, SlowFastForCausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not HAS_GPU, reason="torch finds no GPU")]

SEEDS, STEPS, BLOCK = 5, 200, 20
CLASSES, FRAMES, GRID, CHANNELS, BATCH = 8, 12, 8, 64, 4
CONFIG = SlowFastConfig(
    vocab_size=64,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    mm_hidden_size=CHANNELS,
    mm_projector_type="mlp2x_gelu",
    cross_attn_every_n_layers=2,
    mm_video_pooling_stride=2,
    fast_token_temporal_stride=4,
    fast_token_spatial_stride=4,
)


def batch_of(generator: torch.Generator, marks: Tensor, device: str) -> tuple[Tensor, list[Tensor], Tensor]:
    """Videos of noise, one frame of which shows the mark of a class; a question of any length; the class as answer."""
    classes = torch.randint(CLASSES, (BATCH,), generator=generator)
    length = int(torch.randint(4, 12, (), generator=generator))
    ids = torch.randint(CLASSES, CONFIG.vocab_size, (BATCH, length + 2), generator=generator)
    ids[:, 0], ids[:, -1] = IMAGE_TOKEN_INDEX, classes
    labels = torch.full_like(ids, -100)
    labels[:, -1] = classes
    videos = torch.randn(BATCH, FRAMES, GRID * GRID, CHANNELS, generator=generator)
    shown = torch.randint(FRAMES, (BATCH,), generator=generator)
    videos[torch.arange(BATCH), shown] += 2 * marks[classes][:, None]
    return ids.to(device), list(videos.to(device)), labels.to(device)


def losses(seed: int, backend: str | None, device: str = "cuda", steps: int = STEPS) -> Tensor:
    """Means of blocks of steps; float32 parameters under autocast, so that kernels work in bfloat16."""
    torch.manual_seed(seed)
    model = SlowFastForCausalLM(CONFIG, backend=backend)
    with torch.no_grad():
        for layer in CONFIG.hybrid_layers:
            model.model.layers[layer].self_attn.cross_attn_warm_up_gate.fill_(0.5)
    model = model.to(device).train()
    generator = torch.Generator().manual_seed(seed)
    marks = torch.randn(CLASSES, CHANNELS, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(steps):
        ids, videos, labels = batch_of(generator, marks, device)
        with torch.autocast(device, torch.bfloat16):
            loss = model(ids, videos, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found).float().cpu().unflatten(0, (-1, BLOCK)).mean(1)


def test_training_through_the_kernels_follows_the_eager_loss():
    eager, ours = (torch.stack([losses(seed, name) for seed in range(SEEDS)]) for name in ("eager", None))
    print(f"\neager  {eager.mean(0).tolist()}\n+- sd  {eager.std(0).tolist()}\nours   {ours.mean(0).tolist()}")
    assert eager.mean(0)[-1] < 0.7 * eager.mean(0)[0], "nothing was learnt"
    assert ((ours.mean(0) - eager.mean(0)).abs() <= 2 * eager.std(0)).all()
