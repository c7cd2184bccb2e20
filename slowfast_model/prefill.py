"""Where a prefill can do the same work in other orders: the rule that chooses, and how to force one, to measure it.

A choice is a rule over shapes alone, so that it is the same for every call alike, in training and in inference; runs of
frames are inference's, as autograd keeps what they would let go.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from slowfast_kernels.numbers import as_int

# FLOP of a GEMM in the time in which a byte is copied: some 700 TFLOP/s and 2.5 TB/s on an H100, 100 GFLOP/s and
# 10 GB/s on two cores. More than there are only keeps the order that moves fewer bytes.
FLOP_A_BYTE = {"cpu": 10, "cuda": 300}
# Slow tokens below which the product of one layer's K and V (1024 columns of the 7B model, in tiles of 128 x 256)
# leaves some of an H100's 132 SMs without a tile.
FILLS_A_GPU = 4224
# Of the projector's hidden layer, before and after an activation, at a time. 2^29 are 146 frames of 256 tokens of the
# 7B model: products as large fill an H100 many times over, so that longer ones have nothing to save.
WORKING_BYTES = {"cpu": 2**26, "cuda": 2**29}


class Order(NamedTuple):
    """None: by the rule; else forced."""

    pool_first: bool | None = None
    one_kv_product: bool | None = None
    working_bytes: int | None = None


BY_RULE = Order()
_forced: ContextVar[Order] = ContextVar("prefill_order", default=BY_RULE)


@contextmanager
def use_order(
    *, pool_first: bool | None = None, one_kv_product: bool | None = None, working_bytes: int | None = None
) -> Iterator[None]:
    """Run the prefills of the block in an order that is asked for, where it is possible at all; None: by the rule.

    Args:
        pool_first: spatial pooling before the projector's last linear layer, which then runs on the slow tokens.
        one_kv_product: keys and values of all hybrid layers as one product. The layers' caches are then views of one
            tensor, [Ns, layers, Hkv, 2, D].
        working_bytes: those of the projector's hidden layer, before and after an activation, that are there at a time.
            Videos with more are projected and pooled in runs of frames, three frames at least.

    What torch.compile has compiled stays in the order that the rule chose.

    Raises:
        TypeError, ValueError: ``working_bytes`` that is no integer, or negative.
    """
    if working_bytes is not None:
        working_bytes = as_int("working_bytes", working_bytes, 0, "a number of bytes >= 0")
    token = _forced.set(Order(pool_first, one_kv_product, working_bytes))
    try:
        yield
    finally:
        _forced.reset(token)


def _asked() -> Order:
    return BY_RULE if torch.compiler.is_compiling() else _forced.get()


def pools_first(before: int, after: int, pool_stride: int, x: Tensor) -> bool:
    """Whether frames are pooled before a linear layer of ``before`` to ``after`` channels, which then has less to do.

    It saves the products of all but one token in ``pool_stride`` ^ 2, and writes the pooled tokens and reads the
    layer's once more. ``x``: features of the type and on the device that it is about.
    """
    asked = _asked().pool_first
    if asked is not None:
        return asked
    saved = (pool_stride**2 - 1) * 2 * before * after
    moved = (before + after) * x.element_size()
    return saved > moved * FLOP_A_BYTE.get(x.device.type, FLOP_A_BYTE["cuda"])


def projects_at_once(tokens: Tensor, num_layers: int) -> bool:
    """Whether K and V of slow tokens [Ns, C] are one product for all hybrid layers.

    So they are where one layer's leaves a part of a GPU idle. Where it does not, as many layers' have nothing to save,
    and each layer's cache stays in a tensor of its own, which decode reads from end to end. A compiled model has a
    product a layer, as it would otherwise be compiled anew beyond that length.
    """
    if num_layers < 2 or torch.compiler.is_compiling():
        return False
    asked = _asked().one_kv_product
    if asked is not None:
        return asked
    return tokens.device.type == "cuda" and tokens.shape[0] < FILLS_A_GPU


def rows_at_once(width: int, x: Tensor) -> int | None:
    """Feature tokens that are projected at a time, by a projector of ``width`` channels; None: all of them.

    All of them too where autograd would keep the hidden layers of every run, and in a compiled model, which would have
    a run's code as often as there are runs.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    working = _asked().working_bytes
    if working is None:
        working = WORKING_BYTES.get(x.device.type, WORKING_BYTES["cuda"])
    return working // (2 * width * x.element_size())
