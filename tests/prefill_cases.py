"""Videos, orders and the bound that the tests of prefills share."""

from __future__ import annotations

import pytest
import torch
from model_cases import MODEL_TARGETS

from slowfast_model.prefill import use_order
from slowfast_model.vision import project_and_pool

every_target = pytest.mark.parametrize("target", MODEL_TARGETS)
either_order = pytest.mark.parametrize("first", [False, True], ids=["project_first", "pool_first"])
MIXED = ((5, 4), (4, 6), (1, 3), (7, 4), (1, 4))  # (frames, side): two grids of videos, images on these and another


def tokens(model, videos, norm_eps=1e-6, **order):
    with use_order(**order):
        return project_and_pool(model.model.mm_projector, videos, model.config, norm_eps, model.backend)


def assert_as_exact(found, other, exact, dtype: torch.dtype) -> None:
    """Slow and fast tokens whose errors against float64, as norms, are at most 2 times those of another way."""
    for got, plain, wanted in zip(found[:2], other[:2], exact[:2], strict=True):
        errors = [(x.double() - wanted).norm() for x in (got, plain)]
        assert got.dtype == dtype
        assert errors[0] <= 2 * errors[1]
