"""Triton's kernels that are no ops, in a model: counted, or done without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import pytest

from slowfast_model import model

FUSED = ("rotate", "add_rms_norm", "silu_mul", "scale_columns")  # entry points of ``elementwise``


def answered(monkeypatch: pytest.MonkeyPatch, module: ModuleType, names: Sequence[str]) -> list[str]:
    """Names of the module's entry points, as they are called and answer."""
    calls = []
    for name in names:
        entry = getattr(module, name)

        def counted(*arguments, entry=entry, name=name, **options):
            made = entry(*arguments, **options)
            if made is not None:
                calls.append(name)
            return made

        monkeypatch.setattr(module, name, counted)
    return calls


@contextmanager
def unfused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models leave what stands between their products to PyTorch's ops."""
    with monkeypatch.context() as patch:
        patch.setattr(model, "fuses", lambda *_: False)
        yield
