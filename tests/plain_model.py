"""The whole model for one prompt, in float64, from the official keys of a config.json and a state dict.

Written apart from the package, as ``reference.py`` is: what each variant computes is said here and nowhere shared. Each
line is a line of arXiv 2504.01328 (section 3.2) or of the released code.
"""

from __future__ import annotations

import re

import reference
import torch
import torch.nn.functional as F
from torch import Tensor

VIDEO = -200

# How a text row's gate follows from the projection of its attention output, and whether a warm-up factor multiplies it.
GATINGS = {
    "whole-dynamic": (lambda projected: projected, False),
    "whole-dynamic-tanh": (torch.tanh, False),
    "whole-dynamic-warmup": (lambda projected: projected, True),
    "whole-dynamic-tanh-warmup": (torch.tanh, True),
}
TEXT, TEXT_AFTER_VIDEO, ALL = "text rows", "text rows after the first visual token", "all rows"
# Which rows attend the slow tokens, and what becomes of the warm-up parameter.
IMPLEMENTATIONS = {
    "text-only-vanilla": (TEXT, torch.tanh),
    "text-only-vanilla-flashattn": (TEXT, torch.tanh),
    "text-only-vanilla-masksystem": (TEXT_AFTER_VIDEO, torch.tanh),
    "text-only-vanilla-masksystem-flashattn": (TEXT_AFTER_VIDEO, torch.tanh),
    "text-only-vanilla-flashattn-masksystem": (TEXT_AFTER_VIDEO, torch.tanh),
    "vanilla": (ALL, lambda warm_up: warm_up),
    "vanilla-flashattn": (ALL, lambda warm_up: warm_up),
}


class PlainModel:
    """``config``: official keys, none left out; ``weights``: the state dict under the official names."""

    def __init__(self, config: dict, weights: dict[str, Tensor]) -> None:
        self.config, self.weights = config, {key: x.detach().double() for key, x in weights.items()}
        self.eps, self.heads = config["rms_norm_eps"], config["num_attention_heads"]
        self.head_dim = config["hidden_size"] // self.heads

    def linear(self, name: str, x: Tensor) -> Tensor:
        bias = self.weights.get(f"{name}.bias", x.new_zeros(()))
        return x @ self.weights[f"{name}.weight"].T + bias

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weights[f"{name}.weight"]

    def project(self, features: Tensor) -> Tensor:
        kind = self.config["mm_projector_type"]
        if kind == "identity":
            return features
        if kind == "linear":
            return self.linear("model.mm_projector", features)
        for i in range(int(re.search(r"\d+", kind)[0])):
            features = self.linear(f"model.mm_projector.{2 * i}", features if i == 0 else F.gelu(features))
        return features

    def pooled(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Slow and fast tokens of one video."""
        config, side = self.config, round(features.shape[1] ** 0.5)
        slow, _, fast, _ = reference.pool(
            self.project(features.double()),
            [len(features)],
            (side, side),
            pool_stride=config["mm_video_pooling_stride"],
            sampling_stride=config["fast_token_temporal_sampling_stride"],
            temporal_stride=config["fast_token_temporal_stride"],
            spatial_stride=config["fast_token_spatial_stride"],
            min_fast_frames=config["min_fast_frames"],
        )
        return slow, fast

    def rotated(self, x: Tensor) -> Tensor:
        """x [L, H, D] at positions 0, 1, ...: pairs (i, i + D / 2) turn by position * theta^(-2 i / D)."""
        half = self.head_dim // 2
        turns = self.config["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(len(x), dtype=torch.float64)[:, None, None] * turns
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
        """q [L, Hq, D], k, v [N, Hkv, D] -> [L, Hq * D]; row i sees the first sees[i] of the N."""
        k, v = (x.repeat_interleave(self.heads // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.head_dim**-0.5
        scores = scores.masked_fill(torch.arange(len(k)) >= sees[:, None], -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)

    def slow_path(self, at: str, a: Tensor, q: Tensor, slow: Tensor, rows: Tensor, sees: Tensor) -> Tensor:
        """What a hybrid layer makes of its attention output ``a`` [L, C]."""
        activate, has_warm_up = GATINGS[self.config["cross_attn_gating_type"]]
        kv = self.linear(f"{at}.self_attn.cross_attn_kv_proj", self.norm(f"{at}.input_layernorm", slow))
        k, v = kv.unflatten(1, (-1, 2, self.head_dim)).unbind(2)
        gate = activate(self.linear(f"{at}.self_attn.cross_attn_gate_proj.0", a))
        if has_warm_up:
            factor = IMPLEMENTATIONS[self.config["cross_attn_implementation"]][1]
            gate = gate * factor(self.weights[f"{at}.self_attn.cross_attn_warm_up_gate"])
        return torch.where((rows & (sees > 0))[:, None], a + gate * self.attend(q, k, v, sees), a)

    def attending(self, is_visual: Tensor) -> Tensor:
        """[L] bool."""
        who = IMPLEMENTATIONS[self.config["cross_attn_implementation"]][0]
        has_video_before = torch.tensor([bool(is_visual[:i].any()) for i in range(len(is_visual))])
        return {
            TEXT: ~is_visual,
            TEXT_AFTER_VIDEO: ~is_visual & has_video_before,
            ALL: torch.ones_like(is_visual),
        }[who]

    def logits(self, prompt: list[int], features: list[Tensor]) -> Tensor:
        """[L', V] of one prompt, in which -200 stands for a video."""
        videos, x, is_visual, slow, sees, count = iter(features), [], [], [], [], 0
        for token in prompt:
            if token == VIDEO:
                tokens, fast = self.pooled(next(videos))
                slow.append(tokens)
                x.append(fast)
            else:
                x.append(self.weights["model.embed_tokens.weight"][token][None])
            is_visual += [token == VIDEO] * len(x[-1])
            sees += [count] * len(x[-1])  # slow tokens of the videos before it
            if token == VIDEO:
                count += len(slow[-1])
                sees[-1] = count  # the last fast token: its own video's too
        x, rows, sees = torch.cat(x), self.attending(torch.tensor(is_visual)), torch.tensor(sees)
        if not self.config["causal_slow_tokens"]:
            sees = torch.full_like(sees, count)
        every, first = self.config["cross_attn_every_n_layers"], self.config["cross_attn_min_layer_depth"] or 0
        stop = self.config["cross_attn_max_layer_depth"] or self.config["num_hidden_layers"]
        for i in range(self.config["num_hidden_layers"]):
            at = f"model.layers.{i}"
            h = self.norm(f"{at}.input_layernorm", x)
            q, k, v = (
                self.linear(f"{at}.self_attn.{name}_proj", h).unflatten(1, (-1, self.head_dim)) for name in "qkv"
            )
            q, k = self.rotated(q), self.rotated(k)
            a = self.attend(q, k, v, torch.arange(len(x)) + 1)
            if slow and every and first <= i < stop and (i - first) % every == 0:
                a = self.slow_path(at, a, q, torch.cat(slow), rows, sees)
            x = x + self.linear(f"{at}.self_attn.o_proj", a)
            h = self.norm(f"{at}.post_attention_layernorm", x)
            h = F.silu(self.linear(f"{at}.mlp.gate_proj", h)) * self.linear(f"{at}.mlp.up_proj", h)
            x = x + self.linear(f"{at}.mlp.down_proj", h)
        return self.linear("lm_head", self.norm("model.norm", x))
