"""Heads need not split the hidden size: hybrid layers whose attention output is wider, or narrower, than the state."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from model_cases import (  # noqa: F401
    MODEL_TARGETS,
    PROMPT_VIDEOS,
    PROMPTS,
    features,
    one_thread,
    padded,
    tiny_model,
)

from slowfast_model import DecodeSession
from slowfast_model.config import GATING_TYPES, IMPLEMENTATIONS

every_target = pytest.mark.parametrize("target", MODEL_TARGETS)
every_shape = pytest.mark.parametrize(
    "heads",
    [{"head_dim": 16}, {"head_dim": 4}, {"head_dim": 20, "num_attention_heads": 3, "num_key_value_heads": 3}],
    ids=["wider", "narrower", "no divisor"],
)


def batch(device="cpu"):
    ids, mask = (x.to(device) for x in padded(PROMPTS))
    return ids, features(*PROMPT_VIDEOS, device=device), mask


def by_hand(model, ids, videos, mask):
    """Logits of the layout's valid rows by the definition: one sequence, one head, one row set at a time."""
    x, layout, slow = model.prepare(ids, videos, mask, None)
    config, rope = model.config, model.rope(x.shape[1], x)
    heads_per_kv = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention = layer.self_attn
        a, q = attention.attend(layer.input_layernorm(x), rope, None)
        if layer.is_hybrid:
            gate_proj, rows = attention.cross_attn_gate_proj[0], []
            for b in range(len(x)):
                tokens = layer.input_layernorm(slow.tokens[slow.cu_slow[b] : slow.cu_slow[b + 1]])
                kv = attention.cross_attn_kv_proj(tokens).unflatten(-1, (config.num_key_value_heads, 2, -1))
                k, v = (t.repeat_interleave(heads_per_kv, 1) for t in (kv[:, :, 0], kv[:, :, 1]))
                scores = torch.einsum("lhd,nhd->hln", q[b], k) / config.head_dim**0.5
                rows.append(torch.einsum("hln,nhd->lhd", scores.softmax(-1), v).flatten(1))
            gate = F.linear(a, gate_proj.weight, gate_proj.bias)
            gate = {"tanh": torch.tanh, "linear": lambda x: x}[config.gate](gate)
            if attention.cross_attn_warm_up_gate is not None:
                warm_up = attention.cross_attn_warm_up_gate
                gate = gate * (warm_up if config.updates_every_row else warm_up.tanh())
            attends = torch.zeros(x.shape[0] * x.shape[1], dtype=torch.bool)
            attends[slow.text_rows.long()] = True
            a = torch.where(attends.view(*x.shape[:2], 1), a + gate * torch.stack(rows), a)
        x = x + attention.o_proj(a)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))[layout.attention_mask]


@every_shape
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("gating", GATING_TYPES)
def test_every_variant_computes_its_definition_with_any_head_dim(heads, gating, implementation):
    model = tiny_model(cross_attn_gating_type=gating, cross_attn_implementation=implementation, **heads)
    out = model(*batch())
    torch.testing.assert_close(out.logits[out.attention_mask], by_hand(model, *batch()), atol=2e-4, rtol=2e-4)


@every_shape
def test_the_gate_reads_the_attention_output(heads):
    model = tiny_model(**heads)
    width = model.config.num_attention_heads * heads["head_dim"]
    gate_proj = model.model.layers[0].self_attn.cross_attn_gate_proj[0]
    assert gate_proj.weight.shape == (1, width)


@every_target
@every_shape
def test_training_and_inference_agree_and_every_parameter_learns(heads, target):
    model = tiny_model(target.backend, target.device, **heads).train()
    ids, videos, mask = batch(target.device)
    out = model(ids, videos, mask, labels=ids.masked_fill(ids < 0, -100))
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    with torch.no_grad():
        again = model.eval()(ids, videos, mask)
    valid = out.attention_mask
    torch.testing.assert_close(again.logits[valid], out.logits[valid], atol=2e-4, rtol=2e-4)


@every_target
@every_shape
@torch.no_grad()
def test_cached_logits_equal_a_run_of_the_whole_sequence(heads, target):
    model = tiny_model(target.backend, target.device, **heads)
    ids, videos, mask = batch(target.device)
    session = DecodeSession(model, ids, videos, mask, max_new_tokens=3)
    prompts, logits = [list(prompt) for prompt in PROMPTS], session.logits
    for _ in range(3):
        out = model(*(x.to(target.device) for x in padded(prompts)[:1]), videos, padded(prompts)[1].to(target.device))
        last = out.logits[torch.arange(3), out.attention_mask.sum(1) - 1]
        torch.testing.assert_close(logits, last, atol=2e-4, rtol=2e-4)
        token = logits.argmax(-1)
        for prompt, new in zip(prompts, token.tolist(), strict=True):
            prompt.append(new)
        logits = session.step(token)


@every_shape
def test_such_a_model_is_saved_and_loaded(heads, tmp_path):
    pytest.importorskip("safetensors")
    model = tiny_model(**heads)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, backend="eager")
    assert loaded.config == model.config
    with torch.no_grad():
        assert torch.equal(loaded(*batch()).logits, model(*batch()).logits)
