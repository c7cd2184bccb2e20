"""Checkpoints load by their own key names, strictly, from one file or from shards; K and V start from the LM's."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoint_cases import load, weights, write, write_shards
from model_cases import TINY, VIDEO, features, one_thread, tiny_model  # noqa: F401

import slowfast_kernels as sk
from slowfast_model import SlowFastConfig, SlowFastForCausalLM
from slowfast_model.checkpoint import interleave_kv, read_safetensors

save_file = pytest.importorskip("safetensors.torch").save_file
PROMPT = torch.tensor([[1, VIDEO, 2, 3]])


@pytest.fixture
def directory(tmp_path):
    return write_shards(tmp_path)


def logits(model):
    with torch.no_grad():
        return model(PROMPT, features((4, 4))).logits


def test_the_module_names_are_the_released_keys():
    keys = set(weights())
    for key in (
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.cross_attn_kv_proj.bias",
        "model.layers.0.self_attn.cross_attn_gate_proj.0.weight",
        "model.layers.0.self_attn.cross_attn_warm_up_gate",
        "model.layers.1.mlp.down_proj.weight",
        "model.mm_projector.2.weight",
        "lm_head.weight",
    ):
        assert key in keys
    assert not [key for key in keys if key.startswith("model.layers.1.") and "cross_attn" in key]


def test_a_sharded_checkpoint_loads_from_its_directory(directory):
    model = SlowFastForCausalLM.from_pretrained(directory, backend="eager")
    torch.testing.assert_close(logits(model), logits(tiny_model()))


def test_loading_takes_another_dtype_if_asked(directory):
    model = SlowFastForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_single_file_loads(tmp_path):
    saved = weights()
    save_file(saved, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = read_safetensors(path)
        assert set(found) == set(saved)
        assert all(torch.equal(found[key], x) for key, x in saved.items())


def test_missing_unexpected_and_misshapen_keys_are_named_and_nothing_is_loaded():
    model = tiny_model()
    before = logits(model)
    state_dict = {key: x + 1 for key, x in weights().items()}
    del state_dict["model.norm.weight"]
    state_dict["model.extra.weight"] = torch.zeros(1)
    state_dict["lm_head.weight"] = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"missing: model\.norm\.weight") as error:
        model.load_official_state_dict(state_dict)
    assert "unexpected: model.extra.weight" in str(error.value)
    assert "lm_head.weight [2, 3] (want [61, 32])" in str(error.value)
    assert torch.equal(logits(model), before)


def test_weights_of_the_vision_tower_and_rotary_tables_have_no_place_and_are_let_pass():
    state_dict = weights() | {
        "model.vision_tower.vision_tower.stem.weight": torch.zeros(3),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    with torch.device("meta"):
        other = SlowFastForCausalLM(SlowFastConfig.from_official(TINY), backend="eager")
    other.to_empty(device="cpu").load_official_state_dict(state_dict)
    assert torch.equal(logits(other), logits(tiny_model()))


def test_tied_embeddings_need_no_head_in_the_checkpoint(tmp_path):
    state_dict = weights(tie_word_embeddings=True)
    del state_dict["lm_head.weight"]
    expected = logits(tiny_model(tie_word_embeddings=True))
    model = tiny_model(tie_word_embeddings=True)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.load_official_state_dict(state_dict)
    assert torch.equal(logits(model), expected)

    save_file(state_dict, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"tie_word_embeddings": True}))
    model = SlowFastForCausalLM.from_pretrained(tmp_path, backend="eager")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits(model), expected)


def test_an_absent_checkpoint_or_shard_is_named(directory):
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        read_safetensors(directory / "elsewhere.safetensors")
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        read_safetensors(directory)


def test_a_directory_without_weights_or_configuration_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="safetensors"):
        read_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        SlowFastForCausalLM.from_pretrained(tmp_path)


def test_shards_that_lack_a_promised_key_are_refused(directory):
    index = directory / "model.safetensors.index.json"
    promised = json.loads(index.read_text())
    promised["weight_map"]["model.absent.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(promised))
    with pytest.raises(ValueError, match=r"missing: model\.absent\.weight"):
        read_safetensors(directory)


# ------------------------------------------------------------------------------------------ from a language model


def language_model_weights():
    return {k: x + 0.1 for k, x in weights().items() if ".cross_attn_" not in k and "mm_projector" not in k}


@torch.no_grad()
def test_slow_keys_and_values_start_as_the_language_models_own():
    model = tiny_model()
    model.load_qwen2_state_dict(language_model_weights())
    attention = model.model.layers[0].self_attn
    x = torch.randn(5, 32)
    kv = attention.cross_attn_kv_proj(x).view(5, 2, 2, 8)  # [N, Hkv, 2, D]
    torch.testing.assert_close(kv[:, :, 0], attention.k_proj(x).view(5, 2, 8))
    torch.testing.assert_close(kv[:, :, 1], attention.v_proj(x).view(5, 2, 8))
    assert attention.cross_attn_warm_up_gate.item() == 0


def test_interleaving_keeps_the_rows_of_a_head_together():
    k, v = torch.arange(4.0)[:, None], 10 + torch.arange(4.0)[:, None]
    assert interleave_kv(k, v, 2).flatten().tolist() == [0, 1, 10, 11, 2, 3, 12, 13]


def test_a_language_model_checkpoint_is_strict_too():
    state_dict = language_model_weights()
    del state_dict["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"missing: model\.layers\.2\.mlp\.up_proj\.weight"):
        tiny_model().load_qwen2_state_dict(state_dict)
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.0\.self_attn\.cross_attn"):
        tiny_model().load_qwen2_state_dict(weights())


# ------------------------------------------------------------------------------------------ ties


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("kept", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)], ids=["embedding", "head", "both"])
def test_tied_weights_load_from_either_name_or_both(kept, tmp_path):
    expected = tiny_model(tie_word_embeddings=True)
    state_dict = {key: x for key, x in expected.state_dict().items() if key not in (EMBEDDING, HEAD) or key in kept}
    loaded = load(write(tmp_path, state_dict, tie_word_embeddings=True))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(expected))
    copied = tiny_model(tie_word_embeddings=True)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    copied.load_official_state_dict(state_dict)
    assert torch.equal(logits(copied), logits(expected))


def test_what_safetensors_save_model_writes_of_a_tied_model_loads(tmp_path):
    from safetensors.torch import save_model

    model = tiny_model(tie_word_embeddings=True)
    write(tmp_path, {}, tie_word_embeddings=True)
    save_model(model, str(tmp_path / "model.safetensors"))
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_tied_weights_under_two_names_that_differ_are_refused(tmp_path):
    state_dict = weights(tie_word_embeddings=True)
    state_dict[HEAD] = state_dict[HEAD] + 1
    with pytest.raises(ValueError, match=r"got lm_head\.weight other than model\.embed_tokens\.weight"):
        load(write(tmp_path, state_dict, tie_word_embeddings=True))


def test_equal_ties_may_hold_nan(tmp_path):
    state_dict = weights(tie_word_embeddings=True)
    for key in (EMBEDDING, HEAD):
        state_dict[key][3, 4] = float("nan")
    model = load(write(tmp_path, state_dict, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.isnan().nonzero().tolist() == [[3, 4]]


def test_a_missing_head_of_an_untied_model_is_named(tmp_path):
    state_dict = weights()
    del state_dict[HEAD]
    with pytest.raises(ValueError, match=r"1 keys missing: lm_head\.weight"):
        load(write(tmp_path, state_dict))


# ------------------------------------------------------------------------------------------ dtypes

VIDEO_BF16 = [features((4, 4))[0].bfloat16()]


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_a_dtype_may_be_named(dtype, directory):
    assert {p.dtype for p in load(directory, dtype=dtype).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "dtype", ["bf16", "int8", "", "bfloat", "Auto", torch.int8, torch.float8_e4m3fn, torch.complex64, 16, True, float]
)
def test_a_dtype_that_is_none_is_refused(dtype, directory):
    with pytest.raises(ValueError, match=r"^dtype: got "):
        load(directory, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "auto", "meta", -5.5, "bfloat16", None, "cuda:99", "xpu:99"])
def test_a_device_that_is_none_or_not_here_is_refused(device, directory):
    with pytest.raises(ValueError, match=r"^device: got "):
        load(directory, device=device)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_device_may_be_named(device, directory):
    assert load(directory, device=device).lm_head.weight.device.type == "cpu"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "float16", "torch_dtype": "float32"}, torch.float16),
        ({"torch_dtype": None}, torch.bfloat16),
    ],
    ids=str,
)
def test_the_automatic_dtype_is_the_configurations_else_the_tensors(keys, expected, tmp_path):
    write(tmp_path, {key: x.bfloat16() for key, x in weights().items()}, **keys)
    assert {p.dtype for p in load(tmp_path, dtype="auto").parameters()} == {expected}
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.bfloat16}


def test_a_configuration_with_a_dtype_that_is_none_is_named(tmp_path):
    write(tmp_path, weights(), torch_dtype="float7")
    with pytest.raises(ValueError, match=r"config\.json: dtype: got 'float7'"):
        load(tmp_path, dtype="auto")


def mixed(part):
    """bfloat16 with the keys that contain ``part`` in float32."""
    return {key: x if part(key) else x.bfloat16() for key, x in weights().items()}


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize(
    "part",
    [lambda key: "norm" in key, lambda key: "cross_attn_gate" in key or "warm_up" in key],
    ids=["norms", "gates"],
)
def test_norms_or_gates_kept_in_float32_beside_bfloat16_are_computed_with(part, backend, tmp_path):
    if not sk.backends()[backend].available:
        pytest.skip(sk.backends()[backend].detail)
    model = load(write(tmp_path, mixed(part)), backend=backend)
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    reference = load(tmp_path, dtype=torch.float64)
    with torch.no_grad():
        expected = reference(PROMPT, [VIDEO_BF16[0].double()]).logits
        torch.testing.assert_close(model(PROMPT, VIDEO_BF16).logits.double(), expected, atol=0.5, rtol=0.05)
    assert model.generate(PROMPT, VIDEO_BF16, max_new_tokens=3).shape == (1, 3)
    loss = model.train()(PROMPT, VIDEO_BF16, labels=torch.tensor([[1, -100, 2, 3]])).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("part", "named"),
    [
        (lambda key: "mm_projector" in key, r"model\.mm_projector\.0\.weight \(torch\.float32\)"),
        (lambda key: "warm_up" in key, r"model\.layers\.0\.self_attn\.cross_attn_warm_up_gate"),
        (lambda key: key == "model.norm.weight", r"model\.norm\.weight"),
        (lambda key: "layers.1.mlp" in key, r"model\.layers\.1\.mlp\.down_proj\.weight"),
        (lambda key: key == HEAD, r"lm_head\.weight"),
    ],
    ids=["projector", "warm-up", "one norm", "mlp", "head"],
)
def test_other_mixtures_of_dtypes_are_refused_by_name_and_cast_on_demand(part, named, tmp_path):
    write(tmp_path, mixed(part))
    with pytest.raises(ValueError, match=f"dtype: got a checkpoint of torch.bfloat16 beside .*{named}"):
        load(tmp_path)
    model = load(tmp_path, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("wanted", [None, "bfloat16"])
def test_integer_and_8_bit_tensors_are_refused_by_name(dtype, wanted, tmp_path):
    key = "model.layers.1.mlp.up_proj.weight"
    state_dict = weights()
    state_dict[key] = state_dict[key].to(dtype)
    with pytest.raises(ValueError, match=rf"{key} \({dtype}\)"):
        load(write(tmp_path, state_dict), dtype=wanted)
    with pytest.raises(ValueError, match=rf"{key} \({dtype}\)"):
        tiny_model().load_official_state_dict(state_dict)


@pytest.mark.parametrize("method", ["load_official_state_dict", "load_qwen2_state_dict"])
@pytest.mark.parametrize("state_dict", [None, "model.safetensors", [("lm_head.weight", 1)]])
def test_what_is_no_state_dict_is_refused(method, state_dict):
    with pytest.raises(TypeError, match=r"^state_dict: got "):
        getattr(tiny_model(), method)(state_dict)


def test_a_state_dict_entry_that_is_no_tensor_or_has_no_values_is_named():
    with pytest.raises(TypeError, match=r"^state_dict: got ndarray for lm_head\.weight"):
        tiny_model().load_official_state_dict(weights() | {HEAD: weights()[HEAD].numpy()})
    with pytest.raises(ValueError, match=r"^state_dict: got lm_head\.weight on the meta device"):
        tiny_model().load_official_state_dict(weights() | {HEAD: weights()[HEAD].to("meta")})


def test_a_sparse_tensor_is_named_and_nothing_is_loaded():
    model, sparse = tiny_model(), {key: torch.zeros_like(x) for key, x in weights().items()}
    with pytest.raises(ValueError, match=r"^state_dict: got lm_head\.weight of layout torch\.sparse_coo"):
        model.load_official_state_dict(sparse | {HEAD: sparse[HEAD].to_sparse()})
    assert all(torch.equal(x, model.state_dict()[key]) for key, x in weights().items())


def test_a_model_without_memory_is_not_loaded_into():
    with pytest.raises(ValueError, match=r"^model: got parameters on the meta device"):
        tiny_model().to("meta").load_official_state_dict(weights())


@pytest.mark.parametrize(
    ("prefix", "by"),
    [("module.", "DistributedDataParallel"), ("_orig_mod.", r"torch\.compile"), ("base_model.model.", "PEFT")],
)
def test_a_wrappers_prefix_is_explained(prefix, by):
    with pytest.raises(ValueError, match=rf"missing: .*unexpected: {prefix}.*saved by {by}"):
        tiny_model().load_official_state_dict({prefix + key: x for key, x in weights().items()})


# ------------------------------------------------------------------------------------------ as transformers

QWEN2 = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"head_dim": 16},
        {"num_key_value_heads": None},
        {"rms_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_a_qwen2_that_transformers_saved_computes_the_same(changes, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(5)
    reference = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**QWEN2 | changes)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.3)
    reference.save_pretrained(tmp_path)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path)(ids).logits, reference(ids).logits, atol=1e-4, rtol=1e-4)
