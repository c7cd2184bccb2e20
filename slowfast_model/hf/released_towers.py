"""Which tower a released config.json names, of which sizes, and under which keys and where its weights are stored.

A name fixes the structure (depths, heads); the widths are those of the stored weights, as the fine-tuned towers lie in
the checkpoint. Weights that are elsewhere come from a directory of transformers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from transformers import CLIPVisionConfig, SiglipVisionConfig

from ..weight_files import CONFIG, directory_path, read_json
from .towers import tower_config
from .vision_towers import layers_used

PREFIX = "model.vision_tower.vision_tower."
WAYS_OUT = (
    "vision_tower=DIRECTORY of a SiglipVisionModel or CLIPVisionModel, vision_tower=(name, settings) of towers.TOWERS, "
    "or vision_tower=False and video_features"
)
_CONVNEXT = re.compile(r"convnext-(\d+)")
_TRANSFORMER = re.compile(
    r"(?:.*(?P<siglip>siglip)2?|openai/clip-vit)-(?P<model>[a-z0-9]+)-patch(?P<patch>\d+)(?:-(?P<image>\d+))?"
)
_BASE, _LARGE = (768, 3072, 12, 12), (1024, 4096, 24, 16)
_STRUCTURES = {
    "siglip": {"base": _BASE, "large": _LARGE, "so400m": (1152, 4304, 27, 16)},
    "clip": {"base": _BASE, "large": _LARGE},
}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class ReleasedTower:
    """A checkpoint's tower: ``SlowFastVLConfig.vision_tower``, the stored names of its keys, and its files."""

    config: dict
    directory: Path | None = None  # with its weights, where the checkpoint has none

    def stored_key(self, key: str) -> str:
        """Of a parameter ``key`` of the tower's module."""
        if self.config["name"] == "convnext":  # the released code renamed timm's layer scale
            return PREFIX + re.sub(r"^(stages\.\d+\.blocks\.\d+)\.gamma$", r"\1.weight", key)
        return PREFIX + ("vision_model." + key if self.config["name"] in ("siglip", "clip") else key)

    def is_unused(self, stored_key: str) -> bool:
        """Whether a stored key belongs to what the features do not need: a head, layers behind the selected one."""
        key = stored_key.removeprefix(PREFIX)
        if self.config["name"] == "convnext":
            return key.startswith("head.")
        if self.config["name"] not in ("siglip", "clip"):
            return False
        if re.fullmatch(r"vision_model\.(post_layernorm\..*|head\..*|embeddings\.position_ids)", key):
            return True
        layer = re.match(r"vision_model\.encoder\.layers\.(\d+)\.", key)
        count = self.config["num_hidden_layers"]
        return layer is not None and layers_used(self.config["select_layer"], count) <= int(layer[1]) < count


def released_tower(
    written: Mapping, shapes: Mapping[str, tuple[int, ...]], given: str | PathLike | tuple | bool | None
) -> ReleasedTower | None:
    """The tower of a released config.json ``written``, whose checkpoint has tensors of ``shapes``.

    Args:
        given: as ``vision_tower`` of ``from_pretrained``: None: what ``written`` says.

    Raises:
        ValueError: a name that is not known, or another setting that is not implemented.
        TypeError: ``given`` of another type.
    """
    if given is False:
        return None
    feature = written.get("mm_vision_select_feature")
    if feature not in (None, "patch"):
        raise ValueError(f"mm_vision_select_feature: got {feature!r}, want 'patch' (a square grid of tokens)")
    layer = written.get("mm_vision_select_layer")
    layer = -2 if layer is None else layer
    name = written.get("mm_vision_tower")
    if isinstance(given, tuple | list):
        return ReleasedTower(tower_config(given))
    if isinstance(given, str | bytes | PathLike):
        return _of_directory(directory_path(given), layer)
    if given is not None:
        raise TypeError(f"vision_tower: got {given!r}, want a directory, (name, settings), False or None")
    if isinstance(name, str):
        if os.path.isdir(name):
            return _of_directory(Path(name), layer)
        convnext = _CONVNEXT.fullmatch(name)
        if convnext:
            return ReleasedTower(_convnext(int(convnext[1]), shapes))
        found = _transformer(name, shapes, layer)
        if found:
            return ReleasedTower(found)
    raise ValueError(
        f"mm_vision_tower: got {name!r}, want 'convnext-576', the name of a SigLIP (base, large, so400m) or of an "
        f"openai CLIP (base, large), or a directory with one; else {WAYS_OUT}"
    )


def _convnext(size: int, shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """ConvNeXt-XXL's depths; the widths are those stored."""
    keys = [f"{PREFIX}stages.{stage}.blocks.0.conv_dw.bias" for stage in range(4)]
    dims = {"dims": [shapes[key][0] for key in keys]} if all(key in shapes for key in keys) else {}
    return tower_config(("convnext", {"size": size} | dims))


def _transformer(name: str, shapes: Mapping[str, tuple[int, ...]], select_layer: int) -> dict | None:
    match = _TRANSFORMER.fullmatch(name)
    kind = "siglip" if match and match["siglip"] else "clip"
    if not match or match["model"] not in _STRUCTURES[kind]:
        return None
    settings = dict(zip(_SIZES, _STRUCTURES[kind][match["model"]], strict=True))
    settings |= {"patch_size": int(match["patch"]), "image_size": int(match["image"] or 224)}
    model = PREFIX + "vision_model."
    patches, positions = (f"{model}embeddings.{part}_embedding.weight" for part in ("patch", "position"))
    fc1 = f"{model}encoder.layers.0.mlp.fc1.bias"
    if all(key in shapes for key in (patches, positions, fc1)):
        hidden, _, patch, _ = shapes[patches]
        side = int(shapes[positions][0] ** 0.5)  # CLIP's has one more, for the class token
        settings |= {"hidden_size": hidden, "intermediate_size": shapes[fc1][0]}
        settings |= {"patch_size": patch, "image_size": side * patch}
    return tower_config((kind, settings | {"select_layer": select_layer}))


def _of_directory(directory: Path, select_layer: int) -> ReleasedTower:
    """Of what ``save_pretrained`` of a vision model, or of its two-sided model, wrote."""
    if not (directory / CONFIG).exists():
        raise ValueError(f"vision_tower: got {directory} without {CONFIG}, want a directory of transformers")
    written = read_json(directory / CONFIG)
    kind, _, part = str(written.get("model_type")).partition("_")
    if kind not in ("siglip", "clip") or part not in ("", "vision_model"):
        raise ValueError(
            f"vision_tower: got {directory} of model_type {written.get('model_type')!r}, want a SigLIP or a CLIP"
        )
    sizes = written if part else written.get("vision_config", {})
    config = (SiglipVisionConfig if kind == "siglip" else CLIPVisionConfig)(**sizes)
    names = (*_SIZES, "image_size", "patch_size", "hidden_act", "layer_norm_eps")
    settings = {name: getattr(config, name) for name in names} | {"select_layer": select_layer}
    return ReleasedTower(tower_config((kind, settings)), directory)
