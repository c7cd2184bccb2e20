"""PEFT adapters, offloaded and quantised weights count in training, in inference and in generation alike."""

from __future__ import annotations

import pytest
import torch
from model_cases import MODEL_TARGETS, PROMPT_VIDEOS, PROMPTS, features, one_thread, padded, tiny_model  # noqa: F401
from module_calls import CLOSE, assert_matters, assert_train_and_generate_agree, by_calling_modules, forward, rows_of
from torch import nn

from slowfast_model.vision import PatchTower, encode_frames

every_target = pytest.mark.parametrize("target", MODEL_TARGETS)

# ------------------------------------------------------------------------------------------ PEFT

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "cross_attn_kv_proj", "cross_attn_gate_proj.0"]
LINEARS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
SAVED = ["cross_attn_gate_proj", "cross_attn_kv_proj", "input_layernorm", "embed_tokens", "lm_head"]
ADAPTERS = {
    "lora": lambda peft: peft.LoraConfig(r=4, target_modules=LINEARS),
    "lora_gate_alone": lambda peft: peft.LoraConfig(r=4, target_modules=["cross_attn_gate_proj.0"]),
    "lora_projection_alone": lambda peft: peft.LoraConfig(r=4, target_modules=["cross_attn_kv_proj"]),
    "dora": lambda peft: peft.LoraConfig(r=4, target_modules=LINEARS, use_dora=True),
    "ia3": lambda peft: peft.IA3Config(target_modules=LINEARS, feedforward_modules=["mlp.down_proj"]),
    "ln_tuning": lambda peft: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
    "loha": lambda peft: peft.LoHaConfig(r=4, target_modules=LINEARS),
    "modules_to_save": lambda peft: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=SAVED),
    "embeddings_and_projector": lambda peft: peft.LoraConfig(
        r=4, target_modules=["embed_tokens", "lm_head", "mm_projector.0"]
    ),
    "trained_tokens": lambda peft: peft.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 5, 21]}
    ),
}


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed")


def adapted(peft, kind: str, model):
    """``model`` with awake adapters: they start as the identity."""
    wrapped = peft.get_peft_model(model, ADAPTERS[kind](peft))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return wrapped


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_counts_in_training_and_generation_and_merging_it_changes_nothing(kind, peft):
    base = tiny_model()
    before = by_calling_modules(base)
    wrapped = adapted(peft, kind, base)
    assert_matters(base, before)
    assert_train_and_generate_agree(wrapped, called=base)

    expected = by_calling_modules(base)
    with wrapped.disable_adapter():
        assert_train_and_generate_agree(wrapped, called=base)
        for a, b in zip(forward(wrapped), before, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
    merged = wrapped.merge_and_unload()
    assert merged.model.layers[0].folds_norm
    with torch.no_grad():
        for a, b in zip(forward(merged), expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


@every_target
def test_lora_on_every_linear_agrees_on_every_backend(target, peft):
    if target.device.type != "cpu":
        pytest.skip("the reference of this module runs on a CPU")
    base = tiny_model(target.backend)
    assert_train_and_generate_agree(adapted(peft, "lora", base), called=base)


def test_every_adapter_of_a_hybrid_layer_receives_a_gradient(peft):
    wrapped = adapted(peft, "lora", tiny_model())
    ids, mask = padded(PROMPTS)
    wrapped(ids, features(*PROMPT_VIDEOS), mask, ids.masked_fill(ids < 0, -100)).loss.backward()
    adapters = {name: p for name, p in wrapped.named_parameters() if "lora_" in name}
    assert sum("cross_attn_gate_proj" in name for name in adapters) == 2 * len(wrapped.config.hybrid_layers)
    for name, parameter in adapters.items():
        assert parameter.grad.abs().max() > 0, name


def test_text_alone_gives_every_adapter_a_gradient_of_zeros_at_least(peft):
    wrapped = adapted(peft, "lora", tiny_model()).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    wrapped(ids, labels=ids).loss.backward()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name


def test_a_peft_model_generates_what_its_merged_model_does(peft):
    wrapped = adapted(peft, "lora", tiny_model())
    ids, mask = padded(PROMPTS)
    found = wrapped.generate(ids, features(*PROMPT_VIDEOS), mask, max_new_tokens=4)
    assert torch.equal(
        found, wrapped.merge_and_unload().generate(ids, features(*PROMPT_VIDEOS), mask, max_new_tokens=4)
    )


# ------------------------------------------------------------------------------------------ offloading

EVERYWHERE = {
    "model.embed_tokens": "disk",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "model.mm_projector": "disk",
    "lm_head": "disk",
}
OFFLOADS = {
    "cpu_offload": lambda accelerate, model, _: accelerate.cpu_offload(model, "cpu"),
    "disk_offload": lambda accelerate, model, path: accelerate.disk_offload(model, path, "cpu"),
    "dispatch_model": lambda accelerate, model, path: accelerate.dispatch_model(
        model, EVERYWHERE, main_device="cpu", offload_dir=path
    ),
    "cpu_offload_with_hook": lambda accelerate, model, _: accelerate.cpu_offload_with_hook(model, "cpu")[0],
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", OFFLOADS)
def test_an_offloaded_model_answers_as_before(kind, tied, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, resident = (tiny_model(tie_word_embeddings=tied) for _ in range(2))
    OFFLOADS[kind](accelerate, model, str(tmp_path))
    if kind != "cpu_offload_with_hook":
        assert model.model.layers[0].self_attn.cross_attn_kv_proj.weight.is_meta
    ids, mask = padded(PROMPTS)
    call = (ids, features(*PROMPT_VIDEOS), mask)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out, expected = model(*call), resident(*call)
        for a, b in zip(*(rows_of(o.logits, o.attention_mask) for o in (out, expected)), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
    assert torch.equal(model.generate(*call, max_new_tokens=3), resident.generate(*call, max_new_tokens=3))


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16_weights", "autocast"])
@torch.no_grad()
def test_an_offloaded_model_computes_in_bfloat16(autocast):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, called = (tiny_model() if autocast else tiny_model().bfloat16() for _ in range(2))
    accelerate.cpu_offload(model, "cpu")
    called.model.mm_projector.register_forward_hook(lambda *_: None)  # the reference calls its modules too, and so
    for index in called.config.hybrid_layers:  # rounds as often
        called.model.layers[index].input_layernorm.register_forward_hook(lambda *_: None)
        called.model.layers[index].self_attn.cross_attn_gate_proj.register_forward_hook(lambda *_: None)
    ids, mask = padded(PROMPTS)
    call = (ids, features(*PROMPT_VIDEOS) if autocast else [x.bfloat16() for x in features(*PROMPT_VIDEOS)], mask)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, expected = model(*call), called(*call)
        assert out.logits.dtype == torch.bfloat16
        assert torch.equal(out.logits[out.attention_mask], expected.logits[out.attention_mask])
        assert torch.equal(model.generate(*call, max_new_tokens=3), called.generate(*call, max_new_tokens=3))


@torch.no_grad()
def test_an_offloaded_tower_encodes_frames(rng):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    tower = PatchTower(12, grid=4, patch=2)
    frames = torch.randint(0, 256, (3, 20, 30, 3), dtype=torch.uint8, generator=rng())
    expected = encode_frames(tower, frames)
    accelerate.cpu_offload(tower, "cpu")
    assert torch.equal(encode_frames(tower, frames), expected)


# ------------------------------------------------------------------------------------------ quantisation


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_dynamically_quantised_linears_are_called():
    model = tiny_model()
    before = by_calling_modules(model)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert_matters(quantised, before)
    for a, b in zip(forward(quantised), by_calling_modules(quantised), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    ids, mask = padded(PROMPTS)
    assert quantised.generate(ids, features(*PROMPT_VIDEOS), mask, max_new_tokens=2).shape == (3, 2)


@torch.no_grad()
def test_torchao_weights_are_called():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = tiny_model()
    before = by_calling_modules(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert max((a - b).abs().max() for a, b in zip(by_calling_modules(model), before, strict=True)) > 0
    assert_train_and_generate_agree(model)
