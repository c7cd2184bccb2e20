"""The keys of a config.json: which are fields, which fix what this model does not vary, and how to write them.

The rules are those of transformers' Qwen2 configuration and of the released code. Each key that shapes the computation
is a field, or is held to the values that mean what this model computes; nothing of the kind is passed over in silence.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

RELEASED, QWEN2 = "llava_qwen_slow_fast", "qwen2"
ARCHITECTURES = {RELEASED: "LlavaQwenSlowFastForCausalLM", QWEN2: "Qwen2ForCausalLM"}

# Values that mean what this model computes; null, or no such key, is always one of them.
IMPLEMENTED: dict[str, tuple] = {
    "model_type": (RELEASED, QWEN2),
    "hidden_act": ("silu", "swish"),  # two names of one function
    "use_sliding_window": (False,),
    "attention_dropout": (0,),
    "partial_rotary_factor": (1,),
    "mlp_bias": (False,),
    "attention_bias": (),  # q, k and v have a bias, o has none: neither True nor False says so
    "quantization_config": (),
    "compression_config": (),
    "text_config": (),
    "mm_patch_merge_type": ("flat",),
}
WANTED = {
    "attention_bias": "null (Qwen2's: a bias of q, k and v, and none of o)",
    "quantization_config": "null (dequantise the checkpoint first)",
    "compression_config": "null (decompress the checkpoint first)",
    "text_config": "the language model's keys at top level",
}
# Every model has these: null means nothing in them, and the default would be some other model's.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OWN_FIELDS = ("causal_slow_tokens",)  # the release computes, and reads, the default
QWEN2_FIELDS = (
    *SIZES,
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
    "initializer_range",
)


def read_official(config: Mapping, cls: type) -> dict:
    """The fields of the dataclass ``cls`` that a config.json gives; see ``SlowFastConfig.from_official``."""
    if not isinstance(config, Mapping):
        raise TypeError(f"config: got {type(config).__name__}, want a dict: what a config.json holds")
    for key, values in IMPLEMENTED.items():
        value = config.get(key)
        if value is not None and not _is_one_of(value, values):
            wanted = WANTED.get(key) or " or ".join(map(repr, values))
            raise ValueError(f"{key}: got {value!r}, want {wanted}")
    for key in SIZES:
        if key in config and config[key] is None:
            raise ValueError(f"{key}: got null, want an integer >= 1")
    _check_layer_types(config.get("layer_types"), config.get("num_hidden_layers", cls.num_hidden_layers))

    values = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
    if "num_key_value_heads" in config:
        values["num_key_value_heads"] = config["num_key_value_heads"]
    theta = _nested_theta(config)
    if theta is not None:
        values["rope_theta"] = theta
    return values


def _is_one_of(value: object, values: tuple) -> bool:
    """Whether JSON would write them alike: True is not 1 there, while 0 and 0.0 are one number."""
    return any(isinstance(value, bool) == isinstance(known, bool) and value == known for known in values)


def _check_layer_types(layer_types: object, num_layers: int) -> None:
    if layer_types is None:
        return
    if not isinstance(layer_types, list | tuple) or any(kind != "full_attention" for kind in layer_types):
        raise ValueError(f"layer_types: got {layer_types!r}, want 'full_attention' in every layer")
    if len(layer_types) != num_layers:
        raise ValueError(f"layer_types: got {len(layer_types)} layers, want num_hidden_layers ({num_layers})")


def _nested_theta(config: Mapping) -> object:
    """``rope_theta`` of the dict that transformers takes: ``rope_scaling`` if there is one, or ``rope_parameters``."""
    scaling = config.get("rope_scaling")
    if scaling and config.get("model_type") == RELEASED:
        warnings.warn(f"rope_scaling: {scaling!r} is dropped, as the released code does", stacklevel=4)
        scaling = None
    parameters = config.get("rope_parameters")
    for key, rope in (("rope_scaling", scaling), ("rope_parameters", parameters)):
        if rope:
            _check_rope(key, rope)
    return (scaling or parameters or {}).get("rope_theta")


def _check_rope(key: str, rope: object) -> None:
    if not isinstance(rope, Mapping):
        raise ValueError(f"{key}: got {rope!r}, want an object or null")
    kind = rope.get("rope_type") or rope.get("type") or "default"  # "type" is what older files call it
    if kind != "default":
        raise ValueError(f"{key}: got rope type {kind!r} in {dict(rope)!r}, want 'default'")
    if not _is_one_of(1 if rope.get("partial_rotary_factor") is None else rope["partial_rotary_factor"], (1,)):
        raise ValueError(f"{key}: got partial_rotary_factor {rope['partial_rotary_factor']!r}, want 1")
    known = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    unknown = [name for name, value in rope.items() if name not in known and value is not None]
    if unknown:
        raise ValueError(f"{key}: got {', '.join(map(repr, unknown))} in {dict(rope)!r}, want rope_theta alone")


def write_official(config: Any) -> dict:
    """The keys of a config.json that ``read_official`` reads as ``config``; see ``SlowFastConfig.to_official``."""
    kind = RELEASED if config.hybrid_layers else QWEN2
    written = {"model_type": kind, "architectures": [ARCHITECTURES[kind]], "hidden_act": "silu"}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "head_dim":
            needed = value * config.num_attention_heads != config.hidden_size
        elif field.name in OWN_FIELDS:
            needed = value != field.default
        else:
            needed = kind == RELEASED or field.name in QWEN2_FIELDS or value != field.default
        if needed:
            written[field.name] = value
    return written
