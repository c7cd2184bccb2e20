"""Options and configuration values as Python's own numbers, so that nothing of the caller's is kept or changed.

What counts as a number is decided here, for ops and model alike: Python's, numpy's and torch's, alone or in an array
without a dimension. A bool is no number, a string is nothing but a string, and a flag is True, False, 1 or 0: anything
else would be computed with, or mean its truth, without a word.
"""

from __future__ import annotations

import math
import operator

import numpy as np

from .messages import describe


class NotAFlag(TypeError):
    """An integer other than 0 and 1 where True or False belongs."""


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def _is_alone(value: object) -> bool:
    return getattr(value, "ndim", 0) == 0


def as_int(name: str, value: object, low: int | None = None, want: str | None = None) -> int:
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


def as_float(name: str, value: object, want: str = "a finite number") -> float:
    """``value`` as a finite float; ``want`` words what is wanted.

    Raises:
        TypeError: a bool, a string, an array, None.
        ValueError: NaN, infinite, or past a float's range.
    """
    if type(value) is float and -math.inf < value < math.inf:  # at every call of an op
        return value
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


def as_bool(name: str, value: object) -> bool:
    """``value`` as a bool: True, False, 1 or 0, of Python, numpy or torch.

    Raises:
        TypeError: anything else, "false" among it, which would be true; ``NotAFlag`` for another integer.
    """
    if isinstance(value, bool) or (_is_bool(value) and _is_alone(value)):
        return bool(value)
    try:
        number = as_int(name, value)
    except TypeError:
        raise TypeError(f"{name}: got {describe(value)}, want True or False (or an integer, 1 or 0)") from None
    if number not in (0, 1):
        raise NotAFlag(f"{name}: got {describe(value)}, want True or False")
    return number == 1
