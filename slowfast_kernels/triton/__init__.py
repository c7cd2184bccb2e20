"""The Triton backend: portable forward kernels for any GPU that Triton supports (signatures: ``eager``).

Configurations are fixed by ``heuristics``, so nothing is tuned at run time and a shape class compiles once.
"""

from .attention import slowfast_cross_attention, text_cross_attention
from .gated_mix import gated_residual_mix
from .pool import pool

__all__ = ["gated_residual_mix", "pool", "slowfast_cross_attention", "text_cross_attention"]
