"""Checkpoints load by their own key names, strictly, from one file or from shards; K and V start from the LM's."""

from __future__ import annotations

import json

import pytest
import torch
from model_cases import TINY, VIDEO, features, one_thread, tiny_model  # noqa: F401

from slowfast_model import SlowFastForCausalLM
from slowfast_model.checkpoint import interleave_kv, read_safetensors

save_file = pytest.importorskip("safetensors.torch").save_file
PROMPT = torch.tensor([[1, VIDEO, 2, 3]])


def weights(**changes):
    return {key: x.clone() for key, x in tiny_model(**changes).state_dict().items()}


def logits(model):
    with torch.no_grad():
        return model(PROMPT, features((4, 4))).logits


@pytest.fixture
def directory(tmp_path):
    """A released checkpoint in two shards."""
    state_dict = weights()
    keys = sorted(state_dict)
    shards = {f"model-0000{i}-of-00002.safetensors": keys[i - 1 :: 2] for i in (1, 2)}
    for name, members in shards.items():
        save_file({key: state_dict[key] for key in members}, tmp_path / name)
    weight_map = {key: name for name, members in shards.items() for key in members}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"model_type": "llava_qwen_slow_fast"}))
    return tmp_path


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
    save_file(weights(), tmp_path / "model.safetensors")
    assert set(read_safetensors(tmp_path)) == set(weights())
    assert set(read_safetensors(tmp_path / "model.safetensors")) == set(weights())


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
    tiny_model().load_official_state_dict(state_dict)


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
