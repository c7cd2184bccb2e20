"""Configuration: the keys of the released config.json, checked once, with the rules that follow from them.

A plain Qwen2 config.json is accepted too: without ``cross_attn_every_n_layers`` there are no hybrid layers, without
``mm_hidden_size`` no projector. ``official_config`` reads and writes the file's keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from slowfast_kernels.numbers import as_bool, as_float, as_int

from .official_config import SIZES, read_official, write_official


class Gating(NamedTuple):
    """What a gating type says of the gate."""

    gate: str  # of ``slowfast_kernels.gate.WEIGHTED_GATES``
    has_warm_up: bool


class Implementation(NamedTuple):
    """What an implementation says of the rows that cross-attention updates; "flashattn" changes no result."""

    every_row: bool
    masks_system: bool


GATING_TYPES = {
    "whole-dynamic": Gating("linear", False),
    "whole-dynamic-tanh": Gating("tanh", False),
    "whole-dynamic-warmup": Gating("linear", True),
    "whole-dynamic-tanh-warmup": Gating("tanh", True),
}
IMPLEMENTATIONS = {
    "text-only-vanilla": Implementation(False, False),
    "text-only-vanilla-flashattn": Implementation(False, False),
    "text-only-vanilla-masksystem": Implementation(False, True),
    "text-only-vanilla-masksystem-flashattn": Implementation(False, True),
    "text-only-vanilla-flashattn-masksystem": Implementation(False, True),
    "vanilla": Implementation(True, False),
    "vanilla-flashattn": Implementation(True, False),
}


COUNTS = (
    *SIZES,
    "num_key_value_heads",
    "head_dim",
    "mm_hidden_size",
    "mm_video_pooling_stride",
    "fast_token_spatial_stride",
    "fast_token_temporal_stride",
    "fast_token_temporal_sampling_stride",
    "min_fast_frames",
)
LAYERS = ("cross_attn_every_n_layers", "cross_attn_min_layer_depth", "cross_attn_max_layer_depth")
MAY_BE_NONE = ("mm_hidden_size", "cross_attn_min_layer_depth", "cross_attn_max_layer_depth")


@dataclass
class SlowFastConfig:
    """Shapes and variants of the model; every field has the name of its official key (``head_dim``: of Qwen2's).

    >>> config.hybrid_layers, config.head_dim, config.gate
    ((0, 2), 8, 'tanh')

    ``cross_attn_gating_type`` and ``cross_attn_implementation`` are of ``GATING_TYPES`` and ``IMPLEMENTATIONS``;
    README's table of variants has their formulas. Numbers may be Python's, numpy's or a tensor's without a dimension;
    the fields hold Python's own.

    ``causal_slow_tokens``, a key of this package: a row attends the slow tokens of the videos before it alone, and a
    video's last fast token its own too, where visual rows attend; so the logits of a prompt do not depend on what
    follows it. False: those of all videos of its sample, as released.

    Raises:
        TypeError: a value of another type: nothing is rounded, and a string or a bool is no number.
        ValueError: a gating type, implementation or projector that does not exist, a number out of range, or numbers
            that do not fit together.
    """

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4  # None: num_attention_heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
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
    # of this package, not of the release: text does not see the slow tokens of videos after it
    causal_slow_tokens: bool = False

    def __post_init__(self) -> None:
        self._take_plain_values()
        if self.head_dim % 2:
            raise ValueError(f"head_dim: got {self.head_dim}, want an even number (rotary embedding)")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: got {self.num_attention_heads}, want a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        self._check_layers()
        for name, known in (("cross_attn_gating_type", GATING_TYPES), ("cross_attn_implementation", IMPLEMENTATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, want one of {', '.join(known)}")
        if self.mm_projector_type not in ("linear", "identity") and not self.projector_depth:
            raise ValueError(f"mm_projector_type: got {self.mm_projector_type!r}, want linear, mlpNx_gelu or identity")
        if self.mm_projector_type == "identity" and self.mm_hidden_size not in (None, self.hidden_size):
            raise ValueError(
                f"mm_hidden_size: got {self.mm_hidden_size}, want hidden_size ({self.hidden_size}) for an identity"
            )

    def _take_plain_values(self) -> None:
        """Every field becomes a str, bool, float, int or None of Python's, within its own range."""
        for name in ("cross_attn_gating_type", "cross_attn_implementation", "mm_projector_type"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, want a string")
        for name in ("tie_word_embeddings", "causal_slow_tokens"):
            setattr(self, name, as_bool(name, getattr(self, name)))
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = as_float(name, getattr(self, name))
            if value < 0 or (value == 0 and name == "rope_theta"):
                raise ValueError(f"{name}: got {value}, want a number {'>' if name == 'rope_theta' else '>='} 0")
            setattr(self, name, value)
        for name in SIZES:
            setattr(self, name, as_int(name, getattr(self, name), 1))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size: got {self.hidden_size}, want a multiple of num_attention_heads "
                    f"({self.num_attention_heads}), or head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        for names, low in ((COUNTS, 1), (LAYERS, 0)):
            for name in names:
                if getattr(self, name) is not None or name not in MAY_BE_NONE:
                    setattr(self, name, as_int(name, getattr(self, name), low))

    def _check_layers(self) -> None:
        if not self.cross_attn_every_n_layers:
            return
        first, stop = self.cross_attn_min_layer_depth or 0, self.cross_attn_max_layer_depth
        if first >= self.num_hidden_layers:
            raise ValueError(
                f"cross_attn_min_layer_depth: got {first}, want less than num_hidden_layers ({self.num_hidden_layers})"
            )
        if stop is not None and stop < first:
            raise ValueError(
                f"cross_attn_max_layer_depth: got {stop}, want at least cross_attn_min_layer_depth ({first})"
            )

    @classmethod
    def from_official(cls, config: Mapping) -> SlowFastConfig:
        """Read a released (or a Qwen2) config.json, given as a dict, which is not changed.

        Absent or null strides take the official defaults, all 1; a null ``num_key_value_heads`` is num_attention_heads.
        ``rope_theta`` is looked for as transformers does: in ``rope_scaling`` or else ``rope_parameters``, then at top
        level; where there is none it is 1e4. ``rope_scaling`` is dropped on the released models, as the released code
        does, with a warning. ``tokenizer_model_max_length`` is not applied: nothing is truncated.

        Keys that do not shape the computation are not read. A key that does, and whose value this model does not
        implement, is refused: another family's ``model_type``, rope other than the default, sliding windows, dropout,
        biases, another activation, quantisation.

        >>> qwen2 = {"model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}
        >>> SlowFastConfig.from_official(qwen2 | {"cross_attn_every_n_layers": 8}).hybrid_layers
        (0, 8, 16, 24)

        Raises:
            TypeError: ``config`` is no mapping, or a value has another type.
            ValueError: a setting that this model does not implement, or a wrong value, by its key.
        """
        return cls(**read_official(config, cls))

    def to_official(self) -> dict:
        """The config.json that ``from_official`` reads back as this configuration.

        With hybrid layers it is that of the released models, without them a Qwen2's, which transformers reads too.
        ``causal_slow_tokens``, which the release does not know, is written where it is True.

        >>> SlowFastConfig.from_official(config.to_official()) == config
        True
        """
        return write_official(self)

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
        """``gate=`` of the ops."""
        return GATING_TYPES[self.cross_attn_gating_type].gate

    @property
    def has_warm_up(self) -> bool:
        """Hybrid layers have a ``cross_attn_warm_up_gate``, whose factor (1 without) the gate is multiplied by."""
        return GATING_TYPES[self.cross_attn_gating_type].has_warm_up

    @property
    def updates_every_row(self) -> bool:
        """All-to-media ("vanilla"): visual rows attend the slow tokens too, and the warm-up factor has no tanh."""
        return IMPLEMENTATIONS[self.cross_attn_implementation].every_row

    @property
    def masks_system_text(self) -> bool:
        """Text before the first visual token of a sample gets no cross-attention."""
        return IMPLEMENTATIONS[self.cross_attn_implementation].masks_system
