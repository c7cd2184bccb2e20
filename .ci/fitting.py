"""Prints pip constraints: the triton and the numpy that fit the torch of this Python. The Makefile installs by them.

torch's CUDA builds name their triton. Its CPU builds name none, although torch.compile knows the triton of its time
only: they get the one that they were tested with.
"""

from __future__ import annotations

import re
from importlib.metadata import requires, version

TRITON_OF_TORCH = {
    (2, 6): "3.2.0",
    (2, 7): "3.3.1",
    (2, 8): "3.4.0",
    (2, 9): "3.5.1",
    (2, 10): "3.6.0",
    (2, 11): "3.6.0",
    (2, 12): "3.7.0",
    (2, 13): "3.9.0",
    (2, 14): "3.8.0",
}


def constraints(torch: str, requirements: list[str]) -> list[str]:
    """What fits torch of this version with these requirements; nothing for one that is not known."""
    named = re.search(r"^triton==([\d.]+)", "\n".join(requirements), re.MULTILINE)
    triton = named[1] if named else TRITON_OF_TORCH.get(_release(torch))
    if triton is None:
        return []
    interpreter_knows_numpy = _release(triton) >= (3, 7)
    return [f"triton=={triton}", *([] if interpreter_knows_numpy else ["numpy<2.4"])]


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


if __name__ == "__main__":
    print("\n".join(constraints(version("torch"), requires("torch") or [])))
