"""Directories like a released one at small sizes: config.json, weights under all stored names, tokenizer's files.

The language model, the projector and the hybrid layers are a ``SlowFastForCausalLM``'s, whose names are the released
ones; the towers are the libraries' own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn

from slowfast_model import SlowFastConfig, SlowFastForCausalLM

DEPTHS = (3, 4, 30, 3)
DIMS = (4, 6, 8, 12)
TOWER = "model.vision_tower.vision_tower."
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = 256
VOCABULARY = BYTES + len(WORDS)  # of the tokenizer
CONFIG = {
    "model_type": "llava_qwen_slow_fast",
    "architectures": ["LlavaQwenSlowFastForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "bos_token_id": 256,
    "eos_token_id": 258,
    "mm_vision_tower": "convnext-64",
    "use_mm_proj": True,
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": DIMS[-1],
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_video_pooling_stride": 2,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "cross_attn_every_n_layers": 2,
    "cross_attn_min_layer_depth": 0,
    "cross_attn_max_layer_depth": 4,
    "cross_attn_implementation": "text-only-vanilla-flashattn",
    "cross_attn_gating_type": "whole-dynamic-tanh-warmup",
    "fast_token_spatial_stride": 1,
    "fast_token_temporal_stride": 2,
    "fast_token_temporal_sampling_stride": 1,
    "min_fast_frames": 2,
    "tile_image_input": False,
    "tokenizer_model_max_length": 32768,
    "tokenizer_padding_side": "right",
    "image_aspect_ratio": "pad",
}
SIGLIP = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 12, "num_attention_heads": 4}
CLIP = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 12, "num_attention_heads": 12}


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter matters, norms and layer scales too."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.normal_(std=1.2 * fan_in**-0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return module.eval()


def convnext() -> nn.Module:
    """timm's, with its head."""
    timm = pytest.importorskip("timm")
    return randomised(timm.create_model("convnext_xxlarge", depths=DEPTHS, dims=DIMS, num_classes=7))


def stored_convnext(model: nn.Module) -> dict[str, Tensor]:
    """Its state dict under the released names."""
    return {TOWER + key.replace("gamma", "weight"): value for key, value in model.state_dict().items()}


def stored_transformer(model: nn.Module) -> dict[str, Tensor]:
    """Of a SigLIP or CLIP vision model."""
    keys = {key: f"vision_model.{key.removeprefix('vision_model.')}" for key in model.state_dict()}
    return {TOWER + keys[key]: value for key, value in model.state_dict().items()}


def siglip(**sizes) -> nn.Module:
    settings = {"image_size": 64, "patch_size": 16} | SIGLIP | sizes
    return randomised(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**settings)))


def clip(**sizes) -> nn.Module:
    settings = {"image_size": 64, "patch_size": 16, "hidden_act": "quick_gelu"} | CLIP | sizes
    return randomised(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**settings)))


def language_weights(config: dict) -> dict[str, Tensor]:
    """Of all but the tower, with open gates."""
    model = SlowFastForCausalLM(SlowFastConfig.from_official(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.2 * parameter.shape[1] ** -0.5)
            elif "cross_attn" in name or "bias" in name:
                parameter.normal_()
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.state_dict()


def write_tokenizer(directory: Path, *extra: str) -> None:
    """Qwen2's tokenizer without a merge: a token for each byte, then the words of ChatML."""
    letters = sorted(ByteLevel.alphabet())
    (directory / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    added = {
        str(BYTES + i): {"content": word, "special": True, "normalized": False, "lstrip": False, "rstrip": False}
        for i, word in enumerate((*WORDS, *extra))
    }
    written = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    written |= {"bos_token": None, "added_tokens_decoder": added, "errors": "replace", "model_max_length": 32768}
    (directory / "tokenizer_config.json").write_text(json.dumps(written))


def write(directory: Path, tower: dict[str, Tensor], weights: dict[str, Tensor] | None = None, **changes) -> Path:
    """A directory in the type of the weights, with ``changes`` of CONFIG; a change to None leaves a key out."""
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    weights = language_weights(config) if weights is None else weights
    directory.mkdir(exist_ok=True)
    save_file({key: x.clone().contiguous() for key, x in (weights | tower).items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    return directory
