"""Tiny random language models of each family that the plug-in is tested under, and what the tests make of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from slowfast_model.hf import SlowFastVLForConditionalGeneration, add_slow_fast

VIDEO, PAD, VOCABULARY, WIDTH = 99, 0, 100, 12  # ids; vocabulary; channels of vision features
HYBRID = (0, 2)
GRID = 16  # vision tokens of a frame, 4 x 4
STRIDES = {"mm_video_pooling_stride": 2, "fast_token_temporal_stride": 4}

_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_TOKENS = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None, "max_position_embeddings": 256}
SMALL = _SIZES | _HEADS | _TOKENS

# (configuration class, its settings)
FAMILIES = {
    "qwen2": ("Qwen2Config", SMALL),
    "qwen2.5": ("Qwen2Config", SMALL | {"tie_word_embeddings": True, "num_key_value_heads": 1, "rope_theta": 1e6}),
    "qwen3": ("Qwen3Config", SMALL | {"head_dim": 24}),
    "llama": ("LlamaConfig", SMALL),
    "smollm2": (
        "LlamaConfig",
        SMALL | {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralConfig", SMALL | {"sliding_window": 6, "head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        SMALL
        | {"head_dim": 32, "query_pre_attn_scalar": 40, "sliding_window": 6}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        SMALL | {"head_dim": 32, "query_pre_attn_scalar": 40, "sliding_window": 6, "sliding_window_pattern": 2},
    ),
}


def language_model(family: str = "qwen2", **settings) -> nn.Module:
    """Of random weights that all matter: biases and norms too."""
    kind, sizes = FAMILIES[family]
    config = getattr(transformers, kind)(**sizes | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if family == "gemma2":  # whose soft-cap no other attention applies
        model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "_proj" in name:
                parameter.normal_(std=1.2 * parameter.shape[1] ** -0.5)
    return model


def open_gates(model: SlowFastVLForConditionalGeneration, seed: int = 7) -> SlowFastVLForConditionalGeneration:
    """Gates, projections and projector that make the slow path matter, the same for every model of a shape."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        added = [(n, p) for n, p in model.named_parameters() if "cross_attn_" in n or "mm_projector" in n]
        for name, parameter in added:
            scale = 2.4 * parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(noise + (1.0 if "warm_up" in name else 0.0))
    return model


def close_gates(model: SlowFastVLForConditionalGeneration) -> None:
    with torch.no_grad():
        for attention in model.hybrid_attentions():
            attention.cross_attn_warm_up_gate.zero_()


def word_tokenizer(vocabulary: Mapping[str, int], special: Sequence[str], **options) -> PreTrainedTokenizerFast:
    """Of words with a space between them; "<pad>" stands for others."""
    inner = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **options)
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def slow_fast_model(family: str = "qwen2", lm: nn.Module | None = None, **keys) -> SlowFastVLForConditionalGeneration:
    """A language model with slow-fast layers whose gates are open."""
    lm = language_model(family) if lm is None else lm
    keys = {"hybrid_layers": HYBRID, "video_token_id": VIDEO} | STRIDES | keys
    return open_gates(add_slow_fast(lm, WIDTH, **keys))


def video(frames: int = 8, tokens: int = GRID) -> Tensor:
    """Features [T, H*W, mm_hidden]."""
    return torch.randn(frames, tokens, WIDTH)


def prompt(model, *parts: int | Tensor) -> list[int]:
    """Ids: a number n stands for n random text tokens, features for their placeholders."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(3, VIDEO - 1, (part,)).tolist()
        else:
            ids += [VIDEO] * model.config.num_fast_tokens(part.shape[0], part.shape[1])
    return ids


def batch(rows: Sequence[Sequence[int]], side: str = "left") -> dict[str, Tensor]:
    """input_ids and attention_mask, padded on a side."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares nothing."""
    return copy.deepcopy(model)


def close(got: Tensor, want: Tensor, tolerance: float = 2e-5) -> None:
    got, want = got.detach(), want.detach()
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))
