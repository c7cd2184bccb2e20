"""Llama-3.2-Vision's text cross-attention: transformers' own (SDPA under a dense mask) against ours, on one model.

Prefill and a compiled decode step over static caches, in turns, of a model of the 11B shape with random weights (a CPU:
a tiny one). The vision encoder takes no part: its result is given. Answers are held to transformers' own, by a pass
without a cache.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from .hf import Prompted, Side, measure, sharing_weights, why_absent
from .mllama_shapes import MllamaShape, mllama_cost
from .model import created_on
from .runner import Runner
from .selection import mllama_shapes
from .shapes import language_model_keys

BASE = "sdpa"


def make_model(shape: MllamaShape, dtype: str, device: torch.device):
    """An MllamaForConditionalGeneration made on the device; its vision encoder is a token one, of the right grid."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text = {
        **language_model_keys(shape),
        "cross_attention_layers": list(shape.cross_layers),
        "rope_scaling": {"rope_type": "default"},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    vision = {
        "image_size": shape.image_size,
        "patch_size": shape.patch,
        "max_num_tiles": shape.tiles,
        "hidden_size": 16,
        "intermediate_size": 16,
        "attention_heads": 2,
        "num_hidden_layers": 1,
        "num_global_layers": 1,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 32,
        "supported_aspect_ratios": [[1, tiles + 1] for tiles in range(shape.tiles)],
    }
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=shape.vocab)
    torch.manual_seed(0)
    with created_on(device, dtype):
        model = MllamaForConditionalGeneration._from_config(config, dtype=getattr(torch, dtype)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate")):
            parameter.fill_(0.5)  # closed, the images would not matter
    return model


def run(runner: Runner) -> None:
    reason = why_absent() or _why_no_static_cache()
    if reason is not None:
        runner.absent("mllama-prefill", "slowfast", reason, kind="ours")
        return
    dtype, shapes = runner.dtypes[0], mllama_shapes(runner.shapes, not runner.is_gpu)
    if not shapes:
        return
    model = make_model(shapes[0], dtype, runner.device)
    for shape in shapes:
        facts = {"vision_tokens": shape.num_vision}
        measure(runner, "mllama", shape.name, dtype, sides_of(model, shape, dtype), BASE, facts)


def _why_no_static_cache() -> str | None:
    from transformers import MllamaForConditionalGeneration, __version__

    if "_prepare_static_cache" in vars(MllamaForConditionalGeneration):
        return None
    return f"transformers {__version__} has no static cache of mllama's cross-attention"


def sides_of(model: nn.Module, shape: MllamaShape, dtype: str) -> list[Side]:
    """Ours and transformers' own, on one set of weights; every row of text sees all images."""
    from slowfast_model.hf import accelerate_cross_attention

    device = model.device
    ids = torch.randint(2, shape.vocab, (1, shape.text), device=device)
    states = torch.randn(1, shape.num_vision, shape.hidden, device=device, dtype=model.dtype)
    seen = torch.ones(1, shape.text, shape.images, shape.tiles, dtype=torch.long, device=device)

    def make_cache(length: int):
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        cache = StaticCache(config=model.config.text_config, max_cache_len=length)
        for index in shape.cross_layers:
            cache.layers[index] = StaticLayer(max_cache_len=shape.num_vision)
        return cache

    def reference(of: Tensor) -> Tensor:
        mask = seen[:, :1].expand(-1, of.shape[1], -1, -1)
        inputs = {"cross_attention_states": states, "cross_attention_mask": mask}
        return model(of, use_cache=False, logits_to_keep=1, **inputs).logits[:, -1]

    def prompted(ours: bool) -> Prompted:
        which = accelerate_cross_attention(sharing_weights(model)) if ours else model
        inputs = {"cross_attention_states": states, "cross_attention_mask": seen}
        step_inputs = {"cross_attention_mask": seen[:, :1].clone()}
        return Prompted(which.forward, ids, make_cache, reference, inputs, step_inputs)

    costs = {decode: mllama_cost(shape, dtype, decode) for decode in (False, True)}
    return [
        Side("slowfast", "ours", partial(prompted, True), costs),
        Side(BASE, "base", partial(prompted, False), costs),
    ]
