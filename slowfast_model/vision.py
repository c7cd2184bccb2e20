"""From vision features to slow and fast tokens: the projector, the pooling call, and a small patch tower.

The released towers (ConvNeXt, SigLIP) are not part of this package: the model takes their features. ``PatchTower`` is a
patch embedding that turns real frames into features of the right shape where no tower is at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slowfast_kernels as sk
from slowfast_kernels.pool_plan import make_pool_plan

from .config import SlowFastConfig


def build_projector(config: SlowFastConfig) -> nn.Module:
    """mm_hidden_size -> hidden_size: ``linear``, ``mlpNx_gelu`` (N linear layers) or ``identity``."""
    if config.mm_projector_type == "identity":
        return nn.Identity()
    if config.mm_projector_type == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    layers: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size)]
    for _ in range(config.projector_depth - 1):
        layers += [nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)]
    return nn.Sequential(*layers)


def _grid(index: int, features: Tensor) -> tuple[int, int]:
    side = isqrt(features.shape[1])
    if side * side != features.shape[1] or not side:
        raise ValueError(
            f"frame_features[{index}]: got {features.shape[1]} tokens a frame, want a square number (H * W, H = W)"
        )
    return side, side


def check_features(frame_features: Sequence[Tensor], width: int | None, like: Tensor, *, any_float: bool) -> None:
    """A list of [T, H*W, width] in the dtype and on the device of ``like``; under autocast any floating dtype."""
    if isinstance(frame_features, Tensor) or not isinstance(frame_features, Sequence):
        raise TypeError(
            f"frame_features: got {type(frame_features).__name__}, want a list with a tensor for each video"
        )
    if width is None and frame_features:
        raise ValueError(
            "frame_features: got videos, want none: the configuration has no mm_hidden_size (no projector)"
        )
    for i, x in enumerate(frame_features):
        if x.dim() != 3 or x.shape[2] != width:
            raise ValueError(f"frame_features[{i}]: got shape {list(x.shape)}, want [T, H*W, {width}]")
        if not x.shape[0]:
            raise ValueError(f"frame_features[{i}]: got no frames, want at least one")
        if x.device != like.device:
            raise ValueError(
                f"frame_features[{i}]: got a tensor on {x.device}, want {like.device} (the model's device)"
            )
        if x.dtype != like.dtype and not (any_float and x.is_floating_point()):
            raise TypeError(f"frame_features[{i}]: got {x.dtype}, want {like.dtype} (the model's dtype)")


def slow_and_fast_tokens(
    projected: Sequence[Tensor], config: SlowFastConfig, norm_eps: float | None, backend: str | None
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """projected: [T, H*W, C] of each video -> slow [Ns, C], fast [Nf, C], and (fast, slow) counts of each video.

    Videos on one grid are pooled in one call, whose output is already in reading order.
    """
    options = {
        "pool_stride": config.mm_video_pooling_stride,
        "sampling_stride": config.fast_token_temporal_sampling_stride,
        "temporal_stride": config.fast_token_temporal_stride,
        "spatial_stride": config.fast_token_spatial_stride,
        "min_fast_frames": config.min_fast_frames,
    }
    by_grid: dict[tuple[int, int], list[int]] = {}
    for i, frames in enumerate(projected):
        by_grid.setdefault(_grid(i, frames), []).append(i)
    slow, fast = [None] * len(projected), [None] * len(projected)
    counts = [None] * len(projected)
    for grid, members in by_grid.items():
        frame_counts = [len(projected[i]) for i in members]
        frames = projected[members[0]] if len(members) == 1 else torch.cat([projected[i] for i in members])
        pooled = sk.slowfast_pool(frames, frame_counts, grid, **options, norm_eps=norm_eps, backend=backend)
        plan = make_pool_plan(tuple(frame_counts), grid, *options.values())
        for i, video in zip(members, plan.videos, strict=True):
            counts[i] = (video.num_fast, video.num_slow)
        if len(by_grid) == 1:
            return pooled.slow, pooled.fast, counts
        for tokens, parts, sizes in (
            (pooled.slow, slow, [video.num_slow for video in plan.videos]),
            (pooled.fast, fast, [video.num_fast for video in plan.videos]),
        ):
            for i, part in zip(members, tokens.split(sizes), strict=True):
                parts[i] = part
    return torch.cat(slow), torch.cat(fast), counts


class PatchTower(nn.Module):
    """Frames -> features [T, grid * grid, width]: resize, normalise, one patch embedding, a residual MLP, LayerNorm."""

    def __init__(self, width: int, grid: int = 16, patch: int = 14) -> None:
        super().__init__()
        self.size = grid * patch
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        self.position = nn.Parameter(torch.randn(grid * grid, width) * 0.02)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [T, 3, height, width] in 0..1, the tower's dtype."""
        resized = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        x = self.embed(resized * 2 - 1).flatten(2).transpose(1, 2) + self.position
        return self.norm(x + self.mlp(x))


def encode_frames(tower: nn.Module, frames: Tensor, *, chunk: int = 32) -> Tensor:
    """Features of a video: uint8 frames [T, height, width, 3] through ``tower``, ``chunk`` frames at a time.

    Returns [T, H*W, mm_hidden] on the tower's device and in its dtype, ready for ``frame_features``.

    Raises:
        ValueError: frames of another shape, or none.
        TypeError: frames that are not uint8.
    """
    if frames.dim() != 4 or frames.shape[3] != 3 or not frames.shape[0]:
        raise ValueError(f"frames: got shape {list(frames.shape)}, want [T, height, width, 3] with at least one frame")
    if frames.dtype != torch.uint8:
        raise TypeError(f"frames: got {frames.dtype}, want uint8")
    like = next(tower.parameters())
    parts = (part.to(like.device).permute(0, 3, 1, 2).to(like.dtype) / 255 for part in frames.split(chunk))
    return torch.cat([tower(part) for part in parts])
