"""The whole model reproduces the released one in float32: logits, loss, hidden states, ids of both modes, gradients."""

from __future__ import annotations

import golden_data
import pytest
import torch
from model_cases import MODEL_TARGETS, GoldenModel, one_thread  # noqa: F401

from slowfast_model import DecodeSession

LOGITS = {"atol": 2e-4, "rtol": 0}
GRADIENT = {"atol": 1e-4, "rtol": 1e-4}

pytestmark = pytest.mark.parametrize("target", MODEL_TARGETS)
every_model = pytest.mark.parametrize("name", golden_data.names("model_"))
with_and_without_grad = pytest.mark.parametrize("grad", [True, False], ids=["training_path", "inference_path"])


@every_model
@with_and_without_grad
def test_logits_and_loss(name, grad, target):
    golden = GoldenModel.load(name, target.backend, target.device)
    with torch.set_grad_enabled(grad):
        out = golden.forward()
    valid = golden["out.attention_mask"].bool()
    torch.testing.assert_close(out.logits[valid], golden["out.logits"][valid], **LOGITS)
    torch.testing.assert_close(out.loss, golden["out.loss"][0], atol=1e-4, rtol=0)


@every_model
def test_layout(name, target):
    golden = GoldenModel.load(name, target.backend, target.device)
    out = golden.forward()
    assert torch.equal(out.token_types, golden["out.token_types"])
    assert torch.equal(out.attention_mask, golden["out.attention_mask"].bool())
    assert torch.equal(out.labels, golden["out.labels"])


@every_model
def test_embeddings_slow_and_fast_tokens(name, target):
    golden = GoldenModel.load(name, target.backend, target.device)
    x, layout, slow = golden.model.prepare(golden["in.input_ids"], golden.features, golden["in.attention_mask"], None)
    valid = layout.attention_mask
    torch.testing.assert_close(x[valid], golden["out.inputs_embeds"][valid], atol=1e-5, rtol=0)
    expected = [golden["out.slow_padded"][i][golden["out.cross_attn_mask"][i]] for i in golden.real]
    if not expected:
        assert slow is None
        return
    torch.testing.assert_close(slow.tokens, torch.cat(expected), atol=1e-5, rtol=0)
    fast = torch.cat([golden[f"out.fast.{i}"] for i in golden.real])
    torch.testing.assert_close(x[layout.token_types == 3], fast, atol=1e-5, rtol=0)


@every_model
@torch.no_grad()
def test_hidden_states_after_every_layer(name, target):
    golden = GoldenModel.load(name, target.backend, target.device)
    states = []
    decoder = golden.model.model
    for module in (*decoder.layers[:-1], decoder.norm):
        module.register_forward_hook(lambda _module, _inputs, output: states.append(output))
    golden.forward()
    valid = golden["out.attention_mask"].bool()
    for i, state in enumerate(states, start=1):
        torch.testing.assert_close(state[valid], golden[f"out.hidden_states.{i}"][valid], **LOGITS)


@every_model
@pytest.mark.parametrize("mode", ["attending", "official"])
def test_greedy_ids_and_their_logits(name, mode, target):
    golden = GoldenModel.load(name, target.backend, target.device)
    prompt = (golden["gen.input_ids"], golden.features, golden["gen.attention_mask"])
    ids, logits = golden[f"gen.{mode}_ids"], golden[f"gen.{mode}_logits"]
    options = {"max_new_tokens": ids.shape[1], "slow_tokens_in_decode": mode == "attending"}
    session = DecodeSession(golden.model, *prompt, **options)
    for i in range(ids.shape[1]):
        torch.testing.assert_close(session.logits, logits[:, i], **LOGITS)
        assert torch.equal(session.logits.argmax(-1), ids[:, i])
        if i + 1 < ids.shape[1]:
            session.step(ids[:, i])


def test_gradients_of_the_loss(target):
    golden = GoldenModel.load("model_video1", target.backend, target.device)
    golden.forward().loss.backward()
    found = dict(golden.model.named_parameters())
    recorded = [key for key in golden.tensors if key.startswith("out.grad.weight.")]
    assert recorded
    for key in recorded:
        actual = found[key.removeprefix("out.grad.weight.")].grad
        torch.testing.assert_close(actual, golden[key], **GRADIENT, msg=lambda m, key=key: f"{key}: {m}")
