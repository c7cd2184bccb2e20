"""SlowFastVLConfig: a language model's configuration and, beside it, what the slow-fast path adds to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

from transformers import AutoConfig

from slowfast_kernels.numbers import as_int
from slowfast_kernels.pool_plan import make_pool_plan

from ..config import SlowFastConfig
from ..official_config import RELEASED
from ._versions import PreTrainedConfig

# Fields of SlowFastConfig that say how videos are read; their defaults are there.
SLOW_FAST_KEYS = (
    "mm_projector_type",
    "cross_attn_gating_type",
    "cross_attn_implementation",
    "mm_video_pooling_stride",
    "fast_token_spatial_stride",
    "fast_token_temporal_stride",
    "fast_token_temporal_sampling_stride",
    "min_fast_frames",
    "causal_slow_tokens",
)
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class SlowFastVLConfig(PreTrainedConfig):
    """Configuration of a ``SlowFastVLForConditionalGeneration``.

    Args:
        text_config: the language model's configuration, or its dict with ``model_type``; None: a Qwen2's default.
        mm_hidden_size: width of the vision features.
        hybrid_layers: indices of the decoder layers that attend slow tokens, in any order; kept sorted.
        video_token_id: the id that stands for a fast token in input_ids. None: text alone, until it is set.
        vision_tower: None (features are given), or a dict with ``name``, of ``towers.TOWERS``, and its settings.
        kwargs: fields of ``SlowFastConfig`` (``SLOW_FAST_KEYS``: mm_projector_type, cross_attn_gating_type,
            cross_attn_implementation, mm_video_pooling_stride, fast_token_spatial_stride, fast_token_temporal_stride,
            fast_token_temporal_sampling_stride, min_fast_frames, causal_slow_tokens) with the defaults there, and
            what every configuration of transformers takes.

    Raises:
        ValueError: layers that the language model does not have, or a layer twice; an id outside its vocabulary; layers
            of different sizes; as ``SlowFastConfig``.
        TypeError: values of another type.
    """

    model_type = "slowfast_vl"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        text_config: PreTrainedConfig | Mapping | None = None,
        mm_hidden_size: int | None = None,
        hybrid_layers: Sequence[int] = (),
        video_token_id: int | None = None,
        vision_tower: Mapping | None = None,
        **kwargs,
    ) -> None:
        if text_config is None:
            text_config = AutoConfig.for_model("qwen2")
        elif isinstance(text_config, Mapping):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.mm_hidden_size = mm_hidden_size
        self.hybrid_layers = sorted_layers(hybrid_layers, text_config.num_hidden_layers)
        self.video_token_id = _token(video_token_id, text_config.vocab_size)
        self.vision_tower = None if vision_tower is None else dict(vision_tower)
        for key in SLOW_FAST_KEYS:
            setattr(self, key, kwargs.pop(key, getattr(SlowFastConfig, key)))
        kwargs.setdefault("tie_word_embeddings", getattr(text_config, "tie_word_embeddings", False))
        for key in _SPECIAL_TOKENS:
            kwargs.setdefault(key, getattr(text_config, key, None))
        # The parent's constructor would write None over what the user of a live language model chose.
        kwargs.setdefault("attn_implementation", text_config._attn_implementation)
        experts = kwargs.get("experts_implementation", getattr(text_config, "_experts_implementation", None))
        super().__init__(**kwargs)
        if experts is not None:  # the same, of the experts of 5.x; this model itself has none
            text_config._experts_implementation = experts
        self.slow_fast()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As transformers'; a configuration of another model is refused.

        Raises:
            ValueError: ``config_dict`` says another ``model_type``.
        """
        found = config_dict.get("model_type", cls.model_type)
        if found == RELEASED:
            raise ValueError(
                f"model_type: got {found!r}, a released checkpoint, want the name of its directory on this machine "
                "(huggingface_hub.snapshot_download returns one; AutoConfig reads its configuration)"
            )
        if found != cls.model_type:
            raise ValueError(
                f"model_type: got {found!r}, want {cls.model_type!r}; a language model becomes one by "
                "add_slow_fast(AutoModelForCausalLM.from_pretrained(...), ...)"
            )
        return super().from_dict(config_dict, **kwargs)

    def slow_fast(self) -> SlowFastConfig:
        """The same choices as a ``SlowFastConfig`` of the language model's sizes, which checks them."""
        text = self.text_config
        try:
            heads = text.num_attention_heads
            sizes = {
                "hidden_size": text.hidden_size,
                "num_attention_heads": heads,
                "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
                "head_dim": getattr(text, "head_dim", None),
                "mm_hidden_size": self.mm_hidden_size,
            }
        except RuntimeError as error:  # of a configuration of 5.x that says another value for each layer
            raise ValueError(
                f"text_config: got {type(text).__name__}, whose layers have heads of different sizes, want the same "
                f"sizes in every layer ({error})"
            ) from error
        return SlowFastConfig(**sizes, **{key: getattr(self, key) for key in SLOW_FAST_KEYS})

    def num_fast_tokens(self, num_frames: int, tokens_per_frame: int) -> int:
        """How many ``video_token_id`` ids stand for a video in input_ids.

        Args:
            num_frames: its frames, 1 for an image.
            tokens_per_frame: vision tokens of a frame, a square number H * W.

        Raises:
            ValueError: no frame, tokens that are no square grid, or strides larger than the grid.
            TypeError: a number that is no integer.
        """
        num_frames, tokens = as_int("num_frames", num_frames, 1), as_int("tokens_per_frame", tokens_per_frame, 1)
        side = isqrt(tokens)
        if side * side != tokens:
            raise ValueError(f"tokens_per_frame: got {tokens}, want a square number (H * W, H = W)")
        strides = (
            self.mm_video_pooling_stride,
            self.fast_token_temporal_sampling_stride,
            self.fast_token_temporal_stride,
            self.fast_token_spatial_stride,
            self.min_fast_frames,
        )
        return make_pool_plan((num_frames,), (side, side), *strides).videos[0].num_fast


def sorted_layers(hybrid_layers: Sequence[int], num_layers: int) -> list[int]:
    """Indices of ``num_layers`` layers, each once, in order.

    Raises:
        ValueError, TypeError: what is none, as ``SlowFastVLConfig`` says.
    """
    if isinstance(hybrid_layers, str | bytes | int) or not isinstance(hybrid_layers, Sequence):
        raise TypeError(f"hybrid_layers: got {hybrid_layers!r}, want a sequence of layer indices")
    layers = [as_int("hybrid_layers", layer) for layer in hybrid_layers]
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ValueError(f"hybrid_layers: got {layer}, want 0..{num_layers - 1} (of the language model's layers)")
        if layers.count(layer) > 1:
            raise ValueError(f"hybrid_layers: got {layer} {layers.count(layer)} times, want each layer once")
    return sorted(layers)


def _token(video_token_id: int | None, vocab_size: int) -> int | None:
    if video_token_id is None:
        return None
    token = as_int("video_token_id", video_token_id)
    if not 0 <= token < vocab_size:
        raise ValueError(f"video_token_id: got {token}, want 0..{vocab_size - 1} (an id of the vocabulary) or None")
    return token
