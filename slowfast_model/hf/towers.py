"""Vision towers that a configuration can rebuild by name: it keeps the settings; the weights are the model's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import NamedTuple

from torch import nn

from ..vision import PatchTower
from .vision_towers import CONVNEXT_STRIDE, ClipTower, ConvNextTower, SiglipTower


class Tower(NamedTuple):
    """A tower by its name: the class, whose arguments are the settings, and what these say of its tokens."""

    kind: type[nn.Module]
    side: Callable[[Mapping], int]  # of the grid of tokens of a frame
    width: Callable[[Mapping], int]  # of a token


def _patches(settings: Mapping) -> int:
    return settings["image_size"] // settings["patch_size"]


TOWERS = {
    "patch": Tower(PatchTower, itemgetter("grid"), itemgetter("width")),
    "convnext": Tower(ConvNextTower, lambda s: s["size"] // CONVNEXT_STRIDE, lambda s: s["dims"][-1]),
    "siglip": Tower(SiglipTower, _patches, itemgetter("hidden_size")),
    "clip": Tower(ClipTower, _patches, itemgetter("hidden_size")),
}


def tower_config(tower: nn.Module | tuple[str, Mapping] | None) -> dict | None:
    """``name`` and settings of a tower, as ``SlowFastVLConfig.vision_tower`` keeps them.

    Raises:
        TypeError: neither a module nor a pair of a name and settings.
        ValueError: a tower that no configuration can rebuild.
    """
    if tower is None:
        return None
    if isinstance(tower, nn.Module):
        for name, known in TOWERS.items():
            if isinstance(tower, known.kind):
                return {"name": name, **tower.settings}
        raise ValueError(
            f"vision_tower: got {type(tower).__name__}, want one of {', '.join(TOWERS)} (encode_frames(tower, frames) "
            "gives video_features of any other)"
        )
    if not isinstance(tower, tuple | list) or len(tower) != 2 or not isinstance(tower[1], Mapping):
        raise TypeError(f"vision_tower: got {tower!r}, want a module, (name, settings) or None")
    return {"name": tower[0], **_all_settings({"name": tower[0], **tower[1]})[1]}


def _all_settings(config: Mapping) -> tuple[Tower, dict]:
    settings = dict(config)
    name = settings.pop("name", None)
    if name not in TOWERS:
        raise ValueError(f"vision_tower: got {name!r}, want one of {', '.join(TOWERS)}")
    try:
        bound = inspect.signature(TOWERS[name].kind).bind(**settings)
    except TypeError as error:
        raise ValueError(f"vision_tower: got settings {settings}, which {name!r} does not take ({error})") from error
    bound.apply_defaults()
    return TOWERS[name], {
        key: list(value) if isinstance(value, tuple) else value for key, value in bound.arguments.items()
    }


def build_tower(config: Mapping) -> nn.Module:
    """The tower of a ``SlowFastVLConfig.vision_tower``, with random weights.

    Raises:
        ValueError: an unknown name, or settings that it does not have.
        ImportError: the library that it is of is not installed.
    """
    tower, settings = _all_settings(config)
    return tower.kind(**settings)


def tokens_per_frame(config: Mapping | None) -> int | None:
    """Vision tokens of a frame; None: there is no tower that says so."""
    if config is None:
        return None
    tower, settings = _all_settings(config)
    return tower.side(settings) ** 2


def tower_width(config: Mapping | None) -> int | None:
    """Channels of a vision token; None: there is no tower that says so."""
    if config is None:
        return None
    tower, settings = _all_settings(config)
    return tower.width(settings)
