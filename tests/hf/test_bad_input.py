"""What is refused, and what the message says."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from families import FAMILIES, HYBRID, STRIDES, VIDEO, WIDTH, language_model, prompt, slow_fast_model, video
from transformers import AutoModelForCausalLM

from slowfast_model.hf import SlowFastVLConfig, add_slow_fast


def refuses(call, kind, *words: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert re.search(word, str(caught.value)), str(caught.value)


def ids_of(model, *parts) -> torch.Tensor:
    return torch.tensor([prompt(model, *parts)])


def test_a_video_with_another_number_of_placeholders():
    model, features = slow_fast_model(), video()
    ids = torch.cat([ids_of(model, 2, features), torch.tensor([[VIDEO, 5]])], 1)
    for call in (model, model.generate):
        refuses(lambda call=call: call(ids, video_features=[features]), ValueError, "got 1 videos, which 8 ", "want 9")
    refuses(lambda: model(ids[:, :7], video_features=[features]), ValueError, "which 8 ", "want 5")


def test_placeholders_of_one_video_in_two_samples():
    model, features = slow_fast_model(), [video(8), video(4)]
    ids = torch.cat([ids_of(model, 1, features[1], 4), ids_of(model, 1, features[0])])
    refuses(lambda: model(ids, video_features=features), ValueError, "got 4 video_token_id", "sample 0", "0, 8, 12")


def test_a_video_without_placeholders():
    model = slow_fast_model()
    for call in (model, model.generate):
        refuses(
            lambda call=call: call(ids_of(model, 5), video_features=[video()]), ValueError, "got 1 videos", "want 0"
        )


def test_placeholders_without_a_video():
    model, features = slow_fast_model(), video()
    ids = ids_of(model, 2, features, 3)
    for call in (model, model.generate):
        refuses(lambda call=call: call(ids), ValueError, "video_features: got none", "8 video_token_id")
        refuses(lambda call=call: call(ids, video_features=[]), ValueError, "video_features: got none")
    embeddings = model.get_input_embeddings()(ids)
    refuses(lambda: model(inputs_embeds=embeddings), ValueError, "video_features: got none")


def test_placeholders_behind_a_cache_without_a_video():
    model, features = slow_fast_model(causal_slow_tokens=True), video()
    out = model(ids_of(model, 2, features, 3), video_features=[features], use_cache=True)
    more = ids_of(model, 1, features)
    refuses(lambda: model(more, past_key_values=out[1]), ValueError, "video_features: got none")


def test_placeholders_that_are_padding_do_not_count():
    model, features = slow_fast_model(), video()
    ids = torch.cat([torch.tensor([[VIDEO, VIDEO]]), ids_of(model, 2, features, 3)], 1)
    mask = torch.ones_like(ids)
    mask[:, :2] = 0
    assert model(ids, mask, video_features=[features]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("features", "kind", "words"),
    [
        (torch.randn(8, 16, WIDTH + 1), ValueError, [r"video_features\[0\]: got shape \[8, 16, 13\]", r"want \[T, H"]),
        (torch.randn(0, 16, WIDTH), ValueError, ["no frames"]),
        (torch.randn(8, 15, WIDTH), ValueError, [r"video_features\[0\]: got 15 tokens a frame", "square"]),
        (torch.randn(16, WIDTH), ValueError, ["got shape"]),
        (torch.zeros(8, 16, WIDTH, dtype=torch.long), TypeError, [r"video_features\[0\]: got torch.int64"]),
        ("clip.mp4", TypeError, [r"video_features\[0\]: got str"]),
    ],
)
def test_features_of_another_kind(features, kind, words):
    model = slow_fast_model()
    ids = ids_of(model, 2, video(), 3)
    refuses(lambda: model(ids, video_features=[features]), kind, *words)


def test_features_in_another_container():
    model = slow_fast_model()
    ids = ids_of(model, 2, video(), 3)
    refuses(lambda: model(ids, video_features="clip.mp4"), TypeError, "video_features: got str", "want a list")
    refuses(
        lambda: model(ids, video_features=video()), ValueError, r"got shape \[8, 16, 12\]", r"want \[V, T, H\*W, 12"
    )


def test_frames_without_a_tower_and_beside_features():
    model = slow_fast_model()
    ids, frames = ids_of(model, 2, video(), 3), torch.zeros(8, 4, 4, 3, dtype=torch.uint8)
    refuses(lambda: model(ids, pixel_values_videos=[frames]), ValueError, "no vision tower")
    both = {"pixel_values_videos": [frames], "video_features": [video()]}
    refuses(lambda: model(ids, **both), ValueError, "beside video_features")


def test_both_and_neither_of_ids_and_embeddings():
    model = slow_fast_model()
    ids = ids_of(model, 3)
    refuses(lambda: model(), ValueError, "input_ids: got both or neither")
    refuses(lambda: model(ids, inputs_embeds=model.get_input_embeddings()(ids)), ValueError, "both or neither")


def test_ids_of_one_dimension():
    model = slow_fast_model()
    refuses(lambda: model(torch.tensor([5, 6])), ValueError, r"input_ids: got shape \[2\], want \[B, L\]")


def test_prefill_in_chunks_with_a_video():
    model, features = slow_fast_model(), video()
    ids = ids_of(model, 2, features, 3)
    refuses(
        lambda: model.generate(ids, video_features=[features], prefill_chunk_size=4), ValueError, "got 4, want None"
    )


def test_a_typo_in_generate_is_still_found():
    model = slow_fast_model()
    refuses(lambda: model.generate(ids_of(model, 3), video_feature=[video()]), ValueError, "video_feature")


# --------------------------------------------------------------------------------------------------- add_slow_fast


@pytest.mark.parametrize(
    ("layers", "kind", "words"),
    [
        ((0, 3), ValueError, "got 3, want 0..2"),
        ((-1,), ValueError, "got -1, want 0..2"),
        ((0, 2, 0), ValueError, "got 0 2 times"),
        ((0.5,), TypeError, "hybrid_layers"),
        ((True,), TypeError, "hybrid_layers"),
        (2, TypeError, "got 2, want a sequence"),
        ("02", TypeError, "want a sequence"),
    ],
)
def test_layers_that_are_not_there(layers, kind, words):
    lm = language_model()
    before = lm.state_dict().keys()
    refuses(lambda: add_slow_fast(lm, WIDTH, layers), kind, "hybrid_layers", words)
    assert lm.state_dict().keys() == before


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"video_token_id": 100}, ValueError, "video_token_id: got 100, want 0..99"),
        ({"video_token_id": -200}, ValueError, "video_token_id: got -200"),
        ({"video_token_id": "<video>"}, TypeError, "video_token_id"),
        ({"kv_init": "zeros"}, ValueError, "kv_init: got 'zeros', want 'lm' or 'fresh'"),
        ({"warm_up_init": "open"}, TypeError, "warm_up_init"),
        ({"gate_bias_init": float("nan")}, ValueError, "gate_bias_init"),
        ({"cross_attn_gating_type": "sigmoid"}, ValueError, "cross_attn_gating_type: got 'sigmoid'"),
        ({"mm_projector_type": "conv"}, ValueError, "mm_projector_type"),
        ({"min_fast_frames": 0}, ValueError, "min_fast_frames"),
        ({"fast_token_stride": 2}, TypeError, "fast_token_stride"),
        ({"mm_hidden_size": 0}, ValueError, "mm_hidden_size"),
        ({"mm_hidden_size": "12"}, TypeError, "mm_hidden_size"),
        ({"vision_tower": "patch"}, TypeError, "vision_tower"),
    ],
)
def test_settings_that_do_not_exist(options, kind, words):
    settings = {"mm_hidden_size": WIDTH, "hybrid_layers": HYBRID} | options
    refuses(lambda: add_slow_fast(language_model(), **settings), kind, words)


def test_what_is_no_decoder_only_language_model():
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 100}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**small))
    refuses(lambda: add_slow_fast(t5, WIDTH, (0,)), ValueError, "T5ForConditionalGeneration, an encoder-decoder")
    lm = language_model()
    refuses(lambda: add_slow_fast(lm.model, WIDTH, (0,)), TypeError, "Qwen2Model")
    refuses(lambda: add_slow_fast(torch.nn.Linear(2, 2), WIDTH, (0,)), TypeError, "got Linear")
    refuses(lambda: add_slow_fast(slow_fast_model(), WIDTH, (0,)), TypeError, "SlowFastVLForConditionalGeneration")


@pytest.mark.parametrize(
    "tower",
    [
        ("patch", {"width": WIDTH + 1, "grid": 4}),
        ("convnext", {"size": 64, "depths": [1, 1, 1, 1], "dims": [2, 4, 8, WIDTH + 1]}),
        ("siglip", {"hidden_size": WIDTH + 1}),
        ("clip", {"hidden_size": WIDTH + 1}),
    ],
)
def test_a_tower_of_another_width(tower):
    words = f"mm_hidden_size: got {WIDTH}, want {WIDTH + 1}, the width of the {tower[0]} tower"
    lm = language_model()
    refuses(lambda: add_slow_fast(lm, WIDTH, HYBRID, vision_tower=tower), ValueError, words)
    assert not hasattr(lm.model.layers[0].self_attn, "cross_attn_kv_proj")


def test_a_cache_of_its_own_is_refused_by_name():
    """It cannot carry the videos: MiniMax's, and in 4.57 Qwen3-Next's, Bamba's and their like."""
    config = transformers.MiniMaxConfig(**FAMILIES["llama"][1], num_local_experts=2, layer_types=["full_attention"] * 3)
    lm = AutoModelForCausalLM.from_config(config)
    refuses(lambda: add_slow_fast(lm, WIDTH, HYBRID), ValueError, "lm: got MiniMaxForCausalLM", "cache of its own")
    assert not hasattr(lm.model.layers[0].self_attn, "cross_attn_kv_proj")


def test_embeddings_of_each_layer_are_refused_by_name():
    """They are looked up by ids, and a fast token has none: Gemma 3n's, and Gemma 4's small models'."""
    own = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 100, "laurel_rank": 4, "head_dim": 16}
    own |= {"layer_types": ["full_attention"] * 3, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 3}
    lm = AutoModelForCausalLM.from_config(transformers.Gemma3nTextConfig(**FAMILIES["llama"][1] | own))
    refuses(lambda: add_slow_fast(lm, WIDTH, HYBRID), ValueError, "Gemma3nForCausalLM", "hidden_size_per_layer_input")


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="transformers 4.57 has no Gemma 4")
def test_heads_of_another_size_in_each_layer_are_refused_by_name():
    own = {"head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    lm = AutoModelForCausalLM.from_config(transformers.Gemma4TextConfig(**FAMILIES["llama"][1] | own))
    refuses(lambda: add_slow_fast(lm, WIDTH, HYBRID), ValueError, "Gemma4TextConfig", "different sizes", "head_dim")


def test_layers_that_attend_in_ways_of_their_own():
    mamba = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=100, state_size=4)
    refuses(lambda: add_slow_fast(AutoModelForCausalLM.from_config(mamba), WIDTH, (0,)), ValueError, "Mamba")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    hybrid = transformers.Lfm2Config(**sizes, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    lm = AutoModelForCausalLM.from_config(hybrid)
    refuses(lambda: add_slow_fast(lm, WIDTH, (0,)), ValueError, "Lfm2ForCausalLM", "layer 0", "no self_attn")
    olmo = transformers.Olmo2Config(**sizes, intermediate_size=32, num_key_value_heads=2, pad_token_id=0)
    lm = AutoModelForCausalLM.from_config(olmo)
    refuses(lambda: add_slow_fast(lm, WIDTH, (0,)), ValueError, "Olmo2ForCausalLM", "input_layernorm")
    bloom = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=100)
    refuses(lambda: add_slow_fast(AutoModelForCausalLM.from_config(bloom), WIDTH, (0,)), ValueError, "Bloom")


def test_an_attention_beside_the_interface_is_refused_by_name():
    lm = language_model()

    class OwnAttention(type(lm.model.layers[0].self_attn)):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    lm.model.layers[2].self_attn.__class__ = OwnAttention
    refuses(lambda: add_slow_fast(lm, WIDTH, HYBRID), ValueError, "layer 2", "OwnAttention", "AttentionInterface")
    assert not hasattr(lm.model.layers[0].self_attn, "cross_attn_kv_proj")


def test_a_layer_that_drops_keyword_arguments_is_refused_by_name():
    """The slow tokens travel in them: StableLM's and Nemotron's of 5.24 would answer without the video."""
    lm = language_model()

    class DroppingLayer(type(lm.model.layers[0])):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            return hidden_states + self.self_attn(hidden_states, attention_mask=attention_mask)[0]

    lm.model.layers[2].__class__ = DroppingLayer
    refuses(lambda: add_slow_fast(lm, WIDTH, HYBRID), ValueError, "layer 2", "DroppingLayer", "keyword arguments")
    stable = transformers.StableLmConfig(**FAMILIES["llama"][1])
    refuses(lambda: add_slow_fast(AutoModelForCausalLM.from_config(stable), WIDTH, (0,)), ValueError, "StableLm")


def test_a_decoder_that_drops_keyword_arguments_is_refused_by_name():
    """As GraniteMoe's of 4.57 does."""
    lm = language_model()

    class DroppingDecoder(type(lm.model)):
        def forward(self, inputs_embeds, **kwargs):
            for layer in self.layers:
                inputs_embeds = layer(inputs_embeds, use_cache=kwargs.get("use_cache"))
            return inputs_embeds

    lm.model.__class__ = DroppingDecoder
    refuses(lambda: add_slow_fast(lm, WIDTH, HYBRID), ValueError, "layer 0", "DroppingDecoder", "keyword arguments")


@pytest.mark.parametrize(
    ("projection", "words"),
    [(torch.nn.Linear(64, 16), "another size for V"), (torch.nn.Sequential(torch.nn.Linear(64, 32)), "a linear layer")],
)
def test_projections_that_are_not_those_of_heads_of_one_size(projection, words):
    lm = language_model()
    lm.model.layers[2].self_attn.v_proj = projection
    refuses(lambda: add_slow_fast(lm, WIDTH, HYBRID), ValueError, "layer 2", "Qwen2Attention", words)


def test_a_layer_that_is_hybrid_already():
    model = slow_fast_model()
    refuses(lambda: add_slow_fast(model.language_model, WIDTH, (0,)), ValueError, "layer 0", "already")


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((0, 16), ValueError, "num_frames"),
        ((8, 15), ValueError, "tokens_per_frame: got 15, want a square"),
        ((8, 0), ValueError, "tokens_per_frame"),
        ((8.5, 16), TypeError, "num_frames"),
        ((8, 1), ValueError, "pool_stride"),
    ],
)
def test_a_number_of_fast_tokens_that_cannot_be(arguments, kind, words):
    config = SlowFastVLConfig(**STRIDES)
    refuses(lambda: config.num_fast_tokens(*arguments), kind, words)


def test_the_number_of_fast_tokens():
    config = SlowFastVLConfig(**STRIDES, min_fast_frames=3)
    found = [config.num_fast_tokens(frames, 16) for frames in (1, 2, 8, 16)]
    assert found == [16, 2 * 4, 3 * 4, 4 * 4]
