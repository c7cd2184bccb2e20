"""Every variant and every setting of the configuration computes what ``plain_model`` says, apart from the package."""

from __future__ import annotations

from itertools import combinations

import plain_model
import pytest
import torch
from model_cases import MODEL_TARGETS, PROMPT_VIDEOS, PROMPTS, TINY, features, one_thread, padded, tiny_model  # noqa: F401

from slowfast_model import SlowFastConfig
from slowfast_model.config import GATING_TYPES, IMPLEMENTATIONS
from slowfast_model.generate import DecodeSession

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
MATTERS = 1e-2  # how far a setting must move the logits for a test of it to mean something
DEFAULT = TINY | {"cross_attn_min_layer_depth": None, "cross_attn_max_layer_depth": None, "rms_norm_eps": 1e-6}
DEFAULT |= {"fast_token_spatial_stride": 1, "fast_token_temporal_sampling_stride": 1, "min_fast_frames": 1}
DEFAULT |= {"cross_attn_gating_type": "whole-dynamic-tanh-warmup", "cross_attn_implementation": "text-only-vanilla"}
DEFAULT |= {"causal_slow_tokens": False}

every_target = pytest.mark.parametrize("target", MODEL_TARGETS)
on_eager = pytest.mark.parametrize("target", [param for param in MODEL_TARGETS if "eager" in str(param.id)])


def videos(width: int) -> list[torch.Tensor]:
    return features(*PROMPT_VIDEOS, width=width)


def plain_logits(model, changes: dict) -> list[torch.Tensor]:
    """Of each sample of PROMPTS, from the weights and the official keys alone."""
    config = DEFAULT | changes
    plain = plain_model.PlainModel(config, {key: x.cpu() for key, x in model.state_dict().items()})
    clips = videos(config["mm_hidden_size"])
    shared = (clips[:2], [], clips[2:])
    return [plain.logits(prompt, mine) for prompt, mine in zip(PROMPTS, shared, strict=True)]


def check(target, changes: dict) -> None:
    """Training's and inference's logits are the plain ones."""
    model = tiny_model(target.backend, target.device, **changes)
    expected = plain_logits(model, changes)
    clips = [clip.to(target.device) for clip in videos((DEFAULT | changes)["mm_hidden_size"])]
    ids, mask = (x.to(target.device) for x in padded(PROMPTS))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = model(ids, clips, mask)
        for row, keep, want in zip(out.logits.detach(), out.attention_mask, expected, strict=True):
            torch.testing.assert_close(row[keep].cpu(), want.float(), **CLOSE)


def differ(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return any(x.shape != y.shape or bool((x - y).abs().max() > MATTERS) for x, y in zip(a, b, strict=True))


def test_every_variant_has_a_plain_statement():
    assert set(plain_model.GATINGS) == set(GATING_TYPES)
    assert set(plain_model.IMPLEMENTATIONS) == set(IMPLEMENTATIONS)


@every_target
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gating", GATING_TYPES)
def test_every_gating_of_every_implementation_is_computed_as_stated(gating, implementation, target):
    changes = {"cross_attn_gating_type": gating, "cross_attn_implementation": implementation}
    check(target, changes)


@every_target
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_causal_slow_tokens_of_every_implementation_are_computed_as_stated(implementation, target):
    changes = {"cross_attn_implementation": implementation, "causal_slow_tokens": True}
    check(target, changes)
    model = tiny_model()
    released = {"cross_attn_implementation": implementation}
    assert differ(plain_logits(model, changes), plain_logits(model, released)), "these prompts do not show the setting"


def test_these_prompts_tell_every_variant_from_the_others():
    model = tiny_model()
    found = {}
    for gating, (activate, has_warm_up) in plain_model.GATINGS.items():
        for implementation, (rows, factor) in plain_model.IMPLEMENTATIONS.items():
            changes = {"cross_attn_gating_type": gating, "cross_attn_implementation": implementation}
            meaning = activate is torch.tanh, has_warm_up, rows, factor is torch.tanh or not has_warm_up
            found[meaning] = plain_logits(model, changes)
    for (one, a), (other, b) in combinations(found.items(), 2):
        assert differ(a, b), f"{one} and {other} give the same logits"


@on_eager
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gating", GATING_TYPES)
def test_a_decode_step_is_the_last_row_of_the_longer_prompt(gating, implementation, target):
    changes = {"cross_attn_gating_type": gating, "cross_attn_implementation": implementation}
    model = tiny_model(target.backend, target.device, **changes)
    ids, mask = (x.to(target.device) for x in padded(PROMPTS))
    clips = [clip.to(target.device) for clip in videos(12)]
    prompts = [[*prompt, 21 + i] for i, prompt in enumerate(PROMPTS)]
    session = DecodeSession(model, ids, clips, mask, max_new_tokens=1)
    stepped = session.step(torch.tensor([21, 22, 23], device=target.device))
    plain = plain_model.PlainModel(DEFAULT | changes, model.cpu().state_dict())
    clips = videos(12)
    for row, prompt, mine in zip(stepped.cpu(), prompts, (clips[:2], [], clips[2:]), strict=True):
        torch.testing.assert_close(row, plain.logits(prompt, mine)[-1].float(), **CLOSE)


@every_target
@pytest.mark.parametrize("projector", ["linear", "identity", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "mlp4x_gelu"])
def test_every_projector_is_computed_as_stated(projector, target):
    width = 32 if projector == "identity" else 12
    changes = {"mm_projector_type": projector, "mm_hidden_size": width}
    check(target, changes)
    names = {key for key in tiny_model("eager", **changes).state_dict() if ".mm_projector." in key}
    depth = {"linear": 1, "identity": 0}.get(projector) or int("".join(filter(str.isdigit, projector)) or 0)
    assert len(names) == 2 * depth  # a weight and a bias each


@on_eager
@pytest.mark.parametrize(
    "changes",
    [
        {"mm_video_pooling_stride": 1},
        {"fast_token_spatial_stride": 2},
        {"fast_token_temporal_stride": 1},
        {"fast_token_temporal_sampling_stride": 2},
        {"fast_token_temporal_sampling_stride": 4, "fast_token_temporal_stride": 1, "min_fast_frames": 3},
        {"fast_token_temporal_stride": 4, "min_fast_frames": 3},
        {"rms_norm_eps": 0.5},
        {"rope_theta": 20.0},
        {"cross_attn_every_n_layers": 1},
        {"cross_attn_every_n_layers": 1, "cross_attn_min_layer_depth": 2},
        {"cross_attn_every_n_layers": 1, "cross_attn_max_layer_depth": 1},
        {"cross_attn_every_n_layers": 1, "cross_attn_max_layer_depth": 99},
    ],
    ids=lambda changes: "-".join(f"{key}-{value}" for key, value in changes.items()),
)
def test_every_setting_is_computed_as_stated(changes, target):
    check(target, changes)
    if "cross_attn_every_n_layers" not in changes:  # whose other layers have no weights in a model of the defaults
        model = tiny_model()
        assert differ(plain_logits(model, changes), plain_logits(model, {})), "these prompts do not show the setting"


@on_eager
def test_more_key_value_heads_are_computed_as_stated(target):
    check(target, {"num_key_value_heads": 4})


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_are_one_weight_and_others_two(tied):
    model = tiny_model(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_projector_keeps_its_name_in_the_configuration():
    assert SlowFastConfig.from_official(TINY | {"mm_projector_type": "mlp5x_gelu"}).projector_depth == 5
