"""slowfast-kernels: fused kernels for the Slow-Fast architecture of video multi-modal LLMs (arXiv 2504.01328)."""

from ._extension import capabilities as backends
from .ops import (
    Explanation,
    PooledTokens,
    explain,
    gated_residual_mix,
    merge_attention,
    slowfast_cross_attention,
    slowfast_pool,
    text_cross_attention,
    use_backend,
    warmup,
)

__version__ = "0.2.0"

__all__ = [
    "Explanation",
    "PooledTokens",
    "backends",
    "explain",
    "gated_residual_mix",
    "merge_attention",
    "slowfast_cross_attention",
    "slowfast_pool",
    "text_cross_attention",
    "use_backend",
    "warmup",
]
