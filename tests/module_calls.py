"""The reference for whatever changes a module's answer: a model computed by calling its modules."""

from __future__ import annotations

import torch
from model_cases import PROMPT_VIDEOS, PROMPTS, features, padded
from torch import Tensor

import slowfast_kernels as sk
from slowfast_model import DecodeSession

CLOSE = {"atol": 2e-4, "rtol": 2e-4}
MATTERS = 1e-2  # how far a change must move the logits for a test of it to mean something
NEXT = torch.tensor([21, 22, 23])  # a decode step's tokens, one a sample of PROMPTS


@torch.no_grad()
def by_calling_modules(model, prompts=PROMPTS) -> list[Tensor]:
    """Logits of each sample's rows, from calls of the modules alone."""
    ids, mask = padded(prompts)
    with torch.enable_grad():
        x, layout, slow = model.prepare(ids, features(*PROMPT_VIDEOS), mask, None)
    x, tokens = x.detach(), slow.tokens.detach()
    assert not slow.tokens_are_normalised
    rope = model.rope(x.shape[1], x)
    for layer in model.model.layers:
        attention = layer.self_attn
        a, q = attention.attend(layer.input_layernorm(x), rope, None)
        if layer.is_hybrid:
            kv = attention.cross_attn_kv_proj(layer.input_layernorm(tokens)).unflatten(-1, (-1, 2, attention.head_dim))
            where = (slow.cu_slow, slow.text_rows, slow.cu_text)
            context = sk.text_cross_attention(q.flatten(0, 1), kv, *where, backend="eager").flatten(1)
            state = a.flatten(0, 1)
            gate = attention.cross_attn_gate_proj(state[slow.text_rows]).tanh()
            mixed = gate * attention.cross_attn_warm_up_gate.tanh() * context
            a = state.index_add(0, slow.text_rows, mixed).view_as(a)
        x = x + attention.o_proj(a)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return rows_of(model.lm_head(model.model.norm(x)), layout.attention_mask)


def rows_of(logits: Tensor, attention_mask: Tensor) -> list[Tensor]:
    return [row[keep] for row, keep in zip(logits, attention_mask, strict=True)]


def forward(model, prompts=PROMPTS) -> list[Tensor]:
    out = model(padded(prompts)[0], features(*PROMPT_VIDEOS), padded(prompts)[1])
    return rows_of(out.logits.detach(), out.attention_mask)


def assert_train_and_generate_agree(model, called=None) -> None:
    """Training's and inference's logits, a prefill's and a cached step's, are those of the modules' calls."""
    called = model if called is None else called
    expected = by_calling_modules(called)
    for a, b in zip(forward(model), expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda m: f"training: {m}")
    with torch.no_grad():
        for a, b in zip(forward(model), expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE, msg=lambda m: f"inference: {m}")
    ids, mask = padded(PROMPTS)
    session = DecodeSession(called, ids, features(*PROMPT_VIDEOS), mask, max_new_tokens=1)
    torch.testing.assert_close(session.logits, torch.stack([rows[-1] for rows in expected]), **CLOSE)
    longer = by_calling_modules(called, [[*prompt, int(token)] for prompt, token in zip(PROMPTS, NEXT, strict=True)])
    torch.testing.assert_close(session.step(NEXT), torch.stack([rows[-1] for rows in longer]), **CLOSE)


def assert_matters(model, before) -> None:
    assert max((a - b).abs().max() for a, b in zip(by_calling_modules(model), before, strict=True)) > MATTERS
