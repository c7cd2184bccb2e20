"""Floating-point operations of each op from its sizes: the one formula that profilers, benchmarks and reports share.

A multiplication that feeds an addition counts as two. Products and sums over channels are counted; exponentials, gates'
activations and what is done once a row are not, as in PyTorch's own counts. Sizes are numbers, symbolic ones too.
"""

from __future__ import annotations

from .pool_plan import PoolPlan


def even_pairs(num_text: int, num_slow: int, batch: int) -> int:
    """(text row, slow token) pairs of ``batch`` sequences of one length, which is all that totals can tell.

    Exact for one sequence, and for sequences of as many slow tokens each.
    """
    return num_text * num_slow // batch if batch else 0


def attention(pairs: int, num_q_heads: int, head_dim: int) -> int:
    """Q K^T and P V."""
    return 4 * pairs * num_q_heads * head_dim


def attention_backward(pairs: int, num_q_heads: int, head_dim: int) -> int:
    """Five products: the scores again, and the gradients of probabilities, queries, keys and values."""
    return 10 * pairs * num_q_heads * head_dim


def merge(num_text: int, num_q_heads: int, head_dim: int) -> int:
    """Two contexts by their shares."""
    return 3 * num_text * num_q_heads * head_dim


def merge_backward(num_text: int, num_q_heads: int, head_dim: int) -> int:
    """The merged context again; for each side its distance from it, a dot product with the gradient, and a share."""
    return 11 * num_text * num_q_heads * head_dim


def mix(num_text: int, channels: int, weighted: bool) -> int:
    """state + g * context, and where the gate has a weight its dot product with the state."""
    return (4 if weighted else 2) * num_text * channels


def mix_backward(num_text: int, channels: int, weighted: bool) -> int:
    """The gate's gradient (a dot product) and the context's; with a weight the gate again, and the gradients of weight
    and state.
    """
    return (9 if weighted else 3) * num_text * channels


def pool(plan: PoolPlan, channels: int, normed: bool) -> int:
    """Each feature added to its slow token, each slow token of a window to its fast token; a norm is 3 a channel."""
    return (_features(plan) + 3 * normed * plan.num_slow + _averaged(plan)) * channels


def pool_backward(plan: PoolPlan, channels: int, normed: bool) -> int:
    """A product for each feature; an addition and a product for each slow token of a window. Through a norm the slow
    tokens are pooled again, normalised, and their gradients made orthogonal to them.
    """
    count = _features(plan) + 2 * _averaged(plan)
    if normed:
        count += _features(plan) + 8 * plan.num_slow
    return count * channels


def _features(plan: PoolPlan) -> int:
    """Tokens of the vision features that slow tokens are made of: floor pooling drops the rest."""
    return sum(video.num_slow * video.pool_stride**2 for video in plan.videos)


def _averaged(plan: PoolPlan) -> int:
    """Slow tokens that are added up into fast frames, one for each window that it is in."""
    return sum(len(window) * v.slow_grid[0] * v.slow_grid[1] for v in plan.videos for window in v.windows)
