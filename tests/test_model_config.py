"""The released configuration keys: what they mean, and which values are refused."""

from __future__ import annotations

import pytest

from slowfast_model import SlowFastConfig

RELEASED = {
    "model_type": "llava_qwen_slow_fast",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
    "mm_hidden_size": 3072,
    "mm_projector_type": "mlp2x_gelu",
    "mm_video_pooling_stride": 2,
    "cross_attn_every_n_layers": 8,
    "cross_attn_gating_type": "whole-dynamic-tanh-warmup",
    "cross_attn_implementation": "text-only-vanilla-flashattn",
    "fast_token_spatial_stride": 1,
    "fast_token_temporal_stride": 4,
    "fast_token_temporal_sampling_stride": 1,
    "min_fast_frames": 16,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "tokenizer_padding_side": "right",
}


def test_the_released_7b_model_has_hybrid_layers_0_8_16_24():
    config = SlowFastConfig.from_official(RELEASED)
    assert config.hybrid_layers == (0, 8, 16, 24)
    assert (config.head_dim, config.projector_depth, config.min_fast_frames) == (128, 2, 16)


def test_depth_limits_move_the_hybrid_layers():
    changes = {"cross_attn_min_layer_depth": 2, "cross_attn_max_layer_depth": 20}
    assert SlowFastConfig.from_official(RELEASED | changes).hybrid_layers == (2, 10, 18)


def test_a_null_key_takes_the_official_default():
    config = SlowFastConfig.from_official(RELEASED | {"min_fast_frames": None, "cross_attn_max_layer_depth": None})
    assert config.min_fast_frames == 1
    assert config.hybrid_layers == (0, 8, 16, 24)


def test_a_plain_qwen2_configuration_has_no_hybrid_layer_and_no_projector():
    config = SlowFastConfig.from_official({"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4})
    assert config.hybrid_layers == ()
    assert config.mm_hidden_size is None


def test_rope_theta_is_found_where_newer_transformers_write_it():
    nested = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert SlowFastConfig.from_official(nested).rope_theta == 5e5


@pytest.mark.parametrize(
    ("gating", "gate", "warm_up"),
    [
        ("whole-dynamic", "linear", False),
        ("whole-dynamic-tanh", "tanh", False),
        ("whole-dynamic-warmup", "linear", True),
        ("whole-dynamic-tanh-warmup", "tanh", True),
    ],
)
def test_gating_type_names_the_gate_and_the_warm_up_factor(gating, gate, warm_up):
    config = SlowFastConfig.from_official(RELEASED | {"cross_attn_gating_type": gating})
    assert (config.gate, config.has_warm_up) == (gate, warm_up)


@pytest.mark.parametrize(
    ("implementation", "every_row", "mask_system"),
    [
        ("vanilla", True, False),
        ("text-only-vanilla", False, False),
        ("text-only-vanilla-flashattn", False, False),
        ("text-only-vanilla-masksystem", False, True),
    ],
)
def test_implementation_names_the_rows_that_attend(implementation, every_row, mask_system):
    config = SlowFastConfig.from_official(RELEASED | {"cross_attn_implementation": implementation})
    assert (config.updates_every_row, config.masks_system_text) == (every_row, mask_system)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cross_attn_gating_type", "channel-wise-dynamic-sigmoid", "whole-dynamic-tanh-warmup"),
        ("cross_attn_implementation", "mystery", "text-only-vanilla"),
        ("mm_projector_type", "st_conv", "mlpNx_gelu"),
        ("mm_projector_type", "identity", "mm_hidden_size"),
        ("num_key_value_heads", 3, "multiple of num_key_value_heads"),
        ("num_attention_heads", 27, "hidden_size"),
        ("use_sliding_window", True, "use_sliding_window"),
        ("hidden_act", "gelu", "silu"),
        ("cross_attn_every_n_layers", -1, ">= 0"),
    ],
)
def test_a_value_that_the_model_lacks_is_refused_by_name(key, value, message):
    with pytest.raises(ValueError, match=message):
        SlowFastConfig.from_official(RELEASED | {key: value})


def test_rope_scaling_is_refused_on_a_language_model_and_dropped_on_a_released_one():
    scaling = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    SlowFastConfig.from_official(RELEASED | scaling)
    with pytest.raises(ValueError, match="rope_scaling"):
        SlowFastConfig.from_official({"model_type": "qwen2"} | scaling)
