"""Public ops: one file an op, each with validation, torch.library registration, autograd and dispatch."""

from .attention import text_cross_attention
from .dispatch import use_backend
from .explain import Explanation, explain
from .flop_count import register_formulas
from .fused import slowfast_cross_attention
from .gated_mix import gated_residual_mix
from .merge import merge_attention
from .pool import PooledTokens, slowfast_pool
from .warmup import warmup

register_formulas()

__all__ = [
    "Explanation",
    "PooledTokens",
    "explain",
    "gated_residual_mix",
    "merge_attention",
    "slowfast_cross_attention",
    "slowfast_pool",
    "text_cross_attention",
    "use_backend",
    "warmup",
]
