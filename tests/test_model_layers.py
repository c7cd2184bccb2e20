"""The parts of a decoder layer that know nothing of slow tokens keep nothing of a call."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from slowfast_model.layers import RMSNorm, rope_at


@pytest.mark.parametrize("mode", [FakeTensorMode, torch.inference_mode, lambda: torch.device("meta")])
def test_rotary_tables_first_made_in_a_mode_are_made_again_outside_it(mode):
    arguments = (24, 123.0, torch.float32)
    with mode():
        rope_at(torch.arange(5), *arguments)
    for table in rope_at(torch.arange(5), *arguments):
        assert type(table) is torch.Tensor
        assert table.device.type == "cpu"
        assert not table.is_inference()
        assert table.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_are_formed_in_float32_whatever_the_tables_are_in(dtype):
    """A position of 4 digits is no number of half precision: rounded first, it would turn by whole radians more."""
    positions = torch.tensor([0, 257, 4095, 32767])
    exact = rope_at(positions, 24, 1e4, torch.float32)
    for table, wanted in zip(rope_at(positions, 24, 1e4, dtype), exact, strict=True):
        assert torch.equal(table, wanted.to(dtype))


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_the_norm_divides_by_the_root_of_the_mean_square_and_eps(eps):
    x, norm = torch.randn(3, 8, dtype=torch.float64), RMSNorm(8, eps).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
