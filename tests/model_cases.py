"""Models and prompts that the model tests share: the golden ones, and a tiny one with every part awake."""

from __future__ import annotations

from dataclasses import dataclass

import golden_data
import pytest
import torch
from targets import FLOAT32
from torch import Tensor

from slowfast_model import SlowFastConfig, SlowFastForCausalLM

# These run in float32, which the cuda attention leaves to triton, so a whole model cannot name it here.
MODEL_TARGETS = FLOAT32.without("cuda")
VIDEO = -200  # stands for a video in a prompt


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small spend their time waking threads; a module that imports this fixture runs on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class GoldenModel:
    """One recorded run of the released model, its weights loaded into ours."""

    model: SlowFastForCausalLM
    tensors: dict[str, Tensor]
    sidecar: dict
    features: list[Tensor]  # of the real videos and images; text-only samples were recorded with a dummy
    real: list[int]  # which of the recorded images those are

    @classmethod
    def load(cls, name: str, backend: str | None = "eager", device: torch.device | str = "cpu") -> GoldenModel:
        tensors, sidecar = golden_data.load(name)
        tensors = {key: x.to(device) for key, x in tensors.items()}
        model = SlowFastForCausalLM(SlowFastConfig.from_official(sidecar["hf_config"]), backend=backend).to(device)
        weights = {key.removeprefix("weight."): x for key, x in tensors.items() if key.startswith("weight.")}
        model.load_official_state_dict(weights)
        real = [i for i, (kind, *_) in enumerate(sidecar["config"]["images"]) if kind != "dummy"]
        features = [tower(tensors[f"in.images.{i}"]) for i in real]
        return cls(model, tensors, sidecar, features, real)

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def forward(self):
        return self.model(self["in.input_ids"], self.features, self["in.attention_mask"], self["in.labels"])


def tower(image: Tensor) -> Tensor:
    """The recorded runs' vision tower, which has no weights: [T, C, H, W] or [C, H, W] -> [T, H * W, C]."""
    frames = image if image.dim() == 4 else image[None]
    return frames.flatten(2).transpose(1, 2).contiguous()


TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "mm_hidden_size": 12,
    "mm_projector_type": "mlp2x_gelu",
    "cross_attn_every_n_layers": 2,
    "mm_video_pooling_stride": 2,
    "fast_token_temporal_stride": 2,
}


def tiny_model(backend: str | None = "eager", device: torch.device | str = "cpu", **changes) -> SlowFastForCausalLM:
    """Random weights, large enough for every part to matter; warm-up gates at 0.8."""
    torch.manual_seed(7)
    model = SlowFastForCausalLM(SlowFastConfig.from_official(TINY | changes), backend=backend)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("warm_up_gate"):
                parameter.fill_(0.8)
            elif not name.endswith("norm.weight"):
                parameter.normal_(std=0.3)
            else:
                parameter.uniform_(0.5, 1.5)
    return model.to(device)


def features(*shapes: tuple[int, int], device: torch.device | str = "cpu", width: int = 12) -> list[Tensor]:
    """Vision features of videos of (frames, side): [frames, side * side, width] each."""
    generator = torch.Generator().manual_seed(sum(31 * t + n for t, n in shapes))
    return [torch.randn(t, n * n, width, generator=generator).to(device) for t, n in shapes]


def padded(prompts: list[list[int]], side: str = "right") -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask of ragged prompts."""
    width = max(map(len, prompts))
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.int64), torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, keep, prompt in zip(ids, mask, prompts, strict=True):
        start = {"right": 0, "left": width - len(prompt)}[side]  # where the padding is
        where = slice(start, start + len(prompt))
        row[where], keep[where] = torch.tensor(prompt), 1
    return ids, mask


# A batch with everything: two videos, no video, an image, text on either side.
PROMPTS = [[3, 4, VIDEO, 5, 6, VIDEO, 7], [8, 9, 10, 11], [VIDEO, 12, 13, 14, 15]]
PROMPT_VIDEOS = ((5, 4), (4, 6), (1, 3))  # (frames, side) in reading order: two videos of different grids, an image
