"""Released and Qwen2 checkpoints, by their own key names: what a model takes from one, and what it saves. Strict.

A key that is missing or has no place raises, with its name. Two families are exempt, because they are not weights of
this model: ``model.vision_tower.*`` (the model takes the tower's features) and ``*.rotary_emb.inv_freq`` (recomputed).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from os import PathLike

import torch
from torch import Tensor, nn

from slowfast_kernels.dtypes import OP_DTYPES

from .config import SlowFastConfig
from .weight_files import (
    CONFIG,
    directory_path,
    listed,
    raise_on_keys,
    read_json,
    read_safetensors,
    shard_bytes,
    write_checkpoint,
)

__all__ = [
    "from_pretrained",
    "load_official_state_dict",
    "load_qwen2_state_dict",
    "read_safetensors",
    "save_pretrained",
]

FLOAT32_ASIDE = (re.compile(r"norm\.weight$"), re.compile(r"\.cross_attn_(gate_proj|warm_up_gate)"))  # each as a whole
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WRAPPERS = {  # what puts a prefix before every key
    "module.": "DistributedDataParallel: save model.module",
    "_orig_mod.": "torch.compile: save the model that was compiled",
    "base_model.model.": "PEFT: save what merge_and_unload returns",
}


def _is_ours(key: str) -> bool:
    return not key.startswith("model.vision_tower.") and not key.endswith("rotary_emb.inv_freq")


def _weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries that are weights of this model; each is a tensor of numbers that it can compute with."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: got {type(state_dict).__name__}, want a mapping of key to tensor")
    given = {key: value for key, value in state_dict.items() if _is_ours(key)}
    for key, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"state_dict: got {type(value).__name__} for {key}, want a tensor")
        if value.is_meta:
            raise ValueError(f"state_dict: got {key} on the meta device, without values")
        if value.layout is not torch.strided or value.is_nested:
            raise ValueError(f"state_dict: got {key} of layout {value.layout}, want a dense tensor")
    unusable = [f"{key} ({value.dtype})" for key, value in sorted(given.items()) if value.dtype not in OP_DTYPES]
    if unusable:
        raise ValueError(
            f"state_dict: got {listed(unusable)}, want float32, bfloat16, float16 or float64 (dequantise it first)"
        )
    return given


def _tie(given: dict[str, Tensor]) -> None:
    """Both keys of tied weights, from either; savers keep the one or the other."""
    if EMBEDDING in given and HEAD in given:
        a, b = given[EMBEDDING], given[HEAD]
        if a.shape == b.shape and not ((a == b) | (a.isnan() & b.isnan())).all():
            raise ValueError(
                f"state_dict: got {HEAD} other than {EMBEDDING}, want one of them, or equal ones: "
                "tie_word_embeddings is true"
            )
    for here, there in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
        if here in given:
            given.setdefault(there, given[here])


def _load(model, state_dict: Mapping[str, Tensor], optional: set[str], assign: bool) -> None:
    own, given = model.state_dict(), _weights(state_dict)
    if model.config.tie_word_embeddings:
        _tie(given)
    misshapen = [
        f"{key} {list(given[key].shape)} (want {list(own[key].shape)})"
        for key in sorted(set(own) & set(given))
        if given[key].shape != own[key].shape
    ]
    unexpected = set(given) - set(own)
    wrappers = [by for prefix, by in WRAPPERS.items() if any(key.startswith(prefix) for key in unexpected)]
    hint = f" (saved by {wrappers[0]})" if wrappers else ""
    raise_on_keys("state_dict", set(own) - set(given) - optional, unexpected, misshapen, hint)
    if not assign and any(value.is_meta for value in own.values()):
        raise ValueError("model: got parameters on the meta device, want them to have memory (model.to_empty)")
    model.load_state_dict(given, strict=False, assign=assign)
    if assign and model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def load_official_state_dict(model, state_dict: Mapping[str, Tensor], *, assign: bool = False) -> None:
    """Load every weight of ``model`` from a released checkpoint's state dict.

    Values are copied into the model's parameters, in their dtype; ``assign`` makes them the parameters instead. Tied
    weights may be under either name, or both if they are equal.

    Raises:
        ValueError: keys that are missing, unexpected, of another shape, or of integers or 8-bit floats, by name; tied
            weights that differ. Nothing is loaded then.
        TypeError: what is no mapping of tensors.
    """
    _load(model, state_dict, set(), assign)


def load_qwen2_state_dict(model, state_dict: Mapping[str, Tensor]) -> None:
    """Load a Qwen2 language model's weights; then start the slow path from them.

    Every hybrid layer's ``cross_attn_kv_proj`` becomes the layer's own k_proj and v_proj, and its warm-up gate 0: the
    model then computes exactly what the language model does. The projector and the gates keep their values.

    Raises:
        ValueError, TypeError: as ``load_official_state_dict``. Nothing is loaded then.
    """
    added = {key for key in model.state_dict() if ".cross_attn_" in key or key.startswith("model.mm_projector.")}
    given = set(_weights(state_dict)) & added
    if given:
        raise_on_keys("state_dict", set(), given, [])
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


# ------------------------------------------------------------------------------------------ directories


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype of ``OP_DTYPES`` by itself or by name ("bfloat16", "torch.bfloat16"); None stays None."""
    if dtype is None:
        return None
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or named not in OP_DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, want float32, bfloat16, float16, float64, 'auto' or None")
    return named


def _device(device: torch.device | str | int) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:  # the last: torch was built without that backend
        cause = str(error).partition("\n")[0]
        raise ValueError(f"device: got {device!r}, want one that is here, as 'cpu' or 'cuda:0' ({cause})") from error
    if found.type == "meta":
        raise ValueError("device: got 'meta', want a device that holds values")
    return found


def _cast(given: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors in ``dtype``, or, where that is None, as they are if the model computes with their dtypes.

    ``given`` is emptied by a cast: on a GPU there may be no room for all of them twice.
    """
    if dtype is not None:
        return {key: given.pop(key).to(dtype) for key in list(given)}
    counts = Counter(value.dtype for key, value in given.items() if not any(p.search(key) for p in FLOAT32_ASIDE))
    if not counts:
        return given
    most, aside = counts.most_common(1)[0][0], set()
    for pattern in FLOAT32_ASIDE:
        part = {key for key in given if pattern.search(key)}
        if {given[key].dtype for key in part} == {torch.float32}:
            aside |= part
    others = [f"{k} ({value.dtype})" for k, value in sorted(given.items()) if value.dtype != most and k not in aside]
    if others:
        raise ValueError(
            f"dtype: got a checkpoint of {most} beside {listed(others)}, want dtype={most}, which casts these"
        )
    return given


def from_pretrained(
    cls,
    directory: str | PathLike,
    *,
    device: torch.device | str | int = "cpu",
    dtype: torch.dtype | str | None = None,
    **options,
):
    """Build ``cls`` from a directory with config.json and safetensors, on ``device``, without initialising it first.

    ``dtype`` None keeps the dtype of the checkpoint's tensors, which must be one (all norms, and all gates with their
    warm-up, may be in float32 beside it); "auto" takes what config.json calls its dtype, if it does; a dtype, or its
    name, is cast to. ``options`` go to the constructor.

    Raises:
        FileNotFoundError, NotADirectoryError: no such directory, no config.json in it, or no weights.
        ValueError, TypeError: a configuration or keys that do not fit, files that cannot be read, by their path;
            tensors of several dtypes where ``dtype`` names none; a ``dtype`` or ``device`` that does not exist.
    """
    directory, device = directory_path(directory), _device(device)
    kept = dtype is None or (isinstance(dtype, str) and dtype == "auto")
    wanted = None if kept else _dtype(dtype)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"directory: got {directory}, which is a file")
    file = directory / CONFIG
    if not file.exists():
        hint = "" if directory.exists() else ", as it does not exist (nothing is downloaded by its name)"
        raise FileNotFoundError(f"directory: got {directory} without {CONFIG}{hint}")
    written = read_json(file)
    try:
        config = SlowFastConfig.from_official(written)
        if dtype is not None and kept:
            wanted = _dtype(written.get("dtype") or written.get("torch_dtype"))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{file}: {error}") from error
    with torch.device("meta"):
        model = cls(config, **options)
    state_dict = read_safetensors(directory, device=device)
    try:
        weights = _weights(state_dict)
        del state_dict
        load_official_state_dict(model, _cast(weights, wanted), assign=True)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{directory}: {error}") from error
    return model


def save_pretrained(model, directory: str | PathLike, *, max_shard_size: int | str = "5GB") -> None:
    """Write what ``from_pretrained`` reads: config.json with the official keys, and safetensors by the official names.

    Weights are in one file, or in shards of at most ``max_shard_size`` (bytes, or "5GB", "200MB", "1GiB") with an
    index; tied weights are written once. The files of an older save in ``directory`` are replaced or removed. Without
    hybrid layers and projector, transformers' ``Qwen2ForCausalLM`` reads the directory too. Keys of the released
    config.json that this package does not read, such as the vision tower's name, are not written.

    Raises:
        ValueError: parameters on the meta device (offloaded), sharded over processes, quantised, or other ones than the
            configuration's (adapters that were not merged), by name; tied weights that differ; a wrong size.
        TypeError: ``directory`` or ``max_shard_size`` of another type.
        NotADirectoryError: ``directory`` is a file.
    """
    directory, limit = directory_path(directory), shard_bytes(max_shard_size)
    state_dict = {key.replace("_orig_mod.", ""): value for key, value in model.state_dict().items()}
    with torch.device("meta"):
        expected = type(model)(model.config).state_dict()
    misshapen = [
        f"{key} {list(value.shape)} (want {list(expected[key].shape)})"
        for key, value in sorted(state_dict.items())
        if key in expected and value.shape != expected[key].shape
    ]
    hint = " against the configuration (merge adapters, remove parametrisations first)"
    raise_on_keys("model", set(expected) - set(state_dict), set(state_dict) - set(expected), misshapen, hint)
    for key, value in state_dict.items():
        if type(value) not in (Tensor, nn.Parameter) or value.dtype not in OP_DTYPES:
            raise ValueError(
                f"model: got {key} as {type(value).__name__} of {value.dtype}, want a plain tensor in floating point "
                "(gather shards, dequantise first)"
            )
        if value.is_meta:
            raise ValueError(f"model: got {key} on the meta device, without values (offloaded?), want it in memory")
    if model.config.tie_word_embeddings:
        _tie(state_dict)
        del state_dict[HEAD]
    dtypes = {str(value.dtype).removeprefix("torch.") for value in state_dict.values()}
    config = model.config.to_official() | ({"torch_dtype": dtypes.pop()} if len(dtypes) == 1 else {})
    write_checkpoint(directory, config, state_dict, limit)
