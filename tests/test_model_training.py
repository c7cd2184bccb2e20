"""Training: what receives a gradient, also from text alone, recomputation, the output, and updated weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.utils._pytree as pytree
from model_cases import MODEL_TARGETS, PROMPT_VIDEOS, PROMPTS, VIDEO, features, one_thread, padded, tiny_model  # noqa: F401

from slowfast_model import SlowFastOutput

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


# ------------------------------------------------------------------------------- batches that a video does not reach

TEXT = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
SLOW_PATH = ("cross_attn_", "mm_projector")


def is_slow_path(name: str) -> bool:
    return any(part in name for part in SLOW_PATH)


def train_on_text(model, device="cpu"):
    """Loss and gradients of a batch that is text alone."""
    model.zero_grad()
    loss = model(TEXT.to(device), labels=TEXT.to(device)).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@every_target
def test_text_alone_gives_the_slow_path_zeros_and_the_rest_what_the_language_model_gets(target):
    model = tiny_model(target.backend, target.device).train()
    plain = tiny_model(target.backend, target.device, cross_attn_every_n_layers=0, mm_hidden_size=None).train()
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if not is_slow_path(name)})
    loss, grads = train_on_text(model, target.device)
    expected_loss, expected = train_on_text(plain, target.device)
    assert torch.equal(loss, expected_loss)
    for name, grad in grads.items():
        wanted = torch.zeros_like(grad) if is_slow_path(name) else expected[name]
        assert torch.equal(grad, wanted), name


@every_target
@pytest.mark.parametrize("trainable", ["kv_proj", "cross_attn_gate_proj", "warm_up_gate", "mm_projector"])
def test_text_alone_has_a_graph_where_only_a_part_of_the_slow_path_trains(trainable, target):
    model = tiny_model(target.backend, target.device).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name)
    _, grads = train_on_text(model, target.device)
    for name, grad in grads.items():
        assert (grad is None) == (trainable not in name), name
        assert grad is None or torch.equal(grad, torch.zeros_like(grad)), name


@every_target
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_the_slow_path_holds_does_not_reach_text_alone(value, target):
    model = tiny_model(target.backend, target.device).train()
    expected, _ = train_on_text(model, target.device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_slow_path(name):
                parameter.fill_(value)
    loss, grads = train_on_text(model, target.device)
    assert torch.equal(loss, expected)
    for name, grad in grads.items():
        assert torch.equal(grad, torch.zeros_like(grad)) if is_slow_path(name) else grad.isfinite().all(), name


VARIANTS = {
    "all_to_media": {"cross_attn_implementation": "vanilla"},
    "mask_system": {"cross_attn_implementation": "text-only-vanilla-masksystem"},
    "linear_gate_without_warm_up": {"cross_attn_gating_type": "whole-dynamic"},
    "no_hybrid_layer": {"cross_attn_every_n_layers": 0},
    "no_projector": {"mm_hidden_size": None},
    "identity_projector": {"mm_hidden_size": 32, "mm_projector_type": "identity"},
    "linear_projector": {"mm_projector_type": "linear"},
    "tied_embeddings": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_takes_part_in_text_alone_in_every_variant(variant):
    model = tiny_model(**VARIANTS[variant]).train()
    assert all(grad is not None and grad.isfinite().all() for grad in train_on_text(model)[1].values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["float32", "autocast", "half"])
def test_every_parameter_takes_part_in_text_alone_in_every_precision(dtype, checkpointing):
    model = tiny_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    if dtype == torch.float16:
        model.half()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, grads = train_on_text(model)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads.values())


@pytest.mark.parametrize(
    ("prompts", "videos", "labelled"),
    [
        ([[1, 2, 3, VIDEO]], ((4, 4),), [0]),
        ([[VIDEO]], ((4, 4),), []),
        ([[1, 2, 3], [4, VIDEO, 5]], ((4, 4),), [0]),
        ([[1, 2, 3], [4, VIDEO, 5]], ((4, 4),), []),
        ([[VIDEO, 1, VIDEO, 2], [3]], ((4, 4), (1, 4)), [0, 1]),
    ],
    ids=["no_text_after_the_video", "no_text", "no_label_for_the_video", "no_label", "text_alone_in_one_sample"],
)
@pytest.mark.parametrize("implementation", ["text-only-vanilla", "text-only-vanilla-masksystem", "vanilla"])
def test_every_parameter_takes_part_in_a_batch_with_a_video(prompts, videos, labelled, implementation):
    model = tiny_model(cross_attn_implementation=implementation).train()
    ids, mask = padded(prompts)
    labels = torch.full_like(ids, -100)
    for b in labelled:
        labels[b] = ids[b].masked_fill((ids[b] == VIDEO) | (mask[b] == 0), -100)
    model(ids, features(*videos), mask, labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_modules_run_in_one_order_with_a_video_and_without():
    """What gathers and frees weights as modules run (FSDP, ZeRO-3) must see one order on all ranks."""
    model = tiny_model().train()
    ran = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    loss_of(model)
    with_video = ran.copy()
    ran.clear()
    model(TEXT, labels=TEXT)
    assert ran == with_video
    assert {"model.mm_projector", "model.layers.0.self_attn.cross_attn_kv_proj"} <= set(ran)


@pytest.mark.parametrize("grad", [True, False], ids=["eval_mode", "no_grad"])
def test_text_alone_runs_nothing_of_the_slow_path_outside_training(grad):
    model = tiny_model().train(not grad)
    for module in (model.model.mm_projector, model.model.layers[0].self_attn.cross_attn_kv_proj):
        module.register_forward_pre_hook(lambda *_: pytest.fail("the slow path ran"))
    with torch.set_grad_enabled(grad):
        model(TEXT)


# -------------------------------------------------------------------------------------------------------- the output


def test_the_output_is_a_pytree_node_of_its_tensors():
    ids = torch.tensor([[1, 2, 3]])
    output = tiny_model()(ids, labels=ids)
    leaves, spec = pytree.tree_flatten(output)
    assert [x is y for x, y in zip(leaves, vars(output).values(), strict=True)] == [True] * 5
    doubled = pytree.tree_map(lambda x: 2 * x, output)
    assert type(pytree.tree_unflatten(leaves, spec)) is type(doubled) is SlowFastOutput
    assert torch.equal(doubled.loss, 2 * output.loss)


def test_an_output_without_labels_is_a_pytree_node_too():
    output = tiny_model()(torch.tensor([[1, 2, 3]]))
    same = pytree.tree_map(lambda x: x, output)
    assert same.loss is None
    assert same.logits is output.logits


@torch.no_grad()
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_an_output_can_be_copied_and_sent(clone):
    output = tiny_model()(torch.tensor([[1, 2, 3]]))
    same = clone(output)
    assert torch.equal(same.logits, output.logits)
    assert same.loss is None


def test_the_loss_of_a_half_precision_model_is_formed_in_float32():
    model = tiny_model().to(torch.bfloat16)
    ids, mask = padded(PROMPTS)
    out = model(ids, [x.bfloat16() for x in features(*PROMPT_VIDEOS)], mask, ids.masked_fill(ids == VIDEO, -100))
    logits, targets = out.logits[:, :-1].double(), out.labels[:, 1:]
    expected = -logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0][targets != -100].mean()
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_batch_without_a_target_has_loss_zero():
    ids = torch.tensor([[1, 2, 3]])
    loss = tiny_model()(ids, labels=torch.full_like(ids, -100)).loss
    assert loss.item() == 0
