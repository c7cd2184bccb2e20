"""What save_pretrained writes is what from_pretrained reads, bit for bit; an older save leaves nothing behind."""

from __future__ import annotations

import json
import os

import pytest
import torch
from model_cases import VIDEO, features, one_thread, tiny_model  # noqa: F401
from torch import nn

from slowfast_model import SlowFastConfig, SlowFastForCausalLM
from slowfast_model.weight_files import shard_bytes

safetensors = pytest.importorskip("safetensors")
PLAIN = {"cross_attn_every_n_layers": 0, "mm_hidden_size": None}
PROMPT = torch.tensor([[1, VIDEO, 2, 3]])


def load(directory, **options):
    return SlowFastForCausalLM.from_pretrained(directory, backend="eager", **options)


def assert_same(loaded, model):
    assert loaded.config == model.config
    expected = model.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    for key, value in loaded.state_dict().items():
        assert value.dtype == expected[key].dtype, key
        assert torch.equal(value, expected[key]), key


def keys_of(path):
    with safetensors.safe_open(path, "pt") as file:
        return set(file.keys())


def files(directory):
    return sorted(file.name for file in directory.iterdir())


# ------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize(
    "changes", [{}, PLAIN, {"tie_word_embeddings": True}, {"cross_attn_every_n_layers": 0}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_saved_model_loads_bit_for_bit(changes, dtype, tmp_path):
    model = tiny_model(**changes).to(dtype)
    model.save_pretrained(tmp_path)
    assert files(tmp_path) == ["config.json", "model.safetensors"]
    assert_same(load(tmp_path), model)


@torch.no_grad()
def test_the_loaded_model_computes_the_same_bits(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    videos = features((4, 4))
    assert torch.equal(load(tmp_path)(PROMPT, videos).logits, model(PROMPT, videos).logits)


def test_the_directory_is_made_and_may_be_a_string(tmp_path):
    model = tiny_model()
    assert model.save_pretrained(str(tmp_path / "deep" / "er")) is None
    assert_same(load(tmp_path / "deep" / "er"), model)


@pytest.mark.parametrize("size", ["5GB", 20_000])
def test_whoever_may_read_the_configuration_may_read_the_weights(size, tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size=size)
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_gates_and_norms_kept_in_float32_beside_bfloat16_are_loaded_so(tmp_path):
    model = tiny_model().bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name or "gate_proj.0" in name or "warm_up" in name:
            parameter.data = parameter.data.float() + 1e-4
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same(loaded, model)
    assert loaded.generate(PROMPT, [features((4, 4))[0].bfloat16()], max_new_tokens=3).shape == (1, 3)


def test_the_configuration_has_the_official_keys(tmp_path):
    model = tiny_model().bfloat16()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llava_qwen_slow_fast"
    assert config["architectures"] == ["LlavaQwenSlowFastForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    assert config["cross_attn_every_n_layers"] == 2
    assert SlowFastConfig.from_official(config) == model.config


def test_tensors_that_share_memory_or_have_gaps_are_saved_by_value(tmp_path):
    model = tiny_model()
    layers = model.model.layers
    with torch.no_grad():
        layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight  # one tensor under two names
        both = torch.randn(2, 48, 32)
        for i in (0, 1):
            layers[i].mlp.gate_proj.weight = nn.Parameter(both[i])  # two halves of one
        layers[0].self_attn.q_proj.weight = nn.Parameter(torch.randn(32, 64).t()[::2])
        layers[0].self_attn.k_proj.bias = nn.Parameter(torch.zeros(1).expand(16))
    model.save_pretrained(tmp_path)
    assert_same(load(tmp_path), model)


def test_a_compiled_layer_is_saved_under_its_own_name(tmp_path):
    model = tiny_model()
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    model.save_pretrained(tmp_path)
    assert keys_of(tmp_path / "model.safetensors") == set(expected)
    assert all(torch.equal(value, expected[key]) for key, value in load(tmp_path).state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_without_hybrid_layers_transformers_loads_it(tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny_model(**PLAIN, tie_word_embeddings=tied, rope_theta=5e5, rms_norm_eps=1e-5, head_dim=16)
    model.save_pretrained(tmp_path)
    reference, info = transformers.Qwen2ForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert transformers.AutoConfig.from_pretrained(tmp_path).model_type == "qwen2"
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference.eval()(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_tied_weight_is_written_once(tmp_path):
    tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    keys = keys_of(tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" in keys
    assert "lm_head.weight" not in keys
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


# ------------------------------------------------------------------------------------------ shards


@pytest.mark.parametrize("size", [20_000, "20KB", "20 kb", "0.02MB", "20KiB"])
@pytest.mark.parametrize("tied", [False, True])
def test_shards_are_no_larger_than_asked_and_load_together(size, tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=size)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert files(tmp_path) == ["config.json", *shards, "model.safetensors.index.json"]
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    total = 0
    for shard in shards:
        with safetensors.safe_open(tmp_path / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            sizes = [file.get_tensor(key).nbytes for key in file.keys()]  # noqa: SIM118
            assert {key for key, name in index["weight_map"].items() if name == shard} == set(file.keys())
        assert sum(sizes) <= 20_480
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total
    assert_same(load(tmp_path), model)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=1)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == len(model.state_dict())
    assert_same(load(tmp_path), model)


def test_the_single_file_says_that_it_is_pytorchs(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("size", "expected"),
    [("5GB", 5 * 10**9), ("200MB", 2 * 10**8), ("1GiB", 2**30), ("1.5KB", 1500), ("7B", 7), ("7", 7), (7, 7)],
)
def test_a_size_is_in_bytes_or_by_its_unit(size, expected):
    assert shard_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "5 apples", "-5GB", "0GB", "5Gbit", 0, -1, 5e9, True, None, float("nan")])
def test_a_size_that_is_none_is_refused_and_nothing_is_written(size, tmp_path):
    with pytest.raises((TypeError, ValueError), match=r"^max_shard_size: got "):
        tiny_model().save_pretrained(tmp_path / "model", max_shard_size=size)
    assert not (tmp_path / "model").exists()


# ------------------------------------------------------------------------------------------ saving again


@pytest.mark.parametrize("before", ["5GB", 20_000, 50_000, 1])
@pytest.mark.parametrize("after", ["5GB", 30_000])
def test_a_second_save_leaves_nothing_of_the_first(before, after, tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size=before)
    model = tiny_model(num_hidden_layers=2)
    (tmp_path / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path, max_shard_size=after)
    model.save_pretrained(tmp_path.parent / "fresh", max_shard_size=after)
    assert files(tmp_path) == sorted([*files(tmp_path.parent / "fresh"), "tokenizer.json"])
    assert_same(load(tmp_path), model)


def test_a_loaded_model_is_saved_over_the_files_that_it_came_from(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size=20_000)
    loaded = load(tmp_path)
    with torch.no_grad():
        loaded.model.norm.weight.add_(1)
    expected = {key: value.clone() for key, value in loaded.state_dict().items()}
    loaded.save_pretrained(tmp_path, max_shard_size=30_000)
    assert all(torch.equal(value, expected[key]) for key, value in load(tmp_path).state_dict().items())
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


def test_a_save_that_fails_leaves_the_older_one_whole(tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    before = files(tmp_path)
    calls = []

    def full_disk(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("No space left on device")
        return save_file(*args, **kwargs)

    save_file = safetensors.torch.save_file
    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tiny_model(num_hidden_layers=2).save_pretrained(tmp_path, max_shard_size=30_000)
    assert files(tmp_path) == before
    assert_same(load(tmp_path), model)


@pytest.mark.parametrize("moves", range(1, 6))
def test_a_save_cut_off_among_its_files_is_no_checkpoint_rather_than_a_mixture(moves, tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path, max_shard_size=60_000)
    replace, done = os.replace, []

    def cut(*args):
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(args)
        replace(*args)

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        tiny_model(rope_theta=5e5).save_pretrained(tmp_path, max_shard_size=40_000)
    with pytest.raises(FileNotFoundError, match="neither"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------ refused


def test_a_file_in_the_directorys_place_is_named(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(NotADirectoryError, match=r"directory: got .*model, which is a file"):
        tiny_model().save_pretrained(tmp_path / "model")


def offloaded(model):
    model.model.layers[1].to("meta")


def quantised(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)


def adapted(model):
    model.model.layers[0].self_attn.lora_A = nn.Linear(32, 2)


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.q_proj)


def resized(model):
    model.lm_head = nn.Linear(32, 70, bias=False)


class Sharded(torch.Tensor):
    """Stands for a tensor whose values are elsewhere, or not its own."""


def sharded(model):
    model.model.norm.weight = nn.Parameter(model.model.norm.weight.data.as_subclass(Sharded))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (offloaded, "model.layers.1.*on the meta device"),
        (quantised, "lm_head.weight as Tensor of torch.int8"),
        (adapted, r"unexpected: model.layers.0.self_attn.lora_A.*merge adapters"),
        (parametrised, r"missing: model.layers.0.self_attn.q_proj.weight"),
        (resized, r"lm_head.weight \[70, 32\] \(want \[61, 32\]\)"),
        (sharded, "model.norm.weight as Sharded"),
    ],
)
def test_weights_that_cannot_be_read_back_are_named_and_nothing_is_written(change, named, tmp_path):
    model = tiny_model()
    change(model)
    with pytest.raises(ValueError, match=f"^model: got .*{named}"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_tie_that_was_broken_is_refused(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    with pytest.raises(ValueError, match=r"lm_head\.weight other than model\.embed_tokens\.weight"):
        model.save_pretrained(tmp_path)
