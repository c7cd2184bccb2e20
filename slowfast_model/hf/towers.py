"""Vision towers that a configuration can rebuild by name: it keeps the settings; the weights are the model's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..vision import PatchTower

TOWERS = {"patch": PatchTower}  # the class, whose arguments are the settings


def tower_config(tower: nn.Module | tuple[str, Mapping] | None) -> dict | None:
    """``name`` and settings of a tower, as ``SlowFastVLConfig.vision_tower`` keeps them.

    Raises:
        TypeError: neither a module nor a pair of a name and settings.
        ValueError: a tower that no configuration can rebuild.
    """
    if tower is None:
        return None
    if isinstance(tower, PatchTower):
        patch = tower.embed.kernel_size[0]
        return {"name": "patch", "width": tower.embed.out_channels, "grid": tower.size // patch, "patch": patch}
    if isinstance(tower, nn.Module):
        raise ValueError(
            f"vision_tower: got {type(tower).__name__}, want one of {', '.join(TOWERS)} (encode_frames(tower, frames) "
            "gives video_features of any other)"
        )
    if not isinstance(tower, tuple | list) or len(tower) != 2 or not isinstance(tower[1], Mapping):
        raise TypeError(f"vision_tower: got {tower!r}, want a module, (name, settings) or None")
    config = {"name": tower[0], **tower[1]}
    build_tower(config)
    return config


def build_tower(config: Mapping) -> nn.Module:
    """The tower of a ``SlowFastVLConfig.vision_tower``, with random weights.

    Raises:
        ValueError: an unknown name, or settings that it does not have.
    """
    settings = dict(config)
    name = settings.pop("name", None)
    if name not in TOWERS:
        raise ValueError(f"vision_tower: got {name!r}, want one of {', '.join(TOWERS)}")
    try:
        return TOWERS[name](**settings)
    except TypeError as error:
        raise ValueError(f"vision_tower: got settings {settings}, which {name!r} does not take ({error})") from error


def tokens_per_frame(config: Mapping | None) -> int | None:
    """Vision tokens of a frame; None: there is no tower that says so."""
    if config is None:
        return None
    with torch.device("meta"):
        return len(build_tower(config).position)
