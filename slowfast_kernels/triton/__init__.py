"""The Triton backend: portable kernels for any GPU that Triton supports.

Configurations are fixed by ``heuristics``, so nothing is tuned at run time and a shape class compiles once.
"""

from .attention import prepare_cross_attention, prepare_text_cross_attention
from .attention_backward import prepare_text_cross_attention_backward
from .gated_mix import prepare_gated_residual_mix
from .gated_mix_backward import prepare_gated_residual_mix_backward
from .merge import prepare_merge_attention
from .pool import pool, pool_plan_of
from .pool_backward import prepare_pool_backward

__all__ = [
    "pool",
    "pool_plan_of",
    "prepare_cross_attention",
    "prepare_gated_residual_mix",
    "prepare_gated_residual_mix_backward",
    "prepare_merge_attention",
    "prepare_pool_backward",
    "prepare_text_cross_attention",
    "prepare_text_cross_attention_backward",
]
