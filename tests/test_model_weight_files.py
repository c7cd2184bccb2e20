"""A file of a checkpoint that cannot be read, or is not there, is named with its cause."""

from __future__ import annotations

import json
import os

import pytest
import torch
from checkpoint_cases import load, save_file, weights, write, write_shards
from model_cases import TINY, one_thread, tiny_model  # noqa: F401

from slowfast_model.weight_files import read_shapes

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"
BROKEN = {
    "lfs": (LFS, "a git-lfs pointer"),
    "empty": (b"", "an empty file"),
    "page": (b"<!DOCTYPE html>", "a web page"),
}


@pytest.fixture
def directory(tmp_path):
    return write_shards(tmp_path)


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_something_else_is_named_with_its_cause(kind, name, tmp_path):
    content, cause = BROKEN[kind]
    write(tmp_path, weights())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"/{name}: got .*: {cause}"):
        load(tmp_path)


def test_shapes_are_read_from_the_heads_of_the_files(directory, tmp_path):
    want = {key: tuple(x.shape) for key, x in weights().items()}
    assert read_shapes(directory) == want
    (tmp_path / "one").mkdir()
    file = write(tmp_path / "one", weights()) / "model.safetensors"
    assert read_shapes(file) == want
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"/model\.safetensors: got .* is the download complete"):
        read_shapes(file)


@pytest.mark.parametrize("keep", [4, 100, 10_000, -100, -1])
def test_a_file_cut_off_is_named(keep, directory, tmp_path):
    file = directory / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"/model-00002-of-00002\.safetensors: got .* is the download complete"):
        load(directory)


@pytest.mark.parametrize("content", ["{", "not json", "[1]", "3", '"config"', "null", "\x80"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none_or_no_object_is_named(content, name, directory):
    (directory / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"/{name}: got "):
        load(directory)


@pytest.mark.parametrize(
    "weight_map", [None, [], "all", {"lm_head.weight": 3}, {"lm_head.weight": "../a.safetensors"}], ids=str
)
def test_an_index_without_a_map_of_files_beside_it_is_named(weight_map, directory):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"/model\.safetensors\.index\.json: got "):
        load(directory)


def test_a_shard_that_holds_a_key_of_another_is_named(directory):
    index = directory / "model.safetensors.index.json"
    promised = json.loads(index.read_text())
    promised["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(promised))
    with pytest.raises(ValueError, match=r"/model-0000.-of-00002\.safetensors: got .*lm_head\.weight"):
        load(directory)


def test_a_missing_shard_is_named_with_its_index(directory):
    (directory / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names model-00001-of-00002\.safetensors"):
        load(directory)


def test_of_a_directory_with_both_the_single_file_is_read(directory):
    """As transformers does."""
    state_dict = {key: x + 1 for key, x in weights().items()}
    save_file(state_dict, directory / "model.safetensors")
    assert torch.equal(load(directory).model.norm.weight, state_dict["model.norm.weight"])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("pytorch_model.bin", "pytorch_model.bin .convert it"),
        ("adapter_model.safetensors", "adapter_model.safetensors .convert it"),
        ("model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors .shards are read by their index"),
    ],
)
def test_what_a_directory_holds_instead_of_weights_is_said(other, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / other).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"with neither .*, but with {said}"):
        load(tmp_path)


def test_a_name_that_is_no_directory_is_not_downloaded():
    with pytest.raises(FileNotFoundError, match=r"got shi-labs/slowfast without config\.json.*nothing is downloaded"):
        load("shi-labs/slowfast")


@pytest.mark.parametrize("name", [None, 3, ["model"]], ids=repr)
@pytest.mark.parametrize("call", [load, lambda name: tiny_model().save_pretrained(name)], ids=["load", "save"])
def test_a_directory_that_is_no_name_is_refused(call, name):
    with pytest.raises(TypeError, match=r"^directory: got "):
        call(name)


def test_the_name_of_a_directory_may_be_bytes(tmp_path):
    tiny_model().save_pretrained(os.fsencode(tmp_path))
    loaded = load(os.fsencode(tmp_path)).state_dict()
    assert all(torch.equal(loaded[key], x) for key, x in weights().items())


def test_a_file_in_a_directorys_place_is_named(tmp_path):
    write(tmp_path, weights())
    with pytest.raises(NotADirectoryError, match=r"directory: got .*model\.safetensors, which is a file"):
        load(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: got rope type 'yarn'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: got "),
        ({"hidden_size": "32"}, "hidden_size: got str '32'"),
        ({"hidden_size": 64}, "state_dict: got .* keys of another shape"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named_with_its_path(config, named, tmp_path):
    write(tmp_path, weights(), **config)
    with pytest.raises((TypeError, ValueError), match=rf"{tmp_path}.*: {named}"):
        load(tmp_path)
