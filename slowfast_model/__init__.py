"""The reference model of slowfast-kernels: a plain PyTorch Qwen2 decoder with slow-fast hybrid layers."""

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
