"""add_slow_fast: a language model of transformers becomes one that reads slow and fast video tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from slowfast_kernels.numbers import as_float, as_int

from .attention import start_from_own_kv, unsupported_reason
from .config import SLOW_FAST_KEYS, SlowFastVLConfig, sorted_layers
from .modeling import SlowFastVLForConditionalGeneration
from .towers import tower_config, tower_width

KV_INITS = ("lm", "fresh")


def add_slow_fast(
    lm: PreTrainedModel,
    mm_hidden_size: int,
    hybrid_layers: Sequence[int],
    vision_tower: nn.Module | tuple[str, Mapping] | None = None,
    video_token_id: int | None = None,
    *,
    kv_init: str = "lm",
    warm_up_init: float = 0.0,
    gate_bias_init: float = 0.0,
    **slow_fast_keys,
) -> SlowFastVLForConditionalGeneration:
    """``lm`` with slow-fast hybrid layers (arXiv 2504.01328); without a video, or with a closed gate, it is ``lm``.

    The language model is taken over and not copied: its weights, dtype and devices stay, and its chosen layers'
    attention is changed in place. K and V of slow tokens have no q/k norm and no rope; scores take the layer's own
    scale, without a soft-cap.

    Where training starts: K and V from the language model's own, and a warm-up gate of 0, give ``lm``'s answers, and
    gradients that open the gate. With fresh K and V and both of the gate's values 0, a closed gate gives K and V no
    gradient, and K and V that say nothing give the gate none: open it then (``warm_up_init=2``, ``gate_bias_init=1``).

    Args:
        lm: any decoder-only model of ``AutoModelForCausalLM`` whose attention goes through the AttentionInterface.
        mm_hidden_size: width of the vision features.
        hybrid_layers: indices of the decoder layers that attend slow tokens.
        vision_tower: a module, or (name, settings), of ``towers.TOWERS``, which is saved with the model; None:
            features are given. It computes in its own type here, and in the model's where the model is loaded.
        video_token_id: the id that stands for a fast token; the vocabulary is not changed. None: text alone until
            ``config.video_token_id`` is set.
        kv_init: "lm": K and V of slow tokens start as the layer's k_proj and v_proj; "fresh": at random.
        warm_up_init: the warm-up gates' first value.
        gate_bias_init: the first value of the gates' bias.
        slow_fast_keys: fields of ``SlowFastConfig``: mm_projector_type, cross_attn_gating_type,
            cross_attn_implementation, mm_video_pooling_stride, fast_token_spatial_stride, fast_token_temporal_stride,
            fast_token_temporal_sampling_stride, min_fast_frames, causal_slow_tokens.

    Raises:
        ValueError: an encoder-decoder; a model with a cache of its own, or with embeddings or head sizes of each layer;
            a layer without attention that can be used, by its class; layers out of range or repeated; an id outside
            the vocabulary; a tower of another width; values that do not exist.
        TypeError: no causal language model; an unknown key; values of another type.
    """
    unknown = sorted(set(slow_fast_keys) - set(SLOW_FAST_KEYS))
    if unknown:
        raise TypeError(f"add_slow_fast: got {', '.join(unknown)}, want keys of {', '.join(SLOW_FAST_KEYS)}")
    if kv_init not in KV_INITS:
        raise ValueError(f"kv_init: got {kv_init!r}, want {' or '.join(map(repr, KV_INITS))}")
    warm_up, bias = as_float("warm_up_init", warm_up_init), as_float("gate_bias_init", gate_bias_init)
    _check_language_model(lm)
    decoder = lm.get_decoder()
    hybrid_layers = sorted_layers(hybrid_layers, len(decoder.layers))
    for index in hybrid_layers:
        reason = unsupported_reason(decoder, decoder.layers[index])
        if reason is not None:
            raise ValueError(f"lm: got {type(lm).__name__}, whose layer {index} cannot attend slow tokens: {reason}")
    _check_call(lm)
    mm_hidden_size, tower_settings = as_int("mm_hidden_size", mm_hidden_size, 1), tower_config(vision_tower)
    width = tower_width(tower_settings)
    if width not in (None, mm_hidden_size):
        raise ValueError(
            f"mm_hidden_size: got {mm_hidden_size}, want {width}, the width of the {tower_settings['name']} tower"
        )
    config = SlowFastVLConfig(
        text_config=lm.config,
        mm_hidden_size=mm_hidden_size,
        hybrid_layers=hybrid_layers,
        video_token_id=video_token_id,
        vision_tower=tower_settings,
        **slow_fast_keys,
    )
    was_training = lm.training
    tower = vision_tower if isinstance(vision_tower, nn.Module) else None  # None: by its name
    model = SlowFastVLForConditionalGeneration(config, lm, tower)
    std = getattr(lm.config, "initializer_range", 0.02)
    with torch.no_grad():
        for module in () if model.mm_projector is None else model.mm_projector.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=std)
                module.bias.zero_()
        for attention in model.hybrid_attentions():
            (gate,) = attention.cross_attn_gate_proj
            gate.weight.normal_(std=std)
            gate.bias.fill_(bias)
            if attention.cross_attn_warm_up_gate is not None:
                attention.cross_attn_warm_up_gate.fill_(warm_up)
            if kv_init == "lm":
                start_from_own_kv(attention)
            else:
                attention.cross_attn_kv_proj.weight.normal_(std=std)
                attention.cross_attn_kv_proj.bias.zero_()
    model.train(was_training)
    model.generation_config = lm.generation_config
    return model


def _check_language_model(lm: object) -> None:
    if not isinstance(lm, PreTrainedModel) or isinstance(lm, SlowFastVLForConditionalGeneration):
        raise TypeError(f"lm: got {type(lm).__name__}, want a causal language model of transformers")
    if getattr(lm.config, "is_encoder_decoder", False):
        raise ValueError(f"lm: got {type(lm).__name__}, an encoder-decoder, want a decoder-only model")
    if lm.get_output_embeddings() is None or not hasattr(lm, "get_decoder"):
        raise TypeError(f"lm: got {type(lm).__name__}, want a causal language model (AutoModelForCausalLM)")
    if not hasattr(lm.get_decoder(), "layers"):
        raise ValueError(f"lm: got {type(lm).__name__}, whose {type(lm.get_decoder()).__name__} has no layers")


def _check_call(lm: PreTrainedModel) -> None:
    """That embeddings and a cache of transformers are all that a call of it needs."""
    if not lm._supports_default_dynamic_cache():  # of Qwen3-Next, Bamba and their like in 4.57
        raise ValueError(
            f"lm: got {type(lm).__name__}, which has a cache of its own, want a model that transformers "
            f"{transformers.__version__} runs with a DynamicCache, which carries the slow tokens' K and V"
        )
    if getattr(lm.config, "hidden_size_per_layer_input", None):
        raise ValueError(
            f"lm: got {type(lm).__name__}, whose layers look their tokens up again (hidden_size_per_layer_input), want "
            "a model that embeddings are enough for, as no id stands for a fast token there"
        )
