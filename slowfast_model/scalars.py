"""Options and configuration values as Python's own numbers, so that nothing of the caller's is kept or changed.

numpy's and torch's integers are taken, alone or without a dimension. A bool is no number, a string is nothing but a
string: each would otherwise be computed with, or mean its truth, without a word.
"""

from __future__ import annotations

import math
import operator

import numpy as np

from slowfast_kernels.ops.checks import describe


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def _is_alone(value: object) -> bool:
    return getattr(value, "ndim", 0) == 0


def integer(name: str, value: object, low: int | None = None, want: str | None = None) -> int:
    """``value`` as an int of at least ``low``; ``want`` words what is wanted.

    Raises:
        TypeError: a bool, or what Python does not take for an index: a float, a string, an array, None.
        ValueError: below ``low``.
    """
    want = want or ("an integer" if low is None else f"an integer >= {low}")
    try:
        number = operator.index(value) if _is_alone(value) and not _is_bool(value) else None
    except Exception:  # an object of the caller's may raise anything
        number = None
    if number is None:
        raise TypeError(f"{name}: got {describe(value)}, want {want}")
    if low is not None and number < low:
        got = number if number > -(2**63) else describe(number)  # Python prints no number of thousands of digits
        raise ValueError(f"{name}: got {got}, want {want}")
    return number


def real(name: str, value: object, want: str = "a finite number") -> float:
    """``value`` as a finite float; ``want`` words what is wanted.

    Raises:
        TypeError: a bool, a string, an array, None.
        ValueError: NaN, infinite, or past a float's range.
    """
    try:
        usable = _is_alone(value) and not _is_bool(value) and not isinstance(value, str | bytes | bytearray)
        usable = usable and not np.iscomplexobj(value)  # float() would drop the imaginary part
        number = float(value) if usable else None
    except OverflowError:
        number = math.inf
    except Exception:
        number = None
    if number is None:
        raise TypeError(f"{name}: got {describe(value)}, want {want}")
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {number}, want {want}")
    return number


def flag(name: str, value: object) -> bool:
    """``value`` as a bool: True, False, 1 or 0, of Python, numpy or torch.

    Raises:
        TypeError: anything else, "false" among it, which would be true.
    """
    if _is_bool(value) and _is_alone(value):
        return bool(value)
    try:
        return {0: False, 1: True}[integer(name, value)]
    except (TypeError, KeyError):
        raise TypeError(f"{name}: got {describe(value)}, want True or False") from None
