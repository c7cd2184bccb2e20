"""What a backend does for a call, in numbers: what a prepared call says of itself when it is asked (``sk.explain``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class CallPlan:
    """Of the launches of one call.

    ``tiles``: what work is cut into, by the backend's own names, and with how many warps or threads.
    ``num_splits``: parts of each sequence's slow tokens; None: there is nothing to split.
    ``grid``: CTAs, programs or units of work of the largest launch; None: shapes alone do not fix it.
    ``workspace_bytes``: memory beside arguments and results; None: PyTorch's own ops, or the call's lengths, decide.
    """

    tiles: Mapping[str, int | str | bool] = field(default_factory=dict)
    num_splits: int | None = None
    grid: tuple[int, ...] | None = None
    workspace_bytes: int | None = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "tiles", MappingProxyType(dict(self.tiles)))


def nothing_to_attend() -> CallPlan:
    return CallPlan(notes=("there is no text row or no slow token: no attention is launched",))


def described(describe: Callable[[], CallPlan]) -> Callable[[Callable], Callable]:
    """Decorator of a prepared call: it says what it does by ``describe()``, and costs no more than without."""

    def mark(prepared: Callable) -> Callable:
        prepared.describe = describe
        return prepared

    return mark
