"""The released models by their names' frames and strides, and a tiny one; ``selection`` parses their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .registry import QWEN2_7B_MODEL, TINY_MODEL
from .shapes import ModelShape, language_model_keys


@dataclass(frozen=True)
class ReleasedShape:
    """``frames`` of a video, the strides of its fast tokens, language model, tower, and size of the pictures."""

    frames: int
    sampling: int
    temporal: int
    model: ModelShape
    tower: str  # of slowfast_model.hf.towers, with its settings
    tower_width: int
    picture: tuple[int, int]  # height, width
    tower_settings: Mapping = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.frames}-s{self.sampling}t{self.temporal}"

    @property
    def config(self) -> dict:
        """What a released config.json says of it."""
        model = self.model
        return {
            "model_type": "llava_qwen_slow_fast",
            **language_model_keys(model),
            "mm_hidden_size": self.tower_width,
            "mm_projector_type": "mlp2x_gelu",
            "mm_video_pooling_stride": 2,
            "cross_attn_every_n_layers": model.every,
            "fast_token_temporal_sampling_stride": self.sampling,
            "fast_token_temporal_stride": self.temporal,
            "min_fast_frames": model.fast_frames,
        }


_FULL = ReleasedShape(64, 1, 4, QWEN2_7B_MODEL, "convnext", 3072, (1080, 1920))
RELEASED: list[ReleasedShape] = [
    _FULL,
    replace(_FULL, frames=96, temporal=6),
    replace(_FULL, frames=128, sampling=2),
]
_TINY_SIGLIP = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
RELEASED_ON_CPU: list[ReleasedShape] = [
    ReleasedShape(
        8,
        1,
        2,
        replace(TINY_MODEL, fast_frames=4),
        "siglip",
        24,
        (90, 160),
        _TINY_SIGLIP | {"image_size": 56, "patch_size": 14},
    )
]
