"""What a caller has set for the whole process does not reach in: every tensor that the plug-in makes names its device.

transformers is not held to that, so that the default device itself cannot be another one here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import test_mllama
import torch
from families import FAMILIES, SMALL, batch, prompt, slow_fast_model, video
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from transformers import AutoModelForCausalLM, Qwen2Config

import slowfast_kernels
import slowfast_model
from slowfast_model import PatchTower
from slowfast_model.hf import add_slow_fast

OURS = tuple(str(Path(package.__file__).parent) for package in (slowfast_kernels, slowfast_model))


class DeviceNamed(TorchFunctionMode):
    """A call of ours that leaves the device to the default fails. Modules are made where the caller says."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _device_constructors() and (kwargs or {}).get("device") is None:
            frame = sys._getframe(1)
            assert not frame.f_code.co_filename.startswith(OURS), f"{func.__name__} at line {frame.f_lineno}"
        return func(*args, **(kwargs or {}))


def test_the_mode_sees_a_device_that_is_left_out():
    source = compile("torch.zeros(2)", str(Path(OURS[1]) / "made_up.py"), "eval")
    with DeviceNamed(), pytest.raises(AssertionError, match="zeros at line 1"):
        eval(source, {"torch": torch})


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_training_and_generation_name_the_device(family):
    model, features = slow_fast_model(family), video()
    inputs = batch([prompt(model, 3, features, 4), prompt(model, 5, 6)])
    with DeviceNamed():
        out = model(**inputs, video_features=[features], labels=inputs["input_ids"])
        out.loss.backward()
        for cache in (None, "static"):
            model.generate(**inputs, video_features=[features], max_new_tokens=3, cache_implementation=cache)


def test_slow_fast_layers_may_be_added_to_a_model_without_memory():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**SMALL))
    assert add_slow_fast(model, 12, (0, 2), video_token_id=99).device.type == "meta"


def test_slow_fast_layers_are_added_where_the_model_is_whatever_device_is_the_default():
    model, tower = AutoModelForCausalLM.from_config(Qwen2Config(**SMALL)), PatchTower(12, grid=4)
    with torch.device("meta"):
        model = add_slow_fast(model, 12, (0, 2), vision_tower=tower, video_token_id=99)
    assert {x.device.type for x in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("prompts", test_mllama.PROMPTS.values(), ids=test_mllama.PROMPTS)
def test_mllamas_layers_name_the_device(prompts):
    inputs = test_mllama.inputs_of(prompts)
    model = slowfast_model.hf.accelerate_cross_attention(test_mllama.tiny_model())
    with DeviceNamed():
        model(**inputs)
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        row = {name: inputs[name][:, :1] for name in ("input_ids", "attention_mask")}
        model(**row, **images_of(inputs))


def images_of(inputs):
    """Without a mask over them: a single row then sees all."""
    return {name: inputs[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
