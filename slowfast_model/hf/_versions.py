"""What differs between the transformers that this package runs on (4.57 to 5.x): names, asked for once."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

try:
    from transformers import PreTrainedConfig

    OFFLOADS_STATE_DICTS = True  # from_pretrained(state_dict=...) can put some of it on the disk
except ImportError:  # 4.57
    from transformers import PretrainedConfig as PreTrainedConfig

    OFFLOADS_STATE_DICTS = False

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
except ImportError:  # 4.57 writes what a model has

    def get_model_conversion_mapping(model, **_) -> list:
        return []


__all__ = ["CACHE", "OFFLOADS_STATE_DICTS", "OTHER_CACHE", "PreTrainedConfig", "writing_renames"]

# What models call the cache, as an argument and in their outputs; the other name is accepted from users.
CACHE = "cache" if "cache" in inspect.signature(Qwen2ForCausalLM.forward).parameters else "past_key_values"
OTHER_CACHE = "past_key_values" if CACHE == "cache" else "cache"


def writing_renames(model: PreTrainedModel, names: Iterable[str]) -> bool:
    """Whether ``save_pretrained`` of 5.x, which writes the names of a model's first release, takes one of these for it.

    Its patterns may match a part of a name: sarvam_moe's "v_proj" that of "cross_attn_kv_proj", which is then lost.
    """
    conversions = getattr(model, "_weight_conversions", None)  # of what it was loaded from
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    ways = [conversion.reverse_transform() for conversion in conversions]
    return any(way.rename_source_key(name)[1] is not None for way in ways for name in names)
