"""Frames as a trained tower wants them: resized, cropped and normalised as by PIL, on the device that they are on.

The released code resizes with PIL, whose bicubic filter passes over rows of pixels and then over columns and rounds to
eight bits after each. Here both passes are torch's antialiased filter, which has the same weights in floating point,
and the same rounding. Where PIL's fixed-point sum rounds the other way a pass is one of 255 levels apart, and so two
passes are two at most. (Pillow 13 takes the columns of tall pictures first where the aspect is not kept; the released
code's Pillow did not.) All of it is a few operations of any device: there is no trip to the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Preprocess:
    """uint8 frames [n, height, width, 3] -> float32 pixels [n, 3, size, size].

    ``keeps_aspect``: the shorter edge becomes ``size`` and the centre is cut out, as for ConvNeXt and CLIP; else both
    edges become ``size``, as for SigLIP. ``mean`` and ``std`` are those of red, green and blue, in 0..1.
    """

    size: int
    keeps_aspect: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, frames: Tensor) -> Tensor:
        height, width = frames.shape[1:3]
        new_height = new_width = self.size
        if self.keeps_aspect:
            new_height, new_width = (int(self.size * edge / min(height, width)) for edge in (height, width))
        pixels = _resize(frames.permute(0, 3, 1, 2).float(), (height, new_width))
        pixels = _centre(pixels, 3, self.size)  # columns that are cut off need no second pass
        pixels = _centre(_resize(pixels, (new_height, pixels.shape[3])), 2, self.size)
        mean, std = (pixels.new_tensor(x)[:, None, None] for x in (self.mean, self.std))
        return (pixels / 255 - mean) / std


def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """float32 pixels of whole levels [n, 3, height, width] to [n, 3, *size], whole levels again."""
    if pixels.shape[2:] == size:
        return pixels
    resized = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
    return resized.add_(0.5).floor_().clamp_(0, 255)  # PIL rounds halves up


def _centre(pixels: Tensor, dim: int, size: int) -> Tensor:
    return pixels.narrow(dim, (pixels.shape[dim] - size) // 2, size)
