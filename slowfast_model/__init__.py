"""The reference model of slowfast-kernels: a plain PyTorch Qwen2 decoder with slow-fast hybrid layers.

The examples of this package's docstrings go on from here:

>>> import torch
>>> from slowfast_model import IMAGE_TOKEN_INDEX, SlowFastConfig, SlowFastForCausalLM
>>> sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
>>> heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "cross_attn_every_n_layers": 2}
>>> video = {"mm_hidden_size": 12, "mm_video_pooling_stride": 2, "fast_token_temporal_stride": 4}
>>> config = SlowFastConfig(**sizes, **heads, **video)
>>> model = SlowFastForCausalLM(config).eval()
>>> features = torch.randn(8, 16, 12)  # of a video: 8 frames of 4 x 4 vision tokens
>>> input_ids = torch.tensor([[1, 2, IMAGE_TOKEN_INDEX, 3, 4]])  # -200 stands for it
"""

from .config import SlowFastConfig
from .model import SlowFastForCausalLM, SlowFastOutput
from .session import DecodeSession
from .tokens import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from .video import load_video
from .vision import PatchTower, encode_frames

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_TOKEN_INDEX",
    "DecodeSession",
    "PatchTower",
    "SlowFastConfig",
    "SlowFastForCausalLM",
    "SlowFastOutput",
    "encode_frames",
    "load_video",
]
