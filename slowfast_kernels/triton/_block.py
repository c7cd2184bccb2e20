"""One block of a loop over slow tokens: BLOCK_N of them against a tile of packed rows, forward and backward."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(ptrs, rows, cols, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """Rows and columns that are off are never read (a neighbour's rows may hold NaN) and give 0."""
    if MASK_ROWS and MASK_COLS:
        return tl.load(ptrs, mask=rows[:, None] & cols[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=rows[:, None], other=0.0)
    elif MASK_COLS:
        return tl.load(ptrs, mask=cols[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _seen(live, tokens_left, first, begin, end, BLOCK_N: tl.constexpr):
    """[rows, BLOCK_N], or one row for all. The end of the run cuts rows' ends; one comparison tells both sides, as what
    lies before a row's begin is a large number without a sign.
    """
    if begin is None:
        return live[None, :]
    else:
        count = tl.maximum(tl.minimum(end, first + tokens_left) - begin, 0)
        number = tl.arange(0, BLOCK_N)[None, :] + (first - begin)[:, None]
        return number.to(tl.uint32) < count.to(tl.uint32)[:, None]


@triton.jit
def attend_block(
    acc, total, top, q, keys, values, k_tile, v_tile, tokens_left, cols, scale,
    first, begin, end,  # the block's first token and the tokens that each row sees; None: every row sees all
    BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr,
):  # fmt: skip
    """One online-softmax step over BLOCK_N slow tokens; ``scale`` > 0 takes scores to base 2."""
    live = tl.arange(0, BLOCK_N) < tokens_left
    k = load_tile(keys + k_tile, live, cols, MASK_ROWS, MASK_COLS)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASK_ROWS:
        scores = tl.where(_seen(live, tokens_left, first, begin, end, BLOCK_N), scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    if begin is None:
        origin = new_top
    else:  # a row may have seen nothing yet
        origin = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores * scale - origin[:, None])
    shrink = tl.exp2(top - origin)
    total = total * shrink + tl.sum(p, 1)
    v = load_tile(values + v_tile, live, cols, MASK_ROWS, MASK_COLS)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, new_top


@triton.jit
def add_to_dq(dq, delta, lse2, q, grad, k, v, scale, seen):
    """``dq`` with what a block of slow tokens adds to it, before it is scaled; ``scale`` takes scores to base 2.

    ``grad`` is the gradient of the rows' context, ``delta`` what their softmax subtracts, ``lse2`` in base 2.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    grad_p = tl.dot(grad, tl.trans(v), input_precision="ieee")
    grad_scores = tl.exp2(scores * scale - lse2[:, None]) * (grad_p - delta[:, None])
    if seen is not None:
        grad_scores = tl.where(seen, grad_scores, 0.0)
    return tl.dot(grad_scores.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def differentiate_block(
    dq, delta, lse2, q, grad, keys, values, k_tile, v_tile, tokens_left, cols, scale, first, begin, end,
    BLOCK_N: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr,
):  # fmt: skip
    """``add_to_dq`` of BLOCK_N slow tokens; arguments as ``attend_block`` has them."""
    live = tl.arange(0, BLOCK_N) < tokens_left
    k = load_tile(keys + k_tile, live, cols, MASK_ROWS, MASK_COLS)
    v = load_tile(values + v_tile, live, cols, MASK_ROWS, MASK_COLS)
    if MASK_ROWS:
        seen = _seen(live, tokens_left, first, begin, end, BLOCK_N)
        return add_to_dq(dq, delta, lse2, q, grad, k, v, scale, seen)
    else:
        return add_to_dq(dq, delta, lse2, q, grad, k, v, scale, None)
