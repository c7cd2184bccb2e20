"""Released and Qwen2 checkpoints, by their own key names, from safetensors files, sharded or not. Strict.

A key that is missing or has no place raises, with its name. Two families are exempt, because they are not weights of
this model: ``model.vision_tower.*`` (the model takes the tower's features) and ``*.rotary_emb.inv_freq`` (recomputed).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from .config import SlowFastConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_safetensors(path: str | PathLike, *, device: str = "cpu") -> dict[str, Tensor]:
    """State dict of a .safetensors file, an index of shards, or a directory that holds either.

    Raises:
        FileNotFoundError: no checkpoint at ``path``, or a shard that the index names is missing.
        ValueError: the shards do not hold the keys that the index promises.
    """
    from safetensors.torch import load_file

    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (INDEX, SINGLE) if (path / name).exists()]
        if not found:
            raise FileNotFoundError(f"path: got {path} with neither {INDEX} nor {SINGLE}")
        path = found[0]
    if not path.exists():
        raise FileNotFoundError(f"path: no such checkpoint: {path}")
    if path.suffix != ".json":
        return load_file(path, device=device)
    weight_map = json.loads(path.read_text())["weight_map"]
    state_dict: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (path.parent / shard).exists():
            raise FileNotFoundError(f"path: {path.name} names {shard}, which is not in {path.parent}")
        state_dict |= load_file(path.parent / shard, device=device)
    _raise_on_keys("shards", set(weight_map) - set(state_dict), set(state_dict) - set(weight_map), [])
    return state_dict


def _raise_on_keys(name: str, missing: set[str], unexpected: set[str], misshapen: list[str]) -> None:
    problems = []
    for what, keys in (
        ("missing", sorted(missing)),
        ("unexpected", sorted(unexpected)),
        ("of another shape", misshapen),
    ):
        if keys:
            shown = ", ".join(keys[:20]) + (f" and {len(keys) - 20} more" if len(keys) > 20 else "")
            problems.append(f"{len(keys)} keys {what}: {shown}")
    if problems:
        raise ValueError(f"{name}: got " + "; ".join(problems))


def _is_ours(key: str) -> bool:
    return not key.startswith("model.vision_tower.") and not key.endswith("rotary_emb.inv_freq")


def _load(model, state_dict: Mapping[str, Tensor], optional: set[str], assign: bool) -> None:
    own = model.state_dict()
    given = {key: value for key, value in state_dict.items() if _is_ours(key)}
    embedding = "model.embed_tokens.weight"
    if model.config.tie_word_embeddings and embedding in given:
        given["lm_head.weight"] = given[embedding]
    misshapen = [
        f"{key} {list(given[key].shape)} (want {list(own[key].shape)})"
        for key in sorted(set(own) & set(given))
        if given[key].shape != own[key].shape
    ]
    _raise_on_keys("state_dict", set(own) - set(given) - optional, set(given) - set(own), misshapen)
    model.load_state_dict(given, strict=False, assign=assign)
    if assign and model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def load_official_state_dict(model, state_dict: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Load every weight of ``model`` from a released checkpoint's state dict.

    Values are copied into the model's parameters, in their dtype; ``assign`` makes them the parameters instead.

    Raises:
        ValueError: keys that are missing, unexpected, or of another shape, by name. Nothing is loaded then.
    """
    _load(model, state_dict, set(), assign)


def load_qwen2_state_dict(model, state_dict: Mapping[str, Tensor]) -> None:
    """Load a Qwen2 language model's weights; then start the slow path from them.

    Every hybrid layer's ``cross_attn_kv_proj`` becomes the layer's own k_proj and v_proj, and its warm-up gate 0: the
    model then computes exactly what the language model does. The projector and the gates keep their values.

    Raises:
        ValueError: keys that are missing, unexpected, or of another shape, by name. Nothing is loaded then.
    """
    added = {key for key in model.state_dict() if ".cross_attn_" in key or key.startswith("model.mm_projector.")}
    given = set(state_dict) & added
    if given:
        _raise_on_keys("state_dict", set(), given, [])
    _load(model, state_dict, added, False)
    initialise_slow_path(model)


def interleave_kv(k: Tensor, v: Tensor, num_kv_heads: int) -> Tensor:
    """k_proj and v_proj [Hkv * D, ...] as one projection with output [Hkv, 2, D]: K and V of a head side by side."""
    heads = [x.unflatten(0, (num_kv_heads, -1)) for x in (k, v)]
    return torch.stack(heads, 1).flatten(0, 2)


@torch.no_grad()
def initialise_slow_path(model) -> None:
    """K and V of the slow tokens from the language model's, and warm-up gates at 0, in every hybrid layer.

    The released code concatenates the two projections, though they are read interleaved, which scrambles K and V where
    there is more than one KV head.
    """
    for layer in model.model.layers:
        if layer.is_hybrid:
            attention = layer.self_attn
            for name in ("weight", "bias"):
                k, v = (getattr(proj, name) for proj in (attention.k_proj, attention.v_proj))
                getattr(attention.cross_attn_kv_proj, name).copy_(interleave_kv(k, v, attention.num_kv_heads))
            if attention.cross_attn_warm_up_gate is not None:
                attention.cross_attn_warm_up_gate.zero_()


def from_pretrained(
    cls, directory: str | PathLike, *, device: str = "cpu", dtype: torch.dtype | None = None, **options
):
    """Build ``cls`` from a directory with config.json and safetensors, on ``device``, without initialising it first.

    ``dtype`` None keeps the checkpoint's. ``options`` go to the constructor.

    Raises:
        FileNotFoundError: no config.json or no weights.
        ValueError: a configuration or keys that do not fit.
    """
    directory = Path(directory)
    if not (directory / "config.json").exists():
        raise FileNotFoundError(f"directory: got {directory} without config.json")
    config = SlowFastConfig.from_official(json.loads((directory / "config.json").read_text()))
    with torch.device("meta"):
        model = cls(config, **options)
    load_official_state_dict(model, read_safetensors(directory, device=device), assign=True)
    return model.to(dtype) if dtype is not None else model
