"""How an error names what came: by type, shape and value, on one line, whatever the object is."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def describe(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{kind_of(x)} on {x.device}"
    if isinstance(x, np.ndarray):
        return f"numpy {x.dtype}{list(x.shape)}"
    try:
        return f"{type(x).__name__} {shortened(repr(x))}"
    except Exception:  # an object without a text is still named by its type
        return type(x).__name__


def kind_of(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def named(value: object) -> str:
    """What came where the name of an option belongs."""
    return shortened(repr(value)) if isinstance(value, str) else describe(value)


def shortened(text: str) -> str:
    text = " ".join(text.split())  # one line
    return text if len(text) <= 80 else text[:77] + "..."
