"""The parts of a decoder layer that know nothing of slow tokens keep nothing of a call."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from slowfast_model.layers import rope_at


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
