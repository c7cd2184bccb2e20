"""How the released code samples frames and generates, by name: its demonstration, and its evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Preset:
    """What a call of the processor and one of ``generate`` take.

    >>> preset = PRESETS["evaluation"]
    >>> prompt = processor.apply_chat_template(messages, tokenize=True, **preset.frames, ...)
    >>> ids = model.generate(**prompt, **preset.generate)
    """

    frames: Mapping[str, Any]  # of the processor (and ``load_video``); ``num_frames`` stays the processor's
    generate: Mapping[str, Any]  # of ``generate``; the rest stays what the checkpoint's generation_config says


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        # simple_inference_demo.py: frames by linspace over the clip
        "demo": Preset(
            frames=MappingProxyType({"fps": None}),
            generate=MappingProxyType(
                {
                    "do_sample": True,
                    "temperature": 0.2,
                    "top_p": 1.0,
                    "repetition_penalty": 1.2,
                    "max_new_tokens": 1024,
                }
            ),
        ),
        # lmms_eval's slowfast_videomllm: 2 frames a second and, where these are too many, num_frames of them
        "evaluation": Preset(
            frames=MappingProxyType({"fps": 2}),
            generate=MappingProxyType({"do_sample": False, "num_beams": 1, "max_new_tokens": 256}),
        ),
    }
)
