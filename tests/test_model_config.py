"""The released configuration keys: what they mean, and which values are refused."""

from __future__ import annotations

import copy
import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from slowfast_kernels.gate import WEIGHTED_GATES
from slowfast_model import SlowFastConfig, SlowFastForCausalLM
from slowfast_model.config import GATING_TYPES
from slowfast_model.vision import build_projector

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
        ("vanilla-flashattn", True, False),
        ("text-only-vanilla", False, False),
        ("text-only-vanilla-flashattn", False, False),
        ("text-only-vanilla-masksystem", False, True),
        ("text-only-vanilla-masksystem-flashattn", False, True),
        ("text-only-vanilla-flashattn-masksystem", False, True),
    ],
)
def test_implementation_names_the_rows_that_attend(implementation, every_row, mask_system):
    config = SlowFastConfig.from_official(RELEASED | {"cross_attn_implementation": implementation})
    assert (config.updates_every_row, config.masks_system_text) == (every_row, mask_system)


def test_the_gates_of_the_gating_types_are_gates_of_the_ops():
    assert {gating.gate for gating in GATING_TYPES.values()} <= set(WEIGHTED_GATES)


def test_a_variant_set_past_the_checks_is_refused_where_it_is_read():
    config = SlowFastConfig(mm_hidden_size=8)
    config.cross_attn_gating_type = config.cross_attn_implementation = config.mm_projector_type = "new"
    for read in (lambda: config.gate, lambda: config.updates_every_row, lambda: build_projector(config)):
        with pytest.raises((KeyError, ValueError), match="new"):
            read()


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
    with pytest.warns(UserWarning, match="rope_scaling"):
        SlowFastConfig.from_official(RELEASED | scaling)
    with pytest.raises(ValueError, match="rope_scaling"):
        SlowFastConfig.from_official({"model_type": "qwen2"} | scaling)


# ------------------------------------------------------------------------------------------ values

INTEGERS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "mm_hidden_size", "mm_video_pooling_stride", "min_fast_frames"),
    *("fast_token_spatial_stride", "fast_token_temporal_stride", "fast_token_temporal_sampling_stride"),
    *("cross_attn_every_n_layers", "cross_attn_min_layer_depth", "cross_attn_max_layer_depth"),
]
FLOATS = ["rms_norm_eps", "rope_theta", "initializer_range"]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, torch.tensor], ids=["int64", "uint8", "0-d", "tensor"])
def test_an_integer_field_takes_any_integer_and_keeps_pythons(name, kind):
    given = kind(4)
    config = SlowFastConfig(**{"head_dim": 2, name: given})
    assert type(getattr(config, name)) is int
    assert config == SlowFastConfig(**{"head_dim": 2, name: 4})
    if kind in (np.array, torch.tensor):
        given += 1
        assert getattr(config, name) == 4


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(
    "value",
    [4.0, "4", True, np.bool_(True), -1, float("nan"), [4], np.array([4]), torch.tensor([4]), torch.tensor(4.0)],
)
def test_what_is_no_count_is_refused_by_its_field(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got "):
        SlowFastConfig(**{name: value})


@pytest.mark.parametrize("name", sorted(set(INTEGERS) - {n for n in INTEGERS if n.startswith("cross_attn")}))
def test_sizes_and_strides_are_at_least_one(name):
    with pytest.raises(ValueError, match=f"^{name}: got 0, want an integer >= 1"):
        SlowFastConfig(**{name: 0})


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("kind", [int, float, np.float64, np.array, torch.tensor, Fraction])
def test_a_float_field_takes_any_real_number_and_keeps_pythons(name, kind):
    config = SlowFastConfig(**{name: kind(2)})
    assert type(getattr(config, name)) is float
    assert config == SlowFastConfig(**{name: 2.0})


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize(
    "value", ["1e-6", True, None, -1e-6, float("nan"), float("inf"), 10**400, 1j, np.complex64(1), [1.0]], ids=repr
)
def test_what_is_no_finite_number_is_refused_by_its_field(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: got "):
        SlowFastConfig(**{name: value})


FLAGS = pytest.mark.parametrize("name", ["tie_word_embeddings", "causal_slow_tokens"])


@FLAGS
@pytest.mark.parametrize(("value", "flag"), [(True, True), (0, False), (np.bool_(True), True), (np.int64(0), False)])
def test_a_flag_is_a_bool(name, value, flag):
    assert getattr(SlowFastConfig(**{name: value}), name) is flag


@FLAGS
@pytest.mark.parametrize("value", ["false", "", None, 2, 1.0, [True]])
def test_a_flag_that_would_only_be_true_by_its_truth_is_refused(name, value):
    with pytest.raises(TypeError, match=rf"^{name}: got "):
        SlowFastConfig(**{name: value})


@pytest.mark.parametrize("name", ["cross_attn_gating_type", "cross_attn_implementation", "mm_projector_type"])
@pytest.mark.parametrize("value", [None, 3, ["linear"]])
def test_a_name_that_is_no_string_is_refused_by_its_field(name, value):
    with pytest.raises(TypeError, match=f"^{name}: got "):
        SlowFastConfig(**{name: value})


@pytest.mark.parametrize(
    ("depths", "named"),
    [
        ((-1, None), "cross_attn_min_layer_depth"),
        ((None, -1), "cross_attn_max_layer_depth"),
        ((28, None), "cross_attn_min_layer_depth"),
        ((5, 4), "cross_attn_max_layer_depth"),
    ],
)
def test_depths_that_no_layer_has_are_refused(depths, named):
    limits = dict(zip(("cross_attn_min_layer_depth", "cross_attn_max_layer_depth"), depths, strict=True))
    with pytest.raises(ValueError, match=f"^{named}: got "):
        SlowFastConfig.from_official(RELEASED | limits)


def test_a_depth_past_the_last_layer_is_the_last_layer():
    assert SlowFastConfig.from_official(RELEASED | {"cross_attn_max_layer_depth": 100}).hybrid_layers == (0, 8, 16, 24)


# ------------------------------------------------------------------------------------------ keys


QWEN2 = {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}


@pytest.mark.parametrize("config", [None, [], "config.json", SlowFastConfig()], ids=["none", "list", "name", "config"])
def test_what_is_no_mapping_is_refused(config):
    with pytest.raises(TypeError, match=r"^config: got "):
        SlowFastConfig.from_official(config)


def test_the_mapping_is_not_changed():
    config = QWEN2 | {"rope_parameters": {"rope_theta": 5e5}, "layer_types": ["full_attention"] * 3}
    before = copy.deepcopy(config)
    SlowFastConfig.from_official(config)
    assert config == before


def test_null_kv_heads_are_as_many_as_query_heads():
    assert SlowFastConfig.from_official(QWEN2 | {"num_key_value_heads": None}).num_key_value_heads == 4
    assert SlowFastConfig(num_key_value_heads=None).num_key_value_heads == 28


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_a_null_size_is_refused(key):
    with pytest.raises(ValueError, match=f"^{key}: got null"):
        SlowFastConfig.from_official(QWEN2 | {key: None})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("model_type", "qwen3"),
        ("model_type", "qwen2_vl"),
        ("model_type", "llava_next_video"),
        ("attention_bias", False),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("hidden_act", "relu"),
        ("use_sliding_window", True),
        ("use_sliding_window", "false"),
        ("layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("layer_types", ["full_attention"]),
        ("layer_types", "full_attention"),
        ("quantization_config", {"quant_method": "awq", "bits": 4}),
        ("text_config", {"hidden_size": 64}),
        ("partial_rotary_factor", 0.5),
        ("partial_rotary_factor", True),  # equal to 1 in Python, and nothing that JSON would call one
        ("attention_dropout", False),
        ("use_sliding_window", 0),
        ("mm_patch_merge_type", "spatial_unpad"),
    ],
)
def test_a_key_that_would_change_the_computation_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=f"^{key}: got "):
        SlowFastConfig.from_official(QWEN2 | {key: value})


@pytest.mark.parametrize(
    "same",
    [
        {"model_type": None},
        {"attention_bias": None, "quantization_config": None, "layer_types": None, "partial_rotary_factor": None},
        {"attention_dropout": 0.0, "mlp_bias": False, "partial_rotary_factor": 1.0},
        {"attention_dropout": 0, "partial_rotary_factor": 1},
        {"hidden_act": "swish"},
        {"hidden_act": None},
        {"layer_types": ["full_attention"] * 3, "sliding_window": 4096, "max_window_layers": 1},
        {"rope_scaling": {}, "rope_parameters": None},
        {"max_position_embeddings": 32768, "use_cache": True, "eos_token_id": 5, "transformers_version": "5.0"},
    ],
    ids=str,
)
def test_a_key_that_changes_nothing_is_taken(same):
    assert SlowFastConfig.from_official(QWEN2 | same) == SlowFastConfig.from_official(QWEN2)


# ------------------------------------------------------------------------------------------ rope


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", ["type", "rope_type"])
@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "longrope", "llama3", "mrope", "proportional"])
def test_rope_of_another_type_is_refused_by_name(key, name, kind):
    rope = {name: kind, "factor": 4.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match=f"^{key}: got rope type '{kind}'"):
        SlowFastConfig.from_official(QWEN2 | {key: rope})


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rope_type": "default", "factor": 4.0},
        {"type": "default", "mrope_section": [16, 24, 24]},
        {"full_attention": {"rope_type": "yarn"}},
        {"rope_type": None, "type": "yarn"},
        "yarn",
        ["default"],
    ],
    ids=str,
)
def test_rope_settings_that_are_not_applied_are_refused(key, rope):
    with pytest.raises(ValueError, match=f"^{key}: got "):
        SlowFastConfig.from_official(QWEN2 | {key: rope})


ROPE_KEYS = [
    {},
    {"rope_theta": 5e5},
    {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 1e6},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6},
    {"rope_parameters": {"rope_type": "default"}},
    {"rope_scaling": {"type": "default"}, "rope_theta": 1e6},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 7e5}, "rope_theta": 1e6},
    {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_scaling": {}, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_scaling": None, "rope_theta": 10000},
    {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 1.0}},
]


@pytest.mark.parametrize("keys", ROPE_KEYS, ids=str)
def test_rope_theta_is_what_transformers_takes(keys):
    transformers = pytest.importorskip("transformers", minversion="5")
    expected = transformers.Qwen2Config(**copy.deepcopy(QWEN2 | keys)).rope_parameters["rope_theta"]
    assert SlowFastConfig.from_official(QWEN2 | keys).rope_theta == expected


def test_rope_theta_is_ten_thousand_where_nothing_names_it():
    assert SlowFastConfig.from_official(QWEN2).rope_theta == SlowFastConfig().rope_theta == 1e4


def test_dropping_the_released_models_rope_scaling_is_said():
    with pytest.warns(UserWarning, match=r"rope_scaling: .*yarn.* is dropped"):
        SlowFastConfig.from_official(RELEASED | {"rope_scaling": {"type": "yarn", "factor": 4.0}})


# ------------------------------------------------------------------------------------------ round trips


CONFIGS = [
    RELEASED,
    RELEASED | {"head_dim": 64, "num_key_value_heads": None, "cross_attn_implementation": "vanilla"},
    RELEASED | {"mm_hidden_size": None, "cross_attn_min_layer_depth": 2, "cross_attn_max_layer_depth": 20},
    QWEN2,
    QWEN2 | {"tie_word_embeddings": True, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "head_dim": 32},
    QWEN2 | {"mm_hidden_size": 12, "mm_projector_type": "mlp3x_gelu", "fast_token_temporal_stride": 4},
    QWEN2 | {"cross_attn_every_n_layers": 2, "cross_attn_max_layer_depth": 0},
    RELEASED | {"causal_slow_tokens": True},
    QWEN2 | {"causal_slow_tokens": True},
]


@pytest.mark.parametrize("keys", CONFIGS, ids=range(len(CONFIGS)))
def test_the_official_keys_read_back_as_the_configuration(keys):
    config = SlowFastConfig.from_official(keys)
    written = json.loads(json.dumps(config.to_official()))
    assert SlowFastConfig.from_official(written) == config
    assert SlowFastConfig.from_official(dataclasses.asdict(config)) == config


@pytest.mark.parametrize("keys", [RELEASED, QWEN2])
def test_a_key_that_the_release_does_not_know_is_written_where_it_changes_what_is_computed(keys):
    assert "causal_slow_tokens" not in SlowFastConfig.from_official(keys | {"causal_slow_tokens": False}).to_official()
    assert SlowFastConfig.from_official(keys | {"causal_slow_tokens": True}).to_official()["causal_slow_tokens"] is True


def test_a_hybrid_model_is_written_as_a_released_one_and_another_as_a_qwen2():
    released = SlowFastConfig.from_official(RELEASED).to_official()
    kind = (released["model_type"], released["architectures"])
    assert kind == ("llava_qwen_slow_fast", ["LlavaQwenSlowFastForCausalLM"])
    assert released["cross_attn_every_n_layers"] == 8
    plain = SlowFastConfig.from_official(QWEN2).to_official()
    assert (plain["model_type"], plain["architectures"]) == ("qwen2", ["Qwen2ForCausalLM"])
    assert not [key for key in plain if key.startswith(("mm_", "cross_attn_", "fast_"))]


@pytest.mark.parametrize("config", [None, QWEN2, "config.json"], ids=["none", "dict", "name"])
def test_a_model_is_made_of_a_configuration_alone(config):
    with pytest.raises(TypeError, match=r"^config: got .*, want a SlowFastConfig"):
        SlowFastForCausalLM(config)
