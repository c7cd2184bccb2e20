"""transformers' own ModelTesterMixin and ConfigTester, from the source distribution of the version under test.

``make test-hf`` fetches it and names the unpacked folder in SLOWFAST_TRANSFORMERS_SOURCE. It ships these two without
the packages beside them, of which they take one class each: empty ones stand in.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import types
import unittest
from pathlib import Path

import pytest
import torch
from families import FAMILIES, VOCABULARY, WIDTH

from slowfast_model.hf import SlowFastVLConfig, SlowFastVLForConditionalGeneration

SOURCE = os.environ.get("SLOWFAST_TRANSFORMERS_SOURCE")
if not SOURCE:
    pytest.skip("SLOWFAST_TRANSFORMERS_SOURCE names no source of transformers", allow_module_level=True)

ABSENT = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {"return_dict": False, "output_hidden_states": True}},
}


def their(module: str) -> types.ModuleType:
    """A module of transformers' folder of tests."""
    name, folder = "transformers_tests", Path(SOURCE) / "tests"
    if name not in sys.modules:
        (folder / "__init__.py").touch()
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
        for path, contents in ABSENT.items():
            parent, _ = path.split(".")
            for part in (parent, path):
                sys.modules[f"{name}.{part}"] = types.ModuleType(f"{name}.{part}")
            vars(sys.modules[f"{name}.{path}"]).update(contents)
    return importlib.import_module(f"{name}.{module}")


modeling, configuration = their("test_modeling_common"), their("test_configuration_common")
GenerationTesterMixin = ABSENT["generation.test_utils"]["GenerationTesterMixin"]


MARKER = VOCABULARY // 2  # neither among the ids that the mixin draws nor beyond those that it cuts off


class Tester:
    __test__ = False

    """What the mixin asks of a model's tests."""

    batch_size, seq_length, is_training = 7, 15, True  # the mixin pads smaller batches with other ids
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 64, 2, 4, VOCABULARY

    def __init__(self, parent):
        self.parent = parent

    def get_config(self) -> SlowFastVLConfig:
        sizes = FAMILIES["qwen2"][1] | {"model_type": "qwen2", "num_hidden_layers": self.num_hidden_layers}
        return SlowFastVLConfig(
            text_config=sizes,
            mm_hidden_size=WIDTH,
            hybrid_layers=(0,),
            video_token_id=MARKER,
            mm_video_pooling_stride=2,
            fast_token_temporal_stride=2,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        device = modeling.torch_device
        ids = torch.randint(5, MARKER, (self.batch_size, self.seq_length), device=device)
        features = torch.randn(self.batch_size, 4, 16, WIDTH, device=device)
        ids[:, 2 : 2 + config.num_fast_tokens(4, 16)] = MARKER
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "video_features": features}
        return config, inputs


class SlowFastVLTest(modeling.ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (SlowFastVLForConditionalGeneration,)
    additional_model_inputs = ("video_features",)
    test_pruning = test_head_masking = test_torchscript = False  # 4.57's, which its newer models lack too
    _is_composite = True

    def setUp(self):
        self.model_tester = Tester(self)
        settings = {"mm_hidden_size": WIDTH, "hybrid_layers": [0, 2], "video_token_id": MARKER}
        self.config_tester = configuration.ConfigTester(
            self, config_class=SlowFastVLConfig, has_text_modality=False, **settings
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        return inputs | {"labels": inputs["input_ids"]} if return_labels else inputs

    def test_sdpa_can_dispatch_composite_models(self):
        """As the mixin's, which any model without a tower that attends has to overwrite."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for chosen, attention in ((None, "sdpa"), ("eager", "eager")):
            with tempfile.TemporaryDirectory() as folder:
                SlowFastVLForConditionalGeneration(config).save_pretrained(folder)
                options = {} if chosen is None else {"attn_implementation": chosen}
                model = SlowFastVLForConditionalGeneration.from_pretrained(folder, **options)
            for module in (model, model.language_model, *model.hybrid_attentions()):
                assert module.config._attn_implementation == attention

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip("the language model is whole: there is no base model of its own")
    def test_correct_missing_keys(self):
        pass

    @unittest.skip("it counts the warnings of the deprecated name, which this model takes as well")
    def test_bc_cache_name_forward(self):
        pass
