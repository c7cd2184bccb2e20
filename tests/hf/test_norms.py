"""The hybrid layers' norms over slow tokens: in inference once for all layers, with the factor in the projection."""

from __future__ import annotations

import importlib
import io

import pytest
import torch
from accelerate import init_empty_weights
from ambient import default_type
from families import FAMILIES, batch, close, prompt, slow_fast_model, video
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from slowfast_model import plain
from slowfast_model.hf import SlowFastVLForConditionalGeneration, norms
from slowfast_model.hf.attention import HybridAttention
from slowfast_model.hf.norms import factor_offset


@pytest.fixture
def seen(monkeypatch):
    """For each projection of slow tokens, whether they came normalised."""
    found, project = [], HybridAttention._project

    def recording(self, tokens, are_normalised):
        found.append(are_normalised)
        return project(self, tokens, are_normalised)

    monkeypatch.setattr(HybridAttention, "_project", recording)
    return found


def logits(model, grad=False):
    """Over one prompt and one video, the same at every call."""
    torch.manual_seed(3)
    features = video()
    with torch.set_grad_enabled(grad):
        return model(**batch([prompt(model, 3, features, 4)]), video_features=[features]).logits.detach()


class Shifted(nn.Module):
    """A norm that is no RMS norm, but looks like one from outside."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return self.weight * (x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() + 1)


class EpsOutside(Shifted):
    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


@pytest.mark.parametrize(
    ("kind", "offset"),
    [
        ("qwen2.Qwen2", 0.0),
        ("qwen3.Qwen3", 0.0),
        ("llama.Llama", 0.0),
        ("mistral.Mistral", 0.0),
        ("phi3.Phi3", 0.0),
        ("gemma.Gemma", 1.0),
        ("gemma2.Gemma2", 1.0),
        ("gemma3.Gemma3", 1.0),
    ],
)
def test_norms_of_transformers_are_known_by_what_they_do(kind, offset):
    name, prefix = kind.split(".")
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    assert factor_offset(getattr(module, f"{prefix}RMSNorm")) == offset


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_norm_is_known_whatever_type_and_device_are_the_default(dtype, device):
    with default_type(dtype), torch.device(device):
        assert [factor_offset(kind) for kind in (Qwen2RMSNorm, GemmaRMSNorm)] == [0.0, 1.0]


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.Identity, Shifted, EpsOutside])
def test_other_norms_are_none_of_them(kind):
    assert factor_offset(kind) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_in_inference_slow_tokens_are_normalised_once_and_answers_stay(family, seen):
    model = slow_fast_model(family)
    close(logits(model), logits(model, grad=True))
    assert seen == [True, True, False, False]


def test_a_weight_that_changes_after_a_call_is_seen(seen):
    model = slow_fast_model()
    before = logits(model)
    with torch.no_grad():
        model.get_decoder().layers[2].input_layernorm.weight.data.mul_(1.5)
    after = logits(model)
    assert not torch.allclose(after, before, atol=1e-3)
    close(after, logits(model, grad=True))
    assert seen == [True] * 4 + [False] * 2


@pytest.mark.parametrize("change", ["hook", "forward", "eps"])
def test_a_norm_that_is_more_than_its_weight_is_called_in_every_layer(change, seen):
    model = slow_fast_model()
    norm = model.get_decoder().layers[2].input_layernorm
    if change == "hook":
        norm.register_forward_hook(lambda module, inputs, output: output * 2)
    elif change == "forward":
        plain = norm.forward
        norm.forward = lambda x: plain(x) * 2
    else:
        norm.variance_epsilon = 0.1
    close(logits(model), logits(model, grad=True))
    assert not any(seen)


def test_a_projection_that_must_be_called_is_given_what_its_norm_gives(seen):
    model = slow_fast_model()
    layer, given = model.get_decoder().layers[2], []
    layer.self_attn.cross_attn_kv_proj.register_forward_hook(lambda module, inputs, output: given.append(inputs[0]))
    close(logits(model), logits(model, grad=True))
    assert seen == [True, True, False, False]
    close(*given)


def test_a_norm_is_known_while_new_parameters_go_nowhere():
    """As in every ``from_pretrained`` of transformers 4.57."""
    with init_empty_weights():
        assert factor_offset(Qwen2RMSNorm) == 0.0


def test_a_norm_that_could_not_be_asked_is_asked_again(monkeypatch):
    forward = Qwen2RMSNorm.forward
    with monkeypatch.context() as broken:
        broken.setattr(Qwen2RMSNorm, "forward", lambda self, x: 1 / 0)
        assert factor_offset(Qwen2RMSNorm) is None
    assert Qwen2RMSNorm.forward is forward
    assert factor_offset(Qwen2RMSNorm) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_is_loaded_first_normalises_once(dtype, tmp_path):
    slow_fast_model("gemma3").save_pretrained(tmp_path)
    norms._asked.cache_clear()
    model = SlowFastVLForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    assert [attention.bare_norm_eps for attention in model.hybrid_attentions()] == [1e-6] * 2


def test_a_model_that_is_unpickled_first_normalises_once(monkeypatch):
    written = io.BytesIO()
    torch.save(slow_fast_model(), written)
    norms._asked.cache_clear()
    monkeypatch.delitem(plain._FORWARDS, Qwen2RMSNorm)
    written.seek(0)
    model = torch.load(written, weights_only=False)
    assert all(attention.bare_norm_eps is not None for attention in model.hybrid_attentions())
