"""What differs between the transformers that this package runs on (4.57 to 5.x): names, asked for once."""

from __future__ import annotations

import inspect

from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

try:
    from transformers import PreTrainedConfig

    OFFLOADS_STATE_DICTS = True  # from_pretrained(state_dict=...) can put some of it on the disk
except ImportError:  # 4.57
    from transformers import PretrainedConfig as PreTrainedConfig

    OFFLOADS_STATE_DICTS = False

__all__ = ["CACHE", "OFFLOADS_STATE_DICTS", "OTHER_CACHE", "PreTrainedConfig"]

# What models call the cache, as an argument and in their outputs; the other name is accepted from users.
CACHE = "cache" if "cache" in inspect.signature(Qwen2ForCausalLM.forward).parameters else "past_key_values"
OTHER_CACHE = "past_key_values" if CACHE == "cache" else "cache"
