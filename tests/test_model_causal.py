"""causal_slow_tokens: what a prompt says does not depend on what follows it."""

from __future__ import annotations

import pytest
import torch
from model_cases import MODEL_TARGETS, VIDEO, features, one_thread, padded, tiny_model  # noqa: F401

from slowfast_model.config import IMPLEMENTATIONS

CONVERSATION = [3, 4, VIDEO, 5, 6, VIDEO, 7, VIDEO, 8]
VIDEOS = ((5, 4), (4, 6), (1, 4))  # (frames, side): two videos of different grids, an image
NEIGHBOUR, NEIGHBOUR_VIDEOS = [VIDEO, 9, VIDEO, 10, 11], ((2, 4), (3, 4))
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
every_target = pytest.mark.parametrize("target", MODEL_TARGETS)


def causal_model(target=None, **changes):
    where = (None, "cpu") if target is None else (target.backend, target.device)
    return tiny_model(*where, causal_slow_tokens=True, **changes)


def logits_of(model, prompt, videos, neighbour=False, device="cpu"):
    """Valid rows [n, V] of a prompt, alone or as the second of a batch."""
    prompts, shapes = [prompt], videos
    if neighbour:
        prompts, shapes = [NEIGHBOUR, prompt], (*NEIGHBOUR_VIDEOS, *videos)
    ids, mask = (x.to(device) for x in padded(prompts, "left"))
    dtype = model.lm_head.weight.dtype
    out = model(ids, [clip.to(dtype) for shape in shapes for clip in features(shape, device=device)], mask)
    return out.logits[-1][out.attention_mask[-1]]


def prefixes():
    """All beginnings of the conversation, with their videos."""
    for length in range(1, len(CONVERSATION)):
        prompt = CONVERSATION[:length]
        yield prompt, VIDEOS[: prompt.count(VIDEO)]


@every_implementation
@torch.no_grad()
def test_a_prefix_has_the_same_logits_whatever_follows(implementation):
    model = causal_model(cross_attn_implementation=implementation)
    whole = logits_of(model, CONVERSATION, VIDEOS)
    for prompt, videos in prefixes():
        found = logits_of(model, prompt, videos)
        torch.testing.assert_close(found, whole[: len(found)], atol=1e-4, rtol=1e-4)


@every_target
@torch.no_grad()
def test_a_prefix_has_the_same_logits_in_a_batch_on_every_backend(target):
    model = causal_model(target, cross_attn_implementation="vanilla")
    whole = logits_of(model, CONVERSATION, VIDEOS, True, target.device)
    for prompt, videos in list(prefixes())[2::3]:
        found = logits_of(model, prompt, videos, False, target.device)
        torch.testing.assert_close(found, whole[: len(found)], atol=1e-4, rtol=1e-4)


def gradients(model, prompt, videos, num_rows):
    """Of a loss of the first rows, in training mode: every parameter has one."""
    logits = logits_of(model, prompt, videos)[:num_rows]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=logits.dtype)
    return torch.autograd.grad((logits * weights).sum(), list(model.parameters()))


@every_implementation
@pytest.mark.parametrize("length", [2, 5, 7])
def test_a_prefix_has_the_same_gradients_whatever_follows(implementation, length):
    model = causal_model(cross_attn_implementation=implementation).double().train()  # gradients are in the hundreds
    prompt = CONVERSATION[:length]
    videos = VIDEOS[: prompt.count(VIDEO)]
    num_rows = len(logits_of(model, prompt, videos))
    alone = gradients(model, prompt, videos, num_rows)
    followed = gradients(model, CONVERSATION, VIDEOS, num_rows)
    for (name, _), found, expected in zip(model.named_parameters(), followed, alone, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@torch.no_grad()
def test_inference_and_training_paths_agree():
    model = causal_model(cross_attn_implementation="vanilla")
    inference = logits_of(model, CONVERSATION, VIDEOS)
    with torch.enable_grad():
        training = logits_of(model, CONVERSATION, VIDEOS).detach()
    torch.testing.assert_close(inference, training, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_text_before_the_first_video_is_that_of_a_language_model():
    model = causal_model()
    alone = logits_of(model, CONVERSATION[:2], ())
    torch.testing.assert_close(logits_of(model, CONVERSATION, VIDEOS)[:2], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_as_released_text_sees_the_videos_after_it():
    causal, released = causal_model(), tiny_model(None)
    released.load_state_dict(causal.state_dict())
    found, expected = (logits_of(model, CONVERSATION, VIDEOS) for model in (released, causal))
    assert ((found - expected)[:2].abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("implementation", ["text-only-vanilla-flashattn", "text-only-vanilla-masksystem"])
@torch.no_grad()
def test_masking_system_text_is_what_causal_does_anyway(implementation):
    masking = "text-only-vanilla-flashattn-masksystem"
    one, other = (causal_model(cross_attn_implementation=name) for name in (implementation, masking))
    assert torch.equal(logits_of(one, CONVERSATION, VIDEOS), logits_of(other, CONVERSATION, VIDEOS))


@torch.no_grad()
def test_after_its_one_video_text_is_the_same_bits_as_released_where_system_text_is_masked():
    options = {"cross_attn_implementation": "text-only-vanilla-masksystem"}
    causal, released = causal_model(**options), tiny_model(None, **options)
    prompt = ([3, 4, VIDEO, 5, 6], VIDEOS[:1])
    assert torch.equal(logits_of(causal, *prompt), logits_of(released, *prompt))
