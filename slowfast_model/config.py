"""Configuration: the keys of the released config.json, checked once, with the rules that follow from them.

A plain Qwen2 config.json is accepted too: without ``cross_attn_every_n_layers`` there are no hybrid layers, without
``mm_hidden_size`` no projector.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

GATING_TYPES = ("whole-dynamic", "whole-dynamic-tanh", "whole-dynamic-warmup", "whole-dynamic-tanh-warmup")
IMPLEMENTATIONS = (
    "text-only-vanilla",
    "text-only-vanilla-flashattn",
    "text-only-vanilla-masksystem",
    "text-only-vanilla-masksystem-flashattn",
    "text-only-vanilla-flashattn-masksystem",
    "vanilla",
    "vanilla-flashattn",
)


@dataclass
class SlowFastConfig:
    """Shapes and variants of the model; every field but ``head_dim`` has the name of its official key.

    Raises:
        ValueError: a gating type, implementation or projector that does not exist, or numbers that do not fit together.
    """

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    head_dim: int | None = None  # default: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    # projector: None means that there is none
    mm_hidden_size: int | None = None
    mm_projector_type: str = "linear"
    # hybrid layers: 0 means that there are none
    cross_attn_every_n_layers: int = 0
    cross_attn_min_layer_depth: int | None = None
    cross_attn_max_layer_depth: int | None = None
    cross_attn_gating_type: str = "whole-dynamic-tanh-warmup"
    cross_attn_implementation: str = "text-only-vanilla-flashattn"
    # slow and fast tokens
    mm_video_pooling_stride: int = 1
    fast_token_spatial_stride: int = 1
    fast_token_temporal_stride: int = 1
    fast_token_temporal_sampling_stride: int = 1
    min_fast_frames: int = 1

    def __post_init__(self) -> None:
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size: got {self.hidden_size}, want a multiple of num_attention_heads "
                    f"({self.num_attention_heads}), or head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}, want an even number (rotary embedding)")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: got {self.num_attention_heads}, want a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.cross_attn_every_n_layers < 0:
            raise ValueError(
                f"cross_attn_every_n_layers: got {self.cross_attn_every_n_layers}, want >= 0 (0: no hybrid layer)"
            )
        for name, known in (("cross_attn_gating_type", GATING_TYPES), ("cross_attn_implementation", IMPLEMENTATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, want one of {', '.join(known)}")
        if self.mm_projector_type not in ("linear", "identity") and not self.projector_depth:
            raise ValueError(f"mm_projector_type: got {self.mm_projector_type!r}, want linear, mlpNx_gelu or identity")
        if self.mm_projector_type == "identity" and self.mm_hidden_size not in (None, self.hidden_size):
            raise ValueError(
                f"mm_hidden_size: got {self.mm_hidden_size}, want hidden_size ({self.hidden_size}) for an identity"
            )

    @classmethod
    def from_official(cls, config: Mapping) -> SlowFastConfig:
        """Read a released (or a Qwen2) config.json, given as a dict. Keys that do not shape the model are not read.

        Absent or null strides take the official defaults, all 1. ``tokenizer_model_max_length`` is not applied: nothing
        is truncated. ``rope_scaling`` is dropped on the released models, as the released code does.

        Raises:
            ValueError: a setting that this model does not implement (sliding windows, rope scaling, an activation other
                than silu), or a wrong value.
        """
        if config.get("use_sliding_window"):
            raise ValueError("use_sliding_window: got True, want False (the released models do not use it)")
        released = config.get("model_type") == "llava_qwen_slow_fast" or "cross_attn_every_n_layers" in config
        if config.get("rope_scaling") is not None and not released:
            raise ValueError(f"rope_scaling: got {config['rope_scaling']!r}, want null")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act: got {config['hidden_act']!r}, want 'silu'")
        rope_parameters = config.get("rope_parameters") or {}  # where newer transformers write rope_theta
        if rope_parameters.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters: got {rope_parameters!r}, want rope_type 'default'")
        values = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        if "rope_theta" in rope_parameters:
            values.setdefault("rope_theta", rope_parameters["rope_theta"])
        return cls(**values)

    @property
    def hybrid_layers(self) -> tuple[int, ...]:
        """Indices of the layers with cross-attention."""
        if not self.cross_attn_every_n_layers:
            return ()
        stop = self.cross_attn_max_layer_depth
        stop = self.num_hidden_layers if stop is None else min(stop, self.num_hidden_layers)
        return tuple(range(self.cross_attn_min_layer_depth or 0, stop, self.cross_attn_every_n_layers))

    @property
    def projector_depth(self) -> int:
        """N of ``mlpNx_gelu``, 0 for every other projector."""
        match = re.fullmatch(r"mlp(\d+)x_gelu", self.mm_projector_type)
        return int(match.group(1)) if match else 0

    @property
    def gate(self) -> str:
        return "tanh" if "tanh" in self.cross_attn_gating_type else "linear"

    @property
    def has_warm_up(self) -> bool:
        return "warmup" in self.cross_attn_gating_type

    @property
    def updates_every_row(self) -> bool:
        """All-to-media ("vanilla"): visual rows attend the slow tokens too, and the warm-up factor has no tanh."""
        return self.cross_attn_implementation.startswith("vanilla")

    @property
    def masks_system_text(self) -> bool:
        """Text before the first visual token of a sample gets no cross-attention."""
        return "masksystem" in self.cross_attn_implementation
