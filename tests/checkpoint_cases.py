"""Checkpoints on disk that the tests of loading share: the tiny model's, in one file and in two shards."""

from __future__ import annotations

import json

import pytest
from model_cases import TINY, tiny_model

from slowfast_model import SlowFastForCausalLM

save_file = pytest.importorskip("safetensors.torch").save_file


def weights(**changes):
    return {key: x.clone() for key, x in tiny_model(**changes).state_dict().items()}


def write(directory, state_dict, **config):
    save_file({key: value.clone().contiguous() for key, value in state_dict.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(TINY | config))
    return directory


def load(directory, **options):
    return SlowFastForCausalLM.from_pretrained(directory, **{"backend": "eager"} | options)


def write_shards(directory):
    """A released checkpoint in two shards."""
    state_dict = weights()
    keys = sorted(state_dict)
    shards = {f"model-0000{i}-of-00002.safetensors": keys[i - 1 :: 2] for i in (1, 2)}
    for name, members in shards.items():
        save_file({key: state_dict[key] for key in members}, directory / name)
    weight_map = {key: name for name, members in shards.items() for key in members}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(TINY | {"model_type": "llava_qwen_slow_fast"}))
    return directory
