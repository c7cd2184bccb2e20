"""Checks that the model's tensor arguments share. A message names the argument, what came and what is wanted."""

from __future__ import annotations

import operator

import torch


def as_count(name: str, value: object, want: str) -> int:
    """``value`` as an int >= 1: an integer of Python or numpy, or an integer tensor without a dimension.

    Raises:
        TypeError: not an integer, or a bool.
        ValueError: less than 1.
    """
    is_bool = isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool
    try:
        count = None if is_bool or getattr(value, "ndim", 0) else operator.index(value)
    except TypeError:
        count = None
    if count is None:
        raise TypeError(f"{name}: got {type(value).__name__} {value!r}, want {want}")
    if count < 1:
        raise ValueError(f"{name}: got {count}, want {want}")
    return count
