"""slow-fast video tokens under language models of transformers (4.57 and newer; the extra ``hf``).

Importing this package makes its model known to transformers' Auto classes.
"""

try:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
except ImportError as error:
    raise ImportError(
        f"slowfast_model.hf needs transformers 4.57 or newer: pip install 'slowfast-kernels[hf]' ({error})"
    ) from error

from .add import add_slow_fast
from .chat import Answer, VideoChat
from .config import SlowFastVLConfig
from .mllama import accelerate_cross_attention
from .modeling import SlowFastVLForConditionalGeneration
from .presets import PRESETS, Preset
from .processing import SlowFastVLProcessor
from .released import ReleasedConfig

AutoConfig.register(SlowFastVLConfig.model_type, SlowFastVLConfig)
AutoConfig.register(ReleasedConfig.model_type, ReleasedConfig)
AutoModelForImageTextToText.register(SlowFastVLConfig, SlowFastVLForConditionalGeneration)
AutoProcessor.register(SlowFastVLConfig, SlowFastVLProcessor)

__all__ = [
    "PRESETS",
    "Answer",
    "Preset",
    "SlowFastVLConfig",
    "SlowFastVLForConditionalGeneration",
    "SlowFastVLProcessor",
    "VideoChat",
    "accelerate_cross_attention",
    "add_slow_fast",
]
