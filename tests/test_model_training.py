"""Training: what receives a gradient, that recomputation changes none, and that inference sees updated weights."""

from __future__ import annotations

import pytest
import torch
from model_cases import MODEL_TARGETS, PROMPT_VIDEOS, PROMPTS, VIDEO, features, one_thread, padded, tiny_model  # noqa: F401

every_target = pytest.mark.parametrize("target", MODEL_TARGETS)


def loss_of(model, device="cpu", videos=None):
    ids, mask = (x.to(device) for x in padded(PROMPTS))
    labels = ids.masked_fill((mask == 0) | (ids == VIDEO), -100)
    videos = features(*PROMPT_VIDEOS, device=device) if videos is None else videos
    return model(ids, videos, mask, labels).loss


def gradients(model, device="cpu"):
    model.zero_grad()
    loss_of(model, device).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@every_target
def test_every_parameter_receives_a_gradient(target):
    for name, grad in gradients(tiny_model(target.backend, target.device), target.device).items():
        assert grad.isfinite().all(), name
        assert grad.abs().max() > 0, name


@every_target
def test_gradients_are_the_eager_ones(target):
    expected = gradients(tiny_model("eager", target.device), target.device)
    for name, grad in gradients(tiny_model(target.backend, target.device), target.device).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@every_target
def test_gradients_reach_the_vision_features(target):
    clips = [x.requires_grad_() for x in features(*PROMPT_VIDEOS, device=target.device)]
    loss_of(tiny_model(target.backend, target.device), target.device, clips).backward()
    assert all(clip.grad.abs().max() > 0 for clip in clips)


@every_target
def test_of_the_slow_path_only_a_closed_warm_up_gate_receives_a_gradient(target):
    model = tiny_model(target.backend, target.device)
    with torch.no_grad():
        for layer in model.config.hybrid_layers:
            model.model.layers[layer].self_attn.cross_attn_warm_up_gate.zero_()
    grads = {name: grad for name, grad in gradients(model, target.device).items() if ".cross_attn_" in name}
    for name, grad in grads.items():
        assert (grad.abs().max() > 0) == name.endswith("warm_up_gate"), name


@every_target
def test_gradient_checkpointing_changes_no_gradient(target):
    model = tiny_model(target.backend, target.device).train()
    expected = gradients(model, target.device)
    model.gradient_checkpointing_enable()
    for name, grad in gradients(model, target.device).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_gradient_checkpointing_recomputes_every_layer_hybrid_or_not():
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    calls = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: calls.append(i))
    loss_of(model).backward()
    assert sorted(calls) == [0, 0, 1, 1, 2, 2]
    calls.clear()
    model.gradient_checkpointing_disable()
    loss_of(model).backward()
    assert sorted(calls) == [0, 1, 2]


@every_target
def test_a_few_steps_lower_the_loss(target):
    model = tiny_model(target.backend, target.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    before = loss_of(model, target.device).item()
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model, target.device).backward()
        optimizer.step()
    assert loss_of(model, target.device).item() < before


@pytest.mark.parametrize("through_data", [False, True], ids=["in_place", "through_data"])
def test_inference_sees_updated_weights(through_data):
    """The norm's weight is folded into the slow projection: neither may be stale, however it was changed."""
    model = tiny_model()
    with torch.no_grad():
        loss_of(model)
        for layer in model.config.hybrid_layers:
            for parameter in (
                model.model.layers[layer].self_attn.cross_attn_kv_proj.weight,
                model.model.layers[layer].input_layernorm.weight,
            ):
                (parameter.data if through_data else parameter).mul_(1.5)
        inference = loss_of(model)
    torch.testing.assert_close(inference, loss_of(model).detach(), atol=1e-4, rtol=1e-5)


def test_training_runs_under_autocast_with_float32_parameters():
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_text_alone_trains():
    model = tiny_model()
    ids = torch.tensor([[1, 2, 3, 4]])
    model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
    assert model.model.layers[0].self_attn.cross_attn_kv_proj.weight.grad is None


def test_a_batch_without_a_target_has_loss_zero():
    ids = torch.tensor([[1, 2, 3]])
    loss = tiny_model()(ids, labels=torch.full_like(ids, -100)).loss
    assert loss.item() == 0
